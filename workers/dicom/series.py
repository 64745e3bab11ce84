"""DICOM series of single-frame slices through SimpleITK, with the checks that its series reader does not make.

Stock reading turns a missing slice, copies, tilt or a localiser into a wrong spacing without an error, and drops files
that it cannot read. Each of these is refused here by name. Messages name no file and no identifier.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from vnet_core.errors import ScanError
from vnet_core.geometry import ORTHONORMAL_TOLERANCE, Geometry
from workers.formats.blocks import open_regular
from workers.formats.headers import MAX_VOXELS, grid_of_file

_STEP_TOLERANCE = 0.01
"""Relative difference of a slice distance from the median that counts as uniform."""
_STEP_TOLERANCE_MM = 0.01
_SLICE_OFF_AXIS = 0.1
"""Largest displacement of a slice from its even place: in pixels within the plane, in slice distances across it."""
_COPY_PIXELS = 0.01
"""Slices nearer than this many pixels lie at one place."""
_BIG_ENDIAN_SYNTAX = "1.2.840.10008.1.2.2"
_DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
_NO_IMAGE_CLASSES = tuple(
    "1.2.840.10008." + part
    for part in (
        "1.3.10",  # DICOMDIR
        "5.1.4.1.1.9.", "5.1.4.1.1.11.", "5.1.4.1.1.66", "5.1.4.1.1.67", "5.1.4.1.1.88.", "5.1.4.1.1.104.",
        "5.1.4.1.1.481.3", "5.1.4.1.1.481.4", "5.1.4.1.1.481.5", "5.1.4.1.1.481.6", "5.1.4.1.1.481.7",
        "5.1.4.1.1.481.8", "5.1.4.1.1.481.9",
    )
)  # fmt: skip
"""SOP classes beside a series that hold no scan: waveforms, display states, segmentations, reports, PDF, RT plans."""


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keep C++ warnings off standard error: they are checked for here, and they name files."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def dicom_series(folder: Path) -> dict[str, list[Path]]:
    """The image series in this one folder: SeriesInstanceUID to its files, sorted by name; {} where there is none."""
    with quiet_itk():
        try:
            uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
            names = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids}
        except RuntimeError:  # its text may quote the file
            raise ScanError(
                "dicom.corrupt-slice", "one DICOM file in the folder has a damaged header; copy the series again"
            ) from None
    listed = {uid: sorted(Path(name) for name in files) for uid, files in sorted(names.items())}
    return {uid: files for uid, files in listed.items() if not _no_image(files[0])}


@dataclass(frozen=True, slots=True)
class Slice:
    """One file of a series, by its header."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype
    position_mm: np.ndarray
    axes: np.ndarray
    """(2, 3): unit vectors along a row (growing x) and along a column (growing y)."""
    pixel_mm: np.ndarray
    """(y, x)"""
    mirror: float | None
    """For MONOCHROME1, which ITK inverts: the constant from which its values are to be subtracted again."""


def series_files(folder: Path, series: str | None) -> list[Path]:
    """Files, sorted by name, of the named series or the only one. ``ScanError``: ``dicom.corrupt-slice`` where the
    folder holds any DICOM image that cannot be listed, ``scan.unreadable``, ``dicom.several-series``,
    ``dicom.unknown-series``.
    """
    found = dicom_series(folder)
    known = {path for files in found.values() for path in files}
    try:
        others = [path for path in folder.iterdir() if path.is_file() and path not in known]
    except OSError as error:
        raise ScanError("scan.unreadable", f"the folder cannot be listed: {error.strerror}") from None
    lost = [path for path in others if _is_dicom(path) and not _no_image(path)]
    if lost:
        raise ScanError(
            "dicom.corrupt-slice",
            f"{len(lost)} of {len(lost) + len(known)} DICOM images in the folder cannot be read (cut off, or another"
            " encoding); copy the series again from its source",
        )
    if not found:
        raise ScanError("scan.unreadable", f"the folder holds no DICOM image series ({len(others)} other files)")
    if series is None and len(found) > 1:
        raise ScanError("dicom.several-series", f"the folder holds {len(found)} series; name one: FOLDER#SeriesUID")
    if series is not None and series not in found:
        raise ScanError("dicom.unknown-series", f"none of the {len(found)} series in the folder has that UID")
    return found[series] if series is not None else next(iter(found.values()))


