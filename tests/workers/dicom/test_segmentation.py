"""DICOM segmentations: read onto a series' grid as dcmqi reads them, and written so that others read the same."""

import subprocess
import sysconfig
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.color import CIELabColor
from pydicom.sr._concepts_dict import concepts

from tests.workers.dicom.series_maker import (
    FRAME,
    PIXEL_MM,
    SERIES,
    SHAPE,
    STEP_MM,
    attributes,
    enhanced,
    voxels_of,
    write,
    write_series,
)
from vnet_core.colours import rgb
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, cropped, matrix_of
from vnet_core.plan import Label
from workers.dicom import codes
from workers.dicom.codes import Structure, concept_of, values_of, words
from workers.dicom.derived import Algorithm
from workers.dicom.segmentation import read_segmentation, write_segmentation
from workers.sources.scans import read_geometry, source_files

LABELS = (Label(value=2, name="liver"), Label(value=3, name="left kidney"), Label(value=300, name="Läsion"))
MODEL = Algorithm("organs@3", "abc")
OBLIQUE = [0.8, 0.6, 0, -0.48, 0.64, 0.6]


def mask_of(shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint16)
    mask[1:4, 1:3, 2:4] = 2
    mask[3:, 0, 0] = 3
    mask[0, -1, -1] = 300
    return mask


@pytest.fixture
def series(tmp_path) -> Path:
    folder = tmp_path / "series"
    write_series(folder)
    return folder


def written(series: Path, mask: np.ndarray | None = None, labels=LABELS, name: str = "mask.dcm") -> Path:
    path = series.parent / name
    geometry = read_geometry(series)
    mask = mask_of(geometry.shape) if mask is None else mask
    write_segmentation(path, mask, geometry, labels, source_files(series), MODEL)
    return path


def refused(path: Path, image: Geometry, labels=()) -> str:
    with pytest.raises(ScanError) as caught:
        read_segmentation(path, image, labels)
    return caught.value.code


def changed(path: Path, change) -> Path:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)
    return path


# --- dcmqi's own files


@pytest.fixture
def dcmqi(real_scans) -> Path:
    return real_scans / "dicom" / "dcmqi"


def nrrd(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    ("series", "seg", "truth"),
    [
        ("ct-3slice", "liver.dcm", "liver_seg.nrrd"),
        ("24x38x3/image", "24x38x3/seg/label.seg", "24x38x3/nrrd/label.nrrd"),
        ("23x38x3/image", "23x38x3/seg/label.seg", "23x38x3/nrrd/label.nrrd"),  # frames that end within a byte
        ("24x38x3/image", "sparse-labelmap-noppv.dcm", "sparse_labelmap_noppv_seg.nrrd"),
    ],
)
def test_segments_are_voxel_for_voxel_those_of_dcmqi(dcmqi, series, seg, truth):
    scan = read_segmentation(dcmqi / seg, read_geometry(dcmqi / series))
    np.testing.assert_array_equal(scan.volume.labels, nrrd(dcmqi / truth))
    assert scan.volume.labels.dtype == np.uint8
    assert scan.warnings == ()


def test_the_padding_of_a_label_map_is_background(dcmqi):
    scan = read_segmentation(dcmqi / "sparse-labelmap-ppv5.dcm", read_geometry(dcmqi / "24x38x3/image"))
    truth = nrrd(dcmqi / "sparse_labelmap_ppv5_seg.nrrd")
    np.testing.assert_array_equal(scan.volume.labels, np.where(truth == 5, 0, truth))


def test_overlapping_segments_leave_the_higher_value(dcmqi):
    scan = read_segmentation(dcmqi / "partial_overlaps.dcm", read_geometry(dcmqi / "ct-3slice"))
    groups = [nrrd(dcmqi / f"partial_overlaps-{n}.nrrd") for n in (1, 2, 3)]
    np.testing.assert_array_equal(scan.volume.labels, np.max(groups, axis=0))
    assert scan.warnings == ("label.overlap",)


