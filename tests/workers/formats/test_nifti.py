"""NIfTI: both versions and byte orders against nibabel, transforms, units, extensions, what follows the voxels."""

import gzip
import struct
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from tests.workers.sources.test_scans import OBLIQUE, nifti_bytes, numbered, refused
from vnet_core.geometry import world_mm
from vnet_core.sections import ReadingPlan
from workers.sources.scans import read_geometry, read_label, read_scan, read_volume, source_files, write_label

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
POLICIES = ("agreeing", "sform", "qform")


def affine_of(path: Path) -> np.ndarray:
    """Our geometry as nibabel's affine: index (x, y, z) to RAS."""
    return LPS_FROM_RAS @ read_geometry(path).matrix[:, [2, 1, 0, 3]]


def placed(path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> None:
    image = nib.Nifti1Image(numbered(dtype="<i2").T, None)
    image.set_sform(sform, 1 if sform is not None else 0)
    image.set_qform(qform, 2 if qform is not None else 0)
    image.header.set_zooms(np.linalg.norm((sform if qform is None else qform)[:3, :3], axis=0))
    nib.save(image, path)


def affine(direction: np.ndarray, spacing=(0.5, 0.75, 2.5), origin=(12.5, -30.25, 7.0)) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = direction * spacing
    result[:3, 3] = origin
    return result


# --- versions


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "f4", "f8"])
def test_both_versions_are_what_nibabel_says(tmp_path, kind, order, suffix, dtype):
    path = tmp_path / f"a{suffix}"
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(order + dtype))
    image = kind(numbered(dtype=order + dtype).T, affine(OBLIQUE), header)
    image.set_qform(affine(OBLIQUE), 1)
    nib.save(image, path)
    scan, other = read_scan(path), nib.load(path)
    assert scan.warnings == ()
    assert scan.volume.voxels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(scan.volume.voxels[0].T, np.asarray(other.dataobj))
    np.testing.assert_allclose(affine_of(path), other.affine, rtol=1e-6, atol=1e-6)
    assert read_geometry(path) == scan.volume.geometry
    assert source_files(path) == [path]


def test_nifti_2_by_its_qform_alone(tmp_path):
    rng = np.random.default_rng(5)
    for number in range(12):
        turn = Rotation.random(random_state=rng).as_matrix() * ([1, 1, -1] if number % 2 else 1)
        image = nib.Nifti2Image(numbered(dtype="<i2").T, None)
        image.set_qform(affine(turn), 1)
        nib.save(image, tmp_path / "a.nii")
        np.testing.assert_allclose(affine_of(tmp_path / "a.nii"), nib.load(tmp_path / "a.nii").affine, atol=1e-12)


def test_more_voxels_along_an_axis_than_version_1_can_say(tmp_path):
    voxels = np.arange(40000, dtype="<u2").reshape(40000, 1, 1)
    nib.save(nib.Nifti2Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels[0].T, voxels)


NIFTI_2_REFUSALS = {
    "magic": (4, "8s", b"n+2\0\r\r\n\0", "scan.unreadable"),
    "pair": (4, "8s", b"ni2\0\r\n\x1a\n", "scan.unreadable"),
    "datatype": (12, "h", 9999, "scan.dtype"),
    "bitpix": (14, "h", 8, "scan.header"),
    "ndim": (16, "q", 9, "scan.header"),
    "axis negative": (24, "q", -5, "scan.empty"),
    "axis huge": (24, "q", 2**62, "scan.too-large"),
    "offset early": (168, "q", 352, "scan.header"),
    "offset late": (168, "q", 10**12, "scan.truncated"),
    "offset negative": (168, "q", -1, "scan.header"),
    "slope infinite": (176, "d", np.inf, "scan.header"),
    "sform code": (348, "i", 77, "scan.header"),
    "no transform": (348, "i", 0, "geometry.missing"),
    "sform nan": (400, "d", np.nan, "geometry.nonfinite"),
    "metres": (500, "i", 1, "geometry.ambiguous"),
}


