"""The voxel block of a scan file, read with every declared byte accounted for.

Compressed streams are inflated to their end with their checksum verified; nothing is allocated or inflated beyond
what the header declares. Messages name no file, because a name may identify a patient.
"""

from __future__ import annotations

import math
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry

SURPLUS_BYTES = 4096
"""Bytes after the last declared voxel that still count as padding; more means that the header is wrong."""

_CHUNK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1100
"""No deflate stream grows more than 1032 fold, so a shorter file cannot hold the declared voxels."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the voxels of one scan file lie, and what they mean."""

    geometry: Geometry
    dtype: np.dtype
    """As stored, with its byte order."""
    data_file: Path
    start: int = 0
    """Bytes of ``data_file`` before the voxels or before the compressed stream; -1 for voxels at the end."""
    compressed: bool = False
    """Whether a gzip or zlib stream begins at ``start``."""
    skip: int = 0
    """Bytes of the inflated stream before the voxels."""
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels as stored."""
        return math.prod(self.geometry.shape) * self.dtype.itemsize


def read_block(layout: Layout) -> np.ndarray:
    """Voxels (Z, Y, X) in native byte order, rescaled; every stored byte accounted for.

    ``ScanError``: ``scan.truncated``, ``scan.checksum``, ``scan.header`` (more bytes than declared).
    """
    with open_regular(layout.data_file) as file:
        size = file.seek(0, 2)
        begin = size - layout.voxel_bytes if layout.start < 0 else min(layout.start, size)
        file.seek(max(begin, 0))
        if not layout.compressed:
            _account(layout.voxel_bytes, size - begin if begin >= 0 else size)
            stored = np.fromfile(file, layout.dtype, math.prod(layout.geometry.shape))
        else:
            if (size - begin) * _DEFLATE_LIMIT < layout.voxel_bytes:
                _account(layout.voxel_bytes, (size - begin) * _DEFLATE_LIMIT)
            stored = _inflated(file, layout).view(layout.dtype)
    voxels = stored.astype(layout.dtype.newbyteorder("="), copy=False).reshape(layout.geometry.shape)
    if (layout.slope, layout.intercept) == (1.0, 0.0):
        return voxels
    # float32 holds 8 and 16 bit integers exactly, and is what ITK and FSL give
    exact = layout.dtype.itemsize <= 2 or layout.dtype.char == "f"
    scaled: np.ndarray = voxels.astype(np.float32 if exact else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        np.multiply(scaled, layout.slope, out=scaled)
        np.add(scaled, layout.intercept, out=scaled)
    return scaled


def open_regular(path: Path) -> BinaryIO:
    """The file, open; ``scan.unreadable`` where it is absent, forbidden or not regular (a pipe would hang)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ScanError("scan.unreadable", "this is no regular file; give a scan file or a folder of DICOM slices")
        return path.open("rb")
    except OSError as error:
        raise ScanError("scan.unreadable", f"the file cannot be opened: {error.strerror}") from None


def _inflated(file: BinaryIO, layout: Layout) -> np.ndarray:
    block = np.empty(layout.voxel_bytes, np.uint8)
    room = block.data
    seen = -layout.skip  # negative in what comes before the voxels
    for piece in inflated_pieces(file, None):
        part = memoryview(piece)[max(0, -seen) :]
        at = min(max(0, seen), len(room))
        fits = min(len(part), len(room) - at)
        room[at : at + fits] = part[:fits]
        seen += len(piece)
        if seen > layout.voxel_bytes + SURPLUS_BYTES:  # a bomb must not be inflated to its end
            break
    _account(layout.voxel_bytes, seen)
    return block


def inflated_pieces(file: BinaryIO, enough: int | None) -> Iterator[bytes]:
    """What a zlib stream or all members of a gzip file inflate to: to the verified end, or until ``enough`` bytes."""
    decoder = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, told by the first bytes
    pending, seen = file.read(_CHUNK_BYTES), 0
    while pending:
        try:
            piece = decoder.decompress(pending, _CHUNK_BYTES if enough is None else enough)
        except zlib.error as error:
            raise ScanError(
                "scan.checksum", f"the compressed data are damaged ({error}); copy the file again from its source"
            ) from None
        seen += len(piece)
        yield piece
        if enough is not None and seen >= enough:
            return
        pending = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        if decoder.eof:
            pending = pending if len(pending) > 1 else pending + file.read(_CHUNK_BYTES)
            if not pending.startswith(b"\x1f\x8b"):  # padding after the stream, or nothing
                return
            decoder = zlib.decompressobj(wbits=47)
        pending = pending or file.read(_CHUNK_BYTES)
    raise ScanError(
        "scan.truncated", f"the compressed stream breaks off after {seen} bytes; copy the file again from its source"
    )


def _account(declared_bytes: int, present_bytes: int) -> None:
    present_bytes = max(0, present_bytes)
    if present_bytes < declared_bytes:
        raise ScanError(
            "scan.truncated",
            f"the header declares {declared_bytes} bytes of voxels but at most {present_bytes} are present;"
            " copy the file again from its source",
        )
    if present_bytes > declared_bytes + SURPLUS_BYTES:
        raise ScanError(
            "scan.header",
            f"the header declares {declared_bytes} bytes of voxels but at least {present_bytes} are present;"
            " the header does not belong to these voxels",
        )
