"""RT structure sets: contours to voxels by a rule that a pencil can check, and masks to contours and back exactly."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian
from scipy import ndimage

from tests.workers.dicom.series_maker import (
    FRAME,
    SERIES,
    STEP_MM,
    attributes,
    enhanced,
    voxels_of,
    write,
    write_series,
)
from vnet_core.colours import rgb
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, matrix_of, world_mm
from vnet_core.plan import Label
from workers.dicom.derived import Algorithm
from workers.dicom.structures import STRUCTURE_CLASS, read_structures, write_structures
from workers.sources.scans import read_geometry, source_files

IMAGE = Geometry((9, 20, 24), (2.0, 1.0, 1.0), (-30.0, 10.0, 100.0))
LABELS = (Label(value=2, name="liver"), Label(value=3, name="tumour"))
MODEL = Algorithm("organs@3", "abc")


def box(z: float, y0: float, x0: float, y1: float, x1: float) -> np.ndarray:
    """Corners (z, y, x) of a rectangle in voxels."""
    return np.array([(z, y0, x0), (z, y0, x1), (z, y1, x1), (z, y1, x0)])


def structure_set(path: Path, structures: dict[str, list], image: Geometry = IMAGE) -> Path:
    """A file of named structures, each a list of contours (N, 3) in voxels, or of (kind, contour)."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = STRUCTURE_CLASS, "1.2.3.99"
    frame = Dataset()
    frame.FrameOfReferenceUID = FRAME
    data.ReferencedFrameOfReferenceSequence = [frame]
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), 11):
        structure, drawn = Dataset(), Dataset()
        structure.ROINumber, structure.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for contour in contours:
            kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
            item = Dataset()
            item.ContourGeometricType, item.NumberOfContourPoints = kind, len(points)
            item.ContourData = [f"{v:.6f}" for v in world_mm(image, points).ravel()]
            drawn.ContourSequence.append(item)
        data.StructureSetROISequence.append(structure)
        data.ROIContourSequence.append(drawn)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "rs.dcm"


def refused(path: Path, image: Geometry = IMAGE, labels=()) -> str:
    with pytest.raises(ScanError) as caught:
        read_structures(path, image, labels)
    return caught.value.code


# --- reading


@pytest.mark.parametrize("corner", [-0.5, 0.0])
def test_ten_millimetres_square_on_five_slices_of_two_is_one_millilitre(path, corner):
    contours = [box(z, 3 + corner, 4 + corner, 13 + corner, 14 + corner) for z in range(2, 7)]
    scan = read_structures(structure_set(path, {"GTV": contours}), IMAGE)
    assert np.count_nonzero(scan.volume.labels) * IMAGE.voxel_ml == pytest.approx(1.0)
    assert scan.volume.labels[2:7, 3:13, 4:14].all()
    assert scan.warnings == ()


def test_an_oblique_image_with_other_axes_gets_the_same_voxels(path):
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    image = Geometry(IMAGE.shape, (2.0, 0.7, 0.9), (5.0, -3.0, 8.0), matrix_of(axes))
    contours = [box(z, 2.5, 3.5, 8.5, 14.5) for z in range(1, 4)]
    structure_set(path, {"GTV": contours}, image)
    scan = read_structures(path, image)
    assert scan.volume.labels[1:4, 3:9, 4:15].all()
    assert np.count_nonzero(scan.volume.labels) == 3 * 6 * 11
    turned = Geometry(image.shape[::-1], image.spacing_mm[::-1], image.origin_mm, matrix_of(axes[:, ::-1]))
    np.testing.assert_array_equal(read_structures(path, turned).volume.labels, scan.volume.labels.transpose())


def test_a_hole_a_keyhole_and_several_contours_of_a_slice(path):
    hole = [box(1, 0.5, 0.5, 10.5, 10.5), box(1, 3.5, 3.5, 6.5, 6.5)]
    outer, inner = box(2, 0.5, 0.5, 10.5, 10.5), box(2, 3.5, 3.5, 6.5, 6.5)[::-1]
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    apart = [box(3, 0.5, 0.5, 4.5, 4.5), box(3, 6.5, 6.5, 9.5, 9.5)]
    labels = read_structures(structure_set(path, {"GTV": [*hole, keyhole, *apart]}), IMAGE).volume.labels
    assert [np.count_nonzero(plane) for plane in labels[:4]] == [0, 91, 91, 16 + 9]
    assert not labels[1:3, 4:7, 4:7].any()


