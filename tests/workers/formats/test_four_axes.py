"""NIfTI files with four axes: one named volume at a time, and the channels of the Decathlon the whole way."""

import gzip
import json
import struct
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import zarr

from tests.files import file_of
from tests.workers.formats.test_nifti import LPS_FROM_RAS, OBLIQUE, affine
from tests.workers.sources.test_scans import nifti_bytes, numbered, refused
from vnet_core.errors import ScanError
from vnet_core.geometry import world_mm
from vnet_core.plan import Plan
from vnet_core.sections import PreprocessPlan
from workers.cohort import load_entries, source_digest, volume_key
from workers.identity import private_root
from workers.ingest import ingest
from workers.ledger import Outcome
from workers.preprocess import preprocess
from workers.sources.reading import read_label_scan_apart, read_scan_apart
from workers.sources.scans import numbered_volume, read_geometry, read_label, read_scan, read_volume, source_files
from workers.storage.store import Root

SHAPE = (4, 3, 5, 6)
"""Volumes, then (z, y, x)."""


def written(path: Path, voxels: np.ndarray, where: np.ndarray, kind: type = nib.Nifti1Image) -> Path:
    """Volumes (T, Z, Y, X) as nibabel writes them, with sform and qform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = kind(voxels.T, where)
    image.set_sform(where, 1)
    image.set_qform(where, 1)
    nib.save(image, path)
    return path


# --- one volume


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">f4", "u1"])
def test_every_volume_is_what_nibabel_says(tmp_path, kind, suffix, dtype):
    path = written(tmp_path / f"a{suffix}", numbered(SHAPE, dtype), affine(OBLIQUE), kind)
    theirs = np.asarray(nib.load(path).dataobj)
    for number in range(SHAPE[0]):
        scan = read_scan(f"{path}[{number}]")
        assert (scan.warnings, scan.volume.voxels.dtype) == ((), np.dtype(dtype).newbyteorder("="))
        np.testing.assert_array_equal(scan.volume.voxels[0].T, theirs[..., number])
        assert read_geometry(f"{path}[{number}]") == scan.volume.geometry
        for z, y, x in ((0, 0, 0), (2, 4, 5)):
            ours = world_mm(scan.volume.geometry, np.array([z, y, x]))
            np.testing.assert_allclose(ours, (LPS_FROM_RAS @ affine(OBLIQUE) @ [x, y, z, 1])[:3], atol=1e-5)
    assert source_files(f"{path}[2]") == [path]


def test_rescaled_values_and_labels(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(numbered(SHAPE, "<i2"), (112, "2f", 0.5, -3.0)))
    found = read_volume(f"{path}[3]").voxels[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, numbered(SHAPE, "i2")[3] * 0.5 - 3)
    path.write_bytes(nifti_bytes(numbered(SHAPE, "<i2")))
    np.testing.assert_array_equal(read_label(f"{path}[1]").labels, numbered(SHAPE, "i2")[1])
    np.testing.assert_array_equal(read_label_scan_apart(f"{path}[1]").volume.labels, numbered(SHAPE, "i2")[1])
    np.testing.assert_array_equal(read_scan_apart(f"{path}[2]").volume.voxels[0], numbered(SHAPE, "i2")[2])


def test_a_file_with_three_axes_has_one_volume_and_trailing_axes_of_one_do_not_count(tmp_path):
    for name, voxels in (("a", numbered(SHAPE[1:], "<i2")), ("b", numbered((1, 1, *SHAPE[1:]), "<i2"))):
        path = tmp_path / f"{name}.nii"
        path.write_bytes(nifti_bytes(voxels))
        np.testing.assert_array_equal(read_volume(f"{path}[0]").voxels[0], numbered(SHAPE[1:]))
        assert refused(f"{path}[1]") == refused(f"{path}[1]", read_geometry) == "scan.not-3d"
    path.write_bytes(nifti_bytes(numbered((1, *SHAPE), "<i2")))
    np.testing.assert_array_equal(read_volume(f"{path}[3]").voxels[0], numbered(SHAPE, "<i2")[3])


def test_a_file_with_several_volumes_is_refused_with_the_names_of_them(tmp_path):
    path = tmp_path / "Doe.nii"
    path.write_bytes(nifti_bytes(numbered(SHAPE, "<i2")))
    with pytest.raises(ScanError, match=r"4 axes \(6, 5, 3, 4\).*FILE\[0\] to FILE\[3\]") as caught:
        read_volume(path)
    assert caught.value.code == "scan.not-3d"
    with pytest.raises(ScanError, match=r"\[4\] is named, but the last of the image's 4 volumes is \[3\]") as caught:
        read_volume(f"{path}[4]")
    assert caught.value.code == "scan.not-3d"


REFUSALS = {
    "five axes": (nifti_bytes(numbered((2, *SHAPE), "<i2")), "scan.not-3d"),
    "two axes": (nifti_bytes(numbered((5, 6), "<i2")), "scan.not-3d"),
    "no volume": (nifti_bytes(numbered(SHAPE, "<i2"), (48, "h", 0)), "scan.empty"),
    "fewer than no volume": (nifti_bytes(numbered(SHAPE, "<i2"), (48, "h", -4)), "scan.empty"),
    "too many voxels in all": (nifti_bytes(numbered(SHAPE, "<i2"), (42, "4h", 1024, 1024, 1024, 4)), "scan.too-large"),
    "the last volume cut": (nifti_bytes(numbered(SHAPE, "<i2"))[:-1], "scan.truncated"),
    "a volume more than declared": (nifti_bytes(numbered((4, 16, 16, 16), "<i2"), (48, "h", 3)), "scan.header"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("content", "code"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_with_any_volume_refuses_all(tmp_path, content, code, packed):
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert refused(f"{path}[0]") == code


def test_a_checksum_counts_for_volumes_that_are_not_read(tmp_path):
    whole = bytearray(gzip.compress(nifti_bytes(numbered(SHAPE, "<i2"))))
    whole[-8] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(whole)
    assert refused(f"{tmp_path / 'a.nii.gz'}[0]") == "scan.checksum"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_one_volume_is_held_in_memory(tmp_path, suffix):
    voxels = np.repeat(np.arange(16 * 64 * 128, dtype="<i2"), 128).reshape(16, 64, 128, 128)
    path = written(tmp_path / f"a{suffix}", voxels, affine(np.eye(3)))
    tracemalloc.start()
    try:
        found = read_volume(f"{path}[9]").voxels[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, voxels[9])
    assert peak < found.nbytes + 6 * 2**20, "2 MiB and what is inflated at once, of 32 MiB"


def test_where_the_second_reader_puts_it_still_counts(tmp_path):
    """Its axes are 4 x 4; a time step of 0 is what some converters write."""
    path = written(tmp_path / "a.nii", numbered(SHAPE, "<i2"), affine(OBLIQUE))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 92, 0.0)
    path.write_bytes(raw)
    assert sitk.ReadImage(str(path)).GetDimension() == 4
    assert read_geometry(f"{path}[1]").shape == SHAPE[1:]
    struct.pack_into("<f", raw, 80, 5.0)
    path.write_bytes(raw)
    assert refused(f"{path}[1]") == "geometry.ambiguous"


def test_the_volumes_of_a_real_file(real_scans):
    path = real_scans / "odd-nifti/image_4d_40x42x5x7.nii.gz"
    theirs = np.asarray(nib.load(path).dataobj)
    for number in range(7):
        np.testing.assert_array_equal(read_volume(f"{path}[{number}]").voxels[0].T, theirs[..., number])
    assert refused(path) == refused(f"{path}[7]") == "scan.not-3d"


def test_what_is_a_numbered_volume(tmp_path):
    assert numbered_volume("x/a.nii.gz[12]") == (Path("x/a.nii.gz"), 12)
    for source in (
        "a.nii",
        "a.nii[]",
        "a.nii[-1]",
        "a.nii[x]",
        "a.nii[1]x",
        "a.mha[1]",
        "folder[1]",
        "a.nii[1000000000]",
    ):
        assert numbered_volume(source) is None
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(numbered(SHAPE, "<i2")))
    assert numbered_volume(f"{path}[1]") == (path, 1)
    own = tmp_path / "a.nii[1]"
    own.write_bytes(b"")
    assert numbered_volume(own) is None, "a file of that very name goes first"
    assert refused(tmp_path / "absent.nii[0]") == "scan.unreadable"


# --- the Decathlon


EXECUTOR = ThreadPoolExecutor(1)


@pytest.fixture(scope="module", autouse=True)
def _end_the_reader() -> Iterator[None]:
    yield
    EXECUTOR.shutdown()


NAMES = ("FLAIR", "T1w", "t1gd", "T2w")
WHERE = np.diag([0.5, 0.75, 2.5, 1.0])
"""RAS, as nibabel has it: x and y are turned round for the network."""


def decathlon(folder: Path, cases: int = 2) -> dict[str, np.ndarray]:
    """A task in the layout of Task01; gives the channels (C, Z, Y, X) of every case as stored."""
    stored = {}
    for number in range(cases):
        name = f"BRATS_{number + 1:03}"
        stored[name] = np.random.default_rng(number).integers(0, 1001, (4, 6, 8, 10)).astype("<i2")
        written(folder / f"imagesTr/{name}.nii.gz", stored[name], WHERE)
        label = np.zeros((6, 8, 10), np.uint8)
        label[1:3, 2:5, 3 + number : 7] = 2
        written(folder / f"labelsTr/{name}.nii.gz", label, WHERE)
    mapping = {
        "modality": {str(i): name for i, name in enumerate(NAMES)},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor"},
    }
    (folder / "dataset.json").write_text(json.dumps(mapping))
    return stored


def ingested(root: Root, folder: Path) -> dict[str, Outcome]:
    return {outcome.case: outcome for outcome in ingest(root, "glioma", [str(folder)], EXECUTOR)[1]}


def test_a_task_of_the_decathlon_becomes_the_networks_input(tmp_path):
    root, folder = Root(tmp_path / "root"), tmp_path / "Task01"
    stored = decathlon(folder)
    cohort, outcomes = ingest(root, "glioma", [str(folder)], EXECUTOR)
    assert [(o.case, o.state, o.codes) for o in outcomes] == [(name, "accepted", ()) for name in stored]
    assert cohort.channels == NAMES
    assert [label.name for label in cohort.labels] == ["edema", "non-enhancing tumor"]
    plan = Plan(
        channels=cohort.channels,
        labels=cohort.labels,
        preprocess=PreprocessPlan(
            spacing_mm=(2.5, 0.75, 0.5), intensity="window", window=(0.0, 1000.0), crop_foreground=False
        ),
    )
    cases = [entry.case for entry in load_entries(root, "glioma")]
    assert {o.state for o in preprocess(root, cases, plan, EXECUTOR)} == {"computed"}
    for case in cases:
        arrays = zarr.open_group(file_of(root, volume_key(case, plan)), mode="r")
        image, label = np.asarray(arrays["image"]), np.asarray(arrays["label"])
        turned = stored[case.id][..., ::-1, ::-1].astype(np.float32)
        assert image.shape == (4, 6, 8, 10)
        np.testing.assert_allclose(image, turned / 500 - 1, atol=1e-5)
        drawn = nib.load(folder / f"labelsTr/{case.id}.nii.gz").get_fdata().T[:, ::-1, ::-1]
        np.testing.assert_array_equal(label.reshape(drawn.shape), drawn)


def test_the_case_keeps_which_volumes_it_is_made_of(tmp_path):
    root, folder = Root(tmp_path / "root"), tmp_path / "Task01"
    decathlon(folder)
    ingested(root, folder)
    case = load_entries(root, "glioma")[0].case
    file = folder / "imagesTr/BRATS_001.nii.gz"
    assert case.channels == tuple(f"{file}[{number}]" for number in range(4))
    kept = private_root(root).get_json("cohorts/glioma/cases/BRATS_001.json")
    assert tuple(kept["channels"]) == case.channels
    digests = {source_digest([f"{file}[{number}]"]) for number in range(4)} | {source_digest([str(file)])}
    assert len(digests) == 5, "each volume is decided by its number too"


def test_fewer_volumes_than_the_dataset_declares_and_a_link_out_of_it_are_refused(tmp_path):
    root, folder = Root(tmp_path / "root"), tmp_path / "Task01"
    stored = decathlon(folder, 3)
    written(folder / "imagesTr/BRATS_001.nii.gz", stored["BRATS_001"][:3], WHERE)
    file = folder / "imagesTr/BRATS_002.nii.gz"
    file.rename(tmp_path / "elsewhere.nii.gz")
    file.symlink_to(tmp_path / "elsewhere.nii.gz")
    outcomes = ingested(root, folder)
    assert {name: (o.state, *o.codes) for name, o in outcomes.items()} == {
        "BRATS_001": ("refused", "scan.not-3d"),
        "BRATS_002": ("refused", "scan.path-escape"),
        "BRATS_003": ("accepted",),
    }


def test_one_volume_may_be_a_source(tmp_path):
    decathlon(tmp_path / "Task01")
    root, file = Root(tmp_path / "root"), tmp_path / "Task01/imagesTr/BRATS_001.nii.gz"
    _, outcomes = ingest(root, "c", [f"{file}[1]", f"{file}[2]"], EXECUTOR)
    assert [(o.case, o.state) for o in outcomes] == [("BRATS_001-1", "accepted"), ("BRATS_001-2", "accepted")]
