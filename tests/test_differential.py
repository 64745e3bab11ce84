"""Valid but unusual scans: values and places equal to those of two independent readers.

Where a reader is wrong or refuses, the table says why, and the test holds that it is so: then the truth that was
written takes its place.
"""

import gzip
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

nib = pytest.importorskip("nibabel", reason="nibabel is a dependency of tests only")
dcm2niix = pytest.importorskip("dcm2niix", reason="dcm2niix is a dependency of tests only")

import SimpleITK as sitk  # noqa: E402
from pydicom import Dataset, dcmwrite  # noqa: E402

from tests.bad_inputs import metaimage, nifti, objects, slices  # noqa: E402
from tests.bad_inputs.dicom import mirrored, rescaled, rescaled_truth  # noqa: E402
from tests.bad_inputs.inputs import OBLIQUE, Truth, grid, random  # noqa: E402
from vnet_core.geometry import Geometry, matrix_of, same_grid  # noqa: E402
from vnet_core.volume import Volume, canonical  # noqa: E402
from workers.sources.scans import read_label, read_volume  # noqa: E402

PLACE_TOLERANCE_MM = 2e-3
"""NIfTI and dcm2niix keep places as float32."""
VALUE_TOLERANCE = 1e-6
"""Relative, for rescaled values that a reader keeps as float32."""


@dataclass(frozen=True)
class Unusual:
    """One scan, the readers that it is compared with, and those that are not right."""

    make: Callable[[Path], Truth]
    """Writes the scan into an empty folder."""
    opens: str
    """Relative to the folder."""
    readers: tuple[str, ...]
    not_right: Mapping[str, str] = field(default_factory=dict)
    """Why a reader refuses the scan, or reads it wrong."""


# --- NIfTI


def stored_nifti(
    voxels: np.ndarray, geometry: Geometry = nifti.GEOMETRY, kind: type = nib.Nifti1Image, change: Callable = bytes
) -> Callable[[Path], Truth]:
    def make(folder: Path) -> Truth:
        content = bytearray(nifti.image(voxels, geometry, kind).to_bytes())
        (folder / "scan.nii").write_bytes(change(content))
        return Truth(voxels, geometry)

    return make


def scaled(content: bytearray) -> bytes:
    nifti.put("f", (nifti.SLOPE, (0.25, -7.5)))(content)
    return bytes(content)


def scaled_nifti(folder: Path) -> Truth:
    truth = stored_nifti(random(nifti.SHAPE), change=scaled)(folder)
    return Truth(truth.voxels * 0.25 - 7.5, truth.geometry)


def qform_only(content: bytearray) -> bytes:
    nifti.put("h", (nifti.QFORM_CODE, (1, 0)))(content)
    nifti.put("f", (nifti.SROW, (0.0,) * 12))(content)
    return bytes(content)


def big_endian_nifti(folder: Path) -> Truth:
    (folder / "scan.nii").write_bytes(nifti.big_endian())
    return Truth(random(nifti.SHAPE), nifti.GEOMETRY)


def many_members(folder: Path) -> Truth:
    content = nifti.stored()
    pieces = [content[start : start + 777] for start in range(0, len(content), 777)]
    (folder / "scan.nii.gz").write_bytes(b"".join(gzip.compress(piece) for piece in pieces))
    return Truth(random(nifti.SHAPE), nifti.GEOMETRY)


LEFT_HANDED = grid(nifti.SHAPE, (2.5, 1.1, 0.9), direction=OBLIQUE * [-1, 1, 1])
SAGITTAL = grid(nifti.SHAPE, (2.5, 1.1, 0.9), direction=np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]))


# --- MetaImage and NRRD


def meta(packed: bool) -> Callable[[Path], Truth]:
    def make(folder: Path) -> Truth:
        content = zlib.compress(metaimage.voxels()) if packed else metaimage.voxels()
        # without the size ITK inflates nothing, and gives what was in the memory before
        head = metaimage.header(CompressedData=str(packed), CompressedDataSize=str(len(content)) if packed else "")
        (folder / "scan.mha").write_bytes(head + content)
        return Truth(random(metaimage.SHAPE), metaimage.GEOMETRY)

    return make


def meta_big_endian(folder: Path) -> Truth:
    content = random(metaimage.SHAPE).astype(">i2").tobytes()
    (folder / "scan.mhd").write_bytes(metaimage.header("scan.raw", BinaryDataByteOrderMSB="True"))
    (folder / "scan.raw").write_bytes(content)
    return Truth(random(metaimage.SHAPE), metaimage.GEOMETRY)