def test_segments_become_labels_by_name_then_code(dcmqi):
    image = read_geometry(dcmqi / "ct-3slice")
    whole = read_segmentation(dcmqi / "partial_overlaps.dcm", image).volume.labels
    labels = (Label(value=7, name="orange"), Label(value=9, name="swelling", code="SCT:79654002:Edema"))
    scan = read_segmentation(dcmqi / "partial_overlaps.dcm", image, labels)
    assert scan.warnings == ("label.left-out",), "these two do not overlap"
    assert set(np.unique(scan.volume.labels)) == {0, 7, 9}
    np.testing.assert_array_equal(scan.volume.labels == 9, nrrd(dcmqi / "partial_overlaps-1.nrrd") == 4)
    assert ((whole == 2) <= (scan.volume.labels == 7)).all()
    # the older code of the same concept
    liver = read_segmentation(dcmqi / "liver.dcm", image, [Label(value=4, name="hepar", code="SCT:10200004:Liver")])
    np.testing.assert_array_equal(liver.volume.labels, 4 * nrrd(dcmqi / "liver_seg.nrrd"))


@pytest.mark.parametrize("merge", [False, True])
def test_dcmqi_reads_what_is_written(dcmqi, tmp_path, merge):
    truth = nrrd(dcmqi / "liver_spine_gapped_seg.nrrd").astype(np.uint8)
    image = read_geometry(dcmqi / "ct-3slice")
    labels = (Label(value=1, name="liver"), Label(value=5, name="spine", code="SCT:51282000:Vertebra"))
    path = tmp_path / "mask.dcm"
    write_segmentation(path, truth, image, labels, source_files(dcmqi / "ct-3slice"), MODEL)
    tool = Path(sysconfig.get_path("scripts")) / "segimage2itkimage"
    command = [tool, "--inputDICOM", path, "--outputDirectory", tmp_path, "-t", "nrrd"]
    subprocess.run([*command, *(["--mergeSegments"] if merge else [])], check=True, capture_output=True)
    files = sorted(tmp_path.glob("*.nrrd"))
    assert len(files) == (1 if merge else 2)
    found = np.max([nrrd(file) for file in files], axis=0)
    np.testing.assert_array_equal(found, np.array([0, 1, 0, 0, 0, 2])[truth])
    source = sitk.ReadImage(str(dcmqi / "liver_spine_gapped_seg.nrrd"))
    for file in files:
        header = sitk.ReadImage(str(file))
        np.testing.assert_allclose(header.GetOrigin(), source.GetOrigin(), atol=1e-5)
        np.testing.assert_allclose(header.GetSpacing(), source.GetSpacing(), atol=1e-6)
        np.testing.assert_allclose(header.GetDirection(), source.GetDirection(), atol=1e-9)


# --- there and back


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, -1], OBLIQUE])
def test_a_mask_comes_back_in_every_orientation(tmp_path, orientation):
    row, column = np.reshape(np.array(orientation, float), (2, 3))
    normal = np.cross(row, column)
    place = attributes(
        ImageOrientationPatient=orientation,
        ImagePositionPatient=lambda z: [round(float(v), 9) for v in np.array([-10, 20, 30]) + STEP_MM * z * normal],
    )
    write_series(tmp_path / "series", change=place)
    path = written(tmp_path / "series")
    geometry = read_geometry(tmp_path / "series")
    scan = read_segmentation(path, geometry, LABELS)
    np.testing.assert_array_equal(scan.volume.labels, mask_of())
    assert scan.volume.labels.dtype == np.uint16
    assert scan.warnings == ()
    # in an image whose axes are others, the same voxels of the body
    turned = Geometry(
        geometry.shape[::-1], geometry.spacing_mm[::-1], geometry.origin_mm,
        matrix_of(np.asarray(geometry.direction)[:, ::-1]),
    )  # fmt: skip
    np.testing.assert_array_equal(read_segmentation(path, turned, LABELS).volume.labels, mask_of().transpose())


def test_a_mask_of_an_enhanced_series_refers_to_its_frames(tmp_path):
    write(enhanced(voxels_of()), tmp_path / "series" / "a.dcm")
    path = written(tmp_path / "series")
    found = read_segmentation(path, read_geometry(tmp_path / "series"), LABELS)
    np.testing.assert_array_equal(found.volume.labels, mask_of())
    source = pydicom.dcmread(tmp_path / "series" / "a.dcm").PerFrameFunctionalGroupsSequence
    for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
        (item,) = frame.DerivationImageSequence[0].SourceImageSequence
        there = source[int(item.ReferencedFrameNumber) - 1].PlanePositionSequence[0].ImagePositionPatient
        assert frame.PlanePositionSequence[0].ImagePositionPatient == there


