"""Model cards: what a group reads before it uses a model."""

import copy
import re
from typing import Any

import pytest
import safetensors.torch

from tests.workers.known_model import known_network, known_plan
from vnet_core.plan import Label
from workers.registry.cards import model_card
from workers.registry.models import Target, card_of, load_model, publish
from workers.storage.store import Root

PLAN = known_plan((3.0, 1.0, 1.0))
WEIGHTS = safetensors.torch.save(known_network(PLAN).state_dict())
TRAINING: dict[str, Any] = {
    "folds": 1,
    "steps": 250,
    "minutes": 3.14,
    "workers": 2,
    "precision": "float32",
    "parameters": 12345,
    "torch": "2.13.0",
    "platform": "Linux x86_64",
    "started_from": None,
    "training_cases": ["a", "b", "c"],
    "validation_cases": ["secret-1", "secret-2"],
    "volumes": ["volumes/one", "volumes/two"],
}
METRICS = {"structures": ["grey", "white"], "case_dice": {"secret-1": [0.8, None], "secret-2": [0.9, 0.5]}}
FACTS = {"metrics": METRICS, "training": TRAINING}


@pytest.fixture
def root(tmp_path) -> Root:
    root = Root(tmp_path)
    for name, case, label in (("one", "b" * 64, "c" * 64), ("two", "a" * 64, "d" * 64)):
        root.put(f"volumes/{name}/x", b"")
        root.seal(f"volumes/{name}", {"case_digest": case, "label_digest": label})
    return root


def published(root: Root, version: str = "v1", **changes: Any):
    facts = copy.deepcopy(FACTS) | changes
    return publish(root, Target("brain", version, PLAN), [WEIGHTS], facts, {})


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_bundle_has_its_card_sealed(root):
    model = published(root)
    assert "card.md" in root.receipt(model.prefix)["files"]
    card = card_of(root, model)
    assert card == root.get("models/brain/v1/card.md").decode()
    assert card.startswith("# Model card: brain@v1\n")
    assert re.findall(r"^## (.+)$", card, re.M) == [
        "Intended use", "Data", "Method", "Figures", "Limits", "Provenance",
    ]  # fmt: skip
    assert "not a medical device" in card
    assert "Not for diagnosis" in section(card, "Intended use")


def test_a_model_from_before_there_were_cards_has_one_all_the_same(root):
    model = published(root)
    root.delete("models/brain/v1/card.md")
    assert card_of(root, model) == model_card(model.facts)


def test_figures_by_pencil(root):
    figures = section(card_of(root, published(root)), "Figures")
    lines = [[cell.strip() for cell in line.split("|")] for line in figures.splitlines() if "|" in line]
    rows = {line[1]: line[2:-1] for line in lines}
    cases, mean, interval, median, lowest = rows["grey"]
    assert (cases, mean, median, lowest) == ("2", "0.850", "0.850", "0.800")
    low, high = map(float, interval.split(" to "))
    assert 0.8 <= low < 0.85 < high <= 0.9
    # one case has no spread
    assert rows["white"] == ["1", "0.500", "", "0.500", "0.500"]


def test_cases_are_counted_and_never_named(root):
    card = card_of(root, published(root))
    assert "3 labelled cases to learn from, 2 others" in card
    assert "secret" not in card
    assert "rest on 2 cases" in section(card, "Limits")


def test_limits_follow_from_what_the_model_is(root):
    plain = section(card_of(root, published(root)), "Limits")
    assert "started from" not in plain
    # 3 mm slices of 1 mm pixels are not above the ratio
    assert "coarse along one axis" not in plain
    tuned = published(root, "v2", training=TRAINING | {"started_from": "brain@v1"})
    assert "started from brain@v1, which may have learnt from cases that are judged" in section(
        card_of(root, tuned), "Limits"
    )
    without = published(root, "v3", metrics={"structures": ["grey", "white"], "case_dice": {}})
    assert "None: no case was kept apart" in section(card_of(root, without), "Figures")
    facts = tuned.facts | {"plan": known_plan((5.0, 1.0, 1.0)).model_dump(mode="json")}
    assert "coarse along one axis" in model_card(facts)


def test_a_cross_validation_and_its_cleaning_in_words(root):
    plan = known_plan((1.0, 1.0, 1.0), cleaning=[{"label": 7, "keep": "largest", "minimum_ml": 0.5, "holes": "fill"}])
    plan = plan.model_copy(update={"inference": plan.inference.model_copy(update={"mirror_axes": (1, 2)})})
    facts = copy.deepcopy(FACTS)
    facts["training"]["folds"] = 2
    facts["cleaning"] = ["white: largest component, Dice 0.80 to 0.85 | of 9 cases"]
    card = card_of(root, publish(root, Target("brain", "v1", plan), [WEIGHTS, WEIGHTS], facts, {}))
    method = section(card, "Method")
    assert "masks by 2 networks and 3 mirror images" in method
    assert "white: only the largest component, components of at least 0.5 mL, holes filled" in method
    assert "- white: largest component, Dice 0.80 to 0.85 \\| of 9 cases" in method
    assert "cross-validation" in section(card, "Data")


def test_provenance_names_data_code_and_where_it_started(root):
    model = published(root)
    origin = model.facts["provenance"]
    assert origin["digest"] == model.digest
    assert origin["data"] == [{"scan": "a" * 64, "label": "d" * 64}, {"scan": "b" * 64, "label": "c" * 64}]
    assert len(origin["data_digest"]) == 64
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", origin["version"])
    # the tests run from a checkout
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", origin["commit"])
    assert origin["torch"] == "2.13.0"
    told = section(card_of(root, model), "Provenance")
    for value in (origin["digest"], origin["data_digest"], origin["commit"], model.plan.digest, "12,345", "3.1"):
        assert f"`{value}`" in told
    other = published(root, "v2", training=TRAINING | {"volumes": ["volumes/one"]})
    assert other.facts["provenance"]["data_digest"] != origin["data_digest"]
    assert load_model(root, "brain@v1").facts["provenance"] == origin


def test_hostile_names_do_nothing(root):
    evil = "x|y\n# z <script>alert(1)</script> ![p](http://q) [l](javascript:r) `c`\x1b[2J\u202e"
    plan = PLAN.model_copy(update={"labels": (Label(value=1, name=evil),), "channels": (evil,)})
    metrics = {"structures": [evil], "case_dice": {evil: [0.5]}}
    facts = FACTS | {"metrics": metrics, "training": TRAINING | {"started_from": evil, "platform": evil}}
    card = card_of(root, publish(root, Target("brain", "v1", plan), [WEIGHTS], facts, {}))
    assert "<script" not in card
    # in code spans, which no text can end, brackets are nothing but text
    text = re.sub(r"`[^`\n]*`", "", card)
    assert not re.search(r"(?<!\\)!\[", text)
    assert not re.search(r"(?<!\\)\[l", text)
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert "\n# z" not in card
    # its row of the table still has six cells
    (row,) = [line for line in section(card, "Figures").splitlines() if "0.500" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
