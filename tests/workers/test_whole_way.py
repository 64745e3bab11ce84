"""From a scan file to its mask file and back into other people's readers, with a network whose answer is known.

What is checked is told by nibabel and SimpleITK alone, from the file that they were given: header fields, voxels in
the file's own order, and points in the patient's world.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import zarr
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from tests.files import file_of
from tests.vnet_core.test_geometry import signed_permutations
from tests.workers.known_model import known_network, known_plan, own_spacing, scan_of, segmented
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, same_grid, to_canonical, world_mm
from vnet_core.inference import choose_tile, predicted_peak_bytes
from vnet_core.plan import Plan
from vnet_core.sections import ReadingPlan
from workers.cohort import read_channels
from workers.sources.scans import read_geometry, read_label, read_scan, read_volume, write_label

SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
SHAPE = (4, 5, 6)
SPACING_XYZ = np.array([0.5, 0.75, 3.0])
ORIGIN_MM = np.array([-112.5, 30.25, 710.125])
TURNS = {
    "straight": np.eye(3),
    "nearly straight": Rotation.from_euler("zyx", [0.05, 0.02, -0.03], degrees=True).as_matrix(),
    "oblique": Rotation.from_euler("zyx", [20, -35, 28], degrees=True).as_matrix(),
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def write_scan(path: Path, voxels: np.ndarray, direction: np.ndarray, spacing=SPACING_XYZ, origin=ORIGIN_MM) -> None:
    """A scan (Z, Y, X) as others write it; direction (3, 3) by columns x, y, z and origin in LPS.

    NIfTI in float32 with sform and qform, by nibabel; MetaImage and NRRD by SimpleITK.
    """
    if ".nii" in path.name:
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = LPS_TO_RAS @ (direction * spacing), LPS_TO_RAS @ origin
        image = nib.Nifti1Image(voxels.T, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, path)
        return
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path))


def checked_mask(scan: Path, mask: Path) -> np.ndarray:
    """The voxels (Z, Y, X) that both other readers find in the mask, after its header is found to be the scan's."""
    theirs, ours = sitk.ReadImage(str(scan)), sitk.ReadImage(str(mask))
    voxels = sitk.GetArrayFromImage(ours)
    assert ours.GetSize() == theirs.GetSize()
    if ".nii" in scan.name and ".nii" in mask.name:
        a, b = nib.load(scan), nib.load(mask)
        np.testing.assert_array_equal(np.asarray(b.dataobj).T, voxels)
        for field in ("dim", "srow_x", "srow_y", "srow_z"):
            np.testing.assert_array_equal(a.header[field], b.header[field])
        np.testing.assert_array_equal(a.header["pixdim"][1:4], b.header["pixdim"][1:4])
        np.testing.assert_array_equal(b.affine, a.affine)
        assert b.header["sform_code"] == a.header["sform_code"]
        assert b.header["qform_code"] == a.header["qform_code"]
        assert b.header.get_xyzt_units()[0] == "mm"
        # the quaternion, from which ITK takes the axes where the sform is not orthonormal to its liking
        np.testing.assert_allclose(b.header.get_qform(), a.header.get_qform(), rtol=1e-4, atol=1e-3)
        # both quaternions are float32 of one matrix, found in two ways: 2e-4 rad apart near half turns
        np.testing.assert_allclose(ours.GetDirection(), theirs.GetDirection(), rtol=0, atol=3e-4)
        assert ours.GetSpacing() == pytest.approx(theirs.GetSpacing(), rel=1e-12)
        assert ours.GetOrigin() == pytest.approx(theirs.GetOrigin(), rel=1e-12)
    else:
        exact = {"rtol": 0, "atol": 0} if scan.suffix == mask.suffix == ".mha" else {"rtol": 1e-14, "atol": 1e-15}
        for field in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(ours, field)(), getattr(theirs, field)(), **exact)
    return voxels