def test_highdicom_reads_what_is_written(series):
    seg = hd.seg.segread(written(series))
    volume = seg.get_volume(combine_segments=True)
    expected = np.zeros(SHAPE, int)
    for number, label in enumerate(LABELS, 1):
        expected[mask_of() == label.value] = number
    # its volume spans the slices that have a frame
    start = round((volume.affine[2, 3] - read_geometry(series).origin_mm[2]) / STEP_MM)
    step = 1 if volume.affine[2, 0] > 0 else -1
    found = volume.array if step > 0 else volume.array[::-1]
    start = start if step > 0 else start - len(found) + 1
    np.testing.assert_array_equal(found, expected[start : start + len(found)])


def test_what_a_segmentation_says(series):
    data = pydicom.dcmread(written(series))
    assert data.SegmentationType == "BINARY"
    liver, kidney, lesion = data.SegmentSequence
    assert [s.SegmentLabel for s in data.SegmentSequence] == ["liver", "left kidney", "Läsion"]
    assert {s.SegmentAlgorithmType for s in data.SegmentSequence} == {"AUTOMATIC"}
    shown = [CIELabColor.from_dicom_value(s.RecommendedDisplayCIELabValue).to_rgb() for s in data.SegmentSequence]
    assert shown == [rgb(0), rgb(1), rgb(2)]
    assert liver.SegmentAlgorithmName == "organs@3"
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    kidney_type = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert kidney_type.CodeValue == "64033007"
    assert kidney_type.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeValue == "85756007"
    assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert (data.StudyInstanceUID, data.FrameOfReferenceUID) == ("1.2", FRAME)
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == SERIES
    assert data.SeriesInstanceUID != SERIES
    assert np.allclose(data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing, PIXEL_MM)


def test_the_same_input_gives_the_same_bytes_and_another_mask_another_instance(series):
    first, again = written(series), written(series, name="again.dcm")
    assert first.read_bytes() == again.read_bytes()
    other = pydicom.dcmread(written(series, np.where(mask_of() == 3, 0, mask_of()), name="other.dcm"))
    assert other.SOPInstanceUID != pydicom.dcmread(first).SOPInstanceUID


def test_only_the_patient_and_the_study_of_the_source_are_taken_over(tmp_path):
    texts = {
        "InstitutionName": "canary-1", "ReferringPhysicianName": "canary-2", "PatientComments": "canary-3",
        "StudyDescription": "canary-4", "SeriesDescription": "canary-5", "StationName": "canary-6",
        "OperatorsName": "canary-7", "PatientAddress": "canary-8", "DeviceSerialNumber": "canary-9",
        "ProtocolName": "canary-10", "Manufacturer": "canary-11", "OtherPatientIDs": "canary-12",
    }  # fmt: skip
    write_series(
        tmp_path / "series", change=attributes(**texts, PatientName="Müller^Eva", SpecificCharacterSet="ISO_IR 100")
    )
    path = written(tmp_path / "series")
    assert b"canary" not in path.read_bytes()
    data = pydicom.dcmread(path)
    assert (str(data.PatientName), data.PatientID) == ("Müller^Eva", "0815")


def test_an_empty_mask_and_a_label_without_voxels_come_back(series):
    for mask in (np.zeros(SHAPE, np.uint8), np.where(mask_of() == 2, 2, 0).astype(np.uint8)):
        scan = read_segmentation(written(series, mask), read_geometry(series), LABELS)
        np.testing.assert_array_equal(scan.volume.labels, mask)


def test_a_single_voxel_keeps_its_place(series):
    mask = np.zeros(SHAPE, np.uint8)
    mask[4, 1, 3] = 2
    np.testing.assert_array_equal(
        read_segmentation(written(series, mask), read_geometry(series), LABELS).volume.labels, mask
    )


