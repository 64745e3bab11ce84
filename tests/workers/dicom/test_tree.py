"""Folder trees of DICOM: what becomes a series, what is set aside and counted, what refuses a series."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, Sequence

from tests.workers.dicom.series_maker import (
    LOSSLESS,
    SERIES,
    attributes,
    encoded,
    item_of,
    slice_of,
    voxels_of,
    write,
    write_series,
)
from vnet_core.errors import ScanError
from vnet_core.sections import ReadingPlan
from workers.dicom.tree import Tree, find_series, scan_tree
from workers.dicom.volumes import read_series, series_geometry

PLAN = ReadingPlan()
ROOT = "1.2.840.10008."


def only(folder: Path):
    (series,) = scan_tree(folder).volumes
    return series


def values(series) -> np.ndarray:
    return read_series(series, PLAN).volume.voxels[0]


def codes(tree: Tree) -> list[str | None]:
    return [series.problem.code if series.problem else None for series in tree.volumes]


# --- grouping


def test_a_series_says_what_its_headers_say(tmp_path):
    write_series(tmp_path)
    series = only(tmp_path)
    assert (series.folder, series.uid, series.part) == (tmp_path, SERIES, "")
    assert series.source == f"{tmp_path}#{SERIES}"
    assert series.files == tuple(sorted(tmp_path.iterdir()))
    assert (series.study, series.patient, series.frame_of_reference) == ("1.2", "0815", "1.2.9")
    assert (series.modality, series.description, series.kernel) == ("CT", "Abdomen", "B30f")
    assert (series.orientation, series.slice_spacing_mm, series.slices) == ("axial", 2.5, 6)
    assert (series.acquired, series.burnt_in, series.problem) == ("2026-01-02T03:04:05", False, None)


@pytest.mark.parametrize(
    ("axes", "plane"),
    [((1, 0, 0, 0, 1, 0), "axial"), ((1, 0, 0, 0, 0, -1), "coronal"), ((0, 1, 0, 0, 0, -1), "sagittal")],
)
def test_orientation_is_the_nearest_plane(tmp_path, axes, plane):
    normal = np.cross(axes[:3], axes[3:])
    change = attributes(ImageOrientationPatient=list(axes), ImagePositionPatient=lambda z: list(2.0 * z * normal))
    write_series(tmp_path, change=change)
    assert (only(tmp_path).orientation, only(tmp_path).slice_spacing_mm) == (plane, 2.0)


def test_any_arrangement_of_folders_gives_the_same_volumes(tmp_path):
    """Two series in one folder, one folder per slice, and a series spread over folders of different depth."""
    first, second = voxels_of(seed=1), voxels_of((4, 4, 5), seed=2)
    for name, place in {
        "together": lambda s, z: f"{s}-{z}.dcm",
        "apart": lambda s, z: f"{s}/{z}/slice",
        "deep": lambda s, z: f"{z % 2}/x/{s}/{z}.IMA" if z % 3 else f"{s}-{z}",
    }.items():
        for uid, voxels in (("1.2.3", first), ("1.2.4", second)):
            for z, plane in enumerate(voxels):
                write(slice_of(plane, z, uid), tmp_path / name / place(uid, z))
        tree = scan_tree(tmp_path / name)
        assert [series.uid for series in tree.volumes] == ["1.2.3", "1.2.4"]
        assert tree.set_aside == {}
        for series, voxels in zip(tree.volumes, (first, second), strict=True):
            np.testing.assert_array_equal(values(series), voxels)
            found = find_series(series.folder, series.reference)
            assert found == series
    assert only(tmp_path / "apart" / "1.2.3").folder == tmp_path / "apart" / "1.2.3"


def test_patients_and_studies_are_kept_apart_though_their_series_uid_is_one(tmp_path):
    a = write_series(tmp_path / "a")
    b = write_series(tmp_path / "b", voxels_of(seed=3), attributes(PatientID="0816"))
    c = write_series(tmp_path / "b" / "c", voxels_of(seed=4), attributes(StudyInstanceUID="1.7"))
    tree = scan_tree(tmp_path)
    assert codes(tree) == [None] * 3
    for series, voxels in zip(tree.volumes, (a, b, c), strict=True):
        np.testing.assert_array_equal(values(series), voxels)
        assert find_series(series.folder, series.reference) == series
    for path in (tmp_path / "b").glob("*.dcm"):
        path.rename(tmp_path / "a" / f"x{path.name}")
    assert codes(scan_tree(tmp_path / "a")) == ["dicom.several-series"] * 2


def test_copies_count_once_and_stacks_in_folders_of_their_own_are_volumes(tmp_path):
    voxels = write_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    series = only(tmp_path)
    assert (series.folder, series.warnings, series.slices) == (tmp_path / "a", ("dicom.copies",), 6)
    np.testing.assert_array_equal(values(series), voxels)
    other = write_series(tmp_path / "b", voxels_of(seed=9))
    first, second = scan_tree(tmp_path).volumes
    assert (first.folder, second.folder) == (tmp_path / "a", tmp_path / "b")
    np.testing.assert_array_equal(values(second), other)
    assert find_series(second.folder, second.reference) == second


def test_the_deepest_folder_that_holds_every_file_is_the_source(tmp_path):
    voxels = write_series(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "c").mkdir()
    (tmp_path / "a" / "b" / "003.dcm").rename(tmp_path / "a" / "b" / "c" / "003.dcm")
    series = only(tmp_path)
    assert series.folder == tmp_path / "a" / "b"
    np.testing.assert_array_equal(values(find_series(series.folder)), voxels)


def test_finding_by_reference(tmp_path):
    write_series(tmp_path)
    write_series(tmp_path / "other", series="1.2.4")
    for reference, code in (("", "dicom.several-series"), ("1.2.5", "dicom.unknown-series")):
        with pytest.raises(ScanError) as caught:
            find_series(tmp_path, reference)
        assert caught.value.code == code
    assert find_series(tmp_path, "1.2.4").folder == tmp_path / "other"
    with pytest.raises(ScanError) as caught:
        find_series(tmp_path, "1.2.4/echo-2")
    assert caught.value.code == "dicom.unknown-series"
    assert find_series(tmp_path / "other").uid == "1.2.4"
    for folder in (tmp_path / "absent", tmp_path / "001.dcm"):
        with pytest.raises(ScanError) as caught:
            find_series(folder)
        assert caught.value.code == "scan.unreadable"


def test_a_changed_tree_is_walked_again(tmp_path, monkeypatch):
    write_series(tmp_path)
    assert find_series(tmp_path).slices == 6
    from workers.dicom import tree

    monkeypatch.setattr(tree, "read_elements", lambda path: pytest.fail("nothing has changed"))
    assert find_series(tmp_path).slices == 6
    monkeypatch.undo()
    write(slice_of(voxels_of()[0], 6), tmp_path / "new.dcm")
    assert find_series(tmp_path).slices == 7
    (tmp_path / "new.dcm").unlink()
    assert find_series(tmp_path).slices == 6


# --- set aside


@pytest.mark.parametrize(
    ("sop_class", "reason"),
    [
        ("5.1.4.1.1.88.11", "report"),
        ("5.1.4.1.1.104.1", "document"),
        ("5.1.4.1.1.11.1", "presentation-state"),
        ("5.1.4.1.1.9.1.1", "waveform"),
        ("5.1.4.1.1.481.2", "radiotherapy"),
        ("5.1.4.1.1.481.5", "radiotherapy"),
        ("5.1.4.1.1.6.1", "ultrasound"),
        ("5.1.4.1.1.1", "projection"),
        ("5.1.4.1.1.1.1", "projection"),
        ("5.1.4.1.1.12.1", "projection"),
        ("5.1.4.1.1.77.1.4", "photograph"),
        ("5.1.4.1.1.66", "other"),
        ("5.1.4.1.1.66.1", "other"),
        ("1.3.10", "dicomdir"),
    ],
)
def test_what_is_no_scan_is_counted_by_its_reason(tmp_path, sop_class, reason):
    voxels = write_series(tmp_path)
    for number in range(2):
        data = slice_of(voxels[0], number, "1.9")
        data.SOPClassUID = ROOT + sop_class
        write(data, tmp_path / f"other-{number}.dcm")
    tree = scan_tree(tmp_path)
    assert tree.set_aside == {reason: 2}
    (series,) = tree.volumes
    np.testing.assert_array_equal(values(series), voxels)


def test_secondary_captures_localisers_and_colour(tmp_path):
    voxels = write_series(tmp_path)
    capture = slice_of(voxels[0], 0)  # a dose sheet under the UID of the series
    capture.SOPClassUID, capture.SOPInstanceUID = ROOT + "5.1.4.1.1.7", "1.9.1"
    write(capture, tmp_path / "sheet.dcm")
    del capture.ImagePositionPatient
    capture.SOPInstanceUID = "1.9.2"
    write(capture, tmp_path / "sheet2.dcm")
    for z in range(3):
        scout = slice_of(voxels[0], z, "1.5")
        scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        write(scout, tmp_path / f"scout{z}.dcm")
        picture = slice_of(voxels[0], z, "1.6")
        picture.SamplesPerPixel, picture.PhotometricInterpretation, picture.PlanarConfiguration = 3, "RGB", 0
        picture.BitsAllocated = picture.BitsStored = 8
        picture.HighBit, picture.PixelData = 7, bytes(60)
        write(picture, tmp_path / f"picture{z}.dcm")
    tree = scan_tree(tmp_path)
    assert tree.set_aside == {"colour": 3, "localiser": 3, "secondary-capture": 2}
    np.testing.assert_array_equal(values(*tree.volumes), voxels)


def test_a_stack_of_secondary_captures_is_read_and_never_shown(tmp_path):
    voxels = write_series(tmp_path, change=attributes(SOPClassUID=ROOT + "5.1.4.1.1.7"))
    scan = read_series(only(tmp_path), PLAN)
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels)
    assert scan.burnt_in
    assert "dicom.burnt-in" in scan.warnings


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_annotations_name_the_series_that_they_describe(tmp_path):
    write_series(tmp_path)
    segments = slice_of(voxels_of()[0], 0, "1.7")
    segments.SOPClassUID, segments.SOPInstanceUID = ROOT + "5.1.4.1.1.66.4", "1.7.1"
    segments.ReferencedSeriesSequence = item_of(SeriesInstanceUID=SERIES)
    write(segments, tmp_path / "labels" / "seg.dcm")
    contours = Dataset()
    contours.file_meta = segments.file_meta
    contours.SOPClassUID, contours.SOPInstanceUID = ROOT + "5.1.4.1.1.481.3", "1.8.1"
    series = Sequence([*item_of(SeriesInstanceUID="../1.2.4"), *item_of(SeriesInstanceUID=SERIES)])
    study = item_of(RTReferencedSeriesSequence=series)
    contours.ReferencedFrameOfReferenceSequence = item_of(RTReferencedStudySequence=study)
    write(contours, tmp_path / "labels" / "contours.dcm")
    whole = (tmp_path / "labels" / "contours.dcm").read_bytes()
    (tmp_path / "labels" / "cut.dcm").write_bytes(whole[:-9])
    tree = scan_tree(tmp_path)
    found = {a.kind: a for a in tree.annotations}
    assert found["seg"].references == (SERIES,)
    assert found["seg"].sop_uid == "1.7.1"
    assert found["seg"].path == tmp_path / "labels" / "seg.dcm"
    assert len(found["rtstruct"].references) == 2
    assert SERIES in found["rtstruct"].references
    assert "/" not in "".join(found["rtstruct"].references)
    assert len(tree.annotations) == 2
    assert tree.set_aside == {"damaged": 1}
    assert len(tree.volumes) == 1


def test_other_files_links_pipes_and_devices(tmp_path):
    voxels = write_series(tmp_path / "tree")
    outside = tmp_path / "outside"
    write_series(outside, series="1.9")
    tree = tmp_path / "tree"
    (tree / "Thumbs.db").write_bytes(os.urandom(500))
    (tree / "report.pdf").write_bytes(b"%PDF-1.4 " * 40)
    (tree / "notes").write_text("slices 1 to 6\n")
    (tree / "empty.txt").touch()
    (tree / ".hidden.dcm").write_bytes(b"x")
    os.mkfifo(tree / "pipe.dcm")
    (tree / "loop").symlink_to(tree)
    (tree / "again.dcm").symlink_to(tree / "001.dcm")
    (tree / "away").symlink_to(outside)
    (tree / "zero").symlink_to("/dev/zero")
    (tree / "nowhere.dcm").symlink_to(tree / "nowhere.dcm")
    found = scan_tree(tree)
    assert found.set_aside == {"hidden": 1, "not-dicom": 4, "not-regular": 1, "link": 3, "link-outside": 2}
    (series,) = found.volumes
    np.testing.assert_array_equal(values(series), voxels)
    assert series.files == tuple(tree / f"{n:03}.dcm" for n in range(1, 7))


@pytest.mark.parametrize("target", ["outside/001.dcm", "/dev/zero", "absent"])
def test_a_link_out_of_the_tree_beside_slices_may_be_a_slice(tmp_path, target):
    write_series(tmp_path / "tree")
    write_series(tmp_path / "outside")
    (tmp_path / "tree" / "006.dcm").unlink()  # the first slice: what is left is even
    (tmp_path / "tree" / "006.dcm").symlink_to(tmp_path / target)
    tree = scan_tree(tmp_path / "tree")
    assert codes(tree) == ["scan.path-escape"]
    assert tree.set_aside == {"link-outside": 1}


# --- damage


@pytest.mark.parametrize("keep", [0, 60, 131, 140, 250, 500, -30, -1])
@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_a_slice_that_was_cut_off_refuses_the_series(tmp_path, keep, suffix):
    write_series(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(suffix))
    target = tmp_path / f"003{suffix}"
    target.write_bytes(target.read_bytes()[:keep])
    tree = scan_tree(tmp_path)
    assert codes(tree) == ["dicom.corrupt-slice"]
    assert find_series(tmp_path).problem.code == "dicom.corrupt-slice"
    for reader in (read_series, series_geometry):
        with pytest.raises(ScanError) as caught:
            reader(find_series(tmp_path), PLAN)
        assert caught.value.code == "dicom.corrupt-slice"


@pytest.mark.parametrize("syntax", [*LOSSLESS.values()], ids=[*LOSSLESS])
@pytest.mark.parametrize("cut_bytes", [8, 100])
def test_a_compressed_slice_that_was_cut_off(tmp_path, syntax, cut_bytes):
    write_series(tmp_path, voxels_of((3, 40, 48)), encoded(syntax))
    (tmp_path / "001.dcm").write_bytes((tmp_path / "001.dcm").read_bytes()[:-cut_bytes])
    assert codes(scan_tree(tmp_path)) == ["dicom.corrupt-slice"]


@pytest.mark.parametrize("number", ["5.1.4.1.1.88", "5.1.4.1.9.2"])
def test_a_slice_whose_class_is_damaged_is_not_set_aside(tmp_path, number):
    """The last slice, so that what is left would be an even stack."""
    write_series(tmp_path)
    data = slice_of(voxels_of()[5], 5)
    data.SOPClassUID = ROOT + number
    if number.endswith("9.2"):
        del data.PixelData, data.Rows
    write(data, tmp_path / "001.dcm")
    assert codes(scan_tree(tmp_path)) == ["dicom.corrupt-slice"]


def test_damage_refuses_its_own_series_alone_where_the_header_says_which(tmp_path):
    write_series(tmp_path)
    sound = write_series(tmp_path / "sound", series="1.2.4")
    for path in (tmp_path / "sound").iterdir():
        path.rename(tmp_path / f"4-{path.name}")
    (tmp_path / "003.dcm").write_bytes((tmp_path / "003.dcm").read_bytes()[:-9])
    first, second = scan_tree(tmp_path).volumes
    assert first.problem.code == "dicom.corrupt-slice"
    np.testing.assert_array_equal(values(second), sound)
    (tmp_path / "003.dcm").write_bytes(b"<html>not found</html>")
    assert codes(scan_tree(tmp_path)) == ["dicom.corrupt-slice"] * 2


def test_a_folder_of_damaged_files_alone_is_a_refused_case(tmp_path):
    write_series(tmp_path / "sound")
    (tmp_path / "lost").mkdir()
    for number in range(3):
        (tmp_path / "lost" / f"{number}.dcm").write_bytes(b"")
    lost, sound = scan_tree(tmp_path).volumes
    assert (lost.problem.code, lost.slices, len(lost.files)) == ("dicom.corrupt-slice", 0, 3)
    assert sound.problem is None
    assert find_series(lost.folder, lost.reference).problem.code == "dicom.corrupt-slice"


def test_bytes_flipped_in_a_header_end_in_a_verdict(tmp_path):
    """No header makes the walk crash or hang, and what is accepted has the values that were written."""
    voxels = write_series(tmp_path)
    whole = (tmp_path / "003.dcm").read_bytes()
    rng = np.random.default_rng(5)
    accepted, told = 0, set()
    for _ in range(250):
        raw = bytearray(whole)
        raw[int(rng.integers(132, len(whole) - 40))] = int(rng.integers(256))
        (tmp_path / "003.dcm").write_bytes(raw)
        tree = scan_tree(tmp_path)
        for series in tree.volumes:
            if series.problem is None:
                try:
                    found = read_series(series, PLAN).volume
                except ScanError as error:
                    told.add(error.code)
                    continue
                accepted += 1
                assert found.voxels.shape[1] == series.slices
                if series.slices == 6 and found.voxels.shape[1:] == voxels.shape:
                    np.testing.assert_array_equal(found.voxels[0][:3], voxels[:3])
    assert accepted > 50
    assert told <= {"dicom.gantry-tilt"}


# --- encodings of the file


def test_files_without_preamble_count_when_their_data_set_checks_out(tmp_path):
    voxels = write_series(tmp_path)
    for number, path in enumerate(tmp_path.iterdir()):
        raw = path.read_bytes()
        # from the image type on, which is no meta information at all; from the mark on; from the meta information on
        path.write_bytes(raw[[raw.index(b"\x08\0\x08\0CS"), 128, 132][number % 3] :])
    np.testing.assert_array_equal(values(only(tmp_path)), voxels)
    (tmp_path / "text").write_bytes(b"\x08\0\x05\0" + b"x" * 400)
    (tmp_path / "003.dcm").write_bytes((tmp_path / "003.dcm").read_bytes()[:-9])
    tree = scan_tree(tmp_path)
    assert tree.set_aside == {"not-dicom": 1}
    assert codes(tree) == ["dicom.corrupt-slice"]


@pytest.mark.parametrize(
    ("declared", "meant"),
    [
        ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1"),
        ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2"),
        ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1"),
        ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"),
        ("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.1"),
        ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"),
        ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80"),
        ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.70"),
    ],
)
def test_a_transfer_syntax_that_lies_is_named(tmp_path, declared, meant):
    write_series(tmp_path, voxels_of((3, 40, 48)), encoded(meant))
    path = tmp_path / "002.dcm"
    raw = path.read_bytes()
    old, new = (uid.encode() + b"\0" * (len(uid) % 2) for uid in (meant, declared))
    at = raw.index(b"\x02\0\x10\0UI") + 6
    raw = raw[:at] + len(new).to_bytes(2, "little") + new + raw[at + 2 + len(old) :]
    path.write_bytes(raw)
    (series,) = scan_tree(tmp_path).volumes
    assert series.problem.code == "dicom.syntax-mismatch"


@pytest.mark.parametrize(
    ("uid", "told"),
    [("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.100"), ("1.2.4711.0815", "private")],
)
def test_an_unknown_transfer_syntax_is_named_unless_it_is_private(tmp_path, uid, told):
    write_series(tmp_path, change=encoded("1.2.840.10008.1.2.5"))
    for path in tmp_path.iterdir():
        raw = path.read_bytes()
        at = raw.index(b"\x02\0\x10\0UI") + 6
        new = uid.encode() + b"\0" * (len(uid) % 2)
        path.write_bytes(raw[:at] + len(new).to_bytes(2, "little") + new + raw[at + 2 + 20 :])
    problem = only(tmp_path).problem
    assert problem.code == "dicom.transfer-syntax"
    assert told in str(problem)
    assert "4711" not in str(problem)


# --- identity


def test_nothing_of_a_header_or_path_gets_into_text(tmp_path):
    hostile = "../../../../CANARY"
    folder = tmp_path / "CANARY"
    write_series(
        folder,
        change=attributes(PatientID=hostile, SeriesDescription="CANARY", ConvolutionKernel="CANARY", StudyID="CANARY"),
    )
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\x20\0\x0e\0UI\x06\x001.2.3\0", b"\x20\0\x0e\0UI\x06\x00C/NARY"))
    tree = scan_tree(folder)
    (series,) = tree.volumes
    assert series.patient == hostile
    assert series.uid.isalnum(), "a UID that is none is replaced by a digest"
    assert find_series(folder, series.reference) == series
    (folder / "003.dcm").write_bytes(b"")
    refused = only(folder)
    for told in (repr(tree), repr(series), repr(refused), str(refused.problem)):
        assert "ANARY" not in told
        assert "0815" not in told


@pytest.mark.filterwarnings("ignore:The value length")
@pytest.mark.parametrize("patient", ["CON", "-rf", "x" * 200, "Jürgen^😀", "a/b\\c", ""])
def test_odd_patient_numbers_are_read_like_others(tmp_path, patient):
    voxels = write_series(tmp_path, change=attributes(PatientID=patient, SpecificCharacterSet="ISO_IR 192"))
    np.testing.assert_array_equal(values(only(tmp_path)), voxels)


def test_descriptions_are_decoded_by_their_character_set(tmp_path):
    write_series(tmp_path, change=attributes(SpecificCharacterSet="ISO_IR 192", SeriesDescription="Schädel"))
    assert only(tmp_path).description == "Schädel"