@pytest.mark.parametrize(("offset", "form", "value", "code"), NIFTI_2_REFUSALS.values(), ids=NIFTI_2_REFUSALS)
def test_nifti_2_refusals(tmp_path, offset, form, value, code):
    raw = bytearray(nib.Nifti2Image(numbered(dtype="<i2").T, np.diag([-0.5, -0.75, 2.5, 1.0])).to_bytes())
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").voxels[0], numbered())
    struct.pack_into("<" + form, raw, offset, value)
    (tmp_path / "a.nii").write_bytes(raw)
    assert refused(tmp_path / "a.nii") == code


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm99AnalyzeImage])
def test_pairs_are_refused_by_what_they_are(tmp_path, kind):
    nib.save(kind(numbered(dtype="i2").T, np.eye(4)), tmp_path / "a.img")
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.hdr").read_bytes())
    for name in ("a.hdr", "a.nii"):
        assert refused(tmp_path / name) == "scan.unreadable"
    if kind is not nib.Spm99AnalyzeImage:
        with pytest.raises(ValueError, match=r"NIfTI pair.*convert"):
            read_volume(tmp_path / "a.hdr")


# --- transforms


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("which", ["both", "sform", "qform"])
def test_transforms_that_agree_need_no_policy(tmp_path, policy, which):
    where = affine(OBLIQUE)
    placed(tmp_path / "a.nii", where if which != "qform" else None, where if which != "sform" else None)
    scan = read_scan(tmp_path / "a.nii", ReadingPlan(nifti_transform=policy))
    assert scan.warnings == ()
    np.testing.assert_allclose(LPS_FROM_RAS @ scan.volume.geometry.matrix[:, [2, 1, 0, 3]], where, atol=1e-6)


@pytest.mark.parametrize("turned", [True, False])
def test_of_transforms_that_disagree_the_policy_chooses_one(tmp_path, turned):
    sform = affine(OBLIQUE)
    qform = affine(OBLIQUE[:, [1, 0, 2]] if turned else OBLIQUE, origin=(12.5, 9.75, 7.0))
    path = tmp_path / "a.nii"
    placed(path, sform, qform)
    assert refused(path) == "geometry.ambiguous"
    assert refused(path, read_geometry) == "geometry.ambiguous"
    for policy, where in (("sform", sform), ("qform", qform)):
        reading = ReadingPlan(nifti_transform=policy)
        scan = read_scan(path, reading)
        assert scan.warnings == ("geometry.transforms-differ",)
        np.testing.assert_allclose(LPS_FROM_RAS @ scan.volume.geometry.matrix[:, [2, 1, 0, 3]], where, atol=1e-5)
        assert read_geometry(path, reading) == scan.volume.geometry
        assert read_label(path, reading=reading).geometry == scan.volume.geometry


def test_a_transform_that_is_not_chosen_may_be_damaged(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(None, (252, "2h", 1, 1), (256, "f", np.nan)))
    assert refused(path) == "geometry.ambiguous"
    assert read_scan(path, ReadingPlan(nifti_transform="sform")).warnings == ("geometry.transforms-differ",)
    assert refused(path, lambda p: read_scan(p, ReadingPlan(nifti_transform="qform"))) == "geometry.not-orthonormal"


def test_pixdim_against_the_sform_is_a_matter_of_policy_too(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(None, (80, "f", 5.0)))
    assert refused(path) == "geometry.ambiguous"
    scan = read_scan(path, ReadingPlan(nifti_transform="sform"))
    assert scan.warnings == ("geometry.transforms-differ",)
    assert scan.volume.geometry.spacing_mm == (2.5, 0.75, 0.5)