@pytest.mark.parametrize("keyword", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_a_series_without_what_must_be_named_is_refused(tmp_path, keyword):
    write_series(tmp_path / "series")
    geometry, files = read_geometry(tmp_path / "series"), source_files(tmp_path / "series")
    for path in files:
        changed(path, lambda data: delattr(data, keyword))
    with pytest.raises(ScanError, match=keyword) as caught:
        write_segmentation(tmp_path / "m.dcm", mask_of(), geometry, LABELS, files, MODEL)
    assert caught.value.code == "mask.source-header"


def test_files_that_are_no_dicom_are_refused(tmp_path):
    (tmp_path / "a.nii").write_bytes(bytes(1000))
    with pytest.raises(ScanError) as caught:
        write_segmentation(
            tmp_path / "m.dcm", mask_of(), Geometry(SHAPE, (1, 1, 1), (0, 0, 0)), LABELS, [tmp_path / "a.nii"], MODEL
        )
    assert caught.value.code == "mask.needs-dicom"


# --- what is read


def fractional(series: Path, shares: np.ndarray) -> Path:
    """A segmentation of one segment with a share of 0 .. 1 per voxel."""
    headers = [pydicom.dcmread(path) for path in source_files(series)]
    for header in headers:
        for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(header, name, "")
        header.SliceThickness = STEP_MM
    geometry = read_geometry(series)
    concept = concept_of(LABELS[0])
    seg = hd.seg.Segmentation(
        headers,
        hd.Volume(shares[..., None], geometry.matrix, "PATIENT", FRAME, channels={"SegmentNumber": [1]}),
        "FRACTIONAL",
        [hd.seg.SegmentDescription(1, "liver", concept.category, concept.type, "MANUAL")],
        "1.2.77", 1, "1.2.78", 1, "m", "m", "1", "1", max_fractional_value=200,
    )  # fmt: skip
    seg.save_as(series.parent / "fractional.dcm")
    return series.parent / "fractional.dcm"


def test_a_fractional_segment_counts_from_half_on(series):
    shares = np.zeros(SHAPE)
    shares[2, 1, :4] = (0.25, 0.49, 0.5, 1.0)
    scan = read_segmentation(fractional(series, shares), read_geometry(series), LABELS)
    np.testing.assert_array_equal(scan.volume.labels[2, 1], [0, 0, 2, 2, 0])
    assert np.count_nonzero(scan.volume.labels) == 2
    assert scan.warnings == ("label.thresholded",)


def test_without_labels_segments_count_in_their_order(series):
    values = read_segmentation(written(series), read_geometry(series)).volume.labels
    for number, label in enumerate(LABELS, 1):
        np.testing.assert_array_equal(values == number, mask_of() == label.value)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImagePositionPatient", [-12.5, 30.25, 8.0]),  # between two slices
        ("ImagePositionPatient", [-12.3, 30.25, 7.0]),  # 0.4 pixels to the side
    ],
)
def test_a_frame_beside_the_image_is_refused(series, keyword, value):
    def move(data):
        setattr(data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0], keyword, value)

    assert refused(changed(written(series), move), read_geometry(series)) == "label.grid"


@pytest.mark.parametrize(
    ("group", "keyword", "value"),
    [
        ("PixelMeasuresSequence", "PixelSpacing", [1.5, 0.5]),
        ("PixelMeasuresSequence", "PixelSpacing", [0.75, 0.55]),
        ("PlaneOrientationSequence", "ImageOrientationPatient", [0.8, 0.6, 0, -0.6, 0.8, 0]),
    ],
)
def test_other_spacing_or_axes_are_refused(series, group, keyword, value):
    def bend(data):
        setattr(data.SharedFunctionalGroupsSequence[0][group].value[0], keyword, value)

    assert refused(changed(written(series), bend), read_geometry(series)) == "label.grid"


