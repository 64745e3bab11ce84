"""`vnet models`, the forms of its flows, and the page of a model."""

import getpass
import re
from argparse import ArgumentParser
from typing import Any

import pytest
import safetensors.torch

from flows.commands.command import Result
from flows.commands.models import MODELS
from flows.commands.retraining import RETRAIN
from flows.models import Person, Promotion, model_page, promote_model, rollback_model, withdraw_challenger
from flows.retraining import Retraining, retrain_model
from tests.files import file_of
from tests.workers.known_model import known_network, known_plan
from vnet_core.errors import ConfigError, StorageError
from workers.registry.aliases import aliases, history, promote
from workers.registry.models import Target, publish
from workers.storage.store import Root

PLAN = known_plan((1.0, 1.0, 1.0))
FACTS: dict[str, Any] = {
    "metrics": {"validation_dice": {"grey": 0.5, "white": 0.7}, "structures": ["grey", "white"], "case_dice": {}},
    "training": {"steps": 9},
}
CURVE = b"\x89PNG"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Root:
    root = Root(tmp_path / "root")
    monkeypatch.setenv("VNET_ROOT", str(root.home))
    monkeypatch.delenv("VNET_SITE", raising=False)
    weights = safetensors.torch.save(known_network(PLAN).state_dict())
    for version in ("v1", "v2"):
        publish(root, Target("brain", version, PLAN), [weights], FACTS, {"loss.png": CURVE})
    return root


def models(*arguments: str) -> Result:
    parser = ArgumentParser()
    MODELS.arguments(parser)
    return MODELS.run(parser.parse_args(arguments))


def code_of(*arguments: str) -> str:
    with pytest.raises((ConfigError, StorageError)) as caught:
        models(*arguments)
    return str(caught.value.code)


# --- the command


def test_the_list_shows_which_version_is_used(root):
    models("promote", "brain@v1", "--by", "Ada")
    models("challenge", "brain@v2", "--by", "Ada")
    rows = models("list").extra["models"]
    assert [(row["model"], row["alias"], row["note"]) for row in rows] == [
        ("brain@v1", "champion", ""),
        ("brain@v2", "challenger", ""),
    ]
    assert (rows[0]["labels"], rows[0]["networks"], rows[0]["steps"]) == ("grey white", 1, 9)
    assert rows[0]["validation_dice"] == pytest.approx(0.6)
    assert models("list", "brain").extra["models"] == rows
    assert models("list", "nothing").text == "no models"


def test_the_list_tells_what_is_damaged_and_what_is_gone(root):
    models("promote", "brain@v1", "--by", "Ada")
    file_of(root, "models/brain/v2/weights.safetensors").write_bytes(b"")
    root.delete("models/brain/v1")
    rows = models("list").extra["models"]
    assert [(row["model"], row["alias"], row["note"]) for row in rows] == [
        ("brain@v2", "", "model.damaged"),
        ("brain@v1", "champion", "not there"),
    ]
    assert "model.damaged" in models("list").text


def test_promote_and_roll_back(root):
    models("promote", "brain@v1", "--by", "Ada", "--why", "first")
    done = models("promote", "brain@latest", "--why", "better")
    assert done.extra == {"model": "brain", "aliases": {"champion": "v2"}}
    assert done.text == "brain@v2 is the champion, before: v1"
    last = history(root, "brain")[-1]
    assert (last.by, last.why) == (getpass.getuser(), "better")
    assert models("rollback", "brain", "--by", "Ada").text == "brain@v1 is the champion again"
    told = models("history", "brain")
    assert [change["action"] for change in told.extra["changes"]] == ["promote", "promote", "rollback"]
    assert told.text.splitlines()[1].split()[1:] == ["promote", "v1", "v2", "Ada", "first"]


def test_a_challenger_comes_and_goes(root):
    models("promote", "brain@v1", "--by", "Ada")
    assert models("challenge", "brain@v2", "--by", "Ada").extra["aliases"] == {"champion": "v1", "challenger": "v2"}
    assert models("withdraw", "brain", "--by", "Ada").text == "brain@v2 is no longer the challenger"


def test_the_card_is_printed(root):
    done = models("card", "brain@v2")
    assert done.text.startswith("# Model card: brain@v2\n")
    assert done.extra["card"] == root.get("models/brain/v2/card.md").decode()


def test_what_cannot_be_done_is_told(root):
    assert code_of("promote", "brain", "--by", "Ada") == "model.name"
    assert code_of("promote", "--by", "Ada") == "model.name"
    assert code_of("promote", "brain@v2", "--by", "") == "model.who"
    assert code_of("promote", "brain@v9", "--by", "Ada") == "model.version"
    assert code_of("rollback", "brain", "--by", "Ada") == "model.rollback"
    assert code_of("withdraw", "brain", "--by", "Ada") == "model.alias"
    assert code_of("history", "other") == "model.unknown"
    assert code_of("card", "brain@champion") == "model.alias"
    assert aliases(root, "brain") == {}


# --- forms


@pytest.mark.parametrize("form", [Promotion, Person, Retraining])
def test_every_field_of_a_form_has_a_title_and_a_description(form):
    for name, field in form.model_json_schema()["properties"].items():
        assert field.get("title"), name
        assert field.get("description"), name
        # a field that may be null is shown as a choice between types
        assert "anyOf" not in field, name


@pytest.mark.parametrize("flow", [promote_model, rollback_model, withdraw_challenger, retrain_model])
def test_flows_have_a_name_a_description_and_one_form(flow):
    assert re.fullmatch(r"[a-z]+-[a-z]+", flow.name)
    assert flow.description
    (parameter,) = flow.parameters.properties.values()
    assert parameter["description"]


def test_the_command_and_the_form_of_retraining_have_the_same_bounds():
    parser = ArgumentParser()
    RETRAIN.arguments(parser)
    for value in (["--steps", "-1"], ["--minutes", "0"]):
        with pytest.raises(ConfigError) as caught:
            RETRAIN.run(parser.parse_args(["brain", "--cohort", "c", "--by", "Ada", *value]))
        assert caught.value.code == "train.value"


# --- the page


def test_the_page_of_a_model_has_cards_curves_and_changes(root):
    page = model_page(root, "brain")
    assert "No champion: the newest version is used" in page
    assert "# Model card: brain@v2" in page
    promote(root, "brain", "v1", "Ada <b>", "| evil |")
    page = model_page(root, "brain")
    assert "**champion `v1`**" in page
    # the newest version is shown too, after the one that is used
    assert re.findall("^# Model card: (.+)$", page, re.M) == ["brain@v1", "brain@v2"]
    assert "data:image/png;base64," in page
    assert "Ada &lt;b&gt; | \\| evil \\| |" in page


def test_the_page_tells_a_champion_that_cannot_be_used(root):
    promote(root, "brain", "v1", "Ada", "")
    file_of(root, "models/brain/v1/weights.safetensors").write_bytes(b"")
    assert "`brain@champion`" not in model_page(root, "brain")
    assert "**`brain@v1` cannot be used.** weights.safetensors of model brain@v1" in model_page(root, "brain")
