"""Figures of scans: kept with volumes, ranged in models, compared with them, and told in the report of a mask."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from tests.workers.known_model import known_network, known_plan
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.cohort import Case, source_digest
from workers.dicom.derived import Algorithm
from workers.preprocess import preprocess_case
from workers.registry.models import Target
from workers.registry.profiles import drift_of, training_profile
from workers.segmentation.masks import Mask, load_report, publish_mask
from workers.sources.scans import write_volume
from workers.storage.store import Root
from workers.training.bundle import publish_fitted
from workers.training.run import Run

PLAN = known_plan((1.0, 1.0, 1.0), crop=False)
FITTED = {
    **dict.fromkeys(("steps", "workers", "minutes", "parameters", "loader_wait_share"), 1),
    **dict.fromkeys(("precision", "torch", "platform"), ""),
    "case_dice": {},
    "losses": [[0.1, 1.0]],
    "dice": [],
}


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


def figures(spacing_z: float) -> dict:
    return {
        "spacing_mm": [spacing_z, 1.0, 1.0],
        "extent_mm": [40.0, 40.0, 40.0],
        "intensities": [[5.0, 25.0, 50.0, 75.0, 95.0]],
        "normalised": [[0.05, 0.25, 0.5, 0.75, 0.95]],
    }


def volumes(root: Root, number: int) -> list[str]:
    keys = [f"volumes/{n}" for n in range(number)]
    for n, key in enumerate(keys):
        root.seal(key, {"profile": figures(1 + n / 100), "case_digest": str(n), "label_digest": str(n)})
    return keys


def scan(folder: Path) -> Case:
    values = np.arange(6 * 7 * 8, dtype="<i2").reshape(1, 6, 7, 8)
    grid = Geometry((6, 7, 8), (2.5, 1.0, 1.0), (0.0, 0.0, 0.0))
    write_volume(folder / "a.nii.gz", Volume(values, grid))
    source = str(folder / "a.nii.gz")
    return Case("a", (source,), digest=source_digest([source]), geometry=grid)


def test_preprocessing_keeps_the_figures_of_a_scan_in_the_receipt(root, tmp_path):
    outcome = preprocess_case(root.url, scan(tmp_path), PLAN)
    assert outcome.state == "computed", outcome.message
    found = root.receipt(outcome.key)["profile"]
    assert found["spacing_mm"] == [2.5, 1.0, 1.0]
    assert found["extent_mm"] == [15.0, 7.0, 8.0]
    # of 1 .. 335
    assert found["intensities"] == [[17.7, 84.5, 168.0, 251.5, 318.3]]
    assert found["normalised"][0][2] == pytest.approx(2 * 168 / 1000 - 1, abs=0.02)


def test_a_model_has_the_ranges_of_its_volumes(root):
    ranges = training_profile(root, volumes(root, 21), PLAN)
    assert (ranges["scans"], ranges["channels"]) == (21, ["image"])
    assert ranges["spacing_mm"][0] == pytest.approx([1.002, 1.198, 0.1098], abs=1e-3)


def test_volumes_without_figures_do_not_count(root):
    for n in range(5):
        root.seal(f"volumes/old-{n}", {})
    old = [f"volumes/old-{n}" for n in range(5)]
    assert training_profile(root, [*old, *volumes(root, 19)], PLAN) is None
    assert training_profile(root, [*old, *volumes(root, 20)], PLAN)["scans"] == 20


def test_drift_is_told_where_both_sides_have_figures(root):
    model = {"profile": training_profile(root, volumes(root, 21), PLAN)}
    root.seal("volumes/thick", {"profile": figures(5.0)})
    root.seal("volumes/old", {})
    assert drift_of(root, "volumes/thick", model) == ("spacing 5 mm along z, training 1.002 to 1.198 mm",)
    assert drift_of(root, "volumes/3", model) == ()
    assert drift_of(root, "volumes/old", model) == ()
    assert drift_of(root, "volumes/none", model) == ()
    assert drift_of(root, "volumes/thick", {}) == ()


@pytest.mark.parametrize(("number", "ranged"), [(19, False), (20, True)])
def test_a_model_that_is_published_holds_its_ranges(root, number, ranged):
    cases = {f"c{n}": key for n, key in enumerate(volumes(root, number))}
    fitting, validating = dict(list(cases.items())[:15]), dict(list(cases.items())[15:])
    run = Run(root.url, "training/organs/v1", PLAN.model_dump(mode="json"), fitting, validating, {}, [1, 1])
    root.put_json(f"{run.prefix}/training.json", {"patients": {}})
    root.put_json(f"{run.fitted}/facts.json", FITTED)
    root.put(f"{run.fitted}/weights.safetensors", safetensors.torch.save(known_network(PLAN).state_dict()))
    model = publish_fitted(root, Target("organs", "v1", PLAN), [run])
    assert model.facts["training"]["volumes"] == sorted(cases.values())
    assert ("profile" in model.facts) == ranged
    if ranged:
        assert model.facts["profile"] == training_profile(root, cases.values(), PLAN)


@pytest.mark.parametrize("reasons", [(), ("spacing 5 mm along z, training 1 to 1.5 mm",)])
def test_the_report_of_a_mask_tells_its_drift(root, tmp_path, reasons):
    case = scan(tmp_path)
    plan = Plan.from_mapping({"labels": [{"value": 1, "name": "organ"}]})
    values = np.zeros(case.geometry.shape, np.uint8)
    publish_mask(root, "r/k", Mask(case, values, plan, "nifti", Algorithm("m@v1", "0"), {}, drift=reasons))
    assert load_report(root, "r/k")["drift"] == list(reasons)