def test_labelled_pixels_outside_of_the_image_are_refused_and_empty_ones_are_not(series):
    whole = read_geometry(series)
    path = written(series)
    assert refused(path, cropped(whole, (0, 0, 0), (5, 4, 5))) == "label.grid"
    assert refused(path, cropped(whole, (0, 1, 0), (6, 4, 5))) == "label.grid"
    mask = np.zeros(SHAPE, np.uint8)
    mask[2, 2, 2] = 2
    part = cropped(whole, (1, 1, 1), (5, 4, 5))
    found = read_segmentation(written(series, mask), part, LABELS).volume.labels
    np.testing.assert_array_equal(found, mask[1:5, 1:4, 1:5])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: setattr(d, "PixelData", d.PixelData[:-8]), "label.corrupt"),
        (lambda d: delattr(d, "SegmentSequence"), "label.corrupt"),
        (lambda d: setattr(d, "SegmentSequence", []), "label.no-structure"),
        (lambda d: delattr(d.SharedFunctionalGroupsSequence[0], "PixelMeasuresSequence"), "dicom.missing-geometry"),
        (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "label.corrupt"),
        (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "scan.unreadable"),
    ],
)
def test_damaged_segmentations_are_refused_by_name(series, change, code):
    assert refused(changed(written(series), change), read_geometry(series)) == code


def test_an_element_with_a_length_that_its_type_cannot_have_is_damage(series):
    path = written(series)
    raw = path.read_bytes()
    rows = b"\x28\0\x10\0US\x02\0"
    assert raw.count(rows) == 1
    path.write_bytes(raw.replace(rows, rows[:-2] + b"\x03\0\0"))
    assert refused(path, read_geometry(series)) == "label.corrupt"


def test_other_files_are_refused(series):
    (series.parent / "a.dcm").write_bytes(b"no DICOM at all" * 50)
    assert refused(series.parent / "a.dcm", read_geometry(series)) == "scan.unreadable"


def test_a_value_that_no_segment_describes_is_refused(dcmqi, tmp_path):
    data = pydicom.dcmread(dcmqi / "sparse-labelmap-noppv.dcm")
    data.PixelData = b"\x07" + data.PixelData[1:]
    data.save_as(tmp_path / "a.dcm")
    assert refused(tmp_path / "a.dcm", read_geometry(dcmqi / "24x38x3/image")) == "label.values"


# --- names and codes


def test_every_code_of_the_table_is_one_of_dicom():
    meanings: dict[str, set[str]] = {}
    for items in concepts["SCT"].values():
        for value, (meaning, _) in items.items():
            meanings.setdefault(value, set()).add(meaning.casefold())
    everything = [*(c.type for c in codes._BY_WORDS.values()), codes.TISSUE, codes.ANATOMICAL, codes.ABNORMAL]
    for code in [*everything, *codes.SIDES.values()]:
        assert code.meaning.casefold() in meanings[code.value], code


@pytest.mark.parametrize(
    ("name", "value", "side"),
    [
        ("Liver", "10200004", ""), ("kidney_left", "64033007", "left"), ("Right kidney", "64033007", "right"),
        ("left ventricle", "87878005", ""), ("Tumour", "108369006", ""), ("oesophagus", "32849002", ""),
    ],
)  # fmt: skip
def test_codes_by_name(name, value, side):
    concept = concept_of(Label(value=1, name=name))
    assert (concept.type.value, concept.side) == (value, side)


def test_a_label_without_a_known_name_has_no_code_and_its_own_code_comes_first():
    assert concept_of(Label(value=1, name="label-1")) is None
    own = concept_of(Label(value=1, name="liver", code="99X:L-1:Left: lobe"))
    assert (own.type.scheme_designator, own.type.value, own.type.meaning) == ("99X", "L-1", "Left: lobe")


def test_words_of_a_name():
    assert words("Kidney_LEFT") == words("left  kidney") == ("kidney", "left")
    assert words("GTV-1") != words("GTV-2")


def test_structures_of_one_code_are_joined_and_an_ambiguous_code_is_no_match():
    tumour = concept_of(Label(value=1, name="tumour")).type
    found = [Structure(1, "a", (tumour,)), Structure(2, "b", (tumour,)), Structure(3, "couch")]
    assert values_of(found, [Label(value=5, name="tumour")]) == ({1: 5, 2: 5}, ("label.left-out",))
    twice = [Label(value=5, name="tumour"), Label(value=6, name="neoplasm")]
    with pytest.raises(ScanError) as caught:
        values_of(found, twice)
    assert caught.value.code == "label.no-structure"
    kidneys = [Structure(1, "x", (concept_of(LABELS[1]).type,), "right")]
    with pytest.raises(ScanError):
        values_of(kidneys, LABELS)
