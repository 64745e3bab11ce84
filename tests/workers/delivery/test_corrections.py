"""Corrected masks are checked, kept in private, and reach training by a manifest that ingest reads."""

import csv
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from tests.workers.known_model import known_network, known_plan
from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.sections import OutputPlan
from vnet_core.volume import Volume
from workers.cohort import load_entries, load_entry
from workers.delivery.corrections import confirm, correct, corrections, training_manifest, wanted
from workers.dicom.derived import Algorithm
from workers.identity import private_root
from workers.ingest import Names, ingest
from workers.nights.decisions import Decision, record
from workers.registry.models import Target, publish
from workers.segmentation.masks import Mask, publish_mask
from workers.sources.scans import read_label, write_label, write_volume
from workers.storage.store import Root

GRID = Geometry((6, 7, 8), (2.0, 1.0, 1.0), (-3.0, 4.0, 10.0))
PLAN = known_plan((2.0, 1.0, 1.0))
"""Labels 2, grey, and 7, white."""
EXECUTOR = ThreadPoolExecutor(1)


@pytest.fixture(scope="module", autouse=True)
def _end_the_reader() -> Iterator[None]:
    yield
    EXECUTOR.shutdown()


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


def scan(folder: Path, case: str, seed: int = 0) -> Path:
    voxels = np.random.default_rng(seed).integers(0, 1000, (1, *GRID.shape)).astype(np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case}.nii.gz"
    write_volume(path, Volume(voxels, GRID))
    return path


def mask_values() -> np.ndarray:
    values = np.zeros(GRID.shape, np.uint8)
    values[1:3, 1:4, 1:5] = 2
    values[4, 2:5, 2:6] = 7
    return values


def cohort_of(root: Root, folder: Path, cases: str = "a") -> None:
    for number, case in enumerate(cases):
        scan(folder / "scans", case, number)
    _, outcomes = ingest(root, "liver", [str(folder / "scans")], EXECUTOR)
    assert [outcome.state for outcome in outcomes] == ["accepted"] * len(cases)


def masks_of(root: Root, plan: Plan = PLAN) -> None:
    """A model, and its mask of every case of the cohort."""
    publish(root, Target("known", "v1", plan), [safetensors.torch.save(known_network(plan).state_dict())], {}, {})
    for entry in load_entries(root, "liver"):
        provenance = {"model": "known@v1", "plan_digest": plan.digest}
        mask = Mask(entry.case, mask_values(), plan, "nifti", Algorithm("known@v1", "0"), provenance)
        publish_mask(root, key_of(entry.case.id), mask)


def key_of(case: str) -> str:
    return f"results/liver/{case}/1"


def train(case: str = "a", as_is: bool = False) -> Decision:
    return Decision(case, key_of(case), "train", "Dr. Ada", "2026-11-23T07:00:00+00:00", "2026-11-23_010000", "", as_is)


def corrected(folder: Path, values: np.ndarray | None = None, grid: Geometry = GRID, name: str = "fixed.mha") -> Path:
    if values is None:
        values = mask_values()
        values[0, 0, 0] = 7
    write_label(folder / name, values, grid)
    return folder / name


def test_a_corrected_mask_is_kept_and_ingest_reads_the_manifest(root, tmp_path):
    cohort_of(root, tmp_path, "ab")
    masks_of(root)
    record(root, "liver", train())
    assert wanted(root, "liver") == [train()]
    assert training_manifest(root, "liver").path is None

    found = correct(root, "liver", train(), corrected(tmp_path))
    assert (found.case, found.kind, found.key, found.by) == ("a", "corrected", key_of("a"), "Dr. Ada")
    assert found.voxels == {"grey": 24, "white": 13}
    assert corrections(root, "liver") == [found]
    assert wanted(root, "liver") == []
    training = training_manifest(root, "liver")
    assert training.cases == ("a",)
    with training.path.open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["case", "image", "label", "patient"]
    assert row["image"] == str(tmp_path / "scans" / "a.nii.gz")

    names = Names(labels=PLAN.labels)
    _, outcomes = ingest(root, "retrain", [str(training.path)], EXECUTOR, names)
    assert [(outcome.case, outcome.state) for outcome in outcomes] == [("a", "accepted")]
    entry = load_entry(root, "retrain", "a")
    assert entry.case.digest == load_entry(root, "liver", "a").case.digest
    expected = mask_values()
    expected[0, 0, 0] = 7
    np.testing.assert_array_equal(read_label(entry.case.label).labels, expected)
    assert entry.fingerprint.label_voxels == {0: 336 - 37, 2: 24, 7: 13}


def test_what_is_kept_is_for_its_owner_alone(root, tmp_path):
    cohort_of(root, tmp_path)
    masks_of(root)
    correct(root, "liver", train(), corrected(tmp_path))
    private = private_root(root).home
    for path in [*(private / "corrections").rglob("*"), *(private / "training").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in private.iterdir() if path.name.startswith(".")] == []