def _is_dicom(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")


def _no_image(path: Path) -> bool:
    with open_regular(path) as file:
        return _meta_field(file.read(2048), 0x0002).startswith(_NO_IMAGE_CLASSES)


def _meta_field(head: bytes, element: int) -> str:
    """A UID of group 2, which is explicit little endian in every transfer syntax; '' where absent."""
    at = head.find(struct.pack("<HH2s", 2, element, b"UI"), 132)
    if at < 0 or head[128:132] != b"DICM":
        return ""
    (length,) = struct.unpack_from("<H", head, at + 6)
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("latin-1")


def _slice(path: Path) -> Slice:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise ScanError(
            "dicom.corrupt-slice", "a slice has no readable header; copy it again from its source"
        ) from None

    def numbers(tag: str, default: str = "") -> list[float]:
        text = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else default
        try:
            return [float(word) for word in text.split("\\")]
        except ValueError:
            return []

    if reader.GetNumberOfComponents() != 1 or not sitk.sitkInt8 <= reader.GetPixelID() <= sitk.sitkFloat64:
        raise ScanError("scan.dtype", "the slices are colour images; one grey value per voxel is read")
    if numbers("0028|0008", "1") != [1.0]:
        raise ScanError("dicom.multiframe", "one file holds several frames; convert it to single-frame DICOM or NIfTI")
    position, axes, pixel = numbers("0020|0032"), numbers("0020|0037"), numbers("0028|0030")
    if (len(position), len(axes), len(pixel)) != (3, 6, 2) or not np.isfinite([*position, *axes, *pixel]).all():
        raise ScanError(
            "dicom.missing-geometry", "a slice lacks position, orientation or pixel spacing; export the series again"
        )
    if min(pixel) <= 0:
        raise ScanError("geometry.spacing", f"pixel spacing {pixel} mm is not positive; export the series again")
    directions = np.reshape(axes, (2, 3))
    skew = float(np.abs(directions @ directions.T - np.eye(2)).max())
    if skew > ORTHONORMAL_TOLERANCE:
        raise ScanError(
            "geometry.not-orthonormal",
            f"orientation vectors deviate from orthonormal by {skew:.4f} (at most {ORTHONORMAL_TOLERANCE});"
            " export the series again",
        )
    columns, rows = reader.GetSize()[:2]
    bits = numbers("0028|0100") or [0.0]
    _check_pixel_data(path, rows * columns * int(bits[0]) // 8)
    mirror = None
    if reader.HasMetaDataKey("0028|0004") and reader.GetMetaData("0028|0004").strip() == "MONOCHROME1":
        slope, intercept = (numbers("0028|1053") or [1.0])[0], (numbers("0028|1052") or [0.0])[0]
        stored_bits = (numbers("0028|0101") or bits)[0]
        mirror = slope * (-1 if numbers("0028|0103") == [1.0] else 2**stored_bits - 1) + 2 * intercept
    return Slice(
        path,
        (rows, columns),
        sitk.GetArrayViewFromImage(sitk.Image([1, 1], reader.GetPixelID())).dtype,
        np.array(position),
        directions / np.linalg.norm(directions, axis=1)[:, None],
        np.array(pixel),
        mirror,
    )


def _check_pixel_data(path: Path, expected_bytes: int) -> None:
    """Refuse a file whose pixel data are shorter or longer than its header says, which GDCM reads without a word."""
    with open_regular(path) as file:
        data = file.read()
    syntax = _meta_field(data[:2048], 0x0010)
    if syntax == _DEFLATED_SYNTAX:
        return
    big = syntax == _BIG_ENDIAN_SYNTAX
    tag = b"\x7f\xe0\x00\x10" if big else b"\xe0\x7f\x10\x00"  # (7FE0,0010)
    at = data.find(tag)
    while at >= 0:  # the tag may occur by chance too, so one occurrence that fits is enough
        begin = at + (12 if data[at + 4 : at + 8] in (b"OW\0\0", b"OB\0\0") else 8)  # explicit or implicit form
        length = int.from_bytes(data[begin - 4 : begin], "big" if big else "little")
        if length == 0xFFFFFFFF and _fragments_end(data, begin):
            return
        if expected_bytes <= length <= expected_bytes + 1 and begin + length <= len(data):
            return
        at = data.find(tag, at + 4)
    raise ScanError(
        "dicom.corrupt-slice",
        f"the pixel data of a slice are not the {expected_bytes} bytes that its header declares;"
        " copy the series again from its source",
    )


def _fragments_end(data: bytes, at: int) -> bool:
    """Whether the fragments of compressed pixel data from ``at`` lie whole before their closing delimiter."""
    while data[at : at + 4] == b"\xfe\xff\x00\xe0":
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    return data[at : at + 4] == b"\xfe\xff\xdd\xe0"


def series_grid(files: list[Path]) -> tuple[list[Slice], Geometry]:
    """The slices in the order of growing position along the normal (row x column), and the grid they make."""
    with quiet_itk():
        slices = [_slice(path) for path in files]
    first = slices[0]
    if len(slices) < 2:
        raise ScanError("dicom.too-few-slices", f"the series has {len(slices)} slice, at least 2 make a volume")
    _check_one_plane(slices)
    normal = np.cross(*first.axes)
    along = np.array([s.position_mm @ normal for s in slices])
    slices = [slices[i] for i in np.argsort(along, kind="stable")]
    along.sort()
    pixel_mm = float(first.pixel_mm.min())
    _check_steps(along, _COPY_PIXELS * pixel_mm)
    step_mm = float(along[-1] - along[0]) / (len(slices) - 1)
    offsets = np.array([s.position_mm - slices[0].position_mm for s in slices])
    sideways_mm = float(np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1).max())
    if sideways_mm > _SLICE_OFF_AXIS * pixel_mm:
        degrees = np.degrees(np.arctan2(sideways_mm, along[-1] - along[0]))
        raise ScanError(
            "dicom.gantry-tilt",
            f"slices are displaced in their plane by up to {sideways_mm:.2f} mm ({degrees:.1f} degrees of tilt);"
            " resample the series onto an orthogonal grid first",
        )
    if len(slices) * first.shape[0] * first.shape[1] > MAX_VOXELS:
        raise ScanError("scan.too-large", f"{len(slices)} slices of {first.shape} exceed {MAX_VOXELS} voxels; crop it")
    spacing = np.array([first.pixel_mm[1], first.pixel_mm[0], step_mm])
    direction = np.stack([*first.axes, normal], axis=1)
    return slices, grid_of_file((len(slices), *first.shape), slices[0].position_mm, spacing, direction)


def _check_one_plane(slices: list[Slice]) -> None:
    first = slices[0]
    turned = max(float(np.abs(s.axes - first.axes).max()) for s in slices)
    if turned > ORTHONORMAL_TOLERANCE:
        raise ScanError(
            "dicom.mixed-orientation",
            f"orientation cosines differ by up to {turned:.3f} within the series (at most {ORTHONORMAL_TOLERANCE});"
            " take the localiser or the second stack out",
        )
    shapes = {s.shape for s in slices}
    if len(shapes) > 1:
        raise ScanError("dicom.mixed-size", f"the slices have {len(shapes)} sizes {sorted(shapes)}; split the series")
    if any(np.abs(s.pixel_mm / first.pixel_mm - 1).max() > ORTHONORMAL_TOLERANCE for s in slices):
        raise ScanError("dicom.mixed-spacing", "the pixel spacing differs between slices; split the series")


def _check_steps(along_mm: np.ndarray, copy_mm: float) -> None:
    """Refuse sorted slice positions that are not evenly spaced; nearer than ``copy_mm`` is the same place."""
    steps = np.diff(along_mm)
    smallest, middle, largest = float(steps.min()), float(np.median(steps)), float(steps.max())
    if smallest < copy_mm:
        raise ScanError(
            "dicom.duplicate-slices",
            f"{int(np.count_nonzero(steps < copy_mm))} of {len(along_mm)} slices lie where another one lies;"
            " take out copies, or split the series by time point or echo",
        )
    allowed_mm = min(max(_STEP_TOLERANCE * middle, _STEP_TOLERANCE_MM), _SLICE_OFF_AXIS * middle)
    drift_mm = float(np.abs(along_mm - np.linspace(along_mm[0], along_mm[-1], len(along_mm))).max())
    if max(middle - smallest, largest - middle) <= allowed_mm and drift_mm <= _SLICE_OFF_AXIS * middle:
        return
    multiples = np.rint(steps / smallest)
    if multiples.max() > 1 and np.abs(steps / multiples - smallest).max() <= allowed_mm:
        raise ScanError(
            "dicom.missing-slices",
            f"{int(multiples.sum()) - len(steps)} slices are missing: distances of {smallest:.3f} mm and of"
            f" {largest:.3f} mm; fetch the whole series",
        )
    raise ScanError(
        "dicom.nonuniform-spacing",
        f"slice distances vary from {smallest:.3f} to {largest:.3f} mm (allowed {allowed_mm:.3f} mm off"
        f" {middle:.3f}), or drift by {drift_mm:.3f} mm; resample the series to even slices first",
    )


def series_voxels(slices: list[Slice]) -> np.ndarray:
    """Voxels (Z, Y, X) rescaled slice by slice, MONOCHROME1 as stored; ``dicom.corrupt-slice`` where decoding fails."""
    voxels = np.empty((len(slices), *slices[0].shape), np.result_type(*(s.dtype for s in slices)))
    for plane, piece in zip(voxels, slices, strict=True):
        with quiet_itk():
            try:
                image = sitk.ReadImage(str(piece.path), imageIO="GDCMImageIO")
            except RuntimeError:
                raise ScanError(
                    "dicom.corrupt-slice", "the pixel data of a slice cannot be decoded; export the series uncompressed"
                ) from None
        plane[:] = sitk.GetArrayViewFromImage(image).reshape(plane.shape)
        if piece.mirror is not None:
            plane[:] = np.asarray(piece.mirror).astype(plane.dtype) - plane
    return voxels
