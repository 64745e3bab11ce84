"""Rows 55 to 86: DICOM series, a synthetic CT of ten slices with one thing changed in each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.config import disable_value_validation
from pydicom.uid import JPEG2000Lossless, MediaStorageDirectoryStorage, SecondaryCaptureImageStorage

from tests.bad_inputs import objects
from tests.bad_inputs.inputs import BadInput, Kind, Truth, grid, random, smooth
from tests.bad_inputs.slices import (
    GEOMETRY,
    INTERCEPT,
    SHAPE,
    STEP_MM,
    big_endian,
    content,
    deflated,
    eight_bits,
    high_throughput,
    jpeg,
    jpeg_ls,
    plain,
    relabelled,
    run_length,
    save,
    transcoded,
    truth,
    uid,
)

Maker = Callable[[Path], tuple[Truth, ...]]
Change = Callable[[list[Dataset]], Sequence[Dataset] | None]


def series(change: Change, *truths: Callable[[], Truth]) -> Maker:
    """A maker of the plain series after ``change``, which returns other slices or changes them in place."""

    def make(folder: Path) -> tuple[Truth, ...]:
        with disable_value_validation():
            slices = plain()
            changed = change(slices)
            save(folder, slices if changed is None else changed)
        return tuple(one() for one in truths)

    return make


def each(**values: object) -> Change:
    """Set attributes of every slice."""

    def change(slices: list[Dataset]) -> None:
        for ds in slices:
            for name, value in values.items():
                setattr(ds, name, value)

    return change


def at(number: int, **values: object) -> Change:
    """Set attributes of one slice."""

    def change(slices: list[Dataset]) -> None:
        for name, value in values.items():
            setattr(slices[number], name, value)

    return change


def moved(mm_by_slice: Sequence[float], axis: int = 2) -> Change:
    """Push each slice along one world axis."""

    def change(slices: list[Dataset]) -> None:
        for ds, mm in zip(slices, mm_by_slice, strict=True):
            place = list(ds.ImagePositionPatient)
            place[axis] = round(float(place[axis]) + mm, 6)
            ds.ImagePositionPatient = place

    return change


def duplicate(slices: list[Dataset]) -> list[Dataset]:
    """A slice more at the place of slice 4, with its own UID and other voxels."""
    extra = plain(random((11, *SHAPE[1:]))[::-1])[4]
    extra.SOPInstanceUID = extra.file_meta.MediaStorageSOPInstanceUID = uid("other")
    return [*slices, extra]


def localiser(slices: list[Dataset]) -> list[Dataset]:
    """A sagittal slice of the same series in front."""
    extra = plain(random(SHAPE), grid(SHAPE, (2.0, 1.1, 0.9), direction=np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])))
    extra[0].SOPInstanceUID = extra[0].file_meta.MediaStorageSOPInstanceUID = uid("localiser")
    return [extra[0], *slices]


def rescaled(slices: list[Dataset]) -> None:
    """Another slope and intercept in each slice, as PET has them."""
    for number, ds in enumerate(slices):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + 0.25 * number, number - 20
        ds.RescaleType = "US"


def rescaled_truth() -> Truth:
    number = np.arange(SHAPE[0])[:, None, None]
    return Truth(random(SHAPE) * (0.5 + 0.25 * number) + number - 20, GEOMETRY)


def without_rescale(slices: list[Dataset]) -> None:
    del slices[4].RescaleSlope, slices[4].RescaleIntercept, slices[4].RescaleType


def other_size(slices: list[Dataset]) -> None:
    slices[4].Rows, slices[4].PixelData = 14, slices[4].PixelData[: 14 * 12 * 2]


def short(slices: list[Dataset]) -> None:
    slices[4].PixelData = slices[4].PixelData[:200]


def without_position(slices: list[Dataset]) -> None:
    for ds in slices:
        del ds.ImagePositionPatient


def reversed_numbers(slices: list[Dataset]) -> list[Dataset]:
    for number, ds in enumerate(slices):
        ds.InstanceNumber = len(slices) - number
    return slices[::-1]


def two_series(folder: Path) -> tuple[Truth, ...]:
    save(folder / "a", plain())
    second = grid((8, *SHAPE[1:]), (3.0, 1.1, 0.9), (10.0, 5.0, -40.0))
    stored = random((8, *SHAPE[1:]), 500, 900)
    for number, ds in enumerate(plain(stored, second, series="second")):
        dcmwrite(folder / f"b{number}.dcm", ds, enforce_file_format=True)
    for path in (folder / "a").iterdir():
        path.rename(folder / path.name)
    (folder / "a").rmdir()
    return truth(), Truth(stored + np.int16(INTERCEPT), second)


def files(change: Callable[[dict[str, bytes]], None], *truths: Callable[[], Truth]) -> Maker:
    """A maker that changes the bytes of the plain series' files."""

    def make(folder: Path) -> tuple[Truth, ...]:
        written = {f"{number:03d}.dcm": content(ds) for number, ds in enumerate(plain())}
        change(written)
        for name, data in written.items():
            (folder / name).write_bytes(data)
        return tuple(one() for one in truths)

    return make


