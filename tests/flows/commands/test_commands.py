"""The command line: documents, exit codes, what is computed again, and masks on the scan's own grid."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import SimpleITK as sitk

from flows.cli import main
from flows.server.process import ServerProcess
from tests.conftest import Walkthrough
from tests.walkthrough import REPOSITORY, environment
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry
from vnet_core.phantoms import SAGITTAL_DIRECTION, PhantomSpec, oblique_direction, phantom
from vnet_core.volume import Volume
from workers.sources.scans import read_volume, write_label, write_volume

SMALL = PhantomSpec(seed=5, shape=(20, 24, 28), spacing_mm=(3.0, 2.5, 2.0), body_mm=22.0)
CASE_KEYS = {"case", "state", "codes", "message"}
LABEL_KEYS = {"label", "name", "volume_ml", "voxels", "slices", "touches_border"}
MANY_COMMANDS = """
import contextlib, io, json, os, sys
from flows.cli import main
before, answers = dict(os.environ), []
for arguments in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(before)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
json.dump(answers, sys.stdout)
"""
"""Several commands in one process that has imported everything once."""


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str
    children: frozenset[str] = frozenset()
    """Command lines of every process that it started, where they were watched."""

    @property
    def document(self) -> dict[str, Any]:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    @property
    def states(self) -> dict[str, str]:
        return {case["case"]: case["state"] for case in self.document["cases"]}

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.document["cases"] if case["case"] == name)

    def started(self, part: str) -> bool:
        return any(part in line for line in self.children)


def run(*arguments: str | Path, root: Path, **variables: str) -> Answer:
    """A ``vnet`` process; its children are watched all the time."""
    command = ["vnet", *map(str, arguments), "--root", str(root)]
    pipe = subprocess.PIPE
    env = environment() | variables
    with subprocess.Popen(command, cwd=root.parent, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        watched, over = set(), threading.Event()

        def watch() -> None:
            parent = psutil.Process(process.pid)
            while not over.wait(0.2):
                for child in parent.children(recursive=True):
                    try:
                        watched.add(" ".join(child.cmdline()))
                    except psutil.Error:  # it has ended meanwhile
                        continue

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            out, err = process.communicate(timeout=300)
        finally:
            over.set()
            watcher.join()
    return Answer(process.returncode, out, err, frozenset(watched))


def run_in_one_process(commands: list[list[str]], root: Path, **variables: str) -> list[Answer]:
    """As ``run``, one after the other, in one process that imports everything once; its children are not watched."""
    process = subprocess.run(
        [sys.executable, "-c", MANY_COMMANDS],
        input=json.dumps(commands),
        env=environment() | {"VNET_ROOT": str(root), "PYTHONPATH": str(REPOSITORY)} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return [Answer(answer["code"], answer["out"], answer["err"]) for answer in json.loads(process.stdout)]


@pytest.fixture
def vnet(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run a command that needs no flow in this process, and leave the process as it was."""
    variables, log = dict(os.environ), logging.getLogger("vnet")
    handlers, propagate = list(log.handlers), log.propagate

    def call(*arguments: str | Path) -> Answer:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    yield call
    os.environ.clear()
    os.environ.update(variables)
    log.handlers, log.propagate = handlers, propagate