def test_only_what_a_person_has_corrected_or_confirmed_joins(root, tmp_path):
    cohort_of(root, tmp_path, "abcd")
    masks_of(root)
    for case, choice in {"a": "accept", "b": "reject", "c": "train"}.items():
        decision = train(case)
        record(root, "liver", Decision(case, decision.key, choice, decision.by, decision.at, decision.night))
    confirm(root, "liver", train("d", as_is=True))
    record(root, "liver", train("d", as_is=True))
    training = training_manifest(root, "liver")
    assert training.cases == ("d",)
    assert [one.case for one in wanted(root, "liver")] == ["c"]
    label = private_root(root).home / "corrections/liver/d/mask.nii.gz"
    np.testing.assert_array_equal(read_label(label).labels, mask_values())
    # a later rejection takes the confirmation back
    decision = train("d")
    record(root, "liver", Decision("d", decision.key, "reject", "Dr. Bob", decision.at, decision.night))
    assert training_manifest(root, "liver").path is None
    assert not private_root(root).exists("training/liver.csv")


def test_a_second_correction_replaces_the_first(root, tmp_path):
    cohort_of(root, tmp_path)
    masks_of(root)
    correct(root, "liver", train(), corrected(tmp_path))
    values = np.zeros(GRID.shape, np.uint8)
    values[2, 2, 2] = 2
    correct(root, "liver", train(), corrected(tmp_path, values))
    assert [one.voxels for one in corrections(root, "liver")] == [{"grey": 1}]
    assert training_manifest(root, "liver").cases == ("a",)


def moved() -> Geometry:
    return Geometry(GRID.shape, GRID.spacing_mm, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: corrected(folder, grid=moved()), "label.grid"),
        (lambda folder: corrected(folder, np.full(GRID.shape, 3, np.uint8)), "correction.values"),
        (lambda folder: corrected(folder, np.zeros(GRID.shape, np.uint8)), "correction.empty"),
        (lambda folder: corrected(folder, mask_values()), "correction.unchanged"),
        (lambda folder: folder / "nothing.nii.gz", "scan.unreadable"),
    ],
)
def test_a_mask_that_cannot_be_the_truth_is_refused(root, tmp_path, make, code):
    cohort_of(root, tmp_path)
    masks_of(root)
    with pytest.raises(ScanError) as caught:
        correct(root, "liver", train(), make(tmp_path))
    assert caught.value.code == code
    assert corrections(root, "liver") == []
    assert training_manifest(root, "liver").path is None


def test_a_scan_without_any_label_is_possible_when_it_is_said(root, tmp_path):
    cohort_of(root, tmp_path)
    masks_of(root)
    empty = corrected(tmp_path, np.zeros(GRID.shape, np.uint8))
    assert correct(root, "liver", train(), empty, allow_empty=True).voxels == {}
    assert training_manifest(root, "liver").cases == ("a",)


def test_a_correction_says_nothing_about_other_bytes(root, tmp_path):
    cohort_of(root, tmp_path)
    masks_of(root)
    correct(root, "liver", train(), corrected(tmp_path))
    scan(tmp_path / "scans", "a", seed=9)
    ingest(root, "liver", [str(tmp_path / "scans")], EXECUTOR)
    training = training_manifest(root, "liver")
    assert (training.path, training.cases, training.outdated) == (None, (), ("a",))
    with pytest.raises(ConfigError) as caught:
        correct(root, "liver", train(), corrected(tmp_path))
    assert caught.value.code == "correction.outdated"


def test_cases_and_results_that_are_not_there_are_told(root, tmp_path):
    cohort_of(root, tmp_path)
    with pytest.raises(ConfigError) as caught:
        correct(root, "liver", train("b"), corrected(tmp_path))
    assert caught.value.code == "correction.case"
    with pytest.raises(StorageError) as missing:
        correct(root, "liver", train(), corrected(tmp_path))
    assert missing.value.code == "store.missing"


def test_values_that_are_written_otherwise_come_back_as_the_plans(root, tmp_path):
    cohort_of(root, tmp_path)
    masks_of(root, PLAN.model_copy(update={"output": OutputPlan(values={"grey": 50, "white": 2})}))
    values = np.zeros(GRID.shape, np.uint8)
    values[2, 2, 2], values[3, 3, 3] = 50, 2
    assert correct(root, "liver", train(), corrected(tmp_path, values)).voxels == {"grey": 1, "white": 1}
    kept = read_label(private_root(root).home / "corrections/liver/a/mask.nii.gz").labels
    assert (kept[2, 2, 2], kept[3, 3, 3], int(kept.sum())) == (2, 7, 9)
    assert confirm(root, "liver", train(as_is=True)).voxels == {"grey": 24, "white": 12}


@pytest.mark.parametrize("values", [{"grey": 1, "white": 1}, {"grey": 0}])
def test_labels_that_were_merged_cannot_be_told_apart(root, tmp_path, values):
    cohort_of(root, tmp_path)
    masks_of(root, PLAN.model_copy(update={"output": OutputPlan(values=values)}))
    with pytest.raises(ConfigError) as caught:
        confirm(root, "liver", train(as_is=True))
    assert caught.value.code == "correction.merged"
