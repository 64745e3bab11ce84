"""DICOM slices from a seed, and the ways to store them: what the rows of :mod:`tests.bad_inputs.dicom` change."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset, FileMetaDataset, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from tests.bad_inputs.inputs import Truth, grid, random, smooth
from vnet_core.geometry import Geometry

SHAPE = (10, 16, 12)
STEP_MM = 2.0
GEOMETRY = grid(SHAPE, (STEP_MM, 1.1, 0.9))
INTERCEPT = -1024


def uid(*words: object) -> str:
    """The same UID for the same words."""
    return generate_uid(entropy_srcs=["bad-inputs", *map(str, words)])


def truth() -> Truth:
    """Of the plain series."""
    return Truth(random(SHAPE) + np.int16(INTERCEPT), GEOMETRY)


def plain(
    voxels: np.ndarray | None = None, geometry: Geometry = GEOMETRY, series: str = "first", study: str = "study"
) -> list[Dataset]:
    """A CT series of stored values (Z, Y, X), one data set per slice, from the first position on."""
    stored = random(SHAPE) if voxels is None else voxels
    axes = np.asarray(geometry.direction)
    result = []
    for number, plane in enumerate(stored):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid(series, number)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(study), uid(study, series)
        ds.FrameOfReferenceUID = uid(study, "frame")
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "4711", "19600101", "F"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20260101", "120000", "1", ""
        ds.SeriesDate, ds.ContentDate, ds.ContentTime = "20260101", "20260101", "120000"
        ds.ReferringPhysicianName, ds.Manufacturer, ds.ManufacturerModelName = "", "Maker", "Model"
        ds.DeviceSerialNumber, ds.SoftwareVersions, ds.PositionReferenceIndicator = "1", "1", ""
        ds.Modality, ds.SeriesDescription, ds.SeriesNumber = "CT", "thorax", 1
        ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], number + 1
        ds.ImageOrientationPatient = [*map(float, axes[:, 2]), *map(float, axes[:, 1])]
        place = np.array(geometry.origin_mm) + number * geometry.spacing_mm[0] * axes[:, 0]
        ds.ImagePositionPatient = [round(float(mm), 6) for mm in place]
        ds.PixelSpacing, ds.SliceThickness = list(geometry.spacing_mm[1:]), geometry.spacing_mm[0]
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, INTERCEPT, "HU"
        ds.KVP, ds.ConvolutionKernel = 120, "B30f"
        ds.PixelData = plane.astype("<u2").tobytes()
        result.append(ds)
    return result


def save(folder: Path, slices: Sequence[Dataset]) -> None:
    """One file per data set, under the numbers of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, ds in enumerate(slices):
        dcmwrite(folder / f"{number:03d}.dcm", ds, enforce_file_format=True)


def content(ds: Dataset) -> bytes:
    """The file of one data set."""
    file = io.BytesIO()
    dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def relabelled(file: bytes, syntax: str) -> bytes:
    """The same bytes under another transfer syntax."""
    at = file.index(struct.pack("<HH2s", 2, 0x10, b"UI"), 132)
    (old,) = struct.unpack_from("<H", file, at + 6)
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    (group,) = struct.unpack_from("<I", file, 140)
    return (
        file[:140] + struct.pack("<I", group + len(value) - old) + file[144 : at + 6]
        + struct.pack("<H", len(value)) + value + file[at + 8 + old :]
    )  # fmt: skip


def deflated(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    for ds in slices:
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return slices


def big_endian(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    for ds in slices:
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds["PixelData"].VR = "OW"
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    return slices


def run_length(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    for ds in slices:
        ds.compress(RLELossless, generate_instance_uid=False)
    return slices


def jpeg_ls(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    for ds in slices:
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
    return slices


def eight_bits(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    """Stored values of 0 to 255 in one byte each."""
    for ds in slices:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(np.uint8).tobytes()
        ds["PixelData"].VR = "OB"
    return slices


def jpeg(slices: Sequence[Dataset]) -> Sequence[Dataset]:
    """Baseline JPEG of 8 bits, lossy."""
    for ds in eight_bits(slices):
        file = io.BytesIO()
        plane = np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)
        Image.fromarray(plane).save(file, "JPEG", quality=98)
        ds.PixelData = encapsulate([file.getvalue()])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 4
        ds.LossyImageCompressionMethod = "ISO_10918_1"
    return slices


def transcode(folder: Path, syntax: str) -> None:
    """Rewrite every file of the folder in another transfer syntax, by GDCM's name for it."""
    import gdcm  # after zlib, whose functions it would replace by its own for the whole process

    for path in sorted(folder.iterdir()):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def transcoded(syntax: str, tolerance: float = 0.0) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker of the plain series, with smooth values of 8 bits more where it is lossy, in another syntax."""

    def make(folder: Path) -> tuple[Truth, ...]:
        stored = smooth(SHAPE) * np.int16(8) if tolerance else random(SHAPE)
        slices = plain(stored)
        for ds in slices:
            ds.BitsStored, ds.HighBit = 12, 11
        save(folder, slices)
        transcode(folder, syntax)
        return (Truth(stored + np.int16(INTERCEPT), GEOMETRY, tolerance),)

    return make


def high_throughput(folder: Path) -> tuple[Truth, ...]:
    """HTJ2K of planes of one value each, told apart by the intercept: streams without a code block, made by hand."""
    values = np.arange(SHAPE[0], dtype=np.int16) * 10
    slices = plain()
    for value, ds in zip(values, slices, strict=True):
        ds.RescaleIntercept = int(value) - 2**15
        ds.PixelData = encapsulate([_flat_stream(ds.Rows, ds.Columns)])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = HTJ2KLossless
    save(folder, slices)
    return (Truth(np.broadcast_to(values[:, None, None], SHAPE), GEOMETRY),)


def _flat_stream(rows: int, columns: int) -> bytes:
    """A codestream of one component of 16 bits and no code block, so that all pixels are 2^15 (ISO 15444-1, -15)."""
    size = struct.pack(">H8IH3B", 0x4000, columns, rows, 0, 0, columns, rows, 0, 0, 1, 15, 1, 1)
    capability = struct.pack(">IH", 1 << 17, 0)
    coding = bytes([0, 0, 0, 1, 0, 2, 4, 4, 0x40, 1])  # two decompositions, blocks of 64, high throughput, reversible
    steps = bytes([0x40, 0x80, 0x88, 0x88, 0x90, 0x88, 0x88, 0x90])
    markers = [(0xFF51, size), (0xFF50, capability), (0xFF52, coding), (0xFF5C, steps)]
    packets = bytes(3)  # one empty packet for each resolution
    head = b"".join(struct.pack(">HH", marker, len(part) + 2) + part for marker, part in markers)
    tile = struct.pack(">HHHIBB", 0xFF90, 10, 0, 14 + len(packets), 0, 1) + b"\xff\x93" + packets
    return b"\xff\x4f" + head + tile + b"\xff\xd9"