def nrrd(folder: Path) -> Truth:
    geometry = grid(nifti.SHAPE, (2.5, 1.1, 0.9), direction=OBLIQUE)
    steps = (geometry.matrix[:3, 2::-1] * [[-1], [-1], [1]]).T
    vectors = " ".join(f"({','.join(map(repr, step.tolist()))})" for step in steps)
    x, y, z = geometry.origin_mm
    header = (
        "NRRD0005\n# a comment\ntype: short\ndimension: 3\nspace: right-anterior-superior\n"
        f"sizes: 12 9 10\nspace directions: {vectors}\nkinds: domain domain domain\nendian: little\n"
        f"encoding: gzip\nspace origin: ({-x!r},{-y!r},{z!r})\nkey:=a value of the user\n\n"
    )
    content = random(nifti.SHAPE).astype("<i2").tobytes()
    (folder / "scan.nrrd").write_bytes(header.encode() + gzip.compress(content))
    return Truth(random(nifti.SHAPE), geometry)


# --- DICOM


def dicom(change: Callable[[list[Dataset]], object] = lambda s: None) -> Callable[[Path], Truth]:
    """An oblique series, changed in place."""
    geometry = grid(slices.SHAPE, (2.0, 1.1, 0.9), direction=OBLIQUE)

    def make(folder: Path) -> Truth:
        series = slices.plain(geometry=geometry)
        change(series)
        slices.save(folder, series)
        return Truth(slices.truth().voxels, geometry)

    return make


def transcoded(syntax: str) -> Callable[[Path], Truth]:
    def make(folder: Path) -> Truth:
        truth = dicom()(folder)
        slices.transcode(folder, syntax)
        return truth

    return make


def slopes(folder: Path) -> Truth:
    geometry = dicom(rescaled)(folder).geometry
    return Truth(rescaled_truth().voxels, geometry)


def signed(series: list[Dataset]) -> None:
    """Hounsfield units stored as they are, in twelve bits with a sign."""
    for ds in series:
        values = np.frombuffer(ds.PixelData, "<u2").astype(np.int16) + slices.INTERCEPT
        ds.PixelRepresentation, ds.RescaleIntercept = 1, 0
        ds.BitsStored, ds.HighBit = 12, 11
        ds.PixelData = values.astype("<i2").tobytes()


def enhanced(folder: Path) -> Truth:
    geometry = grid(slices.SHAPE, (2.0, 1.1, 0.9), direction=OBLIQUE)
    series = slices.plain(geometry=geometry)
    dcmwrite(folder / "enhanced.dcm", objects.enhanced(series, range(10)), enforce_file_format=True)
    return Truth(slices.truth().voxels, geometry)


NIFTI = ("nibabel", "SimpleITK")
DICOM = ("dcm2niix", "SimpleITK")
INVERTS = "turns the values of MONOCHROME1 over, so that Hounsfield units change their sign"

SCANS = {
    "big-endian": Unusual(big_endian_nifti, "scan.nii", NIFTI),
    "NIfTI-2": Unusual(
        stored_nifti(random(nifti.SHAPE), kind=nib.Nifti2Image),
        "scan.nii",
        ("nibabel",),
        {"SimpleITK": "reads no NIfTI-2"},
    ),
    "float64": Unusual(stored_nifti(random(nifti.SHAPE) / 3), "scan.nii", NIFTI),
    "int8": Unusual(stored_nifti(random(nifti.SHAPE, -128, 128).astype(np.int8)), "scan.nii", NIFTI),
    "rescaled": Unusual(scaled_nifti, "scan.nii", NIFTI),
    "gzip members": Unusual(many_members, "scan.nii.gz", NIFTI),
    "qform alone": Unusual(stored_nifti(random(nifti.SHAPE), change=qform_only), "scan.nii", NIFTI),
    "left-handed": Unusual(stored_nifti(random(nifti.SHAPE), LEFT_HANDED), "scan.nii", NIFTI),
    "sagittal": Unusual(stored_nifti(random(nifti.SHAPE), SAGITTAL), "scan.nii", NIFTI),
    "MetaImage raw": Unusual(meta(packed=False), "scan.mha", ("SimpleITK",)),
    "MetaImage zlib": Unusual(meta(packed=True), "scan.mha", ("SimpleITK",)),
    "MetaImage big-endian": Unusual(meta_big_endian, "scan.mhd", ("SimpleITK",)),
    "NRRD gzip, RAS": Unusual(nrrd, "scan.nrrd", ("SimpleITK",)),
    "DICOM": Unusual(dicom(), ".", DICOM),
    "DICOM signed": Unusual(dicom(signed), ".", DICOM),
    "DICOM big-endian": Unusual(dicom(slices.big_endian), ".", DICOM),
    "DICOM deflated": Unusual(dicom(slices.deflated), ".", ("SimpleITK",), {"dcm2niix": "inflates no data sets"}),
    "DICOM RLE": Unusual(dicom(slices.run_length), ".", DICOM),
    "DICOM JPEG-LS": Unusual(dicom(slices.jpeg_ls), ".", DICOM),
    "DICOM JPEG 2000": Unusual(transcoded("JPEG2000Lossless"), ".", DICOM),
    "DICOM JPEG lossless": Unusual(transcoded("JPEGLosslessProcess14_1"), ".", DICOM),
    "DICOM MONOCHROME1": Unusual(dicom(mirrored), ".", ("dcm2niix",), {"SimpleITK": INVERTS}),
    "DICOM slope per slice": Unusual(slopes, ".", DICOM),
    "DICOM enhanced": Unusual(enhanced, "enhanced.dcm", DICOM),
}