@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_in_metres_or_micrometres_are_refused_and_unknown_ones_are_mm(tmp_path, policy):
    path = tmp_path / "a.nii"
    for units in (1, 3, 8 + 1, 16 + 3):
        path.write_bytes(nifti_bytes(None, (123, "B", units)))
        assert refused(path, lambda p: read_scan(p, ReadingPlan(nifti_transform=policy))) == "geometry.ambiguous"
    for units in (0, 2, 8 + 2, 8):
        path.write_bytes(nifti_bytes(None, (123, "B", units)))
        assert read_scan(path, ReadingPlan(nifti_transform=policy)).warnings == ()


# --- values


def test_a_slope_of_nan_is_noted(tmp_path):
    path = tmp_path / "a.nii"
    for slope, warnings in ((np.nan, ("scan.unscaled",)), (0.0, ()), (1.0, ())):
        path.write_bytes(nifti_bytes(None, (112, "2f", slope, 0.0)))
        scan = read_scan(path)
        assert scan.warnings == warnings
        np.testing.assert_array_equal(scan.volume.voxels[0], numbered())


def extended(*sizes: int, order: str = "<", room: int = 96) -> bytes:
    """A NIfTI-1 with ``room`` bytes for extensions of the given declared sizes before the voxels."""
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(order + "i2"))
    image = nib.Nifti1Image(numbered(dtype=order + "i2").T, np.eye(4), header)
    raw = bytearray(image.to_bytes())
    struct.pack_into(order + "f", raw, 108, 352.0 + room)
    chain = bytearray(room)
    at = 0
    for size in sizes:
        struct.pack_into(order + "2i", chain, at, size, 2)
        at += max(8, min(size, room - at - 8))
    return bytes(raw[:348]) + b"\1\0\0\0" + bytes(chain) + bytes(raw[352:])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("sizes", "sound"),
    [
        ((96,), True), ((32, 64), True), ((32,), True), ((), True),
        ((2**31 - 1,), False), ((-1,), False), ((7,), False), ((112,), False), ((32, 80), False), ((32, -16), False),
    ],
)  # fmt: skip
def test_extensions_end_before_the_voxels(tmp_path, order, sizes, sound):
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(extended(*sizes, order=order)))
        if sound:
            np.testing.assert_array_equal(read_volume(tmp_path / name).voxels[0], numbered())
        else:
            assert refused(tmp_path / name) == "scan.header"


def test_what_an_extension_says_stays_out_of_a_mask(tmp_path):
    raw = bytearray(extended(96))
    raw[360:370] = b"Doe^John\0\0"
    raw[148:156] = b"Doe^John"
    (tmp_path / "a.nii").write_bytes(raw)
    write_label(tmp_path / "m.nii", numbered(), read_geometry(tmp_path / "a.nii"))
    assert b"Doe" not in (tmp_path / "m.nii").read_bytes()


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", ()), (bytes(512), ()), (bytes(100_000), ()), (b"JUNK", ("scan.trailing-bytes",)),
        (b"J" * 4096, ("scan.trailing-bytes",)), (b"J" * 4097, "scan.header"),
    ],
)  # fmt: skip
def test_bytes_after_a_gzip_stream(tmp_path, tail, expected):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes()) + tail)
    if isinstance(expected, str):
        assert refused(path) == expected
    else:
        scan = read_scan(path)
        assert scan.warnings == expected
        np.testing.assert_array_equal(scan.volume.voxels[0], numbered())


def test_bytes_after_plain_voxels(tmp_path):
    noted = ("scan.trailing-bytes",)
    for name, pack, cases in (
        ("a.nii", bytes, {b"": (), bytes(16): (), b"JUNK": noted}),
        ("b.nii.gz", gzip.compress, {b"": (), bytes(16): noted, b"JUNK": noted}),  # within the stream
    ):
        for tail, warnings in cases.items():
            (tmp_path / name).write_bytes(pack(nifti_bytes() + tail))
            scan = read_scan(tmp_path / name)
            np.testing.assert_array_equal(scan.volume.voxels[0], numbered())
            assert scan.warnings == warnings


