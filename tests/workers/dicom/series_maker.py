"""Small DICOM series from a seed, written by pydicom: what a test changes, it changes in a data set."""

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import jpeg_ls
import numpy as np
import pydicom
import SimpleITK as sitk
from openjpeg.utils import encode_array
from PIL import Image
from pydicom import Dataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_encoder
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

SHAPE = (6, 4, 5)
PIXEL_MM = (0.75, 0.5)
STEP_MM = 2.5
ORIGIN_MM = (-12.5, 30.25, 7.0)
SERIES, STUDY, FRAME = "1.2.3", "1.2", "1.2.9"

Change = Callable[[Dataset, int], None]


def voxels_of(shape: tuple[int, ...] = SHAPE, dtype: str = "<i2", seed: int = 0) -> np.ndarray:
    """Random values that fill 12 bits, or 8."""
    top = 200 if np.dtype(dtype).itemsize == 1 else 2000
    low = -1000 if np.dtype(dtype).kind == "i" else 0
    return np.random.default_rng(seed).integers(low, top, shape).astype(dtype)


def slice_of(pixels: np.ndarray, z: int, series: str = SERIES) -> Dataset:
    """A single-frame axial CT slice (Y, X), ``STEP_MM`` above its predecessor."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{series}.4.{z}"
    data.PatientID, data.PatientName = "0815", "Doe^John"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, series, FRAME
    data.Modality, data.SeriesDescription, data.ConvolutionKernel = "CT", "Abdomen", "B30f"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesDate, data.SeriesTime = "20260102", "030405"
    data.ImagePositionPatient = [ORIGIN_MM[0], ORIGIN_MM[1], ORIGIN_MM[2] + STEP_MM * z]
    data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], list(PIXEL_MM)
    data.InstanceNumber = z + 1
    put_pixels(data, pixels)
    return data


def put_pixels(data: Dataset, pixels: np.ndarray) -> None:
    """Uncompressed pixels (Y, X) or frames (Z, Y, X) and the elements that describe them."""
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.add_new("PixelData", "OB" if data.BitsAllocated == 8 else "OW", pixels.tobytes())
    if len(data.PixelData) % 2:
        data.PixelData += b"\0"


def write(data: Dataset, path: Path) -> None:
    """Write by the transfer syntax in the file meta information."""
    meta = data.file_meta
    meta.MediaStorageSOPClassUID = data.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "1.2.3.4.5")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path, voxels: np.ndarray | None = None, change: Change | None = None, *, series: str = SERIES
) -> np.ndarray:
    """One file per plane of ``voxels`` (Z, Y, X), named against the order of their positions; returns the voxels."""
    voxels = voxels_of() if voxels is None else voxels
    for z, plane in enumerate(voxels):
        data = slice_of(plane, z, series)
        if change is not None:
            change(data, z)
        write(data, folder / f"{len(voxels) - z:03}.dcm")
    return voxels


def attributes(**values: object) -> Change:
    """A change that sets elements by keyword; a callable is asked per slice, None removes."""

    def change(data: Dataset, z: int) -> None:
        for keyword, value in values.items():
            own = value(z) if callable(value) else value
            if own is None:
                delattr(data, keyword)
            else:
                setattr(data, keyword, own)

    return change


# --- encodings

NATIVE = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
LOSSLESS = {
    "rle": RLELossless,
    "jpeg-lossless": JPEGLosslessSV1,
    "jpeg-ls": JPEGLSLossless,
    "jpeg-2000": JPEG2000Lossless,
}
LOSSY = {"jpeg-baseline": JPEGBaseline8Bit, "jpeg-2000-lossy": JPEG2000}


def encoded(syntax: str) -> Change:
    """A change that stores a slice in another transfer syntax."""

    def change(data: Dataset, z: int) -> None:
        data.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            data.PixelData = np.frombuffer(data.PixelData, f"<u{data.BitsAllocated // 8}").byteswap().tobytes()
        elif syntax not in NATIVE.values():
            data.PixelData = encapsulate([_compressed(data, syntax)])
            data["PixelData"].VR = "OB"
            data["PixelData"].is_undefined_length = True

    return change


def _compressed(data: Dataset, syntax: str) -> bytes:
    """One frame, compressed by the library that knows the syntax."""
    kind = f"<{'i' if data.PixelRepresentation else 'u'}{data.BitsAllocated // 8}"
    pixels = np.frombuffer(data.PixelData, kind)[: data.Rows * data.Columns].reshape(data.Rows, data.Columns)
    if syntax in (JPEG2000, JPEG2000Lossless):
        ratios = {"compression_ratios": [2.0]} if syntax == JPEG2000 else {}
        return encode_array(pixels, photometric_interpretation=2, **ratios)
    if syntax == JPEGLSLossless:
        return bytes(jpeg_ls.encode_array(pixels.view(kind.replace("i", "u"))))
    if syntax == JPEGBaseline8Bit:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()
    if syntax == JPEGLosslessSV1:
        with TemporaryDirectory() as folder:
            writer = sitk.ImageFileWriter()
            writer.SetFileName(str(Path(folder, "a.dcm")))
            writer.SetImageIO("GDCMImageIO")
            writer.UseCompressionOn()
            writer.SetCompressor("JPEG")
            writer.Execute(sitk.GetImageFromArray(pixels[None]))
            packed = pydicom.dcmread(Path(folder, "a.dcm"))
        assert packed.file_meta.TransferSyntaxUID == syntax
        return next(generate_frames(packed.PixelData, number_of_frames=1))
    return get_encoder(RLELossless).encode(
        data.PixelData, rows=data.Rows, columns=data.Columns, samples_per_pixel=1, number_of_frames=1,
        bits_allocated=data.BitsAllocated, bits_stored=data.BitsStored, pixel_keyword="PixelData",
        pixel_representation=data.PixelRepresentation, photometric_interpretation="MONOCHROME2",
    )  # fmt: skip


# --- enhanced multi-frame


def enhanced(voxels: np.ndarray, groups: Iterable[Callable[[Dataset], None] | None] = ()) -> Dataset:
    """One file of axial MR frames (Z, Y, X); each of ``groups`` may change the functional groups of its frame."""
    data = slice_of(voxels[0], 0)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(data, keyword)
    data.SOPClassUID, data.Modality = "1.2.840.10008.5.1.4.1.1.4.1", "MR"
    put_pixels(data, voxels)
    data.NumberOfFrames = len(voxels)
    shared = Dataset()
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = _item(PixelSpacing=list(PIXEL_MM), SliceThickness=STEP_MM)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    items = []
    for z in range(len(voxels)):
        item = Dataset()
        item.PlanePositionSequence = _item(ImagePositionPatient=[*ORIGIN_MM[:2], ORIGIN_MM[2] + STEP_MM * z])
        item.FrameContentSequence = _item(StackID="1", InStackPositionNumber=z + 1)
        items.append(item)
    for item, change in zip(items, groups, strict=False):
        if change is not None:
            change(item)
    data.PerFrameFunctionalGroupsSequence = Sequence(items)
    return data


def _item(**values: object) -> Sequence:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return Sequence([item])


item_of = _item
