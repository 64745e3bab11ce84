"""Every case of a cohort gets its verdict, whatever lies in its sources."""

import gzip
import os
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from tests.files import file_of
from tests.workers.sources.test_discover import segmentation, write_series
from vnet_core.codes import CODES, tally
from vnet_core.errors import ConfigError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Plan
from vnet_core.sections import ReadingPlan, Selection
from vnet_core.volume import Volume
from workers.cohort import (
    Cohort,
    check_reading,
    load_cohort,
    load_entries,
    load_entry,
    read_channels,
    scan_channels,
    source_digest,
    volume_key,
)
from workers.identity import private_root
from workers.ingest import Names, ingest
from workers.ledger import Outcome, counts
from workers.preprocess import preprocess_case
from workers.sources.scans import write_label, write_volume
from workers.storage.store import Root

GRID = Geometry((6, 7, 8), (2.5, 1.0, 0.8), (-3.0, 4.0, 10.0))
ORGAN = (Label(value=1, name="organ"),)
RESAMPLE = ReadingPlan(channel_grids="resample")


EXECUTOR = ThreadPoolExecutor(1)
"""One thread for all tests, since each thread starts a process that reads for it."""


@pytest.fixture(scope="module", autouse=True)
def _end_the_reader() -> Iterator[None]:
    yield
    EXECUTOR.shutdown()


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


def run(root: Root, *sources: Path, names: Names | None = None, cohort: str = "c") -> dict[str, Outcome]:
    _, outcomes = ingest(root, cohort, [str(source) for source in sources], EXECUTOR, names)
    assert [outcome.case for outcome in outcomes] == sorted(e.case.id for e in load_entries(root, cohort))
    return {outcome.case: outcome for outcome in outcomes}


def verdicts(outcomes: dict[str, Outcome]) -> dict[str, tuple[str, ...]]:
    return {case: (outcome.state, *outcome.codes) for case, outcome in outcomes.items()}