@pytest.fixture(scope="module")
def root(walkthrough: Walkthrough, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the walkthrough's root that the tests of this file may add to."""
    for done in walkthrough.runs:
        assert done.returncode == 0, done.stderr
    return walkthrough.copy_root(tmp_path_factory.mktemp("commands") / "vnet-data")


def truth_of(walkthrough: Walkthrough) -> list[str]:
    """Names of the whole scans of the night, by name."""
    return sorted(path.name.removesuffix(".nii.gz") for path in (walkthrough.folder / "scans" / "truth").iterdir())


# --- a night that has nothing to do, and one that has


def test_the_same_night_again_computes_nothing_and_starts_no_engine(walkthrough: Walkthrough, root: Path) -> None:
    again = run("nightly", "--cohort", "tonight", "--model", "organs", root=root)
    assert again.code == 3, again.err
    assert "no case computed: 3 cached, 1 refused" in again.out
    assert again.started("flows.server")  # the watch sees what there is
    assert not again.started("raylet")
    assert not again.started("multiprocessing")
    assert "Traceback" not in again.err


@pytest.fixture(scope="module")
def second_night(
    walkthrough: Walkthrough, root: Path, site_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Answer:
    """The night after one scan stayed, one changed, one was renamed and one was added, with a hostile manifest."""
    _, changed, renamed = truth_of(walkthrough)
    night = tmp_path_factory.mktemp("sources") / "night"
    shutil.copytree(walkthrough.folder / "scans" / "night", night)
    volume = read_volume(night / f"{changed}.nii.gz")
    write_volume(night / f"{changed}.nii.gz", Volume(volume.voxels + np.int16(1), volume.geometry))
    (night / f"{renamed}.nii.gz").rename(night / "renamed.nii.gz")
    (night.parent / "more").mkdir()
    write_volume(night.parent / "more" / "scan.mha", phantom(SMALL)[0])
    manifest = night.parent / "more.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image", "patient"])
        writer.writerow(["=2+3", "more/scan.mha", "=1+1"])
        writer.writerow(["absent", "=calc.nii.gz", ""])
    ingested = run("ingest", night, manifest, "--cohort", "tonight", "--json", root=root)
    assert ingested.code == 3, ingested.err
    nightly = ("nightly", "--cohort", "tonight", "--model", "organs", "--json")
    return run(*nightly, root=root, PREFECT_API_URL=site_server.api_url)


def new_case(answer: Answer) -> str:
    """The id that a case called =2+3 gets."""
    return next(name for name in answer.states if name.startswith("2-3-"))


def test_only_new_and_changed_scans_are_computed(walkthrough: Walkthrough, root: Path, second_night: Answer) -> None:
    same, changed, _ = truth_of(walkthrough)
    assert second_night.code == 3, second_night.err
    assert second_night.states == {
        same: "cached",
        changed: "computed",
        # a mask belongs to a case, so a scan under another name is another case ...
        "renamed": "computed",
        new_case(second_night): "computed",
        "absent": "refused",
        "cut-short": "refused",
    }
    assert second_night.document["counts"] == {"cached": 1, "computed": 3, "refused": 2}
    # ... but its bytes were preprocessed before: 3 computed cases, 2 new volumes
    before = {path.name for path in (walkthrough.root / "volumes").iterdir()}
    assert len({path.name for path in (root / "volumes").iterdir()} - before) == 2
    assert second_night.started("raylet")
    assert second_night.started("multiprocessing")


def test_a_night_is_one_json_document(walkthrough: Walkthrough, root: Path, second_night: Answer) -> None:
    document = second_night.document
    assert document["command"] == "nightly"
    assert document["root"] == str(root)
    assert document["seconds"] > 0
    for case in document["cases"]:
        if case["state"] == "refused":
            assert case.keys() == CASE_KEYS
            continue
        # whether a mask of so short a training is flagged, and so waits for a person, is the machine's arithmetic
        assert case.keys() - {"review"} == CASE_KEYS | {"mask", "labels"}
        assert (case["codes"], case["message"]) == ([], "")
        mask = nibabel.load(case["mask"])
        voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
        values = np.asarray(mask.dataobj)
        for label in case["labels"]:
            assert label.keys() == LABEL_KEYS
            z = np.flatnonzero((values == label["label"]).any(axis=(0, 1)))
            assert label["voxels"] == np.count_nonzero(values == label["label"])
            assert label["volume_ml"] == pytest.approx(label["voxels"] * voxel_ml, rel=1e-5)
            assert label["slices"] == ([z[0], z[-1]] if len(z) else None)
        assert [label["name"] for label in case["labels"]] == ["organ", "lesion"]
    cut = second_night.case("cut-short")
    assert cut["codes"] == ["scan.truncated"]
    assert "copy the file again" in cut["message"]
    assert "Traceback" not in second_night.err