def halved(written: dict[str, bytes]) -> None:
    written["004.dcm"] = written["004.dcm"][: len(written["004.dcm"]) // 2]


def emptied(written: dict[str, bytes]) -> None:
    written["004.dcm"] = b""


def bare(written: dict[str, bytes]) -> None:
    for name, data in written.items():
        written[name] = data[132:]


def headless(written: dict[str, bytes]) -> None:
    for (name, _), ds in zip(list(written.items()), plain(), strict=True):
        del ds.file_meta
        file = io.BytesIO()
        dcmwrite(file, ds, implicit_vr=True, little_endian=True)
        written[name] = file.getvalue()


def lying(written: dict[str, bytes]) -> None:
    for name, data in written.items():
        written[name] = relabelled(data, JPEG2000Lossless)


def lying_native(folder: Path) -> tuple[Truth, ...]:
    """JPEG-LS fragments under the syntax of plain voxels."""
    for number, ds in enumerate(jpeg_ls(plain())):
        (folder / f"{number:03d}.dcm").write_bytes(relabelled(content(ds), "1.2.840.10008.1.2.1"))
    return ()


def copied(written: dict[str, bytes]) -> None:
    written["copy of 004.dcm"] = written["004.dcm"]


def directory(path: Path, referenced: Sequence[str]) -> None:
    """A DICOMDIR that refers to one file."""
    ds = Dataset()
    plain_file = plain()[0]
    ds.file_meta = plain_file.file_meta
    ds.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    ds.SOPClassUID, ds.SOPInstanceUID = MediaStorageDirectoryStorage, plain_file.SOPInstanceUID
    ds.FileSetID = "SET"
    record = Dataset()
    record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 0, 0xFFFF
    record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    with disable_value_validation():
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", list(referenced)
    ds.DirectoryRecordSequence = [record]
    file = io.BytesIO()
    dcmwrite(file, ds, enforce_file_format=True)
    path.write_bytes(file.getvalue())


def beside(folder: Path) -> tuple[Truth, ...]:
    save(folder, plain())
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504))
    (folder / "report.pdf").write_bytes(b"%PDF-1.4\n%%EOF\n")
    directory(folder / "DICOMDIR", ["000.DCM"])
    return (truth(),)


def links(folder: Path) -> tuple[Truth, ...]:
    """A link to a series outside, and one to a folder above that has no end."""
    save(folder / "in" / "series", plain())
    save(folder / "outside", plain(series="outside"))
    (folder / "in" / "elsewhere").symlink_to(folder / "outside", target_is_directory=True)
    (folder / "in" / "series" / "loop").symlink_to(folder / "in", target_is_directory=True)
    return (truth(),)


def linked_slice(folder: Path) -> tuple[Truth, ...]:
    save(folder / "in", plain())
    (folder / "outside").mkdir()
    (folder / "in" / "004.dcm").rename(folder / "outside" / "004.dcm")
    (folder / "in" / "004.dcm").symlink_to(folder / "outside" / "004.dcm")
    return ()


def escaping_directory(folder: Path) -> tuple[Truth, ...]:
    save(folder / "in", plain())
    save(folder / "outside", plain(series="outside"))
    directory(folder / "in" / "DICOMDIR", ["..", "outside", "000.dcm"])
    return (truth(),)


def mirrored(slices: list[Dataset]) -> None:
    for ds in slices:
        ds.PhotometricInterpretation = "MONOCHROME1"


def lossy(folder: Path) -> tuple[Truth, ...]:
    save(folder, jpeg(plain(smooth(SHAPE))))
    return (Truth(smooth(SHAPE) + np.int16(INTERCEPT), GEOMETRY, tolerance=6.0),)


