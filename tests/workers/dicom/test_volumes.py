"""Series as volumes: values and places against SimpleITK and pencil, splitting by stated rules, and every refusal."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.uid import CTImageStorage
from scipy.spatial.transform import Rotation

from tests.workers.dicom.series_maker import (
    LOSSLESS,
    LOSSY,
    NATIVE,
    ORIGIN_MM,
    PIXEL_MM,
    SHAPE,
    STEP_MM,
    attributes,
    encoded,
    enhanced,
    item_of,
    slice_of,
    voxels_of,
    write,
    write_series,
)
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, world_mm
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan
from workers.dicom.tree import Series, scan_tree
from workers.dicom.volumes import read_series, series_geometry

PLAN = ReadingPlan()
CORRECT = ReadingPlan(gantry_tilt="correct")
OBLIQUE = Rotation.from_euler("zyx", [20, -35, 50], degrees=True).as_matrix()


def volumes(folder: Path) -> dict[str, Series]:
    return {series.part: series for series in scan_tree(folder).volumes}


def read(folder: Path, plan: ReadingPlan = PLAN) -> Scan:
    (series,) = scan_tree(folder).volumes
    scan = read_series(series, plan)
    assert series_geometry(series, plan) == scan.volume.geometry
    return scan


def refused(folder: Path, plan: ReadingPlan = PLAN) -> str:
    (series,) = scan_tree(folder).volumes
    caught = []
    for reader in (read_series, series_geometry):
        with pytest.raises(ScanError) as error:
            reader(series, plan)
        caught.append(error.value)
    assert caught[0].code == caught[1].code
    assert str(caught[0])
    return caught[0].code


# --- values


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<u2"])
@pytest.mark.parametrize("syntax", [*NATIVE.values(), *LOSSLESS.values()], ids=[*NATIVE, *LOSSLESS])
def test_every_lossless_encoding_gives_the_values_that_were_written(tmp_path, syntax, dtype):
    voxels = write_series(tmp_path, voxels_of((3, 40, 48), dtype), encoded(syntax))
    scan = read(tmp_path)
    assert scan.volume.voxels.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels)


@pytest.mark.parametrize("dtype", ["u1", "<i4", "<u4"])
@pytest.mark.parametrize("syntax", [*NATIVE.values()], ids=[*NATIVE])
def test_other_widths(tmp_path, syntax, dtype):
    voxels = write_series(tmp_path, voxels_of((3, 3, 5), dtype), encoded(syntax))
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], voxels)


@pytest.mark.parametrize(
    ("keyword", "vr", "dtype"), [("FloatPixelData", "OF", "<f4"), ("DoubleFloatPixelData", "OD", "<f8")]
)
def test_floating_point_pixels(tmp_path, keyword, vr, dtype):
    voxels = (np.random.default_rng(0).random((3, 4, 5)) - 0.5).astype(dtype)

    def change(data: Dataset, z: int) -> None:
        del data.PixelData
        data.BitsAllocated = 8 * voxels.itemsize
        data.add_new(keyword, vr, voxels[z].tobytes())

    write_series(tmp_path, voxels_of((3, 4, 5)), change)
    volume = read(tmp_path).volume
    assert volume.voxels.dtype == dtype
    np.testing.assert_array_equal(volume.voxels[0], voxels)


@pytest.mark.parametrize(("syntax", "dtype"), [(LOSSY["jpeg-baseline"], "u1"), (LOSSY["jpeg-2000-lossy"], "<u2")])
def test_lossy_encodings_give_what_their_decoder_gives(tmp_path, syntax, dtype):
    voxels = write_series(tmp_path, voxels_of((3, 40, 48), dtype), encoded(syntax))
    found = read(tmp_path).volume.voxels[0]
    assert 0 < np.abs(found.astype(int) - voxels).mean() < 0.02 * voxels.max()
    for z in range(3):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{3 - z:03}.dcm")))[0]
        np.testing.assert_allclose(found[z], image, atol=1)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_jpeg_of_twelve_bits(tmp_path, photometric):
    stored = sitk.GetArrayFromImage(sitk.ReadImage(get_testdata_file("JPGExtended.dcm")))[0]
    for z in range(2):
        data = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"1.2.{z}"
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 3 * z], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.PhotometricInterpretation = [1, 1], photometric
        write(data, tmp_path / f"{z}.dcm")
    found = read(tmp_path).volume.voxels[0]
    assert found.dtype == np.uint16
    for plane in found:
        np.testing.assert_array_equal(plane, stored)


def test_high_throughput_jpeg_2000_goes_to_openjpeg(tmp_path):
    """OpenJPEG writes no HTJ2K, so the plain stream stands under the syntax of the other, which it tells by itself."""

    def change(data: Dataset, z: int) -> None:
        encoded(LOSSLESS["jpeg-2000"])(data, z)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"

    voxels = write_series(tmp_path, voxels_of((3, 40, 48)), change)
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], voxels)


@pytest.mark.parametrize("syntax", [*LOSSLESS.values()], ids=[*LOSSLESS])
def test_a_damaged_stream_is_no_volume(tmp_path, syntax):
    write_series(tmp_path, voxels_of((3, 40, 48)), encoded(syntax))
    path = tmp_path / "002.dcm"
    raw = path.read_bytes()
    at = raw.index(b"\xfe\xff\x00\xe0", raw.index(b"\xe0\x7f\x10\x00") + 20)
    path.write_bytes(raw[: at + 8] + b"\x5a" * (len(raw) - at - 16) + raw[-8:])
    (series,) = scan_tree(tmp_path).volumes
    with pytest.raises(ScanError) as caught:
        read_series(series, PLAN)
    assert caught.value.code == "dicom.corrupt-slice"


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [
        ("1", "0", "int16"),
        ("1", "-1024", "int16"),
        ("-2", "3", "int16"),
        ("0.5", "3", "float64"),
        ("1e5", "0", "int32"),
    ],
)
def test_rescaled_values_are_never_inverted(tmp_path, photometric, slope, intercept, dtype):
    change = attributes(
        RescaleSlope=slope, RescaleIntercept=intercept, PhotometricInterpretation=photometric, BitsStored=12, HighBit=11
    )
    voxels = write_series(tmp_path, change=change)
    found = read(tmp_path).volume.voxels[0]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, voxels * float(slope) + float(intercept))


def test_every_slice_has_its_own_rescale(tmp_path):
    voxels = write_series(tmp_path, change=attributes(RescaleSlope=lambda z: 0.5 + z, RescaleIntercept=lambda z: -z))
    expected = voxels * (0.5 + np.arange(6))[:, None, None] - np.arange(6)[:, None, None]
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], expected)


@pytest.mark.parametrize("dtype", ["<i2", "<u2"])
def test_bits_above_those_stored_do_not_count(tmp_path, dtype):
    """An overlay in the upper four bits, as old scanners put it."""
    clean = voxels_of(dtype=dtype)
    dirty = ((clean.view("<u2") & 0x0FFF) | 0xA000).view(dtype)
    write_series(tmp_path, dirty, attributes(BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], clean)


# --- place


@pytest.mark.parametrize(
    "axes",
    [
        (1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        (-1, 0, 0, 0, 1, 0),
        tuple(OBLIQUE[:, :2].T.ravel().round(9)),
    ],
    ids=["axial", "sagittal", "coronal", "flipped", "oblique"],
)
def test_a_series_lies_where_simpleitk_puts_it(tmp_path, axes):
    normal = np.cross(axes[:3], axes[3:])
    change = attributes(
        ImageOrientationPatient=list(axes),
        ImagePositionPatient=lambda z: [f"{v:.9f}" for v in normal * 1.25 * z + 5],
        InstanceNumber=lambda z: 100 - z,
    )
    voxels = write_series(tmp_path, change=change)
    volume = read(tmp_path).volume
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), voxels)
    for z, y, x in np.ndindex(*voxels.shape):
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        np.testing.assert_allclose(point, world_mm(volume.geometry, np.array([z, y, x])), atol=1e-6)


def test_the_pencil_grid(tmp_path):
    write_series(tmp_path)
    scan = read(tmp_path)
    assert scan.volume.geometry == Geometry(SHAPE, (STEP_MM, *PIXEL_MM), ORIGIN_MM)
    assert len(scan.frame) == 32
    assert scan.frame != "1.2.9"
    assert (scan.warnings, scan.burnt_in) == ((), False)


def test_frames_of_reference_have_digests_of_their_own(tmp_path):
    found = set()
    for number, frame in enumerate(("1.2.9", "1.2.9", "1.2.8", None)):
        write_series(tmp_path / str(number), change=attributes(FrameOfReferenceUID=frame))
        found.add(read(tmp_path / str(number)).frame)
    assert len(found) == 3
    assert "" in found


def test_burnt_in_annotations_are_told(tmp_path):
    write_series(tmp_path, change=attributes(BurnedInAnnotation=lambda z: "YES" if z == 2 else "NO"))
    scan = read(tmp_path)
    assert scan.burnt_in
    assert scan.warnings == ("dicom.burnt-in",)


def test_small_jitter_of_positions_is_accepted(tmp_path):
    change = attributes(ImagePositionPatient=lambda z: [0, 0.01 * (z % 2), 2.5 * z + 0.004 * (z % 2)])
    voxels = write_series(tmp_path, change=change)
    volume = read(tmp_path).volume
    np.testing.assert_array_equal(volume.voxels[0], voxels)
    assert volume.geometry.spacing_mm[0] == pytest.approx(2.5, abs=1e-3)


def test_thin_slices_have_no_absolute_tolerance_to_hide_in(tmp_path):
    for place, code in (
        (lambda z: z + (z > 2), "dicom.missing-slices"),
        (lambda z: z + {2: 0.08, 3: -0.08}.get(z, 0), "dicom.nonuniform-spacing"),
    ):
        write_series(
            tmp_path,
            change=attributes(
                PixelSpacing=[0.005, 0.005], ImagePositionPatient=lambda z, place=place: [0, 0, 0.005 * place(z)]
            ),
        )
        assert refused(tmp_path) == code


@pytest.mark.parametrize(("skew", "warnings"), [(0.0, ()), (9e-5, ()), (5e-4, ("geometry.repaired",))])
def test_axes_that_miss_a_right_angle_by_rounding_are_repaired_and_it_is_told(tmp_path, skew, warnings):
    row = np.array([1, skew, 0]) / np.hypot(1, skew)
    write_series(tmp_path, change=attributes(ImageOrientationPatient=[*row.tolist(), 0, 1, 0]))
    scan = read(tmp_path)
    assert scan.warnings == warnings
    direction = np.array(scan.volume.geometry.direction)
    assert np.abs(direction.T @ direction - np.eye(3)).max() <= (1e-12 if warnings else skew + 1e-12)
    # 6 x 4 x 5 voxels of 2.5 x 0.75 x 0.5 mm: the middle stays, both axes turn by half about it
    middle = np.array(ORIGIN_MM) + 2 * 0.5 * row + [0, 1.5 * 0.75, 2.5 * STEP_MM]
    np.testing.assert_allclose(world_mm(scan.volume.geometry, np.array([2.5, 1.5, 2])), middle, atol=1e-6)
    corner = np.array(ORIGIN_MM) - world_mm(scan.volume.geometry, np.zeros(3))
    expected = [1.5 * 0.75 * skew / 2, 2 * 0.5 * skew / 2, 0] if warnings else [0, 0, 0]
    np.testing.assert_allclose(np.abs(corner), expected, atol=1e-6)


# --- gantry tilt


def tilted(z: int) -> list[float]:
    return [0, 0.6 * z, 2.5 * z]


def test_a_tilted_gantry_is_refused_or_undone_by_policy(tmp_path):
    """A bright bar along the body, at one world point in every slice, is upright after the correction."""
    voxels = np.zeros((6, 30, 8), "<i2")
    for z in range(6):
        voxels[z, 20 - 2 * z] = 1000  # row y lies at 0.6 z + 0.3 y, so this one at 6 mm in all of them
    write_series(tmp_path, voxels, attributes(ImagePositionPatient=tilted, PixelSpacing=[0.3, 0.5]))
    assert refused(tmp_path) == "dicom.gantry-tilt"
    scan = read(tmp_path, CORRECT)
    assert scan.warnings == ("dicom.tilt-corrected",)
    geometry = scan.volume.geometry
    assert geometry.spacing_mm == (2.5, 0.3, 0.5)
    assert geometry.shape[0] == 6
    rows = scan.volume.voxels[0, :, :, 4].argmax(1)
    assert len(set(rows.tolist())) == 1
    assert world_mm(geometry, np.array([0, rows[0], 0]))[1] == pytest.approx(6.0, abs=1e-6)


def test_one_slice_aside_is_no_tilt(tmp_path):
    write_series(tmp_path, change=attributes(ImagePositionPatient=lambda z: [0.2 * (z == 2), 0, 2.5 * z]))
    assert refused(tmp_path) == refused(tmp_path, CORRECT) == "dicom.gantry-tilt"


# --- several volumes in one series

SPLITS: dict[str, tuple[Callable[[int], dict], list[str]]] = {
    "echo number": (lambda v: {"EchoNumbers": v + 1}, ["echo-1", "echo-2"]),
    "echo time": (lambda v: {"EchoTime": [4.6, 2.3][v]}, ["echo-2", "echo-1"]),
    "b-value": (lambda v: {"DiffusionBValue": [0.0, 1000.0][v]}, ["b-0", "b-1000"]),
    "inversion": (lambda v: {"InversionTime": 100 + v}, ["inversion-1", "inversion-2"]),
    "time point": (lambda v: {"TemporalPositionIdentifier": v + 1}, ["time-01", "time-02"]),
    "component": (lambda v: {"ImageType": ["ORIGINAL", "PRIMARY", "MP"[v]]}, ["kind-1", "kind-2"]),
    "acquisition": (lambda v: {"AcquisitionNumber": v + 1}, ["acquisition-1", "acquisition-2"]),
    "phase": (lambda v: {"NominalPercentageOfCardiacPhase": 40.0 * v}, ["phase-01", "phase-02"]),
}


@pytest.mark.parametrize(("marks", "parts"), SPLITS.values(), ids=SPLITS)
def test_stacks_at_one_place_are_split_by_what_tells_them_apart(tmp_path, marks, parts):
    stacks = [voxels_of(seed=v) for v in range(2)]
    for v, stack in enumerate(stacks):
        own = {"SOPInstanceUID": lambda z, v=v: f"1.2.{v}.{z}", **marks(v)}
        write_series(tmp_path / f"{v}", stack, attributes(**own))
        for path in (tmp_path / f"{v}").iterdir():
            path.rename(tmp_path / f"{path.stem}-{v}.dcm")
    found = volumes(tmp_path)
    assert sorted(found) == sorted(parts)
    for part, stack in zip(parts, stacks, strict=True):
        assert found[part].source.endswith(f"#1.2.3/{part}")
        np.testing.assert_array_equal(read_series(found[part], PLAN).volume.voxels[0], stack)


def test_trigger_times_that_differ_from_slice_to_slice_are_ranked(tmp_path):
    stacks = [voxels_of(seed=v) for v in range(3)]
    for v, stack in enumerate(stacks):
        change = attributes(TriggerTime=lambda z, v=v: 100 * v + 7 * z, SOPInstanceUID=lambda z, v=v: f"1.2.{v}.{z}")
        for z, plane in enumerate(stack):
            data = slice_of(plane, z)
            change(data, z)
            write(data, tmp_path / f"{z}-{v}.dcm")
    found = volumes(tmp_path)
    assert sorted(found) == ["phase-01", "phase-02", "phase-03"]
    for part, stack in zip(sorted(found), stacks, strict=True):
        np.testing.assert_array_equal(read_series(found[part], PLAN).volume.voxels[0], stack)


def test_echoes_within_time_points(tmp_path):
    for t, e in np.ndindex(2, 2):
        for z in range(3):
            data = slice_of(voxels_of(seed=10 * t + e)[z], z)
            data.SOPInstanceUID, data.EchoNumbers, data.TemporalPositionIdentifier = f"1.2.{t}.{e}.{z}", e + 1, t + 1
            write(data, tmp_path / f"{t}{e}{z}.dcm")
    found = volumes(tmp_path)
    assert sorted(found) == ["echo-1-time-01", "echo-1-time-02", "echo-2-time-01", "echo-2-time-02"]
    got = read_series(found["echo-2-time-01"], PLAN).volume.voxels[0]
    np.testing.assert_array_equal(got, voxels_of(seed=1)[:3])


def test_two_interleaved_acquisitions_are_one_stack(tmp_path):
    voxels = write_series(tmp_path, change=attributes(AcquisitionNumber=lambda z: 1 + z % 2, EchoTime=lambda z: z % 3))
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], voxels)


def test_a_volume_of_several_that_lacks_a_slice_is_refused_and_the_others_are_not(tmp_path):
    for v in range(2):
        for z in range(6):
            if (v, z) == (1, 5):  # the last one: what is left is even
                continue
            data = slice_of(voxels_of(seed=v)[z], z)
            data.SOPInstanceUID, data.EchoNumbers = f"1.2.{v}.{z}", v + 1
            write(data, tmp_path / f"{v}{z}.dcm")
    found = volumes(tmp_path)
    assert found["echo-1"].problem is None
    assert found["echo-2"].problem.code == "dicom.missing-slices"


def test_frames_of_reference_are_stacks_of_their_own_or_refused(tmp_path):
    write_series(tmp_path, change=attributes(FrameOfReferenceUID=lambda z: "1.7" if z > 2 else "1.6"))
    assert {part: series.slices for part, series in volumes(tmp_path).items()} == {"stack-1": 3, "stack-2": 3}
    write_series(tmp_path, change=attributes(FrameOfReferenceUID=lambda z: "1.7" if z > 4 else "1.6"))
    assert refused(tmp_path) == "dicom.mixed-frame"


# --- localisers and copies


def localiser(z: int, number: int = 0) -> Dataset:
    data = slice_of(voxels_of()[0], z)
    data.SOPInstanceUID = f"1.2.77.{number}"
    data.ImageOrientationPatient, data.ImagePositionPatient = [0, 1, 0, 0, 0, -1], [40 + number, 0, 60]
    return data


def test_a_localiser_inside_a_series_is_set_aside_and_told(tmp_path):
    voxels = write_series(tmp_path)
    for number in range(2):
        write(localiser(0, number), tmp_path / f"scout{number}.dcm")
    assert scan_tree(tmp_path).set_aside == {"localiser": 2}
    scan = read(tmp_path)
    assert scan.warnings == ("dicom.localiser",)
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels)


def test_what_is_left_must_be_one_good_stack(tmp_path):
    write_series(tmp_path)
    write(localiser(0), tmp_path / "scout.dcm")
    (tmp_path / "003.dcm").unlink()
    assert refused(tmp_path) == "dicom.mixed-orientation"


def test_a_slice_whose_orientation_alone_is_damaged_is_no_localiser(tmp_path):
    turn = attributes(ImageOrientationPatient=lambda z: [0, 1, 0, 0, 0, -1] if z == 5 else [1, 0, 0, 0, 1, 0])
    write_series(tmp_path, change=turn)
    assert refused(tmp_path) == "dicom.mixed-orientation"


def test_identical_copies_count_once(tmp_path):
    voxels = write_series(tmp_path)
    for number in (2, 5):
        (tmp_path / f"copy{number}.dcm").write_bytes((tmp_path / f"{number:03}.dcm").read_bytes())
    scan = read(tmp_path)
    assert scan.warnings == ("dicom.copies",)
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels)
    raw = bytearray((tmp_path / "copy2.dcm").read_bytes())
    raw[-1] ^= 1  # the same UID and other pixels
    (tmp_path / "copy2.dcm").write_bytes(raw)
    assert refused(tmp_path) == "dicom.duplicate-slices"


# --- enhanced multi-frame


def test_an_enhanced_file_is_a_volume(tmp_path):
    voxels = voxels_of()
    order = [3, 0, 5, 1, 4, 2]

    def place(z: int) -> Callable[[Dataset], None]:
        def change(item: Dataset) -> None:
            item.PlanePositionSequence[0].ImagePositionPatient = [*ORIGIN_MM[:2], ORIGIN_MM[2] + STEP_MM * z]
            item.PixelValueTransformationSequence = item_of(RescaleSlope=z + 1, RescaleIntercept=-z, RescaleType="US")

        return change

    write(enhanced(voxels[order], [place(z) for z in order]), tmp_path / "a.dcm")
    scan = read(tmp_path)
    assert scan.volume.geometry == Geometry(SHAPE, (STEP_MM, *PIXEL_MM), ORIGIN_MM)
    z = np.arange(6)[:, None, None]
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels.astype(int) * (z + 1) - z)


@pytest.mark.parametrize("syntax", [LOSSLESS["jpeg-2000"], LOSSLESS["rle"]])
def test_compressed_frames(tmp_path, syntax):
    from pydicom.encaps import encapsulate, generate_frames

    voxels = voxels_of((5, 40, 48))
    streams = []
    for plane in voxels:
        one = slice_of(plane, 0)
        encoded(syntax)(one, 0)
        streams.append(next(generate_frames(one.PixelData, number_of_frames=1)))
    data = enhanced(voxels)
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate(streams)
    data["PixelData"].is_undefined_length = True
    data["PixelData"].VR = "OB"
    write(data, tmp_path / "a.dcm")
    np.testing.assert_array_equal(read(tmp_path).volume.voxels[0], voxels)


def test_stacks_b_values_and_time_points_of_one_file(tmp_path):
    stacks = [voxels_of((3, 4, 5), seed=n) for n in range(4)]

    def marks(stack: str, b_value: float, z: int) -> Callable[[Dataset], None]:
        def change(item: Dataset) -> None:
            item.FrameContentSequence[0].StackID = stack
            item.MRDiffusionSequence = item_of(DiffusionBValue=b_value)
            shift = 100 if stack == "2" else 0
            item.PlanePositionSequence[0].ImagePositionPatient = [shift, 0, 2.0 * z]
            if stack == "2":
                item.PlaneOrientationSequence = item_of(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
                item.PlanePositionSequence[0].ImagePositionPatient = [-2.0 * z, 0, 0]

        return change

    kinds = [("1", 0.0), ("1", 800.0), ("2", 0.0), ("2", 800.0)]
    groups = [marks(*kind, z) for kind in kinds for z in range(3)]
    write(enhanced(np.concatenate(stacks), groups), tmp_path / "a.dcm")
    found = volumes(tmp_path)
    assert sorted(found) == ["stack-1-b-0", "stack-1-b-800", "stack-2-b-0", "stack-2-b-800"]
    for part, stack in zip(sorted(found), stacks, strict=True):
        scan = read_series(found[part], PLAN)
        np.testing.assert_array_equal(scan.volume.voxels[0], stack)
    assert found["stack-2-b-0"].orientation == "sagittal"


def test_highdicoms_legacy_conversion_is_read_as_its_source(tmp_path):
    highdicom = pytest.importorskip("highdicom", reason="writes the enhanced file")
    write_series(tmp_path / "source", change=attributes(**SOURCE))
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "source").iterdir())]
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices, series_instance_uid="1.2.3.9", series_number=2, sop_instance_uid="1.2.3.9.1", instance_number=1
    )
    (tmp_path / "converted").mkdir()
    converted.save_as(tmp_path / "converted" / "a.dcm")
    a, b = read(tmp_path / "source").volume, read(tmp_path / "converted").volume
    np.testing.assert_array_equal(a.voxels, b.voxels)
    assert a.geometry == b.geometry


SOURCE = {
    "PatientBirthDate": "", "PatientSex": "", "StudyID": "", "AccessionNumber": "", "ReferringPhysicianName": "",
    "Manufacturer": "x", "SeriesNumber": 1, "StudyDate": "20260101", "StudyTime": "120000", "ContentDate": "20260101",
    "ContentTime": "120000", "AcquisitionDate": "20260101", "AcquisitionTime": "120000", "AcquisitionNumber": 1,
    "BurnedInAnnotation": "NO", "SliceThickness": 2.5, "RescaleSlope": 1, "RescaleIntercept": -1024,
    "RescaleType": "HU", "KVP": 100, "PatientPosition": "HFS", "PositionReferenceIndicator": "", "Laterality": "",
}  # fmt: skip


# --- refusals

REFUSALS: dict[str, tuple[dict, str]] = {
    "one missing": ({"ImagePositionPatient": lambda z: [0, 0, 2.5 * (z + (z > 2))]}, "dicom.missing-slices"),
    "uneven": ({"ImagePositionPatient": lambda z: [0, 0, 2.5 * z + 0.4 * (z == 3)]}, "dicom.nonuniform-spacing"),
    "one place twice": ({"ImagePositionPatient": lambda z: [0, 0, 2.5 * min(z, 4)]}, "dicom.duplicate-slices"),
    "all at one place": ({"ImagePositionPatient": [0, 0, 0]}, "dicom.duplicate-slices"),
    "pixel spacing differs": ({"PixelSpacing": lambda z: [0.75, 0.5 + 0.1 * (z == 2)]}, "dicom.mixed-spacing"),
    "pixel spacing zero": ({"PixelSpacing": [0, 0]}, "geometry.spacing"),
    "pixel spacing negative in one": ({"PixelSpacing": lambda z: [0.75, -0.5 if z == 5 else 0.5]}, "geometry.spacing"),
    "no pixel spacing": ({"PixelSpacing": None}, "dicom.missing-geometry"),
    "no position": ({"ImagePositionPatient": None}, "dicom.missing-geometry"),
    "no position in the last": (
        {"ImagePositionPatient": lambda z: "" if z == 5 else [0, 0, 2.5 * z]},
        "dicom.missing-geometry",
    ),
    "no orientation": ({"ImageOrientationPatient": None}, "dicom.missing-geometry"),
    "axes not unit": ({"ImageOrientationPatient": [1.1, 0, 0, 0, 1, 0]}, "geometry.not-orthonormal"),
    "axes not square": ({"ImageOrientationPatient": [1, 0, 0, 0.1, 0.995, 0]}, "geometry.not-orthonormal"),
    "axes of one row": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 0]}, "geometry.not-orthonormal"),
    "axes zero": ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "geometry.not-orthonormal"),
    "several frames": ({"NumberOfFrames": 2}, "dicom.corrupt-slice"),
    "bits allocated too many": ({"BitsAllocated": 32}, "dicom.corrupt-slice"),
    "bits allocated too few": ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "dicom.corrupt-slice"),
    "bits of one": ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "scan.dtype"),
    "more bits stored than allocated": ({"BitsStored": 20}, "scan.dtype"),
    "more rows than pixels": ({"Rows": 5}, "dicom.corrupt-slice"),
    "fewer rows than pixels": ({"Rows": 3}, "dicom.corrupt-slice"),
    "no rows": ({"Rows": 0}, "scan.empty"),
    "huge": ({"Rows": 65535, "Columns": 65535}, "scan.too-large"),
    "slope zero": ({"RescaleSlope": 0}, "scan.header"),
    "mosaic": ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "dicom.mosaic"),
    "a table of values": ({"ModalityLUTSequence": item_of(ModalityLUTType="US")}, "dicom.modality-lut"),
    "no pixels in one": ({"PixelData": lambda z: b"" if z == 3 else voxels_of()[z].tobytes()}, "dicom.corrupt-slice"),
}


@pytest.mark.parametrize(("changes", "code"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(tmp_path, changes, code, capfd):
    write_series(tmp_path, change=attributes(**changes))
    assert refused(tmp_path) == code
    assert refused(tmp_path, CORRECT) == code
    assert capfd.readouterr() == ("", ""), "C++ warnings name files"


def test_a_rescale_that_is_no_number_is_not_taken_for_none(tmp_path):
    for word in (b"x ", b"", b"0 "):
        path = tmp_path / "003.dcm"
        write_series(tmp_path, change=attributes(RescaleSlope="2", RescaleIntercept="0"))
        raw = path.read_bytes()
        at = raw.index(b"\x28\0\x53\x10DS")
        path.write_bytes(raw[: at + 6] + len(word).to_bytes(2, "little") + word + raw[at + 10 :])
        if word:
            assert refused(tmp_path) == "scan.header"
        else:  # an empty element is an absent one
            assert read(tmp_path).volume.voxels.shape == (1, *SHAPE)


def test_marks_that_are_no_numbers_tell_nothing_apart(tmp_path):
    for v in range(2):
        for z in range(3):
            data = slice_of(voxels_of(seed=v)[z], z)
            data.SOPInstanceUID, data.DiffusionBValue = f"1.2.{v}.{z}", [float("nan"), float("inf")][v]
            write(data, tmp_path / f"{v}{z}.dcm")
    assert refused(tmp_path) == "dicom.duplicate-slices"


@pytest.mark.parametrize("syntax", [LOSSLESS["jpeg-2000"], LOSSLESS["rle"]])
def test_fewer_compressed_frames_than_declared(tmp_path, syntax):
    from pydicom.encaps import encapsulate, generate_frames

    one = slice_of(voxels_of((1, 40, 48))[0], 0)
    encoded(syntax)(one, 0)
    data = enhanced(voxels_of((5, 40, 48)))
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([next(generate_frames(one.PixelData, number_of_frames=1))] * 4)
    data["PixelData"].is_undefined_length = True
    data["PixelData"].VR = "OB"
    write(data, tmp_path / "a.dcm")
    (series,) = scan_tree(tmp_path).volumes
    with pytest.raises(ScanError) as caught:
        read_series(series, PLAN)
    assert caught.value.code == "dicom.corrupt-slice"


def test_one_slice_and_several_sizes(tmp_path):
    write_series(tmp_path / "one", voxels_of((1, 4, 5)))
    assert refused(tmp_path / "one") == "dicom.too-few-slices"
    write_series(tmp_path / "sizes")
    write(slice_of(voxels_of((1, 6, 5))[0], 6), tmp_path / "sizes" / "7.dcm")
    assert refused(tmp_path / "sizes") == "dicom.mixed-size"


def test_frames_that_lie_nowhere(tmp_path):
    data = slice_of(voxels_of()[0], 0)
    data.NumberOfFrames, data.PixelData = 6, voxels_of().tobytes()
    write(data, tmp_path / "a.dcm")
    assert refused(tmp_path) == "dicom.multiframe"


def test_fewer_descriptions_than_frames(tmp_path):
    data = enhanced(voxels_of())
    del data.PerFrameFunctionalGroupsSequence[5]
    write(data, tmp_path / "a.dcm")
    assert refused(tmp_path) == "dicom.corrupt-slice"


def test_drift_that_no_single_step_shows(tmp_path):
    place = lambda z: [0, 0, 2.5 * z + 2.5e-4 * z * z / 2]  # noqa: E731
    write_series(tmp_path, voxels_of((120, 4, 5)), attributes(ImagePositionPatient=place))
    assert refused(tmp_path) == "dicom.nonuniform-spacing"


def test_files_that_change_between_listing_and_reading(tmp_path):
    write_series(tmp_path)
    (series,) = scan_tree(tmp_path).volumes
    for change in (lambda p: p.write_bytes(p.read_bytes()[:-4]), lambda p: p.write_bytes(b"x" * 300), Path.unlink):
        change(tmp_path / "004.dcm")
        with pytest.raises(ScanError):
            read_series(series, PLAN)
