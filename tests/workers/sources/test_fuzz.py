"""Damaged files through the reading child: a named refusal or a sound volume; no crash, no hang, no growth.

Seeds are the test files that nibabel and pydicom bring along, and small ones made here. The environment variable
VNET_FUZZ multiplies the number of tries.
"""

import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.formats.test_ome_zarr import image
from tests.workers.sources.test_scans import META, NRRD, OBLIQUE, grid, nifti_bytes, numbered
from vnet_core.errors import ScanError
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan
from workers.sources.reading import Limits, Reader
from workers.sources.scans import write_label

TIMES = int(os.environ.get("VNET_FUZZ", "1"))
LIMITS = Limits(judging_seconds=30, seconds=30)
PEAK_BYTES = 1 << 30
CODE = re.compile(r"(scan|geometry|dicom|label)\.[a-z0-9-]+")
FAULTS = ("scan.crashed-reader", "scan.slow-reader", "scan.reader-memory")
READINGS = (ReadingPlan(), ReadingPlan(nifti_transform="sform"), ReadingPlan(nifti_transform="qform"))

NIBABEL = Path(nib.__file__).parent / "tests" / "data"
NIFTI_SEEDS = (
    "anatomical.nii", "functional.nii", "example_nifti2.nii.gz", "standard.nii.gz", "reoriented_anat_moved.nii",
    "resampled_anat_moved.nii", "row_major.dconn.nii", "example4d.nii.gz",
)  # fmt: skip
SLICE_SEEDS = (
    "CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_implicit.dcm",
)  # fmt: skip
SLICES = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader(LIMITS)
    yield reader
    reader.close()


def peak_bytes(reader: Reader) -> int:
    """Most memory that the child has held so far."""
    status = Path(f"/proc/{reader.pid}/status").read_text("utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def outcome(reader: Reader, source: Path, reading: ReadingPlan = READINGS[0]) -> Scan | str:
    """The scan, which holds together, or the code of its refusal, which is no fault of the reader."""
    try:
        scan = reader.scan(source, reading)
    except ScanError as error:
        found = error
    else:
        assert scan.volume.voxels.shape == (1, *scan.volume.geometry.shape)
        assert np.isfinite(scan.volume.voxels).all()
        return scan
    assert CODE.fullmatch(found.code)
    assert found.code not in FAULTS, found.message
    assert source.name not in found.message
    return found.code


def mutated(rng: np.random.Generator, raw: bytes, header_bytes: int = 600) -> bytes:
    """One to three small damages, half of them near the beginning."""
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            return b""
        reach = min(len(data), header_bytes) if rng.random() < 0.5 else len(data)
        at = int(rng.integers(reach))
        kind = rng.integers(6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            data[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + int(rng.integers(1, 64))]
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 64))]
    return bytes(data)


def fuzzed(reader: Reader, seed: int, tries: int, victims: list[Path], source: Path) -> Counter[str]:
    """Outcomes of reading ``source`` with one of the ``victims`` damaged, which are whole again afterwards."""
    rng = np.random.default_rng(seed)
    whole = [path.read_bytes() for path in victims]
    seen: Counter[str] = Counter()
    for number in range(tries):
        at = int(rng.integers(len(victims)))
        victims[at].write_bytes(mutated(rng, whole[at]))
        found = outcome(reader, source, READINGS[number % 3])
        seen[found if isinstance(found, str) else "accepted"] += 1
        victims[at].write_bytes(whole[at])
    return seen


@pytest.mark.parametrize("name", NIFTI_SEEDS)
def test_damaged_nifti(reader, tmp_path, name):
    source = tmp_path / f"Doe_John{name.partition('.')[1]}{name.partition('.')[2]}"
    shutil.copy(NIBABEL / name, source)
    outcome(reader, source)
    first = reader.pid
    seen = fuzzed(reader, 1, 40 * TIMES, [source], source)
    assert len(seen) > 1 or set(seen) != {"accepted"}
    assert reader.pid == first
    assert peak_bytes(reader) < PEAK_BYTES