def test_the_tables_have_every_case_and_no_formula(root: Path, second_night: Answer) -> None:
    prefix = root / "reports" / "tonight" / second_night.document["night"]
    rows = pyarrow.parquet.read_table(f"{prefix}.parquet").to_pylist()
    with open(f"{prefix}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    states = second_night.states
    assert {row["case"]: row["state"] for row in rows} == states
    assert {line["case"]: line["state"] for line in lines} == states
    assert len(rows) == len(lines) == 2 * 4 + 2  # two labels of four masks, and a row for each refusal
    hostile = new_case(second_night)
    assert {row["patient"] for row in rows if row["case"] == hostile} == {"=1+1"}
    assert {line["patient"] for line in lines if line["case"] == hostile} == {"'=1+1"}
    (absent,) = (line for line in lines if line["case"] == "absent")
    assert absent["codes"] == "scan.missing"
    assert "calc" not in absent["message"], "a file may be named after its patient"
    for line in lines:
        for cell in line.values():
            assert not cell.startswith(("=", "@", "\t", "\r"))
            assert not cell.startswith(("+", "-")) or np.isfinite(float(cell))


# --- one scan, and grids of every kind


def test_one_scan_file_is_segmented_into_a_named_folder(
    walkthrough: Walkthrough, root: Path, site: dict[str, str], tmp_path: Path
) -> None:
    name = truth_of(walkthrough)[0]
    scan = walkthrough.folder / "scans" / "night" / f"{name}.nii.gz"
    output = tmp_path / "new" / "masks"
    options = ("--model", "organs@v1", "--output", output, "--format", "mha", "--json")
    answer = run("segment", scan, *options, root=root, **site)
    assert answer.code == 0, answer.err
    assert answer.states == {name: "computed"}
    assert [path.name for path in output.iterdir()] == [f"{name}.mha"]
    assert answer.case(name)["mask"] == str(output / f"{name}.mha")
    mask, source = sitk.ReadImage(str(output / f"{name}.mha")), sitk.ReadImage(str(scan))
    assert mask.GetSize() == source.GetSize()
    assert mask.GetPixelID() == sitk.sitkUInt8
    # the same mask as the night's, in another format
    night = sitk.ReadImage(str(walkthrough.folder / "masks" / f"{name}.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(night))


def flipped(direction: Any) -> Any:
    """The grid counted from its other end along every axis, which makes a right-handed one left-handed."""
    return tuple((-z, -y, -x) for z, y, x in direction)


def test_masks_lie_exactly_on_the_grid_of_their_scan(root: Path, site: dict[str, str], tmp_path: Path) -> None:
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    grids = {
        "axial": CANONICAL_DIRECTION,
        "sagittal": SAGITTAL_DIRECTION,
        "oblique": oblique_direction((11.0, -17.0, 23.0)),
        "flipped": flipped(CANONICAL_DIRECTION),
    }
    for name, direction in grids.items():
        write_volume(scans / f"{name}.nii.gz", phantom(replace(SMALL, direction=direction))[0])
    options = ("--model", "organs", "--output", masks, "--json")
    answer = run("segment", scans, *options, root=root, **site)
    assert answer.code == 0, answer.err
    assert answer.states == dict.fromkeys(grids, "computed")
    for name in grids:
        source, mask = str(scans / f"{name}.nii.gz"), str(masks / f"{name}.nii.gz")
        ours, theirs = nibabel.load(mask), nibabel.load(source)
        assert ours.shape == theirs.shape == SMALL.shape[::-1]
        assert np.array_equal(ours.affine, theirs.affine)
        assert ours.header.get_zooms() == theirs.header.get_zooms()
        image, scan = sitk.ReadImage(mask), sitk.ReadImage(source)
        for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, fact)() == getattr(scan, fact)(), f"{name} {fact}"
    assert len({np.sign(np.linalg.det(nibabel.load(path).affine)) for path in masks.iterdir()}) == 2


# --- what cannot work


@pytest.fixture(scope="module")
def refusals(
    walkthrough: Walkthrough, root: Path, site_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answer]:
    """Commands that cannot work, all run in one process against one Prefect server."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "key.toml").write_text("[training]\npatch_sise = [24, 24, 24]\n")
    (folder / "patch.toml").write_text("[network]\nconvolutions = [1, 1, 1]\n[training]\npatch_size = [26, 24, 24]\n")
    (folder / "site.toml").write_text('dask_adress = "tcp://10.0.0.5:8786"\n')
    scans = str(walkthrough.folder / "scans" / "night")
    commands = {
        "neither": ["segment", "--model", "organs"],
        "both": ["segment", scans, "--cohort", "tonight", "--model", "organs"],
        "model": ["nightly", "--cohort", "tonight", "--model", "organ"],
        "version": ["nightly", "--cohort", "tonight", "--model", "organs@v7"],
        "cohort": ["nightly", "--cohort", "tonite", "--model", "organs", "--json"],
        "key": ["preprocess", "--cohort", "training", "--plan", str(folder / "key.toml")],
        "patch": ["train", "--cohort", "training", "--model", "new", "--plan", str(folder / "patch.toml")],
        "site": ["nightly", "--cohort", "tonight", "--model", "organs", "--site", str(folder / "site.toml")],
        "source": ["segment", str(folder / "nowhere"), "--model", "organs"],
        "workers": ["train", "--cohort", "training", "--model", "new", "--workers", "0"],
        "resume": ["train", "--cohort", "training", "--model", "new", "--resume"],
        "option": ["train", "--cohort", "training", "--model", "new", "--steps", "5", "--minutes", "1"],
    }
    answers = run_in_one_process(list(commands.values()), root, PREFECT_API_URL=site_server.api_url)
    return dict(zip(commands, answers, strict=True))


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("neither", ["segment.input", "either sources or --cohort"]),
        ("both", ["segment.input", "either sources or --cohort"]),
        ("model", ["model.unknown", "'organ'", "known: organs"]),
        ("version", ["model.version", "'v7'", "it has v1"]),
        ("cohort", ["cohort.unknown", "'tonite'", "tonight, training"]),
        ("key", ["plan.unknown-key", "training.patch_sise", "nearest is training.patch_size"]),
        ("patch", ["plan.value", "(26, 24, 24)", "multiple of 4 along z", "use 24 or 28"]),
        ("site", ["site.unknown-key", "dask_adress", "nearest is dask_address"]),
        ("source", ["source.missing", "nowhere"]),
        ("workers", ["train.value", "workers", "greater than or equal to 1"]),
        ("resume", ["train.nothing-to-resume", "leave out --resume"]),
        ("option", ["--minutes", "not allowed with"]),
    ],
)
def test_usage_errors_end_with_2_and_name_the_remedy(
    refusals: dict[str, Answer], command: str, parts: list[str]
) -> None:
    answer = refusals[command]
    assert answer.code == 2, answer.err
    for part in parts:
        assert part in answer.err
    assert "Traceback" not in answer.err


def test_an_error_is_a_json_document_too(refusals: dict[str, Answer]) -> None:
    document = refusals["cohort"].document
    assert document["command"] == "nightly"
    assert document["error"]["code"] == "cohort.unknown"
    assert "tonight" in document["error"]["message"]


def test_usage_errors_leave_nothing(refusals: dict[str, Answer], root: Path) -> None:
    assert [path.name for path in (root / "models").iterdir()] == ["organs"]
    assert not (root / "training" / "new").exists()


# --- verdicts


def two_channels(folder: Path, name: str) -> None:
    """One good case of a folder in nnU-Net's layout."""
    image, label = phantom(SMALL)
    # the same bytes under two names would be one case too many
    image = Volume(image.voxels + np.int16(sum(name.encode()) % 100), image.geometry)
    write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", image)
    write_volume(folder / "imagesTr" / f"{name}_0001.nii.gz", image)
    write_volume(folder / "labelsTr" / f"{name}.nii.gz", label)


def test_each_bad_case_is_one_refused_row_and_the_others_go_on(vnet, tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for name in ("imagesTr", "labelsTr"):
        (source / name).mkdir(parents=True)
    for name in ("good", "fine", "garbled", "mislabelled", "one-channel"):
        two_channels(source, name)
    (source / "imagesTr" / "garbled_0001.nii.gz").write_bytes(b"no scan at all")
    small = Geometry((4, 4, 4), (3.0, 2.5, 2.0), (0.0, 0.0, 0.0))
    write_label(source / "labelsTr" / "mislabelled.nii.gz", np.ones((4, 4, 4), np.uint8), small)
    (source / "imagesTr" / "one-channel_0001.nii.gz").unlink()
    shutil.copy(source / "labelsTr" / "good.nii.gz", source / "labelsTr" / "imageless.nii.gz")
    answer = vnet("ingest", source, "--cohort", "mixed", "--json", "--root", root)
    assert answer.code == 3, answer.err
    found = {case["case"]: (case["state"], case["codes"]) for case in answer.document["cases"]}
    assert found == {
        "fine": ("accepted", []),
        "garbled": ("refused", ["scan.unreadable"]),
        "good": ("accepted", []),
        "imageless": ("refused", ["cohort.missing-image"]),
        "mislabelled": ("refused", ["label.grid"]),
        "one-channel": ("refused", ["cohort.missing-channel"]),
    }
    assert all(case["message"] for case in answer.document["cases"] if case["state"] == "refused")
    assert answer.document["sources"] == [str(source)]


def test_a_cohort_without_a_usable_case_ends_with_4(vnet, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.nii.gz").write_bytes(b"no scan at all")
    (tmp_path / "source" / "b.nrrd").write_bytes(b"")
    answer = vnet("ingest", tmp_path / "source", "--cohort", "bad", "--root", tmp_path / "root")
    assert answer.code == 4
    assert "2 refused" in answer.out
    assert "scan.unreadable" in answer.out


def test_an_empty_folder_ends_with_2(vnet, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("nothing here")
    answer = vnet("ingest", tmp_path / "source", "--cohort", "empty", "--json", "--root", tmp_path / "root")
    assert answer.code == 2
    assert answer.document["error"]["code"] == "cohort.empty"
    assert "1 other files" in answer.err
    assert not (tmp_path / "root" / "cohorts").exists()


# --- questions


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ([], lambda row: True),
        (["--label", "organ"], lambda row: row["name"] == "organ"),
        (["--state", "refused"], lambda row: row["state"] == "refused"),
        (["--case", "cut-short"], lambda row: row["case"] == "cut-short"),
        (["--flag", "empty"], lambda row: "empty" in (row["flags"] or "").split()),
        (["--volume-min-ml", "5"], lambda row: row["volume_ml"] is not None and row["volume_ml"] >= 5),
        (["--volume-max-ml", "5"], lambda row: row["volume_ml"] is not None and row["volume_ml"] <= 5),
        (["--change-min-percent", "1"], lambda row: abs(row["change_percent"] or 0) >= 1),
        (["--label", "nothing"], lambda row: False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_query_filters_the_rows_of_all_nights(
    vnet, root: Path, second_night: Answer, filters: list[str], passes: Callable[[dict], bool]
) -> None:
    answer = vnet("query", "--cohort", "tonight", *filters, "--json", "--root", root)
    assert answer.code == 0
    tables = sorted((root / "reports" / "tonight").glob("*.parquet"), reverse=True)
    rows = [row for table in tables for row in pyarrow.parquet.read_table(table).to_pylist()]
    assert answer.document["rows"] == [row for row in rows if passes(row)]
    assert answer.document["cases"] == []


def test_query_is_limited_and_names_the_cohorts_it_knows(vnet, root: Path, second_night: Answer) -> None:
    newest = vnet("query", "--cohort", "tonight", "--nights", "1", "--json", "--root", root).document["rows"]
    assert {row["night"] for row in newest} == {second_night.document["night"]}
    assert vnet("query", "--cohort", "tonight", "--limit", "3", "--json", "--root", root).document["rows"] == newest[:3]
    unknown = vnet("query", "--cohort", "nobody", "--root", root)
    assert unknown.code == 2
    assert "tonight" in unknown.err
    assert vnet("query", "--label", "nothing", "--root", root).out == "no rows\n"


def test_models_are_listed_and_shown(vnet, root: Path, tmp_path: Path) -> None:
    (model,) = vnet("models", "list", "--json", "--root", root).document["models"]
    assert model["model"] == "organs@v1"
    assert (model["labels"], model["steps"]) == ("organ lesion", 6)
    assert "organs@v1" in vnet("models", "list", "--root", root).out
    shown = vnet("models", "show", "organs", "--json", "--root", root).document
    assert shown["model"]["plan"]["network"]["convolutions"] == [1, 1, 1]
    assert len(shown["digest"]) == 64
    unknown = vnet("models", "show", "liver", "--root", root)
    assert unknown.code == 2
    assert "known: organs" in unknown.err
    assert vnet("models", "show", "--root", root).code == 2
    assert vnet("models", "list", "--root", tmp_path / "fresh").out == "no models\n"


# --- evaluation


def write_pair(folder: Path, name: str, predicted: np.ndarray, true: np.ndarray) -> None:
    grid = Geometry((2, 4, 5), (2.0, 1.0, 5.0), (0.0, 0.0, 0.0))  # 10 mm^3, 0.01 mL a voxel
    write_label(folder / "masks" / f"{name}.nii.gz", predicted, grid)
    write_label(folder / "truth" / f"{name}.nii.gz", true, grid)


def test_evaluate_gives_the_figures_of_a_pencil(vnet, tmp_path: Path) -> None:
    for name in ("masks", "truth"):
        (tmp_path / name).mkdir()
    predicted, true = np.zeros((2, 2, 4, 5), np.uint8)
    predicted[0, :2, :] = 1  # 10 voxels
    true[0, :3, :2] = 1  # 6 voxels, of which 4 are predicted
    true[1, 0, 0] = 2  # 1 voxel, not predicted
    write_pair(tmp_path, "a", predicted, true)
    write_pair(tmp_path, "b", true * (true == 1), true * (true == 1))
    shutil.copy(tmp_path / "masks" / "a.nii.gz", tmp_path / "masks" / "lonely.nii.gz")
    table = tmp_path / "out" / "scores.csv"
    labels = ["--label", "1=organ", "--label", "2=lesion"]
    answer = vnet("evaluate", tmp_path / "masks", tmp_path / "truth", *labels, "--output", table, "--json")
    assert answer.code == 3, answer.err
    assert answer.states == {"a": "computed", "b": "computed", "lonely": "refused"}
    assert answer.case("lonely")["codes"] == ["evaluate.no-truth"]
    organ, lesion = answer.case("a")["labels"]
    assert organ["dice"] == 2 * 4 / (10 + 6)
    assert (organ["volume_ml"], organ["truth_volume_ml"]) == pytest.approx((0.1, 0.06))
    assert organ["volume_error_ml"] == pytest.approx(0.04)
    assert organ["volume_error"] == pytest.approx(4 / 6)
    assert (lesion["name"], lesion["dice"], lesion["volume_error"]) == ("lesion", 0.0, -1.0)
    organ, lesion = answer.case("b")["labels"]
    assert (organ["dice"], organ["volume_error"]) == (1.0, 0.0)
    assert (lesion["dice"], lesion["volume_error"]) == (None, None)  # nothing there, nothing found: no score
    assert answer.document["dice"] == {"lesion": 0.0, "organ": 0.75}
    assert answer.document["mean_dice"] == 0.375
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["name"], row["dice"]) for row in rows] == [
        ("a", "organ", "0.5"),
        ("a", "lesion", "0.0"),
        ("b", "organ", "1.0"),
        ("b", "lesion", ""),
    ]


def test_evaluate_without_a_folder_or_masks_ends_with_2(vnet, tmp_path: Path) -> None:
    nowhere = vnet("evaluate", tmp_path / "nowhere", tmp_path)
    assert (nowhere.code, "evaluate.folder" in nowhere.err) == (2, True)
    empty = vnet("evaluate", tmp_path, tmp_path)
    assert (empty.code, "evaluate.empty" in empty.err) == (2, True)


def test_a_root_behind_a_file_is_told_before_anything_starts(vnet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = vnet("nightly", "--cohort", "tonight", "--model", "organs", "--json", "--root", tmp_path / "file" / "root")
    assert answer.code == 2
    assert answer.document["error"]["code"] == "store.unwritable"
    assert str(tmp_path / "file" / "root") in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