def with_objects(folder: Path) -> tuple[Truth, ...]:
    """A segmentation, contours, a report and a screenshot beside the series."""
    slices = plain()
    save(folder, slices)
    for name, ds in objects.beside(slices).items():
        dcmwrite(folder / f"{name}.dcm", ds, enforce_file_format=True)
    return (truth(),)


def with_screenshot(folder: Path) -> tuple[Truth, ...]:
    """A screenshot of an ultrasound with burnt-in text beside the series."""
    slices = plain()
    save(folder, slices)
    shot = eight_bits(plain(smooth((1, 32, 32)), grid((1, 32, 32), (1.0, 1.0, 1.0)), series="shot"))[0]
    shot.SOPClassUID = shot.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    shot.Modality, shot.ConversionType, shot.BurnedInAnnotation = "US", "WSD", "YES"
    del shot.ImagePositionPatient, shot.ImageOrientationPatient, shot.PixelSpacing
    dcmwrite(folder / "shot.dcm", shot, enforce_file_format=True)
    return (truth(),)


def enhanced(folder: Path) -> tuple[Truth, ...]:
    dcmwrite(folder / "enhanced.dcm", objects.legacy_enhanced(plain()), enforce_file_format=True)
    return (truth(),)


def enhanced_shuffled(folder: Path) -> tuple[Truth, ...]:
    """Frames out of order, the intercept per frame."""
    order = [3, 0, 9, 1, 7, 2, 8, 4, 6, 5]
    dcmwrite(folder / "enhanced.dcm", objects.enhanced(plain(), order), enforce_file_format=True)
    return (truth(),)


def _row(
    number: str | int,
    title: str,
    what: str,
    verdict: str | tuple[str, ...],
    make: Maker,
    inside: str = ".",
    opens: str = "",
) -> BadInput:
    expected = (verdict,) if isinstance(verdict, str) else verdict
    kind: Kind = "bad" if any(v.startswith("refused") for v in expected) else "sound"
    return BadInput(str(number), title, what, kind, expected, make, inside, opens or inside)


def _bad(number: str | int, title: str, what: str, code: str, change: Change) -> BadInput:
    return _row(number, title, what, f"refused:{code}", series(change))


def _sound(number: str | int, title: str, what: str, change: Change) -> BadInput:
    return _row(number, title, what, "accepted", series(change, truth))


_TILT = [STEP_MM * np.tan(np.radians(15)) * number for number in range(SHAPE[0])]
_UNEVEN = [0.0, 0.0, 0.0, 0.4, 0.4, 0.9, 0.9, 1.0, 1.5, 1.5]