def test_contours_are_moved_to_the_nearest_slice(path):
    scan = read_structures(structure_set(path, {"GTV": [box(2.4, 0.5, 0.5, 3.5, 3.5)]}), IMAGE)
    assert np.count_nonzero(scan.volume.labels[2]) == np.count_nonzero(scan.volume.labels) == 9
    assert scan.warnings == ("label.contours-moved",)
    assert read_structures(structure_set(path, {"GTV": [box(2.05, 0, 0, 3, 3)]}), IMAGE).warnings == ()


@pytest.mark.parametrize(
    "contours",
    [
        [box(9.2, 0, 0, 3, 3)],  # beyond the last slice
        [box(-0.7, 0, 0, 3, 3)],
        [box(2, 0, 0, 3, 24.5)],  # beyond the right side
        [box(2, -0.8, 0, 3, 3)],
        [box(2, 0, 0, 3, 3) + np.array([[0, 0, 0], [0, 0, 0], [0.5, 0, 0], [0.5, 0, 0]])],  # out of the plane
        [box(1.7, 0, 0, 3, 3), box(2.2, 0, 0, 3, 3)],  # two planes at one slice
    ],
)
def test_contours_of_another_grid_are_refused(path, contours):
    assert refused(structure_set(path, {"GTV": contours})) == "label.grid"


def test_a_slice_without_a_contour_between_two_is_told(path):
    scan = read_structures(structure_set(path, {"GTV": [box(z, 0, 0, 3, 3) for z in (1, 2, 4)]}), IMAGE)
    assert scan.warnings == ("label.contour-gaps",)


def test_equal_contours_count_once(path):
    square = box(1, 0, 0, 3, 3)
    scan = read_structures(structure_set(path, {"GTV": [square, np.roll(square, 1, axis=0)]}), IMAGE)
    assert np.count_nonzero(scan.volume.labels) == 9
    assert scan.warnings == ("label.contour-copies",)


def test_contours_that_cross_are_joined(path):
    a, b = box(1, 0.5, 0.5, 6.5, 6.5), box(1, 4.5, 4.5, 9.5, 9.5)
    scan = read_structures(structure_set(path, {"GTV": [a, b]}), IMAGE)
    assert np.count_nonzero(scan.volume.labels) == 36 + 25 - 4
    assert scan.warnings == ("label.contours-cross",)
    exclusive = [("CLOSEDPLANAR_XOR", a), ("CLOSEDPLANAR_XOR", b)]
    assert np.count_nonzero(read_structures(structure_set(path, {"GTV": exclusive}), IMAGE).volume.labels) == 53


def test_points_and_open_lines_are_left_out(path):
    marks = [("POINT", box(1, 5, 5, 6, 6)[:1]), ("OPEN_PLANAR", box(1, 5, 5, 9, 9)), box(1, 0, 0, 3, 3)]
    scan = read_structures(structure_set(path, {"GTV": marks}), IMAGE)
    assert np.count_nonzero(scan.volume.labels) == 9
    assert scan.warnings == ("label.open-contours",)


def test_structures_are_labels_by_name_and_the_higher_value_stays(path):
    parts = {"couch": [box(0, 0, 0, 19, 19)], "Tumor": [box(1, 2, 2, 5, 5)], "LIVER": [box(1, 0, 0, 9, 9)]}
    scan = read_structures(structure_set(path, parts), IMAGE, LABELS)
    assert scan.warnings == ("label.left-out", "label.overlap")
    assert dict(zip(*np.unique(scan.volume.labels[1], return_counts=True), strict=True)) == {0: 480 - 81, 2: 72, 3: 9}
    assert not scan.volume.labels[0].any()
    plain = read_structures(path, IMAGE).volume.labels
    assert set(np.unique(plain)) == {0, 1, 3}, "in their order: the third paints over the second"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: delattr(d, "ROIContourSequence"), "label.corrupt"),
        (lambda d: setattr(d, "StructureSetROISequence", []), "label.no-structure"),
        (lambda d: setattr(d.ROIContourSequence[0].ContourSequence[0], "ContourData", [1, 2]), "label.corrupt"),
        (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.481.5"), "scan.unreadable"),
    ],
)
def test_damaged_structure_sets_are_refused_by_name(path, change, code):
    data = pydicom.dcmread(structure_set(path, {"GTV": [box(1, 0, 0, 3, 3)]}))
    change(data)
    data.save_as(path)
    assert refused(path) == code


def test_structures_without_a_wanted_name_are_refused(path):
    assert refused(structure_set(path, {"GTV": [box(1, 0, 0, 3, 3)]}), labels=LABELS) == "label.no-structure"


