"""A model that learns from what is new, and becomes the challenger of what it was."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from examples.make_scans import main as make_scans
from flows.retraining import check_something_new, read_corrections, with_corrections
from tests.flows.commands.test_commands import run
from tests.workers.known_model import known_plan
from vnet_core.errors import TrainingError
from vnet_core.geometry import Geometry
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.plan import Plan
from workers.cohort import Case, Cohort, Entry, Verdict, source_digest, volume_key
from workers.registry.aliases import aliases, history
from workers.registry.models import Model, Target, load_model, publish
from workers.sources.scans import write_label
from workers.storage.store import Root

GRID = Geometry((6, 7, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
PLAN = known_plan((1.0, 1.0, 1.0))


def entry(name: str, digest: str, label: str | None = None, state: str = "accepted") -> Entry:
    case = Case(name, (f"{name}.nii",), label, f"P-{name}", digest, label and f"digest of {label}")
    return Entry(case, Verdict(state))


# --- which cases


def test_a_corrected_label_takes_the_place_of_the_one_that_was_there():
    kept, labelled, refused = entry("a", "1"), entry("b", "2", "old"), entry("c", "3", state="refused")
    corrected = [entry("x", "2", "new"), entry("c", "3", "new"), entry("z", "9", "new"), entry("y", "1")]
    found = with_corrections([kept, labelled, refused], corrected)
    assert found[0] == kept
    assert found[2] == refused
    case = found[1].case
    assert (case.id, case.patient, case.label, case.label_digest) == ("b", "P-b", "new", "digest of new")


def test_a_refused_correction_changes_nothing():
    labelled = entry("b", "2", "old")
    assert with_corrections([labelled], [entry("x", "2", "new", state="refused")]) == [labelled]
    assert with_corrections([], []) == []


def model_that_knows(*volumes: str) -> Model:
    return Model("brain", "v1", PLAN, "0" * 64, {"training": {"volumes": list(volumes)}})


def test_without_anything_new_there_is_nothing_to_train():
    one, two = entry("a", "1", "label"), entry("b", "2", "label")
    start = model_that_knows(volume_key(one.case, PLAN), volume_key(two.case, PLAN))
    with pytest.raises(TrainingError) as caught:
        check_something_new(start, [one, two])
    assert (caught.value.code, "all 2 labelled cases" in str(caught.value)) == ("train.nothing-new", True)
    check_something_new(start, [one, two, entry("c", "3", "label")])
    # another label of the same scan is new
    check_something_new(start, [one, entry("b", "2", "corrected")])
    check_something_new(model_that_knows(), [one])


def test_corrections_are_read_from_their_manifest(tmp_path: Path):
    scan, label, bad = (tmp_path / f"{name}.nii.gz" for name in ("scan", "label", "bad"))
    write_label(scan, np.random.default_rng(0).integers(0, 900, GRID.shape).astype(np.uint16), GRID)
    values = np.zeros(GRID.shape, np.uint8)
    values[2:4, 2:5, 2:5] = 7
    write_label(label, values, GRID)
    write_label(bad, values + 3, GRID)
    manifest = tmp_path / "c.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["case", "image", "label", "patient"], ["good", scan, label, "P"], ["worse", scan, bad, "P"]]
        )
    root = Root(tmp_path / "root")
    cohort = Cohort("c", (str(tmp_path),), ("image",), ())
    entries, outcomes = read_corrections(root, cohort, Model("brain", "v1", PLAN, "", {}), str(manifest))
    assert [(one.case, one.state, one.codes) for one in outcomes] == [
        ("good", "accepted", ()),
        ("worse", "refused", ("label.values",)),
    ]
    good, _ = entries
    assert good.case.digest == source_digest([str(scan)])
    known = replace(good, case=replace(good.case, id="own", label=None, label_digest=None))
    (found,) = with_corrections([known], entries)
    assert (found.case.id, found.case.label) == ("own", str(label))
    assert found.fingerprint is not None
    assert found.fingerprint.label_voxels[7] == 18


# --- the whole way


def published(root: Root) -> Model:
    """A model that has learnt from nothing yet, of two networks, as a cross-validation makes them."""
    plan = Plan.from_mapping(
        {
            "labels": [{"value": 1, "name": "organ"}, {"value": 2, "name": "lesion"}],
            "preprocess": {"spacing_mm": [4.0, 4.0, 4.0]},
            "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1]},
            "training": {"patch_size": [16, 16, 16], "batch_size": 1},
        }
    )
    network = build_vnet(plan.network, 1, plan.outputs)
    initialise(network, 0)
    facts: dict[str, Any] = {
        "metrics": {"validation_dice": {}, "structures": [], "case_dice": {}},
        "training": {"steps": 0, "volumes": []},
    }
    return publish(root, Target("organs", "v1", plan), [safetensors.torch.save(network.state_dict())], facts, {})


@pytest.mark.slow
def test_a_model_is_trained_further_and_becomes_the_challenger(tmp_path: Path):
    """On real engines, for two steps."""
    make_scans(tmp_path / "scans")
    root = tmp_path / "root"
    start = published(Root(root))
    done = run(
        "ingest",
        tmp_path / "scans" / "train",
        "--cohort",
        "new",
        "--label",
        "1=organ",
        "--label",
        "2=lesion",
        root=root,
    )
    assert done.code == 0, done.err
    done = run(
        "retrain", "organs", "--cohort", "new", "--steps", "2", "--by", "Ada", "--why", "six more", "--json", root=root
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["model"], document["champion"]) == ("organs@v2", "organs@v1")
    store = Root(root)
    assert aliases(store, "organs") == {"champion": "v1", "challenger": "v2"}
    assert [(one.action, one.version, one.by) for one in history(store, "organs")] == [
        ("promote", "v1", "Ada"),
        ("challenge", "v2", "Ada"),
    ]
    assert history(store, "organs")[-1].why == "six more"
    trained = load_model(store, "organs@challenger")
    assert trained.plan == start.plan
    assert trained.facts["training"]["started_from"] == "organs@v1"
    assert len(trained.facts["provenance"]["data"]) == 6
    assert "started from organs@v1" in store.get("models/organs/v2/card.md").decode()
    # the champion still is what the name means
    assert load_model(store, "organs").version == "v1"
