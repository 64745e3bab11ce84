"""Scan files to volumes, and label maps back to files: the only place in the program that reorders axes.

NIfTI, MetaImage and NRRD are decoded by :mod:`workers.formats`, because their stock readers return truncated data as
success; SimpleITK reads DICOM (:mod:`workers.dicom`) and gives the second opinion on a NIfTI header. Files index x, y, z
and we index z, y, x; voxels need no move, since x is fastest in both. Messages name no file and no identifier: both may
name a patient.

A source is a scan file, a folder that holds one DICOM series, or ``folder#SeriesInstanceUID`` where it holds several.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import Geometry
from vnet_core.volume import Volume
from workers.dicom.series import dicom_series as dicom_series
from workers.dicom.series import quiet_itk, series_files, series_grid, series_voxels
from workers.formats.blocks import Layout, open_regular, read_block
from workers.formats.headers import file_axes, meta_layout, nifti_layout, not_a, nrrd_layout

SCAN_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
"""Suffixes of scan files, in any case; a DICOM series is a folder."""
LABEL_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Suffixes that :func:`write_label` and :func:`write_volume` write."""
_DTYPE_NAMES = {
    np.dtype(np.uint8): (2, "MET_UCHAR", "uint8"),
    np.dtype(np.uint16): (512, "MET_USHORT", "uint16"),
    np.dtype(np.int16): (4, "MET_SHORT", "int16"),
    np.dtype(np.float32): (16, "MET_FLOAT", "float"),
}
"""What is written, under its name in NIfTI, MetaImage and NRRD."""

_NIFTI_SUFFIXES = (".nii.gz", ".nii")
_READERS_AGREE_VOXELS = 0.1
"""Largest distance, in the smallest spacing, of one voxel as placed by us and by SimpleITK."""


def is_scan(path: Path) -> bool:
    """Whether the name is that of a scan file; hidden files such as ``._scan.nii.gz`` are not."""
    return not path.name.startswith(".") and path.name.lower().endswith(SCAN_SUFFIXES)