INPUTS = (
    _bad(55, "slice missing", "slice 5 of 10 is lost", "dicom.missing-slices", lambda s: s[:4] + s[5:]),
    _bad(56, "two slices at one place", "other voxels, other UID", "dicom.duplicate-slices", duplicate),
    _row(57, "one file twice", "an identical copy under another name", "warned:dicom.copies", files(copied, truth)),
    _row(58, "two series in one folder", "on different grids", ("accepted", "accepted"), two_series),
    _row(59, "localiser inside the series", "a sagittal slice among ten axial ones", "warned:dicom.localiser",
         series(localiser, truth)),
    _bad(60, "gantry tilt", "slices displaced in their plane, 15 degrees", "dicom.gantry-tilt", moved(_TILT, axis=1)),
    _bad(61, "uneven slices", "distances of 2.0 to 2.5 mm", "dicom.nonuniform-spacing", moved(_UNEVEN)),
    _bad(62, "slices of two sizes", "14 rows in one, 16 in the others", "dicom.mixed-size", other_size),
    _row("63a", "slope per slice", "rescaling differs from slice to slice, as in PET", "accepted",
         series(rescaled, rescaled_truth)),
    _bad("63b", "slope lost in one slice", "slope and intercept are absent, the other nine have them", "scan.header",
         without_rescale),
    _bad(64, "no positions", "ImagePositionPatient is absent", "dicom.missing-geometry", without_position),
    _bad(65, "voxels cut", "200 of 384 bytes in one slice", "dicom.corrupt-slice", short),
    _bad(66, "pixel spacing differs", "0.9 x 1.1 mm, but 1.4 x 1.1 mm in one slice", "dicom.mixed-spacing",
         at(4, PixelSpacing=[1.1, 1.4])),
    _bad(67, "pixel spacing 0", "in every slice", "geometry.spacing", each(PixelSpacing=[0, 0])),
    _bad(68, "orientation not of unit length", "row cosines (1.1, 0, 0)", "geometry.not-orthonormal",
         each(ImageOrientationPatient=[1.1, 0, 0, 0, 1, 0])),
    BadInput("69", "single slice", "one slice is no volume", "unsuitable", ("refused:dicom.too-few-slices",),
             series(lambda s: s[:1]), opens="."),
    _sound(70, "numbers reversed", "InstanceNumber runs against the positions", reversed_numbers),
    _sound(71, "explicit VR big-endian", "a retired transfer syntax", big_endian),
    _sound("72a", "RLE", "lossless run lengths", run_length),
    _sound("72b", "deflated", "the data set is compressed", deflated),
    _sound("73a", "JPEG-LS", "lossless", jpeg_ls),
    _row("73b", "JPEG 2000", "lossless", "accepted", transcoded("JPEG2000Lossless")),
    _row("73c", "JPEG lossless", "process 14, first-order prediction", "accepted",
         transcoded("JPEGLosslessProcess14_1")),
    _row("73d", "JPEG baseline", "8 bits, lossy", "accepted", lossy),
    _row("73e", "JPEG extended", "12 bits, lossy", "accepted",
         transcoded("JPEGExtendedProcess2_4", tolerance=24.0)),
    _row("73f", "high-throughput JPEG 2000", "planes of one value each", "accepted", high_throughput),
    _row("74a", "file cut in half", "one of ten", "refused:dicom.corrupt-slice", files(halved)),
    _row("74b", "file of 0 bytes", "one of ten", "refused:dicom.corrupt-slice", files(emptied)),
    _row("75a", "no preamble", "the 132 bytes before the file's header are lost", "accepted", files(bare, truth)),
    _row("75b", "bare data set", "nothing before the first element, implicit little endian", "accepted",
         files(headless, truth)),
    _row(76, "other files beside", "Thumbs.db, a PDF and a DICOMDIR", "accepted", beside),
    _row("77a", "transfer syntax lies", "plain voxels under the name of JPEG 2000", "refused:dicom.syntax-mismatch",
         files(lying)),
    _row("77b", "transfer syntax lies the other way", "JPEG-LS under the name of plain voxels",
         "refused:dicom.syntax-mismatch", lying_native),
    _row("78a", "links out of the tree and in a loop", "the series in the tree is whole", "accepted", links, "in",
         "in/series"),
    _row("78b", "slice by a link", "one slice lies outside the tree", "refused:dicom.missing-slices", linked_slice,
         "in"),
    _bad(79, "65535 x 65535 in one slice", "its voxels are 384 bytes", "scan.too-large",
         at(4, Rows=65535, Columns=65535)),
    _bad(80, "32 bits declared, 16 stored", "in every slice", "dicom.corrupt-slice",
         each(BitsAllocated=32, BitsStored=32, HighBit=31)),
    _sound(81, "MONOCHROME1", "shown inverted, but its numbers are Hounsfield units", mirrored),
    _sound("82a", "PatientID is a path", "../../../../escape", each(PatientID="../../../../escape")),
    _sound("82b", "UID is a path", "a slash and dots in SeriesInstanceUID", each(SeriesInstanceUID="1.2/../../3.4")),
    _sound("82c", "PatientID of 200 letters", "64 are allowed", each(PatientID="x" * 200)),
    _sound("82d", "name in another script", "SpecificCharacterSet ISO_IR 192",
           each(SpecificCharacterSet="ISO_IR 192", PatientName="山田^太郎", PatientID="患者-7",
                SeriesDescription="胸部")),
    _sound("82e", "PatientID CON", "a device's name on Windows", each(PatientID="CON", SeriesDescription="NUL")),
    _sound("82f", "PatientID with a leading dash", "--output=/", each(PatientID="--output=/")),
    _row("83a", "enhanced CT", "one file of ten frames, converted by highdicom", "accepted", enhanced),
    _row("83b", "enhanced MR", "ten frames out of order", "accepted", enhanced_shuffled),
    _row(84, "other objects beside", "segmentation, contours, report and screenshot in the folder", "accepted",
         with_objects),
    _row("85a", "burnt-in text declared", "BurnedInAnnotation YES", "warned:dicom.burnt-in",
         series(each(BurnedInAnnotation="YES"), truth)),
    _row("85b", "ultrasound screenshot beside", "a secondary capture with burnt-in text", "accepted", with_screenshot),
    _row(86, "DICOMDIR that points outside", "../outside; the series beside it is whole", "accepted",
         escaping_directory, "in"),
)  # fmt: skip