def files(folder: Path, suffix: str) -> tuple[Path, Path]:
    """A scan and its mask; ``a.nii`` never beside ``a.nii.gz``, of which SimpleITK takes the voxels of ``a.nii``."""
    stem = f"{suffix.count('.')}{suffix}"
    return folder / f"scan-{stem}", folder / f"mask-{stem}"


def whole_way(folder: Path, suffix: str, voxels: np.ndarray, plan: Plan | None = None, **header: object) -> np.ndarray:
    """The mask of a scan as other readers find it; without ``plan`` at the scan's own spacing."""
    scan, mask = files(folder, suffix)
    write_scan(scan, voxels, **header)  # type: ignore[arg-type]
    volume = read_volume(scan)
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    plan = plan or known_plan(own_spacing(volume.geometry), crop=voxels.min() < min(250, voxels.max()))
    write_label(mask, segmented(volume, plan), volume.geometry)
    return checked_mask(scan, mask)


def some_mask(shape=SHAPE, seed: int = 0) -> np.ndarray:
    """Both labels and background at random, so that no swap, flip or shift of axes goes unseen."""
    return np.random.default_rng(seed).choice([0, 2, 7], shape, p=[0.6, 0.2, 0.2]).astype(np.uint8)


def world(image: sitk.Image, voxels: np.ndarray) -> np.ndarray:
    """Points (n, 3) of the voxels that are not 0, in the patient's world LPS by SimpleITK."""
    index = np.argwhere(voxels)[:, ::-1]
    axes = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    points = np.array(image.GetOrigin()) + index @ axes.T
    theirs = [image.TransformIndexToPhysicalPoint(i.tolist()) for i in index[:3]]
    np.testing.assert_allclose(points[:3], np.reshape(theirs, (-1, 3)), atol=1e-9)
    return points


# --- every orientation


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_48_axis_orders_keep_every_voxel_and_every_header_field(tmp_path, suffix, turn):
    for number, order in enumerate(signed_permutations()):
        known = some_mask(seed=number)
        found = whole_way(tmp_path, suffix, scan_of(known, number), direction=TURNS[turn] @ order)
        np.testing.assert_array_equal(found, known, err_msg=f"orientation {order.tolist()}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_patients_left_stays_left_back_stays_back_and_head_stays_head(tmp_path, suffix):
    """A marker is put at one side by its point in the world, in all orientations; its mask lies at that side."""
    scan, mask = tmp_path / f"scan{suffix}", tmp_path / f"mask{suffix}"
    for number, order in enumerate(signed_permutations()):
        write_scan(scan, np.zeros(SHAPE, np.int16), TURNS["oblique"] @ order)
        image = sitk.ReadImage(str(scan))
        points = world(image, np.ones(SHAPE))
        middle = points.mean(axis=0)
        axis, way = number % 3, 1 if number % 2 else -1
        beyond = way * (points - middle)[:, axis] > 0.35 * np.ptp(points[:, axis])
        assert 0 < beyond.sum() < 60
        voxels = scan_of(np.where(beyond.reshape(SHAPE), 2, 0), number)
        write_scan(scan, voxels, TURNS["oblique"] @ order)
        volume = read_volume(scan)
        write_label(mask, segmented(volume, known_plan(own_spacing(volume.geometry))), volume.geometry)
        if ".nii" in suffix:
            found = nib.load(mask)
            indices = np.argwhere(np.asarray(found.dataobj))
            marker = (indices @ found.affine[:3, :3].T + found.affine[:3, 3]).mean(axis=0) @ LPS_TO_RAS
        else:
            found = sitk.ReadImage(str(mask))
            marker = world(found, sitk.GetArrayFromImage(found)).mean(axis=0)
        assert way * (marker - middle)[axis] > 0, f"a marker along {'xyz'[axis]} changed sides"
        np.testing.assert_allclose(marker, points[beyond].mean(axis=0), atol=1e-3)


def test_a_mask_of_one_format_lies_on_the_scan_of_another(tmp_path):
    known = some_mask()
    for number, (order, source) in enumerate(zip(signed_permutations(), SUFFIXES * 12, strict=True)):
        scan, mask = tmp_path / f"scan{number}{source}", tmp_path / f"mask{number}{SUFFIXES[number // 4 % 4]}"
        write_scan(scan, scan_of(known), TURNS["oblique"] @ order)
        volume = read_volume(scan)
        write_label(mask, segmented(volume, known_plan(own_spacing(volume.geometry))), volume.geometry)
        theirs, ours = sitk.ReadImage(str(scan)), sitk.ReadImage(str(mask))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), known)
        np.testing.assert_allclose(world(ours, known), world(theirs, known), rtol=0, atol=2e-4)