def case_stem(path: Path) -> str:
    """The name without its scan suffix: ``liver_0000.nii.gz`` gives ``liver_0000``; other names stay whole."""
    suffix = next((s for s in SCAN_SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_volume(source: str | Path) -> Volume:
    """One channel (1, Z, Y, X) in its stored dtype, or float32 or float64 where the header rescales.

    ``ScanError`` codes: ``scan.unreadable``, ``scan.header``, ``scan.truncated``, ``scan.checksum``, ``scan.not-3d``,
    ``scan.dtype``, ``scan.empty``, ``scan.too-large``, ``scan.nonfinite``, ``scan.path-escape``, ``geometry.*`` and,
    for series, ``dicom.*``.
    """
    path, series = _split(source)
    if path.is_dir():
        slices, geometry = series_grid(series_files(path, series))
        voxels = series_voxels(slices)
    else:
        layout = _layout(path)
        geometry, voxels = layout.geometry, read_block(layout)  # first: damage is told as damage, not as odd geometry
        _check_second_reader(path, geometry)
    if voxels.dtype.kind == "f":
        bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels)
        if bad:
            raise ScanError(
                "scan.nonfinite", f"{bad} of {voxels.size} voxels are NaN or Inf; replace them by measured values"
            )
    return Volume(voxels[None], geometry)


def read_label(source: str | Path) -> Volume:
    """A label map (1, Z, Y, X), uint8 where its values fit, else uint16; whole numbers stored as float are converted.

    ``ScanError`` codes: those of :func:`read_volume`, ``label.not-integer``, ``label.negative``, ``label.values``.
    """
    volume = read_volume(source)
    voxels = volume.voxels
    if voxels.dtype.kind == "f":
        fractional = sum(int(np.count_nonzero(plane != np.trunc(plane))) for plane in volume.labels)
        if fractional:
            raise ScanError(
                "label.not-integer",
                f"{fractional} of {voxels.size} label voxels are no whole numbers; threshold the soft label first",
            )
    low, high = voxels.min(), voxels.max()
    if low < 0:
        raise ScanError("label.negative", f"the smallest label is {low:g}, must be at least 0; renumber the labels")
    if high > 65535:
        raise ScanError("label.values", f"the largest label is {high:g}, must be at most 65535; renumber the labels")
    return Volume(voxels.astype(np.uint8 if high < 256 else np.uint16, copy=False), volume.geometry)


def read_geometry(source: str | Path) -> Geometry:
    """The grid alone, from headers; every check of :func:`read_volume` that needs no voxel is made."""
    path, series = _split(source)
    if path.is_dir():
        return series_grid(series_files(path, series))[1]
    geometry = _layout(path).geometry
    _check_second_reader(path, geometry)
    return geometry


def source_files(source: str | Path) -> list[Path]:
    """All files whose bytes make up the source, sorted: the data file beside a header, the slices of a series."""
    path, series = _split(source)
    if path.is_dir():
        return series_files(path, series)
    if path.name.lower().endswith(_NIFTI_SUFFIXES):  # one file by its definition: nothing to parse
        open_regular(path).close()
        return [path]
    return sorted({path, _layout(path).data_file})


def write_label(path: Path, labels: np.ndarray, geometry: Geometry) -> None:
    """Write uint8 or uint16 ``labels`` (Z, Y, X) by the suffix of ``path``; the same input gives the same bytes.

    NIfTI gets sform and qform, both code 1: sform to the last digit of float32, which nibabel and ITK prefer.
    ``ScanError``: ``scan.shape``, ``label.dtype``; ``ConfigError`` ``output.format`` for another suffix.
    """
    if labels.dtype not in (np.uint8, np.uint16):
        raise ScanError("label.dtype", f"labels are {labels.dtype}, must be uint8 or uint16; convert them first")
    _write(path, labels, geometry)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume of one channel, uint8, uint16, int16 or float32, in the way of :func:`write_label`.

    ``ScanError`` ``scan.dtype``; ``ConfigError`` ``output.format`` for another suffix.
    """
    if volume.voxels.dtype not in _DTYPE_NAMES:
        known = ", ".join(map(str, _DTYPE_NAMES))
        raise ScanError("scan.dtype", f"voxels are {volume.voxels.dtype}, must be one of {known}; convert them first")
    _write(path, volume.labels, volume.geometry)


def _write(path: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    if voxels.shape != geometry.shape:
        raise ScanError("scan.shape", f"voxels of shape {voxels.shape} do not fit the grid {geometry.shape}")
    suffix = next((s for s in LABEL_SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise ConfigError(
            "output.format", f"{path.suffix!r} is no scan format; end the name in one of {', '.join(LABEL_SUFFIXES)}"
        )
    planes = (np.ascontiguousarray(p, voxels.dtype.newbyteorder("<")).tobytes() for p in voxels)
    with path.open("wb") as file:
        if suffix == ".mha":
            packer = zlib.compressobj()
            data = [packer.compress(plane) for plane in planes] + [packer.flush()]
            file.write(_meta_header(voxels.dtype, geometry, sum(map(len, data))))
            file.writelines(data)
        elif suffix == ".nrrd":
            file.write(_nrrd_header(voxels.dtype, geometry))
            _write_gzip(file, planes)
        elif suffix == ".nii.gz":
            _write_gzip(file, chain([_nifti_header(voxels.dtype, geometry)], planes))
        else:
            file.write(_nifti_header(voxels.dtype, geometry))
            file.writelines(planes)


# --- files


def _split(source: str | Path) -> tuple[Path, str | None]:
    path = Path(source)
    head, mark, series = str(source).rpartition("#")
    if mark and not path.exists() and Path(head).is_dir():
        return Path(head), series
    return path, None


def _layout(path: Path) -> Layout:
    name = path.name.lower()
    if name.endswith(_NIFTI_SUFFIXES):
        return nifti_layout(path)
    if name.endswith((".mha", ".mhd")):
        return meta_layout(path)
    if name.endswith((".nrrd", ".nhdr")):
        return nrrd_layout(path)
    with open_regular(path) as file:
        raise not_a(f"scan file ({', '.join(SCAN_SUFFIXES)})", file.read(132))


def _check_second_reader(path: Path, geometry: Geometry) -> None:
    """Refuse a NIfTI header that ITK places elsewhere: its mask would fit the scan in one viewer and not in another."""
    if not path.name.lower().endswith(_NIFTI_SUFFIXES):
        return
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    reader.SetFileName(str(path))
    with quiet_itk():
        try:
            reader.ReadImageInformation()
        except RuntimeError:  # its text names the file
            raise ScanError(
                "geometry.not-orthonormal",
                "SimpleITK refuses the header: the axes are sheared, or sform and qform contradict; resample the scan",
            ) from None
    steps = np.array(reader.GetDirection()).reshape(3, 3) * np.array(reader.GetSpacing())
    spacing, direction = file_axes(geometry)
    reach = np.abs(steps - direction * spacing) @ (np.array(geometry.shape[::-1]) - 1)
    apart_mm = float(np.linalg.norm(reach + np.abs(np.array(reader.GetOrigin()) - geometry.origin_mm)))
    if not apart_mm <= _READERS_AGREE_VOXELS * spacing.min():
        raise ScanError(
            "geometry.ambiguous",
            f"two readers place the scan up to {apart_mm:.3g} mm apart (spacing {spacing.min():.3g} mm), because sform,"
            " qform, pixdim or units disagree; make them agree, or convert the scan again from its source",
        )


# --- headers of written files


def _write_gzip(file: BinaryIO, pieces: Iterator[bytes]) -> None:
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as stream:
        stream.writelines(pieces)


def _nifti_header(dtype: np.dtype, geometry: Geometry) -> bytes:
    """352 bytes: NIfTI-1, millimetres, no text; fields at the byte offsets of nifti1.h."""
    spacing, direction = file_axes(geometry)
    lps_to_ras = np.diag([-1.0, -1.0, 1.0])
    affine = lps_to_ras @ np.column_stack([direction * spacing, geometry.origin_mm])
    left, _, right = np.linalg.svd(lps_to_ras @ direction)
    axes = left @ right  # the nearest orthonormal matrix, which a quaternion needs
    hand = 1.0 if np.linalg.det(axes) > 0 else -1.0
    axes[:, 2] *= hand
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    if max(geometry.shape) > 32767:
        raise ScanError("scan.too-large", f"NIfTI holds at most 32767 voxels along an axis, not {geometry.shape}")
    struct.pack_into("<8h", header, 40, 3, *geometry.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, _DTYPE_NAMES[dtype][0], 8 * dtype.itemsize)
    struct.pack_into("<8f", header, 76, hand, *spacing, 1.0, 1.0, 1.0, 1.0)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)  # vox_offset, scl_slope, scl_inter
    header[123] = 2  # mm
    struct.pack_into("<2h", header, 252, 1, 1)  # qform and sform: scanner coordinates
    struct.pack_into("<3f", header, 256, *Rotation.from_matrix(axes).as_quat(canonical=True)[:3])
    struct.pack_into("<3f", header, 268, *affine[:, 3])
    struct.pack_into("<12f", header, 280, *affine.ravel())
    header[344:348] = b"n+1\0"
    return bytes(header)


def _meta_header(dtype: np.dtype, geometry: Geometry, packed_bytes: int) -> bytes:
    spacing, direction = file_axes(geometry)
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = True\n"
        f"CompressedDataSize = {packed_bytes}\n"
        f"TransformMatrix = {_spaced(direction.T.ravel())}\nOffset = {_spaced(geometry.origin_mm)}\n"
        f"CenterOfRotation = 0 0 0\nElementSpacing = {_spaced(spacing)}\nDimSize = {_spaced(geometry.shape[::-1])}\n"
        f"ElementType = {_DTYPE_NAMES[dtype][1]}\nElementDataFile = LOCAL\n"
    ).encode()


def _nrrd_header(dtype: np.dtype, geometry: Geometry) -> bytes:
    spacing, direction = file_axes(geometry)
    vectors = " ".join(f"({_spaced(column, ',')})" for column in (direction * spacing).T)
    return (
        f"NRRD0004\ntype: {_DTYPE_NAMES[dtype][2]}\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {_spaced(geometry.shape[::-1])}\nspace directions: {vectors}\nkinds: domain domain domain\n"
        f"endian: little\nencoding: gzip\nspace origin: ({_spaced(geometry.origin_mm, ',')})\n\n"
    ).encode()


def _spaced(numbers: np.ndarray | tuple[float, ...], separator: str = " ") -> str:
    """Shortest text that reads back as the same double."""
    return separator.join(repr(n.item() if isinstance(n, np.generic) else n) for n in numbers)