def test_members_of_any_size(tmp_path):
    raw = nifti_bytes()
    for size in (1, 7, 340, 352):
        members = (gzip.compress(raw[at : at + size]) for at in range(0, len(raw), size))
        (tmp_path / "a.nii.gz").write_bytes(b"".join(members))
        np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels[0], numbered())


# --- axes that are not at right angles


def skewed(path: Path, shear: float) -> np.ndarray:
    """An sform whose second axis leans towards the first by ``shear`` of its length."""
    steps = np.eye(3)
    steps[0, 1] = shear
    where = affine(OBLIQUE @ steps)
    placed(path, where, None)
    return where


def test_rounding_is_kept_as_it_is_stored(tmp_path):
    where = skewed(tmp_path / "a.nii", 5e-5)
    scan = read_scan(tmp_path / "a.nii")
    assert scan.warnings == ()
    np.testing.assert_allclose(affine_of(tmp_path / "a.nii"), where, atol=1e-6)


def test_slightly_skewed_axes_that_itk_refuses_are_repaired(tmp_path, capfd):
    path = tmp_path / "a.nii"
    where = skewed(path, 5e-4)
    with pytest.raises(RuntimeError):
        sitk.ReadImage(str(path))
    scan = read_scan(path)
    assert scan.warnings == ("geometry.repaired",)
    assert read_geometry(path) == scan.volume.geometry
    direction = np.array(scan.volume.geometry.direction)
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)
    np.testing.assert_array_equal(scan.volume.voxels[0], numbered())
    # a shear of 0.0005 is halved between two axes: each turns by 0.00025 about the centre of 3 x 4 x 5 voxels
    for y, moved_mm in ((1.5, 0), (0, 0.00025 * 1.5 * 0.75), (3, 0.00025 * 1.5 * 0.75)):
        ours = world_mm(scan.volume.geometry, np.array([1, y, 2]))
        moved = np.linalg.norm(ours - (LPS_FROM_RAS @ where @ [2, y, 1, 1])[:3])
        assert moved == pytest.approx(moved_mm, rel=0.01, abs=2e-6)
    capfd.readouterr()


def test_sheared_axes_are_refused_or_resampled(tmp_path):
    path = tmp_path / "a.nii"
    where = skewed(path, 0.2)
    reading = ReadingPlan(sheared_axes="resample")
    assert refused(path) == refused(path, read_geometry) == "geometry.not-orthonormal"
    scan = read_scan(path, reading)
    assert scan.warnings == ("geometry.straightened",)
    assert scan.volume.voxels.dtype == np.float32
    assert read_geometry(path, reading) == scan.volume.geometry
    label = read_label(path, reading=reading)
    assert label.geometry == scan.volume.geometry
    assert set(np.unique(label.voxels)) <= set(range(60))
    # the first voxel stays where the header puts it, with its value
    index = np.linalg.inv(scan.volume.geometry.matrix) @ LPS_FROM_RAS @ where @ [0, 0, 0, 1]
    z, y, x = np.rint(index[:3]).astype(int)
    np.testing.assert_allclose(index[:3], (z, y, x), atol=1e-4)
    assert scan.volume.voxels[0, z, y, x] == pytest.approx(0, abs=1e-3)


def test_flat_axes_are_refused_under_either_policy(tmp_path):
    skewed(tmp_path / "a.nii", 5.0)
    for policy in ("refuse", "resample"):
        reading = ReadingPlan(sheared_axes=policy)
        assert refused(tmp_path / "a.nii", lambda p, r=reading: read_scan(p, r)) == "geometry.not-orthonormal"


def test_all_48_orders_and_signs_of_axes(tmp_path):
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            direction = np.eye(3)[:, list(order)] * signs
            placed(tmp_path / "a.nii", affine(direction), affine(direction))
            np.testing.assert_allclose(affine_of(tmp_path / "a.nii"), affine(direction), atol=1e-6)
