"""Training by the command line: folds that become one model, another model to start from, presets and reasons."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from flows.server.process import ServerProcess
from tests.conftest import Walkthrough
from tests.files import file_of
from tests.flows.commands.test_commands import run, run_in_one_process
from workers.registry.models import load_model, load_networks
from workers.storage.store import Root

PLAN = """
[preprocess]
spacing_mm = [3.0, 3.0, 3.0]

[network]
kernel_size = 3
width = 4
convolutions = [1, 1, 1]

[training]
patch_size = [24, 24, 24]
batch_size = 2
learning_rate = 0.01
"""


@pytest.fixture(scope="module")
def root(walkthrough: Walkthrough, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "plan.toml").write_text(PLAN)
    return walkthrough.copy_root(folder / "vnet-data")


def train(root: Path, *arguments: str) -> dict[str, Any]:
    plan = str(root.parent / "plan.toml")
    done = run("train", "--cohort", "training", "--plan", plan, *arguments, "--json", root=root)
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def folded(root: Path) -> dict[str, Any]:
    return train(root, "--model", "folded", "--folds", "2", "--steps", "60")


@pytest.mark.slow
def test_folds_become_one_model_that_was_judged_on_every_case(root: Path, folded: dict[str, Any]) -> None:
    assert folded["training"]["folds"] == 2
    model = load_model(Root(str(root)), "folded")
    networks = load_networks(Root(str(root)), model)
    assert len(networks) == 2
    states = [network.state_dict() for network in networks]
    assert any(not (states[0][name] == states[1][name]).all() for name in states[0])
    judged = model.facts["metrics"]["case_dice"]
    assert sorted(judged) == model.facts["training"]["validation_cases"] == model.facts["training"]["training_cases"]
    assert len(judged) > 2
    means = [sum(row[i] for row in judged.values()) / len(judged) for i in range(len(model.plan.labels))]
    assert list(model.facts["metrics"]["validation_dice"].values()) == pytest.approx(means)
    # a reason for every label, whatever was chosen
    assert len(model.facts["cleaning"]) == len(model.plan.labels)
    assert {cleaning.label for cleaning in model.plan.inference.cleaning} <= {la.value for la in model.plan.labels}


@pytest.mark.slow
def test_a_model_of_several_networks_segments(root: Path, folded: dict[str, Any]) -> None:
    done = run("segment", "--cohort", "tonight", "--model", "folded", "--json", root=root)
    assert done.code in (0, 3), done.err
    states = [case["state"] for case in json.loads(done.out)["cases"]]
    assert "computed" in states


@pytest.mark.slow
def test_folds_go_on_where_they_stood(root: Path, folded: dict[str, Any]) -> None:
    # the second fold's last figures and the bundle are lost: nothing but that is made again
    store = Root(str(root))
    before = [store.get(f"models/folded/v1/weights-{fold}.safetensors") for fold in range(2)]
    first = file_of(store, "training/folded/v1/fold-0/fitted/receipt.json").stat().st_mtime_ns
    store.delete("models/folded")
    store.delete("training/folded/v1/fold-1/fitted")
    train(root, "--model", "folded", "--resume")
    assert [store.get(f"models/folded/v1/weights-{fold}.safetensors") for fold in range(2)] == before
    assert file_of(store, "training/folded/v1/fold-0/fitted/receipt.json").stat().st_mtime_ns == first


@pytest.mark.slow
def test_a_training_is_judged_while_it_goes_on(root: Path) -> None:
    plan = root.parent / "judged.toml"
    plan.write_text(f'{PLAN}full_validation_every = 4\npublish = "best"\n')
    done = run("train", "--cohort", "training", "--model", "judged", "--plan", str(plan), "--steps", "10", root=root)
    assert done.code == 0, done.err
    with sqlite3.connect(root / "prefect" / "prefect.db") as database:
        query = "select description, data from artifact where key = 'validation-judged' order by created"
        (first, page), (second, _) = database.execute(query).fetchall()
    assert (first, second) == tuple(f"Validation of model judged at step {step}" for step in (4, 8))
    assert "data:image/png;base64," in page
    facts = load_model(Root(str(root)), "judged").facts
    assert facts["training"]["attempts"] == [{"from_step": 0, "workers": 1, "after": ""}]


@pytest.mark.slow
def test_a_training_that_starts_from_a_model(root: Path) -> None:
    first = train(root, "--model", "first", "--steps", "10")
    second = train(root, "--model", "second", "--from", "first", "--steps", "1")
    facts = load_model(Root(str(root)), "second").facts
    assert facts["training"]["started_from"] == first["model"]
    old, new = (
        safetensors.numpy.load_file(root / "models" / name / "v1" / "weights.safetensors")
        for name in ("first", "second")
    )
    # one step in, still nearly the weights of the first model
    largest = max(abs(old[name] - new[name]).max() for name in old)
    assert 0 < largest < 0.05
    assert second["training"]["steps"] == 1


def test_refusals_say_what_would_work(root: Path, site_server: ServerProcess) -> None:
    plan = root.parent / "large.toml"
    plan.write_text(PLAN.replace("batch_size = 2", "batch_size = 200000"))
    train = ["train", "--cohort", "training", "--model", "x", "--steps", "1"]
    commands = [[*train, "--plan", str(plan)], [*train, "--folds", "19"], [*train, "--folds", "2", "--workers", "2"]]
    large, many, both = run_in_one_process(commands, root, PREFECT_API_URL=site_server.api_url)
    assert large.code == 2
    assert "plan.memory" in large.err
    assert "use training.batch_size" in large.err
    assert many.code == 4
    assert "train.folds" in many.err
    assert both.code == 2
    assert "leave out --workers" in both.err


def test_the_plan_and_its_reasons(root: Path) -> None:
    done = run("plan", "explain", "--cohort", "training", "--json", root=root)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    reasons = {row["key"]: row for row in document["reasons"]}
    assert {"preprocess.spacing_mm", "training.patch_size", "network.width", "network.convolutions"} <= reasons.keys()
    assert all(row["because"] for row in document["reasons"])
    text = run("plan", "explain", "--cohort", "training", root=root).out
    assert "because" in text.splitlines()[0]