def made(folder: Path) -> dict[str, list[Path]]:
    """Sources and the files that they are made of."""
    block = numbered(dtype="<i2").tobytes()
    (folder / "Doe.mha").write_bytes(META + block)
    (folder / "Doe.mhd").write_bytes(META.replace(b"LOCAL", b"v.raw"))
    (folder / "v.raw").write_bytes(block)
    (folder / "Doe.nrrd").write_bytes(NRRD + block)
    (folder / "Doe.nii").write_bytes(nifti_bytes())
    write_label(folder / "packed.nrrd", numbered(), grid(OBLIQUE))
    write_label(folder / "packed.mha", numbered(), grid(OBLIQUE))
    image(folder / "v2.zarr", 2)
    image(folder / "v3.zarr", 3, chunks=(1, 2, 3), shards=(2, 4, 6))
    names = ("Doe.mha", "Doe.mhd", "Doe.nrrd", "Doe.nii", "packed.nrrd", "packed.mha")
    files = {name: [folder / name] for name in names}
    files["Doe.mhd"].append(folder / "v.raw")
    for name in ("v2.zarr", "v3.zarr"):
        files[name] = sorted(p for p in (folder / name).rglob("*") if p.is_file())
    return files


@pytest.mark.parametrize(
    "name", ["Doe.mha", "Doe.mhd", "Doe.nrrd", "Doe.nii", "packed.nrrd", "packed.mha", "v2.zarr", "v3.zarr"]
)
def test_damaged_small_files(reader, tmp_path, name):
    victims = made(tmp_path)[name]
    assert isinstance(outcome(reader, tmp_path / name), Scan)
    first = reader.pid
    seen = fuzzed(reader, 2, 60 * TIMES, victims, tmp_path / name)
    assert len(seen) > 2
    assert reader.pid == first
    assert peak_bytes(reader) < PEAK_BYTES


def dicom_series(folder: Path, name: str) -> list[Path]:
    """Three slices, 2 mm apart, of a test file of pydicom's, which is one slice."""
    dataset = pydicom.dcmread(SLICES / name)
    axes = [float(n) for n in dataset.ImageOrientationPatient]
    normal = np.cross(axes[:3], axes[3:])
    for number in range(3):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in normal * 2.0 * number]
        dataset.save_as(folder / f"{number}.dcm")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", SLICE_SEEDS)
def test_damaged_series(reader, tmp_path, name):
    folder = tmp_path / "Doe_John"
    folder.mkdir()
    victims = dicom_series(folder, name)
    assert isinstance(outcome(reader, folder), Scan)
    first = reader.pid
    seen = fuzzed(reader, 3, 25 * TIMES, victims, folder)
    assert len(seen) > 1
    assert reader.pid == first
    assert peak_bytes(reader) < PEAK_BYTES


def test_damaged_frames_in_one_file(reader, tmp_path, real_scans):
    folder = tmp_path / "Doe_John"
    shutil.copytree(real_scans / "dicom" / "dcmqi" / "24x38x3" / "multiframe", folder)
    assert isinstance(outcome(reader, folder), Scan)
    first = reader.pid
    seen = fuzzed(reader, 4, 60 * TIMES, sorted(folder.iterdir()), folder)
    assert len(seen) > 1
    assert reader.pid == first
    assert peak_bytes(reader) < PEAK_BYTES


