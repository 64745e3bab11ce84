"""Label maps and volumes written as NIfTI-1, MetaImage or NRRD; the same input gives the same bytes."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import Geometry
from vnet_core.volume import Volume
from workers.formats.headers import file_axes

LABEL_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Suffixes that :func:`write_label` and :func:`write_volume` write."""
_DTYPE_NAMES = {
    np.dtype(np.uint8): (2, "MET_UCHAR", "uint8"),
    np.dtype(np.uint16): (512, "MET_USHORT", "uint16"),
    np.dtype(np.int16): (4, "MET_SHORT", "int16"),
    np.dtype(np.float32): (16, "MET_FLOAT", "float"),
}
"""What is written, under its name in NIfTI, MetaImage and NRRD."""


class Planes(Protocol):
    """An array (Z, Y, X) whose planes are told in turn: a numpy array, or something larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along (z, y, x)."""

    @property
    def dtype(self) -> np.dtype:
        """Of a voxel."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Planes (Y, X) from the first on."""


def write_label(path: Path, labels: Planes, geometry: Geometry) -> None:
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


def _write(path: Path, voxels: Planes, geometry: Geometry) -> None:
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