# --- whatever a scanner writes

MASKS = ("empty", "single voxel", "full", "random")


def drawn_mask(kind: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    known = np.zeros(shape, np.uint8)
    if kind == "single voxel":
        known[tuple(np.random.default_rng(seed).integers(shape))] = 7
    elif kind == "full":
        known[:] = 2
    elif kind == "random":
        known = some_mask(shape, seed)
    return known


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    suffix=st.sampled_from(SUFFIXES),
    kind=st.sampled_from(MASKS),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    order=st.integers(0, 47),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    digits=st.sampled_from([4, 5, 6, None]),
    spacing=st.tuples(*[st.floats(0.25, 12.0)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
)
@example(".nii", "single voxel", (1, 1, 1), 17, (180.0, 0.0, 90.0), None, (0.1, 0.3, 7.0), (0.1, -0.2, 1e-7))
@example(".mha", "empty", (1, 1, 1), 0, (0.0, 0.0, 0.0), 4, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
@example(".nrrd", "full", (9, 1, 2), 47, (45.0, 45.0, 45.0), 4, (0.05, 12.0, 0.05), (2000.0, -2000.0, 2000.0))
def test_whatever_the_grid_the_mask_is_exact(tmp_path, suffix, kind, shape, order, angles, digits, spacing, origin):
    """Cosines as scanners write them: rounded to a few digits, or to float32, and so not quite orthonormal."""
    direction = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() @ signed_permutations()[order]
    direction = direction.astype(np.float32).astype(float) if digits is None else direction.round(digits)
    assume(np.abs(direction.T @ direction - np.eye(3)).max() < 0.95e-4)  # what deviates more is repaired, see below
    known = drawn_mask(kind, shape, order)
    header = {"direction": direction, "spacing": np.array(spacing), "origin": np.array(origin)}
    found = whole_way(tmp_path, suffix, scan_of(known, order), **header)
    np.testing.assert_array_equal(found, known)


# --- other spacings

BALL_MM = 14.0
"""Radius; at least three voxels of every grid below."""
TARGETS = {"finer": (1.0, 0.5, 0.5), "isotropic": (1.5, 1.5, 1.5), "coarser": (4.0, 2.0, 2.0), "odd": (1.1, 3.7, 0.9)}


def ball(shape, direction, spacing, centre_index) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)[..., ::-1]  # x, y, z
    distance = np.linalg.norm((index - centre_index) * spacing @ direction.T, axis=-1)
    return (distance <= BALL_MM).astype(np.uint8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_at_another_spacing_a_ball_keeps_its_centre_and_its_volume(tmp_path, suffix, target):
    """Its centroid within a twentieth of the coarser voxel along each axis, its volume within 6 %."""
    shape, spacing, centre = (14, 38, 50), np.array([0.6, 0.9, 2.5]), np.array([23.3, 19.1, 6.4])
    for order in signed_permutations()[::5]:
        direction = TURNS["oblique"] @ order
        known = 2 * ball(shape, direction, spacing, centre)
        header = {"direction": direction, "spacing": spacing}
        plan = known_plan(TARGETS[target])
        found = whole_way(tmp_path, suffix, scan_of(known, noise=0), plan, **header)
        assert set(np.unique(found)) == {0, 2}
        assert np.count_nonzero(found) == pytest.approx(np.count_nonzero(known), rel=0.06)
        scan, mask = files(tmp_path, suffix)
        image = sitk.ReadImage(str(mask))
        moved_mm = world(image, found).mean(axis=0) - world(image, known).mean(axis=0)
        along_network = np.linalg.inv(_network_axes(read_geometry(scan))) @ moved_mm
        coarser = np.maximum(TARGETS[target], own_spacing(read_geometry(scan)))
        assert (np.abs(along_network) <= 0.05 * coarser).all(), along_network / coarser


def _network_axes(geometry: Geometry) -> np.ndarray:
    """Unit vectors of the scan's axes that come nearest to head, back and left, by columns."""
    columns = np.array(geometry.direction)
    picked = [columns[:, np.abs(columns[axis]).argmax()] for axis in (2, 1, 0)]
    return np.stack(picked, axis=1)


@pytest.mark.parametrize("target", TARGETS)
def test_an_empty_and_a_single_voxel_mask_at_another_spacing(tmp_path, target):
    plan = known_plan(TARGETS[target], crop=False)
    known = np.zeros((9, 11, 13), np.uint8)
    assert not whole_way(tmp_path, ".nii.gz", scan_of(known), plan, direction=TURNS["oblique"]).any()
    known[4, 5, 6] = 2
    found = whole_way(tmp_path, ".nii.gz", scan_of(known, noise=0), plan, direction=TURNS["oblique"])
    if found.any():  # it may vanish on coarser voxels, but what is left lies where it was
        assert np.abs(np.argwhere(found).mean(axis=0) - [4, 5, 6]).max() <= 1


def test_tiles_give_the_same_mask_as_one_pass(tmp_path):
    known = some_mask((24, 26, 40))
    scan = tmp_path / "scan.nii.gz"
    write_scan(scan, scan_of(known), TURNS["oblique"] @ signed_permutations()[13])
    volume = read_volume(scan)
    spacing, shape = own_spacing(volume.geometry), to_canonical(volume.geometry)[1].shape
    whole = predicted_peak_bytes(known_plan(spacing).network, 1, 3, shape, 4)
    plan = known_plan(spacing, memory_limit_gib=(whole - 1) / 2**30)
    tile = choose_tile(plan, shape, 4)
    assert tile is not None
    assert max(tile) < max(shape)
    np.testing.assert_array_equal(segmented(volume, plan), known)


# --- DICOM

PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "axial, feet first": ((-1, 0, 0), (0, 1, 0)),
    "oblique": tuple(map(tuple, TURNS["oblique"][:, :2].T.round(6).tolist())),
}
"""Cosines along a row, to growing columns, and along a column, to growing rows, as in ImageOrientationPatient."""
PIXEL_MM, SLICE_MM = (0.75, 0.5), 2.5
"""Distance of rows, distance of columns; distance of slices."""


def write_series(folder: Path, voxels: np.ndarray, plane: str, shift_mm=(0.0, 0.0), step_mm: float = SLICE_MM) -> str:
    """A CT series, one file per slice, named and numbered against their order; its source, FOLDER#UID.

    Slice k lies ``k * step_mm`` along the normal (row x column), and ``k * shift_mm`` along (column, row) beside it.
    """
    row, column = (np.array(cosines, float) for cosines in PLANES[plane])
    series = pydicom.uid.generate_uid(prefix="1.2.3.", entropy_srcs=[plane, str(shift_mm), str(step_mm)])[:50]
    folder.mkdir(exist_ok=True)
    for k, pixels in enumerate(voxels):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"{series}.{k}"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = f"{series}.1", series, f"{series}.2"
        one.Modality, one.PatientID, one.InstanceNumber = "CT", "p", len(voxels) - k
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.ImagePositionPatient = [f"{v:.6f}" for v in first_pixel(plane, k, shift_mm, step_mm)]
        one.ImageOrientationPatient = [f"{v:.6f}" for v in (*row, *column)]
        one.PixelSpacing, one.SliceThickness = list(PIXEL_MM), abs(step_mm)
        one.Rows, one.Columns = pixels.shape
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        one.PixelData = (pixels + 1024).astype("<u2").tobytes()
        one.save_as(folder / f"{len(voxels) - k:03}.dcm", enforce_file_format=True)
    return f"{folder}#{series}"


def first_pixel(plane: str, k: int, shift_mm=(0.0, 0.0), step_mm: float = SLICE_MM) -> np.ndarray:
    row, column = (np.array(cosines, float) for cosines in PLANES[plane])
    return ORIGIN_MM + k * (step_mm * np.cross(row, column) + shift_mm[0] * column + shift_mm[1] * row)


def pixels_mm(plane: str, voxels: np.ndarray, shift_mm=(0.0, 0.0), step_mm: float = SLICE_MM) -> np.ndarray:
    """World points (n, 3) of the pixels that are not 0, by the equation of PS3.3 C.7.6.2.1.1."""
    row, column = (np.array(cosines, float) for cosines in PLANES[plane])
    k, i, j = np.argwhere(voxels).T
    first = np.array([first_pixel(plane, n, shift_mm, step_mm) for n in range(len(voxels))])
    return first[k] + np.outer(i * PIXEL_MM[0], column) + np.outer(j * PIXEL_MM[1], row)


def in_order(points: np.ndarray) -> np.ndarray:
    """Points in an order that does not depend on how a reader lists them."""
    return points[np.lexsort(points.round(2).T)]


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("step_mm", [SLICE_MM, -SLICE_MM])
@pytest.mark.parametrize("plane", PLANES)
def test_the_mask_of_a_series_lies_on_the_pixels_it_was_made_of(tmp_path, plane, step_mm, suffix):
    known = some_mask((5, 6, 7), 3)
    source = write_series(tmp_path / "series", scan_of(known), plane, step_mm=step_mm)
    volume = read_volume(source)
    assert volume.geometry == read_geometry(source)
    mask = tmp_path / f"mask{suffix}"
    write_label(mask, segmented(volume, known_plan(own_spacing(volume.geometry))), volume.geometry)
    found = sitk.ReadImage(str(mask))
    voxels = sitk.GetArrayFromImage(found)
    for label in (2, 7):
        expected = in_order(pixels_mm(plane, known == label, step_mm=step_mm))
        np.testing.assert_allclose(in_order(world(found, voxels == label)), expected, atol=1e-3)


@pytest.mark.parametrize("plane", PLANES)
def test_a_series_and_the_nifti_file_of_it_give_one_volume_and_one_mask(tmp_path, plane):
    known = some_mask((5, 6, 7), 4)
    series = read_volume(write_series(tmp_path / "series", scan_of(known), plane))
    row, column = (np.array(cosines, float) for cosines in PLANES[plane])
    direction = np.stack([row, column, np.cross(row, column)], axis=1)
    spacing = np.array([PIXEL_MM[1], PIXEL_MM[0], SLICE_MM])
    write_scan(tmp_path / "scan.nii.gz", scan_of(known), direction, spacing)
    file = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(series.voxels, file.voxels)
    assert same_grid(series.geometry, file.geometry, 1e-3)
    masks = [segmented(v, known_plan((1.0, 0.7, 0.6))) for v in (series, file)]
    assert masks[0].any()
    assert np.count_nonzero(masks[0] != masks[1]) <= 0.02 * np.count_nonzero(masks[0])


# --- axes that do not stand at right angles, and a tilted gantry

STRAIGHTENED = ReadingPlan(sheared_axes="resample", gantry_tilt="correct")


def write_nifti_without_quaternion(path: Path, voxels: np.ndarray, direction: np.ndarray, spacing=SPACING_XYZ) -> None:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = LPS_TO_RAS @ (direction * spacing), LPS_TO_RAS @ ORIGIN_MM
    image = nib.Nifti1Image(voxels.T, affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nib.save(image, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cosines_of_few_digits_are_repaired_and_every_voxel_stays_within_5e_4_of_the_edges(tmp_path, suffix):
    """Rounded to three digits the axes deviate by up to 1e-3, which ITK refuses in a NIfTI file without qform."""
    known, repaired = some_mask(), 0
    for number in range(40):
        direction = Rotation.random(random_state=np.random.default_rng(number)).as_matrix().round(3)
        unit = direction / np.linalg.norm(direction, axis=0)  # what NRRD and NIfTI keep of them
        skews = [np.abs(d.T @ d - np.eye(3)).max() for d in (direction, unit)]
        if not 1.2e-4 < min(skews) <= max(skews) <= 9e-4:
            continue
        repaired += 1
        scan, mask = tmp_path / f"scan{suffix}", tmp_path / "mask.nii.gz"
        write = write_nifti_without_quaternion if ".nii" in suffix else write_scan
        write(scan, scan_of(known), direction)
        read = read_scan(scan)
        assert read.warnings == ("geometry.repaired",)
        write_label(mask, segmented(read.volume, known_plan(own_spacing(read.volume.geometry))), read.volume.geometry)
        found = sitk.ReadImage(str(mask))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(found), known)
        index = np.argwhere(np.ones(SHAPE))[:, ::-1]
        declared = ORIGIN_MM + (index * SPACING_XYZ) @ direction.T
        moved_mm = np.linalg.norm(world(found, np.ones(SHAPE)) - declared, axis=1)
        edges_mm = (np.array(SHAPE) - 1) * SPACING_XYZ[::-1]
        assert moved_mm.max() <= 5e-4 * edges_mm.sum() + 2e-5  # and what float32 leaves of an origin of 710 mm
        np.testing.assert_allclose(world(found, np.ones(SHAPE)).mean(axis=0), declared.mean(axis=0), atol=1e-4)
    assert repaired > 10


def sheared(direction: np.ndarray, lean: float) -> np.ndarray:
    """The axes with the third leaning towards the first, as in a tilted gantry; columns of unit length."""
    leaning = direction @ np.array([[1, 0, lean], [0, 1, 0], [0, 0, 1]])
    return leaning / np.linalg.norm(leaning, axis=0)


@pytest.mark.parametrize("lean", [0.1, -0.45])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_sheared_scan_is_refused_or_its_mask_lies_straight_on_the_same_world(tmp_path, suffix, lean):
    """By policy; the ball's centroid within a twentieth of a voxel, its volume within 2 %."""
    shape, spacing, centre = (14, 38, 50), np.array([0.6, 0.9, 2.5]), np.array([23.3, 19.1, 6.4])
    for order in signed_permutations()[::7]:
        direction = sheared(TURNS["oblique"] @ order, lean)
        known = 2 * ball(shape, direction, spacing, centre)
        scan, mask = tmp_path / f"scan{suffix}", tmp_path / f"mask{suffix}"
        write = write_nifti_without_quaternion if ".nii" in suffix else write_scan
        write(scan, scan_of(known, noise=0), direction, spacing)
        with pytest.raises(ScanError) as caught:
            read_volume(scan)
        assert caught.value.code == "geometry.not-orthonormal"
        read = read_scan(scan, STRAIGHTENED)
        volume = read.volume
        assert read.warnings == ("geometry.straightened",)
        assert volume.geometry == read_geometry(scan, STRAIGHTENED)
        write_label(mask, segmented(volume, known_plan(own_spacing(volume.geometry))), volume.geometry)
        image = sitk.ReadImage(str(mask))
        axes = np.array(image.GetDirection()).reshape(3, 3)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
        found = sitk.GetArrayFromImage(image)
        voxel = np.prod(image.GetSpacing())
        declared = np.abs(np.linalg.det(direction * spacing))
        assert np.count_nonzero(found) * voxel == pytest.approx(np.count_nonzero(known) * declared, rel=0.02)
        points = ORIGIN_MM + (np.argwhere(known)[:, ::-1] * spacing) @ direction.T
        moved_mm = axes.T @ (world(image, found).mean(axis=0) - points.mean(axis=0))
        assert (np.abs(moved_mm) <= 0.05 * np.array(image.GetSpacing())).all()


def test_a_label_of_the_same_shear_is_straightened_onto_its_image(tmp_path):
    known = some_mask((6, 9, 8))
    direction = sheared(TURNS["oblique"], 0.3)
    write_scan(tmp_path / "scan.mha", scan_of(known), direction)
    write_scan(tmp_path / "label.nrrd", known, direction)
    image = read_volume(tmp_path / "scan.mha", STRAIGHTENED)
    label = read_label(tmp_path / "label.nrrd", reading=STRAIGHTENED)
    assert same_grid(image.geometry, label.geometry, 1e-6)
    assert set(np.unique(label.labels)) == {0, 2, 7}
    found = segmented(image, known_plan(own_spacing(image.geometry)))
    sure = label.labels == found
    assert sure.mean() > 0.7, "random labels, interpolated in two ways, agree on most voxels"


@pytest.mark.parametrize("plane", PLANES)
def test_a_tilted_series_is_refused_or_its_mask_lies_on_the_pixels(tmp_path, plane):
    """A tilt of whole pixels is exact: every labelled pixel keeps its point in the world."""
    known, shift_mm = some_mask((5, 6, 7), 6), (2 * PIXEL_MM[0], -PIXEL_MM[1])
    source = write_series(tmp_path / "series", scan_of(known), plane, shift_mm)
    with pytest.raises(ScanError) as caught:
        read_volume(source)
    assert caught.value.code == "dicom.gantry-tilt"
    read = read_scan(source, STRAIGHTENED)
    assert read.warnings == ("dicom.tilt-corrected",)
    geometry = read.volume.geometry
    assert geometry == read_geometry(source, STRAIGHTENED)
    assert geometry.shape == (5, 6 + 4 * 2, 7 + 4)
    mask = tmp_path / "mask.nii.gz"
    write_label(mask, segmented(read.volume, known_plan(own_spacing(geometry))), geometry)
    image = sitk.ReadImage(str(mask))
    found = sitk.GetArrayFromImage(image)
    for label in (2, 7):
        expected = in_order(pixels_mm(plane, known == label, shift_mm))
        np.testing.assert_allclose(in_order(world(image, found == label)), expected, atol=2e-3)


@pytest.mark.parametrize("degrees", [-25.0, 3.0, 12.0])
def test_a_ball_in_a_tilted_series_comes_back_round(tmp_path, degrees):
    """Its volume within 2 %, its centroid within a tenth of a voxel, its extent that of a ball in ten slices."""
    shape, step_mm = (16, 60, 80), 2.5
    shift_mm = (step_mm * np.tan(np.radians(degrees)), 0.0)
    everywhere = pixels_mm("axial", np.ones(shape), shift_mm, step_mm)
    centre = everywhere.mean(axis=0) + np.array([0.3, -0.7, 0.4])
    known = 2 * (np.linalg.norm(everywhere - centre, axis=1) <= 13.0).reshape(shape)
    source = write_series(tmp_path / "series", scan_of(known.astype(np.uint8), noise=0), "axial", shift_mm, step_mm)
    volume = read_volume(source, STRAIGHTENED)
    found = segmented(volume, known_plan(own_spacing(volume.geometry)))
    write_label(tmp_path / "mask.mha", found, volume.geometry)
    image = sitk.ReadImage(str(tmp_path / "mask.mha"))
    points = world(image, found)
    assert len(points) == pytest.approx(np.count_nonzero(known), rel=0.02)
    assert (np.abs(points.mean(axis=0) - everywhere[known.ravel() > 0].mean(axis=0)) <= [0.05, 0.075, 0.25]).all()
    assert np.linalg.norm(points - centre, axis=1).max() <= 13.0 + 0.75
    np.testing.assert_allclose(np.ptp(points, axis=0), [26, 26, 22.5], atol=1.0)


def test_a_second_channel_on_another_grid_is_brought_onto_the_first(tmp_path):
    """The second channel covers less, is turned, and coarser; a marker in it keeps its point within a third of it."""
    known = some_mask((9, 21, 19))
    write_scan(tmp_path / "first.nii.gz", scan_of(known), TURNS["oblique"])
    first = read_geometry(tmp_path / "first.nii.gz")
    middle = world_mm(first, (np.array(first.shape) - 1) / 2)
    direction, spacing = TURNS["nearly straight"] @ signed_permutations()[29], np.array([1.5, 1.5, 1.5])
    other = np.zeros((9, 9, 9), np.int16)
    other[4, 4, 4] = 900
    other[0, 0, 0] = -50
    write_scan(tmp_path / "second.mha", other, direction, spacing, middle - (direction * spacing) @ [4, 4, 4])
    sources = [str(tmp_path / "first.nii.gz"), str(tmp_path / "second.mha")]
    with pytest.raises(ScanError) as caught:
        read_channels(sources)
    assert caught.value.code == "cohort.channel-grid"
    both = read_channels(sources, ReadingPlan(channel_grids="resample"))
    assert both.geometry == first
    np.testing.assert_array_equal(both.voxels[0], scan_of(known))
    assert both.voxels[1].min() == -50
    weights = np.clip(both.voxels[1], 0, None).astype(float)
    points = np.moveaxis(world_mm(first, np.moveaxis(np.indices(first.shape), 0, -1)), -1, 0)
    marker = (points * weights).sum(axis=(1, 2, 3)) / weights.sum()
    np.testing.assert_allclose(marker, middle, atol=0.5)


# --- through the storage root, as a cohort goes


@pytest.mark.parametrize(
    ("number", "suffix", "mask_format", "file"),
    [
        (0, ".nii.gz", "nifti", "mask.nii.gz"),
        (13, ".nii", "nifti", "mask.nii.gz"),
        (22, ".mha", "mha", "mask.mha"),
        (31, ".mha", "nifti", "mask.nii.gz"),
        (38, ".nrrd", "nrrd", "mask.nrrd"),
        (47, ".nii.gz", "mha", "mask.mha"),
    ],
)
def test_every_stage_hands_the_geometry_on(tmp_path, number, suffix, mask_format, file):
    """Preprocessed into the root, segmented by a published model, proved, published; read by others from the root."""
    import safetensors.torch

    from workers.cohort import Case, source_digest
    from workers.preprocess import preprocess_case
    from workers.registry.models import Target, publish
    from workers.segmentation.segment import Job, Segmenter
    from workers.storage.store import Root

    known = some_mask((9, 10, 11), number)
    scan = tmp_path / f"scan{suffix}"
    write_scan(scan, scan_of(known, number), TURNS["oblique"] @ signed_permutations()[number])
    root = Root(tmp_path / "root")
    geometry = read_geometry(scan)
    plan = known_plan(own_spacing(geometry))
    weights = safetensors.torch.save(known_network(plan).state_dict())
    publish(root, Target("known", "v1", plan), [weights], {}, {})
    case = Case("one", (str(scan),), digest=source_digest([str(scan)]), geometry=geometry)
    prepared = preprocess_case(root.url, case, plan)
    assert prepared.state == "computed", prepared
    outcome = Segmenter(root.url, "known@v1", 1).segment(Job("c", case, mask_format))
    assert outcome.state == "computed", outcome
    mask = file_of(root, f"{outcome.key}/{file}")
    if mask.suffix == scan.suffix or (".nii" in scan.name and ".nii" in mask.name):
        np.testing.assert_array_equal(checked_mask(scan, mask), known)
    image, source = sitk.ReadImage(str(mask)), sitk.ReadImage(str(scan))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), known)
    np.testing.assert_allclose(world(image, known), world(source, known), rtol=0, atol=2e-4)
    report = json.loads(file_of(root, f"{outcome.key}/report.json").read_text("utf-8"))
    voxel_ml = np.prod(SPACING_XYZ) / 1000
    volumes = {row["name"]: row["volume_ml"] for row in report["labels"]}
    assert volumes == {
        name: pytest.approx(np.count_nonzero(known == value) * voxel_ml, rel=1e-5)
        for name, value in (("grey", 2), ("white", 7))
    }
    np.testing.assert_array_equal(
        zarr.open_array(file_of(root, f"{outcome.key}/mask.ome.zarr/0"), mode="r")[...], known
    )
