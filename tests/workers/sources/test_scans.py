"""Scan files against nibabel and SimpleITK as independent readers, and every refusal on a small made file."""

import gzip
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of, same_grid, world_mm
from vnet_core.volume import Volume
from workers.sources.scans import (
    LABEL_SUFFIXES,
    SCAN_SUFFIXES,
    case_stem,
    is_scan,
    read_geometry,
    read_label,
    read_volume,
    source_files,
    write_label,
    write_volume,
)

SHAPE = (3, 4, 5)
SPACING_MM = (2.5, 0.75, 0.5)
ORIGIN_MM = (-12.5, 30.25, 7.0)
OBLIQUE = Rotation.from_euler("zyx", [20, -35, 50], degrees=True).as_matrix()
DIRECTIONS = {
    "axial": np.array(CANONICAL_DIRECTION),
    "sagittal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]),  # slices to the left, rows down, columns to the back
    "coronal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "flipped": np.array([[0, 0, -1], [0, 1, 0], [-1, 0, 0]]),
    "mirrored": np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]]),  # the other handedness
    "oblique": OBLIQUE,
    "nearly-axial": Rotation.from_euler("zyx", [0.05, 0.02, -0.03], degrees=True).as_matrix()
    @ np.array(CANONICAL_DIRECTION),
}


def grid(direction: np.ndarray, shape=SHAPE) -> Geometry:
    return Geometry(shape, SPACING_MM, ORIGIN_MM, matrix_of(direction))