# --- readers


def by_nibabel(path: Path, work: Path) -> Volume:
    image = nib.load(path)
    return _volume(np.asanyarray(image.dataobj).T, np.diag([-1, -1, 1, 1]) @ image.affine)


def by_simpleitk(path: Path, work: Path) -> Volume:
    if path.is_dir():
        (series,) = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series))
    else:
        image = sitk.ReadImage(str(path))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return _volume(sitk.GetArrayFromImage(image), matrix)


def by_dcm2niix(path: Path, work: Path) -> Volume:
    folder = path if path.is_dir() else path.parent
    command = [dcm2niix.bin, "-b", "n", "-z", "n", "-f", "out", "-o", str(work), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (made,) = work.glob("*.nii")
    assert run.returncode == 0
    return by_nibabel(made, work)


READERS = {"nibabel": by_nibabel, "SimpleITK": by_simpleitk, "dcm2niix": by_dcm2niix}


def _volume(voxels: np.ndarray, matrix_xyz: np.ndarray) -> Volume:
    """From voxels (Z, Y, X) and the matrix from index x, y, z to LPS mm."""
    steps = matrix_xyz[:3, 2::-1]
    spacing = np.linalg.norm(steps, axis=0)
    z, y, x = map(float, spacing)
    a, b, c = map(float, matrix_xyz[:3, 3])
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    return Volume(voxels[None], Geometry(shape, (z, y, x), (a, b, c), matrix_of(steps / spacing)))


def same(a: Volume, b: Volume) -> bool:
    """Whether every voxel has one value and one place in the world, in whatever order the axes are."""
    (first, _), (second, _) = canonical(a), canonical(b)
    return same_grid(first.geometry, second.geometry, PLACE_TOLERANCE_MM) and np.allclose(
        first.voxels.astype(float), second.voxels.astype(float), VALUE_TOLERANCE, VALUE_TOLERANCE
    )


@pytest.mark.parametrize("name", SCANS)
def test_equal_to_two_independent_sources(name, tmp_path):
    """Two readers, or one and the truth that was written by other means."""
    scan = SCANS[name]
    source, work = tmp_path / "scan", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    written = scan.make(source)
    truth = Volume(written.voxels[None], written.geometry)
    ours = read_volume(source if name.startswith("DICOM") else source / scan.opens)
    assert same(ours, truth)
    for reader in scan.readers:
        assert same(ours, READERS[reader](source / scan.opens, work)), reader


@pytest.mark.parametrize(("name", "reader"), [(n, r) for n, scan in SCANS.items() for r in scan.not_right])
def test_why_a_reader_is_left_out(name, reader, tmp_path):
    scan = SCANS[name]
    source, work = tmp_path / "scan", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    written = scan.make(source)
    truth = Volume(written.voxels[None], written.geometry)
    try:
        found = READERS[reader](source / scan.opens, work)
    except (RuntimeError, ValueError):
        return
    assert not same(found, truth), f"{reader} is right now: compare with it"


def test_labels_of_64_bits(tmp_path):
    labels = random(nifti.SHAPE, 0, 5).astype(np.int64)
    image = nib.Nifti1Image(labels.T, nifti.ras_affine(nifti.GEOMETRY), dtype="int64")
    nib.save(image, tmp_path / "label.nii")
    assert nib.load(tmp_path / "label.nii").get_data_dtype() == np.int64
    ours = read_label(tmp_path / "label.nii")
    assert ours.voxels.dtype == np.uint8
    for reader in NIFTI:
        assert same(ours, READERS[reader](tmp_path / "label.nii", tmp_path))