def area_mm2(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


@pytest.mark.parametrize(("modality", "share"), [("CT", 0.001), ("MR_T1", 0.001), ("PET", 0.025)])
def test_a_real_tumour_has_the_volume_of_its_polygons(real_scans, tmp_path, modality, share):
    folder = real_scans / "dicom" / "STS_002" / modality
    image = read_geometry(folder / "image")
    scan = read_structures(folder / "mask" / "RS.dcm", image)
    assert scan.warnings == ()
    contours = pydicom.dcmread(folder / "mask" / "RS.dcm").ROIContourSequence[0].ContourSequence
    areas_mm2 = sum(area_mm2(np.reshape(np.array(c.ContourData, float), (-1, 3))) for c in contours)
    analytic_ml = areas_mm2 * image.spacing_mm[0] / 1000
    assert analytic_ml == pytest.approx(53.2, abs=0.1)
    assert np.count_nonzero(scan.volume.labels) * image.voxel_ml == pytest.approx(analytic_ml, rel=share)
    write_structures(
        tmp_path / "again.dcm", scan.volume.labels, image, [Label(value=1, name="GTV")],
        source_files(folder / "image"), MODEL,
    )  # fmt: skip
    again = read_structures(tmp_path / "again.dcm", image)
    np.testing.assert_array_equal(again.volume.labels, scan.volume.labels)
    assert again.frame == scan.frame != ""


# --- writing


def blobs(shape, seed=0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return np.select([field > np.quantile(field, 0.8), field > np.quantile(field, 0.6)], [3, 2], 0).astype(np.uint8)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [0.8, 0.6, 0, -0.48, 0.64, 0.6]])
def test_a_mask_comes_back_exactly(tmp_path, path, orientation):
    normal = np.cross(orientation[:3], orientation[3:])
    place = attributes(
        ImageOrientationPatient=orientation,
        ImagePositionPatient=lambda z: [round(float(v), 9) for v in np.array([-10, 20, 30]) + STEP_MM * z * normal],
    )
    write_series(tmp_path / "series", voxels_of((7, 18, 13)), place)
    image, files = read_geometry(tmp_path / "series"), source_files(tmp_path / "series")
    for mask in (blobs(image.shape), np.zeros(image.shape, np.uint8), np.full(image.shape, 3, np.uint8)):
        write_structures(path, mask, image, LABELS, files, MODEL)
        scan = read_structures(path, image, LABELS)
        np.testing.assert_array_equal(scan.volume.labels, mask)
        assert not set(scan.warnings) - {"label.contour-gaps"}
    first = path.read_bytes()
    write_structures(path, mask, image, LABELS, files, MODEL)
    assert path.read_bytes() == first


def test_what_a_structure_set_says(tmp_path, path):
    write_series(tmp_path / "series", change=attributes(InstitutionName="canary", ReferringPhysicianName="canary"))
    image, files = read_geometry(tmp_path / "series"), source_files(tmp_path / "series")
    mask = np.zeros(image.shape, np.uint8)
    mask[2, 1:3, 1:4] = 2
    write_structures(path, mask, image, LABELS, files, MODEL)
    assert b"canary" not in path.read_bytes()
    data = pydicom.dcmread(path)
    assert [s.ROIName for s in data.StructureSetROISequence] == ["liver", "tumour"]
    assert [tuple(c.ROIDisplayColor) for c in data.ROIContourSequence] == [rgb(0), rgb(1)]
    assert "ContourSequence" not in data.ROIContourSequence[1]
    (contour,) = data.ROIContourSequence[0].ContourSequence
    assert contour.NumberOfContourPoints == 4
    there = pydicom.dcmread(next(f for f in files if pydicom.dcmread(f).InstanceNumber == 3))
    assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == there.SOPInstanceUID
    (frame,) = data.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert (frame.FrameOfReferenceUID, series.SeriesInstanceUID) == (FRAME, SERIES)
    assert len(series.ContourImageSequence) == len(files)
    codes = [o.RTROIIdentificationCodeSequence[0].CodeValue for o in data.RTROIObservationsSequence]
    assert codes == ["10200004", "108369006"]
    assert (data.PatientID, data.Modality, data.ApprovalStatus) == ("0815", "RTSTRUCT", "UNAPPROVED")


def test_a_mask_of_an_enhanced_series_refers_to_its_frames(tmp_path, path):
    write(enhanced(voxels_of()), tmp_path / "series" / "a.dcm")
    image, files = read_geometry(tmp_path / "series"), source_files(tmp_path / "series")
    mask = blobs(image.shape)
    write_structures(path, mask, image, LABELS, files, MODEL)
    np.testing.assert_array_equal(read_structures(path, image, LABELS).volume.labels, mask)
    contours = pydicom.dcmread(path).ROIContourSequence[1].ContourSequence
    first = int(np.flatnonzero((mask == 3).any(axis=(1, 2)))[0])
    assert contours[0].ContourImageSequence[0].ReferencedFrameNumber == first + 1