def test_every_dicom_file_of_pydicom_whole_and_damaged(reader, tmp_path):
    """Alone in a folder, as a scan; and by itself, as a label on some grid."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "Doe_John"
    folder.mkdir()
    label = folder / "Roe.dcm"
    for path in sorted(SLICES.glob("*.dcm")):
        raw = path.read_bytes()
        for content in (raw, *(mutated(rng, raw) for _ in range(TIMES))):
            label.write_bytes(content)
            outcome(reader, folder)
            outcome_of_label(reader, label)
    assert peak_bytes(reader) < PEAK_BYTES


@pytest.mark.parametrize("name", ["rtstruct.dcm", "liver_1frame.dcm"])
def test_damaged_labels(reader, tmp_path, name):
    rng = np.random.default_rng(6)
    raw = (SLICES / name).read_bytes()
    first = reader.pid
    for _ in range(40 * TIMES):
        (tmp_path / "Doe.dcm").write_bytes(mutated(rng, raw, 6000))
        outcome_of_label(reader, tmp_path / "Doe.dcm")
    assert reader.pid == first


def outcome_of_label(reader: Reader, path: Path) -> None:
    try:
        found = reader.label(path, grid(OBLIQUE), [Label(value=1, name="liver")])
    except ScanError as error:
        refusal = error
    else:
        assert found.volume.voxels.dtype in (np.uint8, np.uint16)
        return
    assert CODE.fullmatch(refusal.code)
    # pydicom makes room for the length that an element declares, however short the file is
    assert refusal.code not in FAULTS[:2], refusal.message


# --- header fields


SHORT = (-(2**15), 2**15 - 1)
"""Least and largest of 16 bits."""
FIELDS = {
    40: ("h", st.sampled_from([3, 4, 5, 2, 1, 0, 8]) | st.integers(*SHORT)),
    42: ("h", st.sampled_from([5, 4, 1, 0, -5, 6]) | st.integers(*SHORT)),
    46: ("h", st.sampled_from([3, 2, 1, 4]) | st.integers(*SHORT)),
    48: ("h", st.sampled_from([1, 2, 0]) | st.integers(*SHORT)),
    70: ("h", st.sampled_from([2, 4, 8, 16, 64, 512, 128, 32]) | st.integers(*SHORT)),
    72: ("h", st.sampled_from([8, 16, 32, 64]) | st.integers(*SHORT)),
    76: ("f", st.sampled_from([1.0, -1.0, 0.0]) | st.floats(width=32)),
    80: ("f", st.sampled_from([0.5, -0.5, 0.0]) | st.floats(width=32)),
    88: ("f", st.floats(width=32)),
    108: ("f", st.sampled_from([352.0, 0.0, 348.0, 353.0, 368.0]) | st.floats(width=32)),
    112: ("f", st.sampled_from([1.0, 0.0, 2.0]) | st.floats(width=32)),
    116: ("f", st.floats(width=32)),
    123: ("B", st.integers(0, 255)),
    252: ("h", st.integers(-1, 6)),
    254: ("h", st.integers(-1, 6)),
    256: ("f", st.floats(-1, 1, width=32) | st.floats(width=32)),
    260: ("f", st.floats(-1, 1, width=32)),
    268: ("f", st.floats(width=32)),
    280: ("f", st.floats(width=32)),
    284: ("f", st.floats(-(2.0**-10), 2.0**-10, width=32) | st.floats(width=32)),
    292: ("f", st.floats(width=32)),
    348: ("B", st.integers(0, 1)),
}


@settings(
    max_examples=200 * TIMES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True),
    data=st.data(),
    number=st.integers(0, 2),
)
def test_nifti_fields(reader, tmp_path, edits, data, number):
    raw = bytearray(nifti_bytes())
    for at in edits:
        form, values = FIELDS[at]
        struct.pack_into("<" + form, raw, at, data.draw(values, label=str(at)))
    source = tmp_path / "Doe.nii"
    source.write_bytes(raw)
    found = outcome(reader, source, READINGS[number])
    if isinstance(found, Scan):
        other = nib.load(source)
        with np.errstate(all="ignore"):
            expected = np.squeeze(other.get_fdata(dtype=np.float64))
        np.testing.assert_allclose(np.squeeze(found.volume.voxels).T, expected, rtol=1e-5, atol=1e-30)
        assert found.volume.voxels[0].size <= (len(raw) - 352) // other.dataobj.dtype.itemsize


WORDS = st.sampled_from(
    ["0", "1", "-1", "3", "5 4 3", "5 4 4", "1 1 1", "0.5 0.75 2.5", "nan 1 1", "inf 1 1", "1e400", "True", "False", "",
     "MET_UCHAR", "MET_FLOAT", "uchar", "float", "gzip", "bzip2", "hex", "little", "big", "LOCAL", "LIST",
     "/etc/passwd", "../x", "1 0 0 0 1 0 0 0 1", "1 0 0 0.3 1 0 0 0 1", "(1,0,0) (0,1,0) (0,0,1)",
     "(1,0,0) (0.2,1,0) (0,0,1)", "none", "RAS", "LAS", "9" * 400]
) | st.text(max_size=20)  # fmt: skip


@settings(
    max_examples=150 * TIMES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(["Doe.mha", "Doe.nrrd"]), data=st.data())
def test_text_fields(reader, tmp_path, name, data):
    lines = (META if name == "Doe.mha" else NRRD).decode().rstrip("\n").split("\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        key, mark, _ = lines[at].partition(" = " if name == "Doe.mha" else ": ")
        lines[at] = key + mark + data.draw(WORDS)
    text = "\n".join(lines) + ("\n" if name == "Doe.mha" else "\n\n")
    (tmp_path / name).write_bytes(text.encode() + numbered(dtype="<i2").tobytes())
    found = outcome(reader, tmp_path / name)
    if isinstance(found, Scan):
        assert found.volume.voxels.nbytes <= 120