def numbered(shape=SHAPE, dtype: type | str = np.uint8) -> np.ndarray:
    """Every voxel another value, so that any swap or flip of axes shows."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def itk_image(voxels: np.ndarray, geometry: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(s) for s in geometry.spacing_mm[::-1]])
    image.SetOrigin([float(v) for v in geometry.origin_mm])
    image.SetDirection(np.array(geometry.direction)[:, ::-1].ravel().tolist())
    return image


def refused(source: Path | str, reader=read_volume) -> str:
    with pytest.raises(ScanError) as caught:
        reader(source)
    assert Path(source).name not in str(caught.value), "a file name may name a patient"
    assert str(caught.value)
    return caught.value.code


# --- round trips


@pytest.mark.parametrize("suffix", LABEL_SUFFIXES)
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_written_label_reads_back_with_its_voxels_and_grid(tmp_path, suffix, direction):
    geometry = grid(direction)
    write_label(tmp_path / f"m{suffix}", numbered(), geometry)
    back = read_label(tmp_path / f"m{suffix}")
    np.testing.assert_array_equal(back.labels, numbered())
    if suffix == ".mha":
        assert back.geometry == geometry
    tolerance = {"rtol": 1e-14, "atol": 1e-15} if suffix == ".nrrd" else {"rtol": 3e-7, "atol": 1e-7}
    np.testing.assert_allclose(back.geometry.matrix, geometry.matrix, **tolerance)
    np.testing.assert_allclose(back.geometry.spacing_mm, geometry.spacing_mm, rtol=1e-7)


@pytest.mark.parametrize("suffix", LABEL_SUFFIXES)
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_simpleitk_finds_every_voxel_of_a_label_at_our_world_point(tmp_path, suffix, direction):
    geometry = grid(direction)
    write_label(tmp_path / f"m{suffix}", numbered(), geometry)
    image = sitk.ReadImage(str(tmp_path / f"m{suffix}"))
    for z, y, x in np.ndindex(*SHAPE):
        assert image.GetPixel(x, y, z) == numbered()[z, y, x]
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        np.testing.assert_allclose(point, world_mm(geometry, np.array([z, y, x])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_nibabel_finds_every_voxel_of_a_label_at_our_world_point(tmp_path, suffix, direction):
    geometry = grid(direction)
    write_label(tmp_path / f"m{suffix}", numbered(), geometry)
    image = nib.load(tmp_path / f"m{suffix}")
    array = np.asarray(image.dataobj)
    assert image.get_data_dtype() == np.uint8
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    for z, y, x in np.ndindex(*SHAPE):
        assert array[x, y, z] == numbered()[z, y, x]
        right, front, head = (image.affine @ [x, y, z, 1])[:3]  # nibabel's world is RAS, ours LPS
        np.testing.assert_allclose((-right, -front, head), world_mm(geometry, np.array([z, y, x])), atol=1e-5)
    # a reader that only knows the quaternion; float32 leaves it 2e-4 rad near half turns
    np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=2e-3)


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_files_of_simpleitk_are_read_as_simpleitk_reads_them(tmp_path, suffix, dtype):
    path = tmp_path / f"scan{suffix}"
    for name, direction in DIRECTIONS.items():
        sitk.WriteImage(itk_image(numbered(dtype=dtype), grid(direction)), str(path), name != "axial")
        volume, image = read_volume(path), sitk.ReadImage(str(path))
        assert volume.voxels.dtype == dtype
        assert volume.voxels.shape == (1, *SHAPE)
        np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(image))
        assert volume.geometry.spacing_mm[::-1] == pytest.approx(image.GetSpacing(), rel=1e-15)
        assert volume.geometry.origin_mm == pytest.approx(image.GetOrigin(), rel=1e-15)
        ours = np.array(volume.geometry.direction)[:, ::-1].ravel()
        np.testing.assert_allclose(ours, image.GetDirection(), atol=1e-6 if "nii" in suffix else 1e-15)
        assert read_geometry(path) == volume.geometry


def test_a_cube_of_10_mm_has_its_corner_where_the_pencil_says(tmp_path):
    labels = np.zeros((4, 20, 30), np.uint8)
    labels[1:3, 5:15, 10:30] = 1  # 2 x 5 mm, 10 x 1 mm, 20 x 0.5 mm
    geometry = Geometry(labels.shape, (5.0, 1.0, 0.5), (100.0, -50.0, 20.0))
    write_label(tmp_path / "cube.nii.gz", labels, geometry)
    back = read_label(tmp_path / "cube.nii.gz")
    assert back.labels.sum() * back.geometry.voxel_ml == pytest.approx(1.0)
    first = np.argwhere(back.labels)[0]
    np.testing.assert_allclose(world_mm(back.geometry, first), (100 + 10 * 0.5, -50 + 5, 20 + 5))


@pytest.mark.parametrize("suffix", LABEL_SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_written_volumes_are_the_same_to_us_and_to_simpleitk(tmp_path, suffix, dtype):
    voxels = (numbered(dtype="f8") / 3 - 7 * (dtype[0] != "u")).astype(dtype)
    write_volume(tmp_path / f"v{suffix}", Volume(voxels[None], grid(OBLIQUE)))
    back = read_volume(tmp_path / f"v{suffix}")
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"v{suffix}")))
    assert back.voxels.dtype == image.dtype == dtype
    np.testing.assert_array_equal(back.voxels[0], voxels)
    np.testing.assert_array_equal(image, voxels)
    with pytest.raises(ScanError, match="int64"):
        write_volume(tmp_path / f"v{suffix}", Volume(numbered(dtype="i8")[None], grid(OBLIQUE)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (6, 1, 1)])
@pytest.mark.parametrize("suffix", LABEL_SUFFIXES)
def test_single_voxels_slices_and_lines_survive(tmp_path, shape, suffix):
    write_label(tmp_path / f"m{suffix}", numbered(shape, np.uint16), grid(OBLIQUE, shape))
    back = read_label(tmp_path / f"m{suffix}")
    np.testing.assert_array_equal(back.labels, numbered(shape))
    assert same_grid(back.geometry, grid(OBLIQUE, shape), 1e-4)


def test_an_empty_mask_is_a_mask(tmp_path):
    write_label(tmp_path / "m.nii.gz", np.zeros(SHAPE, np.uint8), grid(OBLIQUE))
    assert read_label(tmp_path / "m.nii.gz").labels.sum() == 0


def test_views_are_written_as_they_look(tmp_path):
    flipped = numbered((5, 4, 3), np.uint16).transpose(2, 1, 0)[::-1]
    for suffix in LABEL_SUFFIXES:
        write_label(tmp_path / f"m{suffix}", flipped, grid(OBLIQUE))
        np.testing.assert_array_equal(read_label(tmp_path / f"m{suffix}").labels, flipped)


# --- a mask carries its source's header


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, qform: int, sform: int) -> None:
    image = nib.Nifti1Image(voxels.T, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine if sform else None, sform)
    nib.save(image, path)


@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (0, 1), (0, 2), (1, 0), (2, 1), (1, 2)])
def test_a_mask_and_its_nifti_source_have_one_header_in_both_readers(tmp_path, qform, sform):
    rng = np.random.default_rng(4)
    for number in range(12):
        turn = Rotation.random(random_state=rng).as_matrix() * ([1, 1, -1] if number % 2 else 1)
        affine = np.eye(4)
        affine[:3, :3] = turn * rng.uniform(0.3, 6, 3)
        affine[:3, 3] = rng.uniform(-300, 300, 3)
        nifti(tmp_path / "scan.nii.gz", numbered(dtype="i2"), affine, qform, sform)
        write_label(tmp_path / "mask.nii.gz", numbered(), read_volume(tmp_path / "scan.nii.gz").geometry)
        scan, mask = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
        np.testing.assert_array_equal(mask.affine.astype("f4"), scan.affine.astype("f4"))
        np.testing.assert_array_equal(mask.header.get_zooms(), scan.header.get_zooms())
        a, b = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "mask.nii.gz"))
        assert (a.GetSize(), a.GetSpacing(), a.GetOrigin()) == (b.GetSize(), b.GetSpacing(), b.GetOrigin())
        # ITK turns a quaternion, or none, into slightly other float32 than the sform of the mask
        np.testing.assert_allclose(a.GetDirection(), b.GetDirection(), rtol=0, atol=2e-7 if sform == 1 else 2e-6)


def test_labels_are_the_same_bytes_each_time_and_hold_no_text(tmp_path):
    for suffix in LABEL_SUFFIXES:
        first, second = tmp_path / f"Doe_John{suffix}", tmp_path / f"other{suffix}"
        write_label(first, numbered(), grid(OBLIQUE))
        os.utime(first, (0, 0))
        write_label(second, numbered(), grid(OBLIQUE))
        assert first.read_bytes() == second.read_bytes()
        assert b"Doe" not in first.read_bytes()
    header = nib.load(tmp_path / "other.nii.gz").header
    assert all(not bytes(header[field]).strip(b"\0") for field in ("descrip", "aux_file", "intent_name", "db_name"))
    packed = (tmp_path / "other.nii.gz").read_bytes()
    assert packed[3] == 0, "no file name in the gzip header"
    assert packed[4:8] == b"\0\0\0\0", "no time in the gzip header"


# --- reading: types, scaling, byte order


def test_nifti_rescale_is_applied(tmp_path):
    image = nib.Nifti1Image(numbered(dtype="i2").T, np.diag([-0.5, -0.75, 2.5, 1]))
    image.header.set_slope_inter(0.25, -3)
    nib.save(image, tmp_path / "a.nii.gz")
    raw = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    struct.pack_into("<2f", raw, 112, 0.25, -3.0)
    raw[352:] = numbered(dtype="<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels[0], numbered() * 0.25 - 3)
    np.testing.assert_array_equal(volume.voxels[0].T, nib.load(tmp_path / "a.nii").get_fdata())


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_keeps_its_dtype_in_either_byte_order(tmp_path, dtype, order):
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(order + dtype))
    nib.save(nib.Nifti1Image(numbered(dtype=order + dtype).T, np.eye(4), header), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.voxels[0], numbered())


def test_big_endian_metaimage_and_nrrd(tmp_path):
    block = numbered(dtype=">i2").tobytes()
    (tmp_path / "a.mha").write_bytes(META.replace(b"ByteOrderMSB = False", b"ByteOrderMSB = True") + block)
    (tmp_path / "a.nrrd").write_bytes(NRRD.replace(b"little", b"big") + block)
    for name in ("a.mha", "a.nrrd"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).voxels[0], numbered())
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))), numbered())


@pytest.mark.parametrize("space", ["left-posterior-superior", "right-anterior-superior", "LAS"])
def test_nrrd_spaces_lie_where_simpleitk_puts_them(tmp_path, space):
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD.replace(b"left-posterior-superior", space.encode()) + numbered(dtype="<i2").tobytes())
    geometry, image = read_geometry(path), sitk.ReadImage(str(path))
    for z, y, x in np.ndindex(*SHAPE):
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        np.testing.assert_allclose(point, world_mm(geometry, np.array([z, y, x])), atol=1e-12)


def test_trailing_axes_of_one_are_squeezed(tmp_path):
    for trail in ((1,), (1, 1), (1, 1, 1, 1)):
        nib.save(nib.Nifti1Image(numbered().T.reshape(5, 4, 3, *trail), np.eye(4)), tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels[0], numbered())


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_suffixes_count_in_any_case(tmp_path, suffix):
    sitk.WriteImage(itk_image(numbered(), grid(OBLIQUE)), str(tmp_path / f"a{suffix}"))
    (tmp_path / f"a{suffix}").rename(tmp_path / f"A{suffix.upper()}")
    np.testing.assert_array_equal(read_volume(tmp_path / f"A{suffix.upper()}").voxels[0], numbered())


def test_gzip_members_and_padding_after_the_stream(tmp_path):
    write_label(tmp_path / "a.nii", numbered(), grid(OBLIQUE))
    raw = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:360]) + gzip.compress(raw[360:]) + b"\0" * 512)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").voxels[0], numbered())


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_streams_that_end_at_a_chunk_border(tmp_path, spare):
    shape = (1, 1024, 2048 + spare)
    labels = (np.arange(np.prod(shape)) // 777 % 251).reshape(shape).astype(np.uint8)
    for suffix in (".nii.gz", ".mha", ".nrrd"):
        write_label(tmp_path / f"a{suffix}", labels, grid(OBLIQUE, shape))
        np.testing.assert_array_equal(read_label(tmp_path / f"a{suffix}").labels, labels)


# --- labels


@pytest.mark.parametrize(
    ("values", "stored", "expected"),
    [
        ([0, 1, 2], "float32", "uint8"),
        ([0, 255], "int64", "uint8"),
        ([0, 256], "float64", "uint16"),
        ([0, 65535], "int32", "uint16"),
        ([0, 0.5], "float32", "label.not-integer"),
        ([0, -1], "int16", "label.negative"),
        ([0, -1], "float32", "label.negative"),
        ([0, -0.25], "float32", "label.not-integer"),
        ([0, 65536], "uint32", "label.values"),
        ([0, np.nan], "float32", "scan.nonfinite"),
    ],
)
def test_labels_are_whole_numbers_of_8_or_16_bits(tmp_path, values, stored, expected):
    voxels = np.resize(np.array(values), SHAPE).astype(stored)
    sitk.WriteImage(itk_image(voxels, grid(OBLIQUE)), str(tmp_path / "a.mha"))
    if "." in expected:
        assert refused(tmp_path / "a.mha", read_label) == expected
    else:
        labels = read_label(tmp_path / "a.mha").labels
        assert labels.dtype == expected
        np.testing.assert_array_equal(labels, voxels)


def test_write_label_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ScanError, match=r"int32.*uint8 or uint16"):
        write_label(tmp_path / "a.nii.gz", numbered(dtype="i4"), grid(OBLIQUE))
    with pytest.raises(ScanError, match=r"\(3, 4, 4\).*\(3, 4, 5\)"):
        write_label(tmp_path / "a.nii.gz", numbered((3, 4, 4)), grid(OBLIQUE))
    with pytest.raises(ConfigError, match="scan format"):
        write_label(tmp_path / "a.png", numbered(), grid(OBLIQUE))
    with pytest.raises(ScanError, match="32767"):
        write_label(tmp_path / "a.nii", np.zeros((1, 1, 32768), np.uint8), grid(OBLIQUE, (1, 1, 32768)))


# --- names and sources


def test_names():
    assert case_stem(Path("/x/liver_0000.nii.gz")) == "liver_0000"
    assert case_stem(Path("a.b.NRRD")) == "a.b"
    assert case_stem(Path("/x/folder")) == "folder"
    assert is_scan(Path("a.NII.GZ"))
    assert not any(is_scan(Path(name)) for name in ("._a.nii.gz", "a.dcm", "a.hdr", "DS_Store", "a.nii.gz.bak"))


def test_source_files_name_every_file_that_holds_bytes(tmp_path):
    for suffix, extra in ((".nii.gz", ()), (".mha", ()), (".nrrd", ()), (".mhd", ("s.raw",)), (".nhdr", ("s.raw.gz",))):
        folder = tmp_path / suffix
        folder.mkdir()
        sitk.WriteImage(itk_image(numbered(), grid(OBLIQUE)), str(folder / f"s{suffix}"), suffix == ".nhdr")
        assert source_files(folder / f"s{suffix}") == sorted(folder / name for name in (f"s{suffix}", *extra))
        assert source_files(folder / f"s{suffix}") == sorted(folder.iterdir())


# --- refusals: NIfTI


def nifti_bytes(voxels: np.ndarray | None = None, *edits: tuple) -> bytes:
    """A little-endian NIfTI-1 of int16 with the given (offset, format, values...) written into its header."""
    voxels = numbered(dtype="<i2") if voxels is None else voxels
    raw = bytearray(nib.Nifti1Image(voxels.T, np.diag([-0.5, -0.75, 2.5, 1.0])).to_bytes())
    for offset, layout, *values in edits:
        struct.pack_into("<" + layout, raw, offset, *values)
    return bytes(raw)


NO_QFORM = (252, "h", 0)
NIFTI_REFUSALS = {
    "empty": (b"", "scan.unreadable"),
    "html": (b"<!DOCTYPE html><html>" + b" " * 400, "scan.unreadable"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "scan.unreadable"),
    "gzip named nii": (gzip.compress(nifti_bytes()), "scan.unreadable"),
    "header cut": (nifti_bytes()[:200], "scan.truncated"),
    "no voxels": (nifti_bytes()[:352], "scan.truncated"),
    "extension flag cut": (nifti_bytes()[:348], "scan.truncated"),
    "voxels cut": (nifti_bytes()[:-1], "scan.truncated"),
    "far more voxels than declared": (nifti_bytes() + b"\0" * 5000, "scan.header"),
    "magic": (nifti_bytes(None, (344, "4s", b"XXXX")), "scan.unreadable"),
    "two-file magic": (nifti_bytes(None, (344, "4s", b"ni1\0")), "scan.unreadable"),
    "sizeof_hdr": (nifti_bytes(None, (0, "i", 999)), "scan.unreadable"),
    "dims huge": (nifti_bytes(None, (42, "3h", 32767, 32767, 32767)), "scan.too-large"),
    "dim negative": (nifti_bytes(None, (42, "h", -5)), "scan.empty"),
    "dim zero": (nifti_bytes(None, (42, "h", 0)), "scan.empty"),
    "ndim 0": (nifti_bytes(None, (40, "h", 0)), "scan.header"),
    "ndim 9": (nifti_bytes(None, (40, "h", 9)), "scan.header"),
    "2-D": (nifti_bytes(numbered(dtype="<i2")[0]), "scan.not-3d"),
    "4-D": (nifti_bytes(numbered((2, 3, 4, 5), "<i2")), "scan.not-3d"),
    "datatype unknown": (nifti_bytes(None, (70, "h", 9999)), "scan.dtype"),
    "complex": (nifti_bytes(numbered(dtype="c8")), "scan.dtype"),
    "rgb": (nifti_bytes(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "scan.dtype"),
    "bitpix": (nifti_bytes(None, (72, "h", 64)), "scan.header"),
    "slope inf": (nifti_bytes(None, (112, "f", np.inf)), "scan.header"),
    "intercept nan": (nifti_bytes(None, (112, "2f", 2.0, np.nan)), "scan.header"),
    "vox_offset past the end": (nifti_bytes(None, (108, "f", 1e9)), "scan.truncated"),
    "vox_offset past all files": (nifti_bytes(None, (108, "f", 1e30)), "scan.truncated"),
    "vox_offset nan": (nifti_bytes(None, (108, "f", np.nan)), "scan.header"),
    "vox_offset 0": (nifti_bytes(None, (108, "f", 0)), "scan.header"),
    "nan voxels": (nifti_bytes(np.full(SHAPE, np.nan, "<f4")), "scan.nonfinite"),
    "inf voxel": (nifti_bytes(np.where(numbered() == 7, np.inf, 0).astype("<f4")), "scan.nonfinite"),
    "sform code": (nifti_bytes(None, (254, "h", 512)), "scan.header"),
    "qform code": (nifti_bytes(None, (252, "h", -1)), "scan.header"),
    "sform nan": (nifti_bytes(None, (280, "f", np.nan)), "geometry.nonfinite"),
    "sform inf offset": (nifti_bytes(None, (292, "f", np.inf)), "geometry.nonfinite"),
    "sform zero": (nifti_bytes(None, (280, "12f", *[0] * 12)), "geometry.spacing"),
    "sform singular": (nifti_bytes(None, (280, "8f", 1, 1, 0, 0, 0, 0, 1, 0)), "geometry.not-orthonormal"),
    "shear": (nifti_bytes(None, (284, "f", 0.3)), "geometry.not-orthonormal"),
    "no geometry": (nifti_bytes(None, (252, "2h", 0, 0)), "geometry.missing"),
    "quaternion too long": (nifti_bytes(None, (252, "2h3f", 1, 0, 1, 1, 1)), "geometry.not-orthonormal"),
    "quaternion nan": (nifti_bytes(None, (252, "2h3f", 1, 0, np.nan, 0, 0)), "geometry.not-orthonormal"),
    "pixdim negative": (nifti_bytes(None, (80, "f", -0.5)), "geometry.ambiguous"),
    "pixdim contradicts sform": (nifti_bytes(None, (80, "f", 5.0)), "geometry.ambiguous"),
    "pixdim zero": (nifti_bytes(None, (80, "f", 0.0), (252, "2h", 1, 0)), "geometry.spacing"),
    "metres": (nifti_bytes(None, (123, "B", 1)), "geometry.ambiguous"),
    "aligned sform far from qform": (
        nifti_bytes(None, (252, "2h", 1, 2), (268, "f", 40.0)),
        "geometry.ambiguous",
    ),
}


@pytest.mark.parametrize(("raw", "code"), NIFTI_REFUSALS.values(), ids=NIFTI_REFUSALS)
def test_nifti_refusals(tmp_path, raw, code):
    (tmp_path / "Doe_John.nii").write_bytes(raw)
    assert refused(tmp_path / "Doe_John.nii") == code
    if not code.startswith(("scan.truncated", "scan.nonfinite")) and "far more" not in code and len(raw) < 5000:
        assert refused(tmp_path / "Doe_John.nii", read_geometry) == code


def test_the_base_of_the_refusals_is_accepted(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").voxels[0], numbered())
    for scaling in ((0.0, 5.0), (np.nan, np.nan), (1.0, 0.0)):  # each means: not scaled
        (tmp_path / "a.nii").write_bytes(nifti_bytes(None, (112, "2f", *scaling)))
        assert read_volume(tmp_path / "a.nii").voxels.dtype == np.int16
    # sform and qform agree within a tenth of a voxel, or both readers take the sform
    for edit in ((268, "f", 0.03), (252, "2h", 2, 1)):
        (tmp_path / "a.nii").write_bytes(nifti_bytes(None, (252, "2h", 1, 2), edit))
        assert read_volume(tmp_path / "a.nii").geometry.spacing_mm == SPACING_MM


def test_messages_say_what_the_file_looks_like(tmp_path):
    path = tmp_path / "a.nii.gz"
    for raw, words in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"  <html>", "HTML"),
        (nifti_bytes(), "suffix .nii"),
        (gzip.compress(b"<html>" + b" " * 400), "HTML"),
        (b"\0" * 128 + b"DICM", "folder"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ScanError, match=words) as caught:
            read_volume(path)
        assert caught.value.code == "scan.unreadable"


def test_every_cut_and_every_flipped_bit_of_a_compressed_scan_is_noticed(tmp_path):
    """No prefix is accepted; a flipped bit is refused, or (the time, a code word of equal sense) changes nothing."""
    for suffix, guarded in ((".nii.gz", 0), (".mha", 1), (".nrrd", 1)):
        path = tmp_path / f"a{suffix}"
        write_label(path, numbered((2, 3, 4)), grid(np.array(CANONICAL_DIRECTION), (2, 3, 4)))
        whole = path.read_bytes()
        begin = 0 if not guarded else whole.index(b"LOCAL\n") + 6 if suffix == ".mha" else whole.index(b"\n\n") + 2
        for length in range(begin, len(whole)):
            path.write_bytes(whole[:length])
            assert refused(path) in ("scan.truncated", "scan.unreadable")
        for at in range(begin, len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            try:
                volume = read_volume(path)
            except ScanError:
                continue
            np.testing.assert_array_equal(volume.voxels[0], numbered((2, 3, 4)))


def test_a_wrong_checksum_alone_is_noticed(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes())[:-8] + b"\0" * 8)
    assert refused(tmp_path / "a.nii.gz") == "scan.checksum"
    packed = zlib.compress(numbered(dtype="<i2").tobytes())
    (tmp_path / "a.mha").write_bytes(META.replace(b"CompressedData = False", b"CompressedData = True") + packed[:-4])
    assert refused(tmp_path / "a.mha") == "scan.truncated"


def test_a_gzip_bomb_is_refused_before_it_unfolds(tmp_path):
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    bomb = packer.compress(nifti_bytes()) + b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
    (tmp_path / "a.nii.gz").write_bytes(bomb)
    with pytest.raises(ScanError, match="declares 120 bytes") as caught:
        read_volume(tmp_path / "a.nii.gz")
    assert caught.value.code == "scan.header"
    inflated = max(int(word) for word in caught.value.message.split() if word.isdigit())
    assert inflated < 4 << 20
    # and a small file that declares gigabytes is refused without making room for them
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(nifti_bytes(None, (42, "3h", 1200, 1200, 1200))))
    tracemalloc.start()
    assert refused(tmp_path / "b.nii.gz") == "scan.truncated"
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    assert refused(tmp_path / "pipe.nii") == "scan.unreadable"
    assert refused(tmp_path / "absent.nii.gz") == "scan.unreadable"
    (tmp_path / "folder.nii.gz").mkdir()
    assert refused(tmp_path / "folder.nii.gz") == "scan.unreadable"
    assert refused(tmp_path) == "scan.unreadable", "a folder with a pipe"
    (tmp_path / "a.txt").write_text("x")
    assert refused(tmp_path / "a.txt") == "scan.unreadable"


# --- refusals: MetaImage and NRRD

META = (
    b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 0.5 0.75 2.5\nDimSize = 5 4 3\n"
    b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
META_EDITS = {
    "spacing zero": (b"0.5 0.75", b"0 0.75", "geometry.spacing"),
    "spacing negative": (b"0.5 0.75", b"-0.5 0.75", "geometry.spacing"),
    "spacing nan": (b"0.5 0.75", b"nan 0.75", "geometry.nonfinite"),
    "spacing of two": (b"0.5 0.75", b"0.75", "scan.header"),
    "spacing absent": (b"ElementSpacing", b"ElementSpicing", "scan.header"),
    "offset inf": (b"Offset = 0", b"Offset = inf", "geometry.nonfinite"),
    "matrix singular": (b"1 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1", "geometry.not-orthonormal"),
    "matrix sheared": (b"1 0 0 0 1 0 0 0 1", b"1 0 0 0.2 1 0 0 0 1", "geometry.not-orthonormal"),
    "matrix nan": (b"1 0 0 0 1 0 0 0 1", b"nan 0 0 0 1 0 0 0 1", "geometry.nonfinite"),
    "huge": (b"5 4 3", b"100000 100000 100000", "scan.too-large"),
    "negative size": (b"5 4 3", b"5 -4 3", "scan.empty"),
    "one slice more": (b"5 4 3", b"5 4 4", "scan.truncated"),
    "words for sizes": (b"5 4 3", b"a b c", "scan.header"),
    "2-D": (b"NDims = 3", b"NDims = 2", "scan.header"),
    "4-D": (b"NDims = 3", b"NDims = 4", "scan.header"),
    "type unknown": (b"MET_SHORT", b"MET_STRING", "scan.dtype"),
    "vector": (b"NDims = 3", b"NDims = 3\nElementNumberOfChannels = 3", "scan.dtype"),
    "text voxels": (b"BinaryData = True", b"BinaryData = False", "scan.unreadable"),
    "not compressed": (b"CompressedData = False", b"CompressedData = True", "scan.checksum"),
    "not a flag": (b"CompressedData = False", b"CompressedData = Talse", "scan.header"),
    "not a header": (b"NDims = 3", b"hello", "scan.unreadable"),
    "absolute path": (b"LOCAL", b"/etc/passwd", "scan.path-escape"),
    "parent path": (b"LOCAL", b"../secret.raw", "scan.path-escape"),
    "folder path": (b"LOCAL", b"sub/secret.raw", "scan.path-escape"),
    "windows path": (b"LOCAL", b"..\\secret.raw", "scan.path-escape"),
    "list": (b"LOCAL\n", b"LIST\na.raw\n", "scan.path-escape"),
    "pattern": (b"LOCAL", b"a%02d.raw 1 3 1", "scan.path-escape"),
    "link out of the folder": (b"LOCAL", b"link.raw", "scan.path-escape"),
    "missing file": (b"LOCAL", b"absent.raw", "scan.unreadable"),
    "own folder": (b"LOCAL", b".", "scan.path-escape"),
}


@pytest.mark.parametrize(("old", "new", "code"), META_EDITS.values(), ids=META_EDITS)
def test_metaimage_refusals(tmp_path, old, new, code):
    (tmp_path / "secret.raw").write_bytes(numbered(dtype="<i2").tobytes())
    folder = tmp_path / "cohort"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "secret.raw").write_bytes(numbered(dtype="<i2").tobytes())
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    (folder / "a.mha").write_bytes(META + numbered(dtype="<i2").tobytes())
    np.testing.assert_array_equal(read_volume(folder / "a.mha").voxels[0], numbered())
    assert META.count(old) == 1
    (folder / "a.mha").write_bytes(META.replace(old, new) + numbered(dtype="<i2").tobytes())
    assert refused(folder / "a.mha") == code


def test_metaimage_and_nrrd_without_a_third_axis_or_with_a_fourth(tmp_path):
    for shape in ((4, 5), (2, 3, 4, 5)):
        image = sitk.GetImageFromArray(np.zeros(shape, "u1"), isVector=False)
        for suffix in (".mha", ".nrrd"):
            sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
            assert refused(tmp_path / f"a{suffix}") == "scan.not-3d"
    for suffix in (".mha", ".nrrd"):
        sitk.WriteImage(
            sitk.GetImageFromArray(np.zeros((3, 4, 5, 3), "u1"), isVector=True), str(tmp_path / f"v{suffix}")
        )
        assert refused(tmp_path / f"v{suffix}") in ("scan.dtype", "scan.not-3d")


def test_metaimage_data_file_with_its_own_header(tmp_path):
    block = numbered(dtype="<i2").tobytes()
    for skip, raw in ((b"7", b"x" * 7 + block), (b"-1", b"any" + block)):
        (tmp_path / "a.raw").write_bytes(raw)
        (tmp_path / "a.mhd").write_bytes(
            META.replace(b"NDims", b"HeaderSize = " + skip + b"\nNDims").replace(b"LOCAL", b"a.raw")
        )
        np.testing.assert_array_equal(read_volume(tmp_path / "a.mhd").voxels[0], numbered())
    for skip, raw in ((b"-1", block[:-1]), (b"1", block), (b"9" * 30, block)):
        (tmp_path / "a.raw").write_bytes(raw)
        (tmp_path / "a.mhd").write_bytes(
            META.replace(b"NDims", b"HeaderSize = " + skip + b"\nNDims").replace(b"LOCAL", b"a.raw")
        )
        assert refused(tmp_path / "a.mhd") == "scan.truncated"


NRRD = (
    b"NRRD0004\n# comment\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 4 3\n"
    b"space directions: (0.3,0.4,0) (-0.6,0.45,0) (0,0,2.5)\nkinds: domain domain domain\nendian: little\n"
    b"encoding: raw\nspace origin: (1,2,3)\nPatient:=Doe\n\n"
)
NRRD_EDITS = {
    "magic": (b"NRRD0004", b"NEARD004", "scan.unreadable"),
    "encoding": (b"raw", b"hex", "scan.unreadable"),
    "type": (b"short", b"block", "scan.dtype"),
    "sizes absent": (b"sizes: 5 4 3\n", b"", "scan.header"),
    "huge": (b"5 4 3", b"99999 99999 99999", "scan.too-large"),
    "one slice more": (b"5 4 3", b"5 4 4", "scan.truncated"),
    "endian absent": (b"endian: little\n", b"", "scan.header"),
    "space unknown": (b"left-posterior-superior", b"scanner-xyz", "geometry.missing"),
    "directions absent": (b"space directions: (0.3,0.4,0) (-0.6,0.45,0) (0,0,2.5)\n", b"", "geometry.missing"),
    "direction none": (b"(0,0,2.5)", b"none", "geometry.missing"),
    "direction of two": (b"(0,0,2.5)", b"(0,2.5)", "scan.header"),
    "direction nan": (b"(0,0,2.5)", b"(0,0,nan)", "geometry.nonfinite"),
    "direction zero": (b"(0,0,2.5)", b"(0,0,0)", "geometry.spacing"),
    "sheared": (b"(0,0,2.5)", b"(1,0,2.5)", "geometry.not-orthonormal"),
    "origin absent": (b"space origin: (1,2,3)\n", b"", "scan.header"),
    "units": (b"sizes", b'space units: "um" "um" "um"\nsizes', "geometry.ambiguous"),
    "not gzip": (b"raw", b"gzip", "scan.checksum"),
    "not bzip2": (b"raw", b"bzip2", "scan.checksum"),
    "data file outside": (b"sizes", b"data file: ../x.raw\nsizes", "scan.path-escape"),
    "data file list": (b"sizes", b"data file: LIST\nsizes", "scan.path-escape"),
    "data file pattern": (b"sizes", b"data file: x%03d.raw 1 3 1\nsizes", "scan.path-escape"),
    "line skip": (b"sizes", b"line skip: 2\nsizes", "scan.header"),
}


@pytest.mark.parametrize(("old", "new", "code"), NRRD_EDITS.values(), ids=NRRD_EDITS)
def test_nrrd_refusals(tmp_path, old, new, code):
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD + numbered(dtype="<i2").tobytes())
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
    assert NRRD.count(old) == 1
    path.write_bytes(NRRD.replace(old, new) + numbered(dtype="<i2").tobytes())
    assert refused(path) == code


@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd"])
def test_damaged_headers_are_refused_or_read_as_simpleitk_reads_them(tmp_path, name, capfd):
    rng = np.random.default_rng(11)
    block = b"" if name == "a.nii" else numbered(dtype="<i2").tobytes()
    header = {"a.nii": nifti_bytes(), "a.mha": META, "a.nrrd": NRRD}[name]
    accepted = 0
    for _ in range(300):
        raw = bytearray(header)
        # of NIfTI, bytes 40 to 343: a lost magic makes ITK read another format
        raw[int(rng.integers(*((40, 344) if name == "a.nii" else (0, len(header)))))] = int(rng.integers(256))
        (tmp_path / name).write_bytes(bytes(raw) + block)
        try:
            volume = read_volume(tmp_path / name)
            image = sitk.ReadImage(str(tmp_path / name))
        except (ScanError, RuntimeError):  # refused by us, or by SimpleITK for a field that has no say in the grid
            continue
        accepted += 1
        np.testing.assert_allclose(volume.voxels[0], sitk.GetArrayFromImage(image), rtol=1e-6, atol=1e-30)
        for z, y, x in ((0, 0, 0), (2, 3, 4)):
            point = image.TransformIndexToPhysicalPoint((x, y, z))
            np.testing.assert_allclose(point, world_mm(volume.geometry, np.array([z, y, x])), rtol=1e-6, atol=0.05)
    assert accepted > 15
    capfd.readouterr()  # SimpleITK's complaints


# --- DICOM


def element(group: int, number: int, kind: str, value: bytes | str) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    data += (b"\0" if kind == "UI" else b" ") * (len(data) % 2)
    if kind in ("OB", "OW"):
        return struct.pack("<HH2sHI", group, number, kind.encode(), 0, len(data)) + data
    return struct.pack("<HH2sH", group, number, kind.encode(), len(data)) + data


def dicom(pixels: np.ndarray, number: int, **changes: object) -> bytes:
    """A single-frame CT slice, explicit little endian, 2.5 mm above its predecessor; ``changes`` name the fields."""
    field = {
        "position": (-12.5, 30.25, 7 + 2.5 * number),
        "axes": (1, 0, 0, 0, 1, 0),
        "spacing": (0.75, 0.5),
        "series": "1.2.3",
        "kind": "1.2.840.10008.5.1.4.1.1.2",
        "photometric": "MONOCHROME2",
        "bits": 16,
        "rows": pixels.shape[0],
        "slope": "1",
        "intercept": "0",
        "frames": None,
    } | changes
    short = {key: struct.pack("<H", int(field[key])) for key in ("rows", "bits")}  # type: ignore[call-overload]
    meta = (
        element(2, 0x02, "UI", field["kind"])
        + element(2, 0x03, "UI", f"1.2.3.4.{number}")
        + element(2, 0x10, "UI", "1.2.840.10008.1.2.1")
    )
    data = element(0x08, 0x16, "UI", field["kind"]) + element(0x08, 0x18, "UI", f"1.2.3.4.{number}")
    data += element(0x10, 0x10, "PN", "Doe^John") + element(0x20, 0x0E, "UI", field["series"])
    for tag, value in ((0x32, field["position"]), (0x37, field["axes"])):
        data += element(0x20, tag, "DS", "\\".join(map(str, value))) if value else b""
    data += element(0x28, 0x02, "US", b"\1\0") + element(0x28, 0x04, "CS", field["photometric"])
    data += element(0x28, 0x08, "IS", field["frames"]) if field["frames"] else b""
    data += element(0x28, 0x10, "US", short["rows"]) + element(0x28, 0x11, "US", struct.pack("<H", pixels.shape[1]))
    data += element(0x28, 0x30, "DS", "\\".join(map(str, field["spacing"]))) if field["spacing"] else b""
    data += element(0x28, 0x100, "US", short["bits"]) + element(0x28, 0x101, "US", short["bits"])
    data += element(0x28, 0x102, "US", struct.pack("<H", int(field["bits"]) - 1))
    data += element(0x28, 0x103, "US", struct.pack("<H", pixels.dtype.kind == "i"))
    data += element(0x28, 0x1052, "DS", field["intercept"]) + element(0x28, 0x1053, "DS", field["slope"])
    data += element(0x7FE0, 0x10, "OW", pixels.tobytes())
    return bytes(128) + b"DICM" + element(2, 0, "UL", struct.pack("<I", len(meta))) + meta + data


def series(folder: Path, count: int = 6, skip: tuple[int, ...] = (), **changes: object) -> np.ndarray:
    """Slices 0 to ``count`` as files named against their order; a callable change is asked per slice."""
    voxels = numbered((count, 4, 5), "<i2")
    for z in range(count):
        if z not in skip:
            own = {key: change(z) if callable(change) else change for key, change in changes.items()}
            (folder / f"{count - z:03}.dcm").write_bytes(dicom(voxels[z], z, **own))
    return voxels


def test_a_series_is_read_in_the_order_of_its_positions(tmp_path):
    voxels = series(tmp_path)
    volume = read_volume(tmp_path)
    assert volume.voxels.dtype == np.int16
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    assert volume.geometry == Geometry((6, 4, 5), (2.5, 0.75, 0.5), (-12.5, 30.25, 7.0))
    assert read_geometry(tmp_path) == volume.geometry
    assert source_files(tmp_path) == sorted(tmp_path.iterdir())
    assert source_files(f"{tmp_path}#1.2.3") == source_files(tmp_path)


@pytest.mark.parametrize(
    "axes",
    [(0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0), tuple(OBLIQUE[:, :2].T.ravel().round(9))],
    ids=["sagittal", "coronal", "flipped", "oblique"],
)
def test_a_series_lies_where_simpleitk_puts_it(tmp_path, axes):
    normal = np.cross(axes[:3], axes[3:])
    voxels = series(tmp_path, axes=axes, position=lambda z: tuple((normal * 1.25 * z + 5).round(9)))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), voxels)
    for z, y, x in np.ndindex(*voxels.shape):
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        np.testing.assert_allclose(point, world_mm(volume.geometry, np.array([z, y, x])), atol=1e-6)


def test_rescale_and_photometric_interpretation(tmp_path):
    voxels = series(tmp_path, intercept="-1024")
    np.testing.assert_array_equal(read_volume(tmp_path).voxels[0], voxels.astype(int) - 1024)
    series(tmp_path, slope=lambda z: str(0.5 + z))  # PET: another slope in each slice
    expected = voxels * (0.5 + np.arange(6))[:, None, None]
    np.testing.assert_allclose(read_volume(tmp_path).voxels[0], expected)
    for slope, intercept in (("1", "0"), ("1", "-1024"), ("2.5", "3")):
        series(tmp_path, photometric="MONOCHROME1", slope=slope, intercept=intercept)
        expected = voxels * float(slope) + float(intercept)
        np.testing.assert_array_equal(read_volume(tmp_path).voxels[0], expected)
    for z in range(6):
        (tmp_path / f"{6 - z:03}.dcm").write_bytes(dicom(voxels[z].astype("<u2"), z, photometric="MONOCHROME1"))
    np.testing.assert_array_equal(read_volume(tmp_path).voxels[0], voxels)


def test_other_files_beside_a_series_do_not_matter(tmp_path):
    voxels = series(tmp_path)
    (tmp_path / "Thumbs.db").write_bytes(b"x" * 500)
    (tmp_path / "sub").mkdir()
    report = dicom(voxels[0], 9, kind="1.2.840.10008.5.1.4.1.1.88.11", series="1.9")
    (tmp_path / "report.dcm").write_bytes(report)
    (tmp_path / "plan.dcm").write_bytes(dicom(voxels[0], 9, kind="1.2.840.10008.5.1.4.1.1.481.3")[:700])
    np.testing.assert_array_equal(read_volume(tmp_path).voxels[0], voxels)
    assert len(source_files(tmp_path)) == 6


def test_several_series_in_one_folder(tmp_path):
    series(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(".ima"))
    second = series(tmp_path, 3, series="1.2.4")
    assert refused(tmp_path) == "dicom.several-series"
    assert refused(f"{tmp_path}#1.2.5") == "dicom.unknown-series"
    np.testing.assert_array_equal(read_volume(f"{tmp_path}#1.2.4").voxels[0], second)
    assert len(source_files(f"{tmp_path}#1.2.3")) == 6
    (tmp_path / "a").mkdir()
    (tmp_path / "a#b").mkdir()
    series(tmp_path / "a#b")
    assert read_volume(tmp_path / "a#b").geometry.shape == (6, 4, 5)


def tilted(z: int) -> tuple[float, float, float]:
    return (0, 0.6 * z, 2.5 * z)


SERIES_REFUSALS = {
    "one missing": ({"skip": (3,)}, "dicom.missing-slices"),
    "every other missing at the end": ({"count": 9, "skip": (4, 6)}, "dicom.missing-slices"),
    "uneven": ({"position": lambda z: (0, 0, 2.5 * z + (0.4 if z == 3 else 0))}, "dicom.nonuniform-spacing"),
    "drift": ({"count": 120, "position": lambda z: (0, 0, 2.5 * z + 2.5e-4 * z * z / 2)}, "dicom.nonuniform-spacing"),
    "copy": ({"position": lambda z: (0, 0, 2.5 * min(z, 4))}, "dicom.duplicate-slices"),
    "all at one place": ({"position": (0, 0, 0)}, "dicom.duplicate-slices"),
    "one slice": ({"count": 1}, "dicom.too-few-slices"),
    "gantry tilt": ({"position": tilted}, "dicom.gantry-tilt"),
    "one slice shifted": ({"position": lambda z: (0.2 if z == 2 else 0, 0, 2.5 * z)}, "dicom.gantry-tilt"),
    "localiser": ({"axes": lambda z: (0, 1, 0, 0, 0, -1) if z == 0 else (1, 0, 0, 0, 1, 0)}, "dicom.mixed-orientation"),
    "pixel spacing differs": ({"spacing": lambda z: (0.75, 0.5 + 0.1 * (z == 2))}, "dicom.mixed-spacing"),
    "pixel spacing zero": ({"spacing": (0, 0)}, "geometry.spacing"),
    "no pixel spacing": ({"spacing": None}, "dicom.missing-geometry"),
    "no position": ({"position": None}, "dicom.missing-geometry"),
    "position nan": ({"position": lambda z: (0, 0, "nan")}, "dicom.missing-geometry"),
    "axes not unit": ({"axes": (1.1, 0, 0, 0, 1, 0)}, "geometry.not-orthonormal"),
    "axes not square": ({"axes": (1, 0, 0, 0.1, 0.995, 0)}, "geometry.not-orthonormal"),
    "several frames": ({"frames": "2"}, "dicom.corrupt-slice"),
    "bits allocated too many": ({"bits": 32}, "dicom.corrupt-slice"),
    "more rows than pixels": ({"rows": 5}, "dicom.corrupt-slice"),
    "sizes differ": ({"rows": lambda z: 5 if z == 2 else 4}, "dicom.corrupt-slice"),
}


@pytest.mark.parametrize(("changes", "code"), SERIES_REFUSALS.values(), ids=SERIES_REFUSALS)
def test_series_refusals(tmp_path, changes, code, capfd):
    series(tmp_path, **changes)
    assert refused(tmp_path) == code
    assert refused(tmp_path, read_geometry) == code
    assert capfd.readouterr().err == "", "C++ warnings name files"


@pytest.mark.parametrize("keep", [0, 100, 300, 450, -1])
def test_a_slice_that_was_cut_off_is_not_dropped(tmp_path, keep):
    series(tmp_path)
    whole = (tmp_path / "003.dcm").read_bytes()
    assert len(whole) > 500
    (tmp_path / "003.dcm").write_bytes(whole[:keep])
    assert refused(tmp_path) == "dicom.corrupt-slice"
    assert refused(tmp_path, source_files) == "dicom.corrupt-slice"


def test_slices_of_two_sizes(tmp_path):
    series(tmp_path)
    (tmp_path / "003.dcm").write_bytes(dicom(numbered((1, 6, 5), "<i2")[0], 3))
    assert refused(tmp_path) == "dicom.mixed-size"


def test_small_jitter_of_positions_is_accepted(tmp_path):
    voxels = series(tmp_path, position=lambda z: (0, 0.01 * (z % 2), 2.5 * z + 0.004 * (z % 2)))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    assert volume.geometry.spacing_mm[0] == pytest.approx(2.5, abs=1e-3)


def test_thin_slices_have_no_absolute_tolerance_to_hide_in(tmp_path):
    series(tmp_path, spacing=(0.005, 0.005), position=lambda z: (0, 0, 0.005 * (z + (z > 2))))
    assert refused(tmp_path) == "dicom.missing-slices"
    series(tmp_path, spacing=(0.005, 0.005), position=lambda z: (0, 0, 0.005 * (z + {2: 0.08, 3: -0.08}.get(z, 0))))
    assert refused(tmp_path) == "dicom.nonuniform-spacing"


def test_reading_leaves_the_warning_switch_as_it_was(tmp_path):
    series(tmp_path)
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    read_volume(tmp_path)
    assert sitk.ProcessObject.GetGlobalWarningDisplay() == before
