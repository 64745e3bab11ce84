"""The voxel block of a scan file, read with every declared byte accounted for.

Compressed streams are inflated to their end with their checksum verified; nothing is allocated or inflated beyond
what the header declares. Messages name no file, because a name may identify a patient.
"""

from __future__ import annotations

import bz2
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from vnet_core.errors import ScanError
from workers.formats.headers import FileGrid

SURPLUS_BYTES = 4096
"""Bytes after the last declared voxel that still count as padding; more means that the header is wrong."""
BOMB_BYTES = 1 << 30
"""Declared voxels below this are inflated whatever their ratio: a mask of one label shrinks a thousandfold."""
BOMB_RATIO = 200
"""Largest growth of a compressed stream that declares more than ``BOMB_BYTES``."""

Packing = Literal["raw", "deflate", "bzip2"]

_CHUNK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1100
"""No deflate stream grows more than 1032 fold, so a shorter file cannot hold the declared voxels."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the voxels of one scan file lie, and what they mean."""

    grid: FileGrid
    dtype: np.dtype
    """As stored, with its byte order."""
    data_file: Path
    start: int = 0
    """Bytes of ``data_file`` before the voxels or before the compressed stream; -1 for voxels at the end."""
    packing: Packing = "raw"
    """What begins at ``start``: the voxels, a gzip or zlib stream, or a bzip2 stream."""
    skip: int = 0
    """Bytes of the inflated stream before the voxels."""
    slope: float = 1.0
    intercept: float = 0.0
    warnings: tuple[str, ...] = ()
    """Codes of what the header leaves to be noted."""
    volumes: int = 1
    """Volumes of the grid's shape, one behind the other."""
    volume: int = 0
    """Which of them is read, from 0."""

    @property
    def volume_bytes(self) -> int:
        """Bytes of one volume as stored."""
        return math.prod(self.grid.shape) * self.dtype.itemsize

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels of all volumes as stored."""
        return self.volumes * self.volume_bytes


def read_block(layout: Layout) -> tuple[np.ndarray, tuple[str, ...]]:
    """Voxels (Z, Y, X) in native byte order, rescaled, and warnings: ``scan.trailing-bytes``.

    Of several volumes one is held in memory; all are accounted for.

    ``ScanError``: ``scan.truncated``, ``scan.checksum``, ``scan.bomb``, ``scan.header`` (more bytes than declared).
    """
    with open_regular(layout.data_file) as file:
        size = file.seek(0, 2)
        begin = size - layout.voxel_bytes if layout.start < 0 else min(layout.start, size)
        file.seek(max(begin, 0))
        if layout.packing == "raw":
            _surplus(layout.voxel_bytes, size - begin if begin >= 0 else size)
            file.seek(begin + layout.volume * layout.volume_bytes)
            stored = np.fromfile(file, layout.dtype, math.prod(layout.grid.shape))
            surplus = _surplus(layout.volume_bytes, stored.nbytes)
            file.seek(begin + layout.voxel_bytes)
        else:
            packed = size - begin
            if layout.packing == "deflate" and packed * _DEFLATE_LIMIT < layout.voxel_bytes:
                _surplus(layout.voxel_bytes, packed * _DEFLATE_LIMIT)
            refuse_bomb(layout.voxel_bytes, packed)
            stored, surplus = _inflated(file, layout)
            stored = stored.view(layout.dtype)
        rest = file.read(SURPLUS_BYTES + 1)
        if any(rest):  # zeros are padding
            surplus = _surplus(layout.voxel_bytes, layout.voxel_bytes + len(rest))
    notes = ("scan.trailing-bytes",) if surplus else ()
    voxels = stored.astype(layout.dtype.newbyteorder("="), copy=False).reshape(layout.grid.shape)
    if (layout.slope, layout.intercept) == (1.0, 0.0):
        return voxels, notes
    # float32 holds 8 and 16 bit integers exactly, and is what ITK and FSL give
    exact = layout.dtype.itemsize <= 2 or layout.dtype.char == "f"
    scaled: np.ndarray = voxels.astype(np.float32 if exact else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        np.multiply(scaled, layout.slope, out=scaled)
        np.add(scaled, layout.intercept, out=scaled)
    return scaled, notes


def read_planes(layout: Layout) -> Iterator[np.ndarray]:
    """Planes (Y, X) of the only volume of a file in turn, in native byte order and not rescaled.

    ``ScanError``: ``scan.truncated``, ``scan.checksum``, ``scan.header`` (more bytes than declared), after the planes
    that are there.
    """
    plane_bytes = layout.voxel_bytes // layout.grid.shape[0]
    with open_regular(layout.data_file) as file:
        file.seek(layout.start if layout.start >= 0 else file.seek(0, 2) - layout.voxel_bytes)
        pieces = _raw_pieces(file) if layout.packing == "raw" else inflated_pieces(file, layout.packing, None)
        held, skip, seen = bytearray(), layout.skip, -layout.skip
        for piece in pieces:
            seen += len(piece)
            held += piece[skip:]
            skip = max(0, skip - len(piece))
            while len(held) >= plane_bytes:
                plane = np.frombuffer(bytes(held[:plane_bytes]), layout.dtype).reshape(layout.grid.shape[1:])
                yield plane.astype(layout.dtype.newbyteorder("="), copy=False)
                del held[:plane_bytes]
            if seen > layout.voxel_bytes + SURPLUS_BYTES:
                break
        _surplus(layout.voxel_bytes, seen)


def _raw_pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_CHUNK_BYTES):
        yield piece


def open_regular(path: Path) -> BinaryIO:
    """The file, open; ``scan.unreadable`` where it is absent, forbidden or not regular (a pipe would hang)."""
    try:
        _refuse_irregular(path.stat())  # before it is opened: opening a device may act on it
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(handle, "rb")
    except OSError as error:
        raise ScanError("scan.unreadable", f"the file cannot be opened: {error.strerror}") from None
    except ValueError:
        raise ScanError("scan.unreadable", "the file cannot be opened: its name holds a NUL") from None
    try:
        _refuse_irregular(os.fstat(handle))  # it may have been replaced in between
    except ScanError:
        file.close()
        raise
    return file


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """``scan.changed`` where one of the files is another one, longer, shorter or newer when the block ends.

    That error replaces any other that arose in between, because a half written file looks damaged.
    """
    before = [_stamp(path) for path in paths]
    try:
        yield
    except ScanError:
        _refuse_changed(paths, before)
        raise
    _refuse_changed(paths, before)


def refuse_bomb(declared_bytes: int, packed_bytes: int) -> None:
    """``scan.bomb`` where few bytes promise very many: above ``BOMB_BYTES`` and more than ``BOMB_RATIO`` fold."""
    if declared_bytes > BOMB_BYTES and packed_bytes * BOMB_RATIO < declared_bytes:
        raise ScanError(
            "scan.bomb",
            f"{packed_bytes} bytes would inflate to {declared_bytes}, more than {BOMB_RATIO} fold; where that is meant,"
            f" store fewer bits per voxel, at most {BOMB_BYTES} bytes in all, or no compression",
        )


def inflated_pieces(file: BinaryIO, packing: Packing, enough: int | None) -> Iterator[bytes]:
    """What all members of a compressed stream inflate to: to the verified end, or until ``enough`` bytes.

    At the end of the stream the file stands behind its last byte.
    """
    unpack = _bunzipped if packing == "bzip2" else _deflated
    seen = 0
    for piece in unpack(file, _CHUNK_BYTES if enough is None else enough):
        seen += len(piece)
        yield piece
        if enough is not None and seen >= enough:
            return


def _deflated(file: BinaryIO, most: int) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, told by the first bytes
    pending, seen = file.read(_CHUNK_BYTES), 0
    while pending:
        try:
            piece = decoder.decompress(pending, most)
        except zlib.error as error:
            raise _damaged(error) from None
        seen += len(piece)
        yield piece
        pending = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        if decoder.eof:
            pending = pending if len(pending) > 1 else pending + file.read(_CHUNK_BYTES)
            if not pending.startswith(b"\x1f\x8b"):  # padding after the stream, or nothing
                file.seek(-len(pending), 1)
                return
            decoder = zlib.decompressobj(wbits=47)
        pending = pending or file.read(_CHUNK_BYTES)
    raise _broken_off(seen)


def _bunzipped(file: BinaryIO, most: int) -> Iterator[bytes]:
    decoder = bz2.BZ2Decompressor()
    pending, seen = file.read(_CHUNK_BYTES), 0
    while pending or not decoder.needs_input:
        try:
            piece = decoder.decompress(pending, most)
        except OSError as error:
            raise _damaged(error) from None
        seen += len(piece)
        yield piece
        pending = b""
        if decoder.eof:
            pending = decoder.unused_data + file.read(3)
            if not pending.startswith(b"BZh"):
                file.seek(-len(pending), 1)
                return
            decoder = bz2.BZ2Decompressor()
        elif decoder.needs_input:
            pending = file.read(_CHUNK_BYTES)
    raise _broken_off(seen)


def _inflated(file: BinaryIO, layout: Layout) -> tuple[np.ndarray, int]:
    """The voxels of the volume as bytes, and how many bytes more than all volumes the stream holds."""
    block = np.empty(layout.volume_bytes, np.uint8)
    room = block.data
    seen = -layout.skip  # negative in what comes before the voxels
    for piece in inflated_pieces(file, layout.packing, None):
        place = seen - layout.volume * layout.volume_bytes
        part = memoryview(piece)[max(0, -place) :]
        at = min(max(0, place), len(room))
        fits = min(len(part), len(room) - at)
        room[at : at + fits] = part[:fits]
        seen += len(piece)
        if seen > layout.voxel_bytes + SURPLUS_BYTES:  # a bomb must not be inflated to its end
            break
    return block, _surplus(layout.voxel_bytes, seen)


def _surplus(declared_bytes: int, present_bytes: int) -> int:
    """Bytes beyond those declared; refused where bytes lack, or where too many are left over."""
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
    return present_bytes - declared_bytes


def _damaged(error: Exception) -> ScanError:
    return ScanError("scan.checksum", f"the compressed data are damaged ({error}); copy the file again from its source")


def _broken_off(seen: int) -> ScanError:
    return ScanError(
        "scan.truncated", f"the compressed stream breaks off after {seen} bytes; copy the file again from its source"
    )


def _refuse_irregular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ScanError("scan.unreadable", "this is no regular file; give a scan file or a folder of DICOM slices")


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # whoever opens it names that
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _refuse_changed(paths: tuple[Path, ...], before: list[tuple[int, ...] | None]) -> None:
    changed = sum(_stamp(path) != stamp for path, stamp in zip(paths, before, strict=True))
    if changed:
        raise ScanError(
            "scan.changed",
            f"{changed} of {len(paths)} files changed while they were read; wait until they are written, and try again",
        )