def scan(path: Path, seed: int = 0, geometry: Geometry = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(-1000, 1000, (1, *geometry.shape)).astype(np.int16)
    write_volume(path, Volume(voxels, geometry))
    return path


def label(path: Path, value: int = 1, geometry: Geometry = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(geometry.shape, np.uint8)
    values[1:3, 2:5, 2:5] = value
    write_label(path, values, geometry)
    return path


# --- a cohort with one bad case of each of ten kinds


def spoil(images: Path, labels: Path) -> dict[str, str]:
    """Ten bad cases beside sound ones; the code that each must be refused with."""
    for number, name in enumerate(("cut", "nan", "stack", "elsewhere", "foreign", "placeless"), 100):
        scan(images / f"Meier-{name}.nii.gz", number)
        label(labels / f"Meier-{name}.nii.gz")
    whole = (images / "Meier-cut.nii.gz").read_bytes()
    (images / "Meier-cut.nii.gz").write_bytes(whole[:-40])
    write_volume(images / "Meier-nan.nii.gz", Volume(np.full((1, *GRID.shape), np.nan, np.float32), GRID))
    edit(images / "Meier-stack.nii.gz", (40, "<5h", (4, 8, 7, 3, 2)))
    label(labels / "Meier-elsewhere.nii.gz", geometry=Geometry(GRID.shape, GRID.spacing_mm, (0.0, 0.0, 0.0)))
    label(labels / "Meier-foreign.nii.gz", value=7)
    edit(images / "Meier-placeless.nii.gz", (252, "<2h", (0, 0)))
    (images / "Meier-page.nii.gz").write_text("<html>404</html>")
    (images / "Meier-nothing.nii.gz").write_bytes(b"")
    label(labels / "Meier-imageless.nii.gz")
    shutil.copy(images / "good-07.nii.gz", images / "twice-Meier.nii.gz")
    return {
        "Meier-cut": "scan.truncated",
        "Meier-elsewhere": "label.grid",
        "Meier-foreign": "label.values",
        "Meier-imageless": "cohort.missing-image",
        "Meier-nan": "scan.nonfinite",
        "Meier-nothing": "scan.unreadable",
        "Meier-page": "scan.unreadable",
        "Meier-placeless": "geometry.missing",
        "twice-Meier": "cohort.duplicate-case",
        "Meier-stack": "scan.not-3d",
    }


def edit(path: Path, *fields: tuple[int, str, tuple]) -> None:
    """Overwrite fields of the NIfTI header of a ``.nii.gz``."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    for offset, form, values in fields:
        struct.pack_into(form, data, offset, *values)
    path.write_bytes(gzip.compress(bytes(data), mtime=0))


def test_fifty_cases_of_which_ten_are_bad_end_with_forty_accepted_and_ten_reasons(root, tmp_path):
    source = tmp_path / "source"
    for number in range(40):
        scan(source / f"images/good-{number:02}.nii.gz", number)
        label(source / f"labels/good-{number:02}.nii.gz")
    expected = spoil(source / "images", source / "labels")
    outcomes = run(root, source, names=Names(labels=ORGAN))
    assert counts(outcomes.values()) == {"accepted": 40, "refused": 10}
    assert {case: o.codes[0] for case, o in outcomes.items() if o.state == "refused"} == expected
    for case, outcome in outcomes.items():
        assert bool(outcome.message) == (case in expected)
        assert "Meier" not in outcome.message, "a file's name may be a patient's"
    assert "case good-07" in outcomes["twice-Meier"].message
    usable = [entry for entry in load_entries(root, "c") if entry.verdict.usable]
    assert len(usable) == 40
    assert all(entry.fingerprint and entry.case.digest and entry.case.label_digest for entry in usable)

    rows = tally(outcome.codes for outcome in outcomes.values())
    assert {row["code"]: row["cases"] for row in rows} == Counter(expected.values())
    assert rows[0]["code"] == "scan.unreadable", "the most frequent comes first"
    assert all(row["state"] == "refused" and row["meaning"] and row["remedy"] for row in rows)

    again = run(root, source, names=Names(labels=ORGAN))
    assert verdicts(again) == verdicts(outcomes)


# --- twice the same, and ids that look alike


def test_of_equal_bytes_the_first_by_id_is_kept_and_the_other_comes_back_when_it_is_gone(root, tmp_path):
    scan(tmp_path / "s/b.nii.gz")
    shutil.copy(tmp_path / "s/b.nii.gz", tmp_path / "s/c.nii.gz")
    label(tmp_path / "s/c_seg.nii.gz")
    twice = ("refused", "cohort.duplicate-case")
    assert verdicts(run(root, tmp_path / "s")) == {"b": ("accepted",), "c": twice}
    assert verdicts(run(root, tmp_path / "s")) == {"b": ("accepted",), "c": twice}
    assert not load_entry(root, "c", "c").verdict.usable
    shutil.copy(tmp_path / "s/b.nii.gz", tmp_path / "s/a.nii.gz")
    assert verdicts(run(root, tmp_path / "s")) == {"a": ("accepted",), "b": twice, "c": twice}
    (tmp_path / "s/a.nii.gz").unlink()
    (tmp_path / "s/b.nii.gz").unlink()
    assert verdicts(run(root, tmp_path / "s")) == {"c": ("accepted",)}
    assert load_entry(root, "c", "c").fingerprint


def test_a_duplicate_keeps_its_own_warnings(root, tmp_path):
    for name in ("a", "b"):
        scan(tmp_path / f"s/images/{name}.nii.gz")
        write_label(label(tmp_path / f"s/labels/{name}.nii.gz"), np.zeros(GRID.shape, np.uint8), GRID)
    assert verdicts(run(root, tmp_path / "s"))["b"] == ("refused", "cohort.duplicate-case", "label.empty")
    (tmp_path / "s/images/a.nii.gz").unlink()
    (tmp_path / "s/labels/a.nii.gz").unlink()
    assert verdicts(run(root, tmp_path / "s")) == {"b": ("warned", "label.empty")}


def test_ids_that_differ_in_case_alone_are_told_apart(root, tmp_path):
    scan(tmp_path / "s/Liver.nii.gz", 1)
    scan(tmp_path / "s/liver.nii.gz", 2)
    outcomes = run(root, tmp_path / "s")
    assert sorted(verdicts(outcomes).values()) == [("accepted",), ("warned", "cohort.similar-id")]
    assert sorted(verdicts(run(root, tmp_path / "s")).values()) == sorted(verdicts(outcomes).values())
    assert len({case.casefold() for case in outcomes}) == 2
    assert "Liver" in outcomes


# --- channels


def test_channels_on_other_grids_are_refused_or_resampled(root, tmp_path):
    """The second channel has slices twice as far apart, and values that grow by 10 per mm along z."""
    thick = Geometry((3, 7, 8), (5.0, 1.0, 0.8), GRID.origin_mm)
    ramp = np.broadcast_to(np.int16([0, 50, 100])[:, None, None], thick.shape)
    scan(tmp_path / "s/images/a_0000.nii.gz")
    write_volume(tmp_path / "s/images/a_0001.nii.gz", Volume(ramp[None], thick))
    outcomes = run(root, tmp_path / "s")
    assert verdicts(outcomes) == {"a": ("refused", "cohort.channel-grid")}
    outcomes = run(root, tmp_path / "s", names=Names(reading=RESAMPLE))
    assert verdicts(outcomes) == {"a": ("warned", "cohort.channels-resampled")}
    case = load_entry(root, "c", "a").case
    image = read_channels(case.channels, RESAMPLE)
    assert image.voxels.shape == (2, *GRID.shape)
    assert case.geometry == image.geometry
    assert image.geometry.spacing_mm == pytest.approx(GRID.spacing_mm)
    np.testing.assert_allclose(image.voxels[1, :, 3, 4], [0, 25, 50, 75, 100, 100], atol=1e-3)


def test_channels_of_different_frames_of_reference_are_refused(tmp_path):
    write_series(tmp_path / "one", series="1.2.826.0.1.1", frame="1.2.826.0.5.1")
    write_series(tmp_path / "two", series="1.2.826.0.1.2", frame="1.2.826.0.5.2")
    write_series(tmp_path / "same", series="1.2.826.0.1.3", frame="1.2.826.0.5.1")
    one, two, same = (f"{tmp_path / n}#1.2.826.0.1.{i}" for i, n in enumerate(("one", "two", "same"), 1))
    assert scan_channels([one, same], ReadingPlan()).volume.voxels.shape == (2, 3, 4, 5)
    with pytest.raises(ValueError, match="2 frames of reference") as caught:
        scan_channels([one, two], ReadingPlan())
    assert caught.value.code == "cohort.frames"


# --- how files are read


def test_reading_is_kept_with_the_cohort_and_decides_digests(root, tmp_path):
    scan(tmp_path / "s/a.nii.gz")
    run(root, tmp_path / "s")
    assert load_cohort(root, "c").reading == ReadingPlan()
    usual = load_entry(root, "c", "a").case
    assert usual.digest == source_digest(usual.channels)
    run(root, tmp_path / "s", names=Names(reading=RESAMPLE))
    changed = load_entry(root, "c", "a").case
    assert changed.digest == source_digest(usual.channels, RESAMPLE) != usual.digest
    run(root, tmp_path / "s", names=Names(("image",)))
    assert load_cohort(root, "c").reading == RESAMPLE, "a refresh reads as before"
    assert load_entry(root, "c", "a").case == changed
    plan = Plan(labels=ORGAN)
    assert volume_key(usual, plan) != volume_key(changed, plan)


def test_a_plan_that_reads_otherwise_is_named_before_work():
    cohort = Cohort("c", (), ("image",), ORGAN, RESAMPLE)
    check_reading(cohort, Plan(labels=ORGAN, reading=RESAMPLE))
    chosen = ReadingPlan(channel_grids="resample", select=(Selection(channel="image", modality="CT"),))
    check_reading(cohort, Plan(labels=ORGAN, reading=chosen))
    with pytest.raises(ConfigError, match=r"reading\.channel_grids = 'resample' \(the plan has 'refuse'\)") as caught:
        check_reading(cohort, Plan(labels=ORGAN))
    assert caught.value.code == "plan.reading"


def test_a_case_whose_bytes_change_after_ingest_is_not_preprocessed(root, tmp_path):
    path = scan(tmp_path / "s/a.nii.gz")
    run(root, tmp_path / "s")
    case = load_entry(root, "c", "a").case
    assert preprocess_case(root.url, case, Plan(labels=ORGAN)).state == "computed"
    root.delete("volumes")
    scan(path, seed=5)
    outcome = preprocess_case(root.url, case, Plan(labels=ORGAN))
    assert (outcome.state, outcome.codes) == ("refused", ("scan.changed",))


def test_a_file_that_changes_while_it_is_read_is_refused_and_read_again(root, tmp_path, monkeypatch):
    path = scan(tmp_path / "s/a.nii.gz")

    def read_and_write(*arguments):
        read = scan_channels(*arguments)
        scan(path, seed=3)
        return read

    with monkeypatch.context() as patched:
        patched.setattr("workers.ingest.scan_channels", read_and_write)
        assert verdicts(run(root, tmp_path / "s")) == {"a": ("refused", "scan.changed")}
    assert verdicts(run(root, tmp_path / "s")) == {"a": ("accepted",)}


def test_names_given_later_accept_the_labels_that_were_unknown(root, tmp_path):
    scan(tmp_path / "s/images/a.nii.gz")
    label(tmp_path / "s/labels/a.nii.gz", value=2)
    assert verdicts(run(root, tmp_path / "s", names=Names(labels=ORGAN))) == {"a": ("refused", "label.values")}
    both = (*ORGAN, Label(value=2, name="lesion"))
    assert verdicts(run(root, tmp_path / "s", names=Names(labels=both))) == {"a": ("accepted",)}


def test_an_unchanged_case_is_not_read_again(root, tmp_path):
    path = scan(tmp_path / "s/a.nii.gz")
    run(root, tmp_path / "s")
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verdicts(run(root, tmp_path / "s")) == {"a": ("accepted",)}
    os.utime(path, ns=(1, 1))
    assert verdicts(run(root, tmp_path / "s")) == {"a": ("refused", "scan.unreadable")}


# --- DICOM


def test_a_study_is_a_case_where_rules_choose_its_channels(root, tmp_path):
    for number, (modality, frame) in enumerate((("CT", "1"), ("MR", "1"), ("NM", "1")), 1):
        write_series(
            tmp_path / f"s/p1/{modality}",
            series=f"1.2.826.0.1.{number}",
            modality=modality,
            frame=f"1.2.826.0.5.{frame}",
        )
    write_series(tmp_path / "s/p2/CT", series="1.2.826.0.1.7", study="1.2.826.0.9.7")
    rules = ReadingPlan(select=(Selection(channel="mr", modality="MR"), Selection(channel="ct", modality="CT")))
    outcomes = run(root, tmp_path / "s", names=Names(reading=rules))
    assert sorted(verdicts(outcomes).values()) == [("accepted",), ("refused", "select.none")]
    cohort = load_cohort(root, "c")
    assert (cohort.channels, cohort.reading) == (("mr", "ct"), rules)
    (accepted,) = (e.case for e in load_entries(root, "c") if e.verdict.usable)
    assert [channel.rpartition("#")[2] for channel in accepted.channels] == ["1.2.826.0.1.2", "1.2.826.0.1.1"]
    (left,) = cohort.not_chosen
    assert (left.case, left.modality, left.slices) == (accepted.id, "NM", 3)
    assert "mr: another modality than MR" in left.reason


def test_a_cohort_whose_ingest_has_not_ended_is_told_from_one_that_is_not_there(root, tmp_path):
    write_series(tmp_path / "s/ct")
    run(root, tmp_path / "s")
    with pytest.raises(ConfigError, match=r"there is no cohort 'd' .*known: c\)") as caught:
        load_cohort(root, "d")
    assert caught.value.code == "cohort.unknown"
    file_of(root, "cohorts/c/cohort.json").unlink()
    with pytest.raises(ConfigError, match=r"the first ingest of cohort 'c' .* has not ended") as caught:
        load_cohort(root, "c")
    assert caught.value.code == "cohort.unfinished"


def test_a_segmentation_that_cannot_be_used_leaves_its_case_without_a_label(root, tmp_path):
    write_series(tmp_path / "s/ct")
    segmentation(tmp_path / "s/drawn.dcm", "1.2.826.0.1.1")  # it refers to the series and holds nothing
    (outcome,) = run(root, tmp_path / "s").values()
    assert (outcome.state, outcome.codes) == ("warned", ("label.unusable",))
    assert "label." in outcome.message
    (entry,) = load_entries(root, "c")
    assert (entry.case.label, entry.case.label_digest) == (None, None)
    piece = next((tmp_path / "s/ct").iterdir())
    status = piece.stat()
    piece.write_bytes(piece.read_bytes()[:-2] + b"\7\7")
    os.utime(piece, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(root, tmp_path / "s") == {outcome.case: replace(outcome, seconds=ANY, peak_bytes=ANY)}
    assert load_entries(root, "c") == [entry], "its bytes were not looked at again"
    manifest = tmp_path / "m.csv"
    manifest.write_text("case,image,label\na,s/ct,s/drawn.dcm\n")
    (named,) = run(root, manifest).values()
    assert named.state == "refused", "a label that a manifest names must be good"


def test_contours_of_one_structure_are_labels_and_of_others_are_none(root, real_scans):
    """The tumour of a sarcoma patient, drawn on CT, MR and PET."""
    source = real_scans / "dicom" / "STS_002"
    assert set(verdicts(run(root, source)).values()) == {("accepted",)}
    assert [entry.case.label is not None for entry in load_entries(root, "c")] == [True] * 3
    assert [label.name for label in load_cohort(root, "c").labels] == ["label-1"]
    assert len({entry.case.patient for entry in load_entries(root, "c")}) == 1
    assert set(verdicts(run(root, source)).values()) == {("accepted",)}
    liver = Names(labels=(Label(value=1, name="liver"),))
    assert set(verdicts(run(root, source, names=liver)).values()) == {("warned", "label.unusable")}


def test_a_series_with_burnt_in_text_is_accepted_with_a_warning(root, tmp_path):
    write_series(tmp_path / "s/ct", burnt_in="YES")
    (outcome,) = run(root, tmp_path / "s").values()
    assert (outcome.state, outcome.codes) == ("warned", ("dicom.burnt-in",))


# --- archives


def test_an_archive_is_a_source_and_goes_with_the_last_cohort_that_names_it(root, tmp_path):
    scan(tmp_path / "images/a.nii.gz", 1)
    scan(tmp_path / "b.nii.gz", 2)
    with zipfile.ZipFile(tmp_path / "night.zip", "w") as file:
        file.write(tmp_path / "images/a.nii.gz", "images/a.nii.gz")
        file.write(tmp_path / "b.nii.gz", "images/b.nii.gz")
    assert verdicts(run(root, tmp_path / "night.zip")) == {"a": ("accepted",), "b": ("accepted",)}
    run(root, tmp_path / "night.zip", cohort="other")
    assert load_cohort(root, "c").sources == (str(tmp_path / "night.zip"),)
    (key,) = private_root(root).names("archives")
    run(root, tmp_path / "b.nii.gz")
    assert private_root(root).names("archives") == [key], "the other cohort names it still"
    run(root, tmp_path / "b.nii.gz", cohort="other")
    assert private_root(root).names("archives") == []


def test_slices_in_an_archive_are_read(root, tmp_path):
    write_series(tmp_path / "ct")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as file:
        for path in (tmp_path / "ct").iterdir():
            file.write(path, f"study/ct/{path.name}")
    (outcome,) = run(root, tmp_path / "study.zip").values()
    assert (outcome.case[:3], outcome.state) == ("CT-", "accepted")


def test_a_bad_archive_is_one_refused_case(root, tmp_path):
    scan(tmp_path / "a.nii.gz")
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 and no end")
    outcomes = run(root, tmp_path / "torn.zip", tmp_path / "a.nii.gz")
    assert verdicts(outcomes) == {"a": ("accepted",), "torn": ("refused", "archive.damaged")}
    assert not (private_root(root).home / "archives").exists() or not any(
        (private_root(root).home / "archives").rglob("*.nii.gz")
    )


def test_a_storage_root_inside_its_source_is_no_source(tmp_path):
    scan(tmp_path / "a.nii.gz")
    write_series(tmp_path / "ct")
    root = Root(tmp_path / "vnet-data")
    scan(file_of(root, "results/mask.nii.gz"), 7)
    write_series(file_of(root, "archives/old"), series="1.2.826.0.1.9")
    outcomes = run(root, tmp_path)
    assert sorted(case.partition("-")[0] for case in outcomes) == ["CT", "a"]
    assert load_cohort(root, "c").set_aside == {}


# --- the record


def test_what_is_set_aside_is_counted_in_the_cohort(root, tmp_path):
    scan(tmp_path / "s/a.nii.gz")
    (tmp_path / "s/notes.txt").write_text("x")
    (tmp_path / "s/table.csv").write_text("x")
    (tmp_path / "s/old.zip").write_bytes(b"x")
    run(root, tmp_path / "s")
    assert load_cohort(root, "c").set_aside == {"archive": 1, "not-a-scan": 2}


def test_every_code_of_a_refusal_here_is_explained():
    assert {"cohort.duplicate-case", "cohort.frames", "cohort.channels-resampled", "scan.changed"} <= set(CODES)
