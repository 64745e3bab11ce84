"""The header of one DICOM file: a quick walk over its elements that reads no pixel and trusts no length.

A tree holds thousands of slices, so only some forty elements are kept, values are shared between slices, and large ones
are stepped over without being read. The walk goes as far as the pixel data and accounts for every byte of them, which
stock readers do not. Encodings: PS3.5 sections 7 and A; elements: PS3.6. Explicit and implicit little endian, explicit
big endian, deflated and every encapsulated syntax are walked; which of them are decoded is said in
:mod:`workers.dicom.pixels`. Messages quote no text of a header.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from vnet_core.errors import ScanError
from workers.dicom.elements import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    Elements,
    NotDicom,
    PixelBlock,
    corrupt,
    shown,
)
from workers.dicom.streams import promised_stream, stream_of
from workers.formats.blocks import open_regular

_NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)
_CHUNK_BYTES = 8192
_PREAMBLE_BYTES = 132
_VALUE_BYTES = 1 << 16
"""Longest value of a kept element."""
_INFLATED_BYTES = 1 << 28
"""Largest deflated data set that is inflated; a longer one counts as cut off."""
_DEPTH = 32
"""Deepest nesting of sequences."""
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = {0x7FE00008: "float", 0x7FE00009: "double", 0x7FE00010: "integer"}
_SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # PS3.5 table 7.1-2: a length of two bytes
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
KEPT = frozenset(
    (
        0x00080005, 0x00080008, 0x00080016, 0x00080018, 0x00080020, 0x00080021, 0x00080022, 0x0008002A, 0x00080030,
        0x00080031, 0x00080032, 0x00080060, 0x0008103E, 0x00089208, 0x00100020, 0x00180081, 0x00180082, 0x00180086,
        0x00181060, 0x00181210, 0x00189087, 0x00189089, 0x00190010, 0x0019100C, 0x0020000D, 0x0020000E, 0x00200012,
        0x00200032, 0x00200037, 0x00200052, 0x00200100, 0x00209241, 0x00280002, 0x00280004, 0x00280008, 0x00280010,
        0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280301, 0x00281052, 0x00281053,
        0x00283000, 0x00430010, 0x00431039, 0x00541300, 0x52009229, 0x52009230,
    )
)  # fmt: skip
"""Elements that are kept, by group and number. Of sequences only their presence is."""


def _mismatch(declared: str, found: str) -> ScanError:
    return ScanError(
        "dicom.syntax-mismatch",
        f"the file declares {declared} but its data are {found}; export the series again from its source",
    )


class _Cut(Exception):
    """The walk ran over the end of the file, or into something that is no element."""


class _Reader:
    """Bytes of a file by their offset, a piece at a time; a deflated data set is inflated behind the same face."""

    def __init__(self, file: object, size: int) -> None:
        self._descriptor = file.fileno()  # type: ignore[attr-defined]
        self.size = size
        self.base = 0
        self.data = os.pread(self._descriptor, _CHUNK_BYTES, 0)

    def load(self, at: int, count: int) -> int:
        """Make ``count`` bytes from ``at`` lie in ``data`` and return their index there; ``_Cut`` past the end."""
        if at + count > self.size:
            raise _Cut
        self.base = at
        self.data = os.pread(self._descriptor, max(_CHUNK_BYTES, count), at)
        if len(self.data) < count:
            raise _Cut
        return 0

    def bytes_at(self, at: int, count: int) -> bytes:
        index = at - self.base
        if index < 0 or index + count > len(self.data):
            index = self.load(at, count)
        return self.data[index : index + count]

    def inflate(self, start: int) -> None:
        """Replace what follows ``start`` by what it inflates to. A bomb ends at the limit."""
        if self.size - start > _INFLATED_BYTES:
            raise _Cut
        data = self.bytes_at(start, self.size - start)
        decoder = zlib.decompressobj(wbits=-15)
        try:
            self.data = decoder.decompress(data, _INFLATED_BYTES)
        except zlib.error:
            raise _Cut from None
        if not decoder.eof:
            raise _Cut
        self.base, self.size = 0, len(self.data)


def read_elements(path: Path) -> Elements:
    """Walk the file to its pixel data. ``NotDicom`` for what is none; ``ScanError`` ``scan.unreadable``.

    A file without preamble counts when its data set names a class of DICOM. A file that begins as DICOM and cannot be
    walked to its end has a ``problem``, with what was found before it.
    """
    with open_regular(path) as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        found = Elements(path, "", {})
        start = _meta_start(reader.data)
        bare = start != _PREAMBLE_BYTES
        if start is None:
            if not _begins_a_data_set(reader.data):
                raise NotDicom
            start = 0
        else:
            try:
                start = _meta(reader, found, start)
            except _Cut:
                if bare:
                    raise NotDicom from None
                found.problem = corrupt("a DICOM file ends within its file meta information")
                return found
        guess = _look(reader, start)
        if not found.syntax:
            if not guess:
                raise NotDicom
            found.syntax = guess
        try:
            if found.syntax == DEFLATED:
                reader.inflate(start)
                start, guess = 0, ""
            _check_look(found, guess)
            walk(reader, found, start)
        except _Cut:
            found.problem = found.problem or corrupt("a DICOM file is cut off, or damaged within its header")
        if bare and not found.text(0x00080016).startswith("1.2.840.10008."):
            raise NotDicom
        return found


def inflated(path: Path) -> bytes:
    """The whole data set of a file of the deflated syntax, which :func:`read_elements` has walked."""
    with open_regular(path) as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        try:
            reader.inflate(_meta(reader, Elements(path, "", {}), _meta_start(reader.data) or 0))
        except _Cut:
            raise corrupt("the deflated data of a slice are damaged") from None
        return reader.data


def _meta_start(data: bytes) -> int | None:
    """Where the file meta information begins: after the preamble and its mark, or at once where these were lost."""
    if data[128:132] == b"DICM":
        return _PREAMBLE_BYTES
    return {b"DICM": 4, b"\x02\0\0\0": 0}.get(data[:4])


def _meta(reader: _Reader, found: Elements, at: int) -> int:
    """Read group 2, explicit little endian in every file, and return where the data set begins."""
    while at < reader.size:
        head = reader.bytes_at(at, 8) if at + 8 <= reader.size else b""
        if head[:2] != b"\x02\0":
            break
        if head[4:6] in _LONG_VRS:
            length, at = int.from_bytes(reader.bytes_at(at + 8, 4), "little"), at + 12
        else:
            length, at = int.from_bytes(head[6:8], "little"), at + 8
        if head[2:4] == b"\x10\0":
            found.syntax = shown(reader.bytes_at(at, length))
        elif head[2:4] == b"\x02\0":
            found.values[0x00020002] = reader.bytes_at(at, length)
        at += length
    if at > reader.size:
        raise _Cut
    return at


def _begins_a_data_set(data: bytes) -> bool:
    """Whether a file without preamble may be a data set: its first element is of group 8 and has a small number."""
    return len(data) >= 16 and ((data[:2] == b"\x08\0" and data[3] == 0) or (data[:2] == b"\0\x08" and data[2] == 0))


def _look(reader: _Reader, start: int) -> str:
    """The syntax that the first element after ``start`` has, of the three that are not compressed; '' for none."""
    try:
        head = reader.bytes_at(start, 8)
    except _Cut:
        return ""
    named = head[4:6] in _SHORT_VRS or head[4:6] in _LONG_VRS
    if named:
        return BIG_ENDIAN if head[0] == 0 and head[1] else EXPLICIT
    return IMPLICIT if head[1] == 0 and int.from_bytes(head[4:8], "little") < reader.size else ""


def _check_look(found: Elements, guess: str) -> None:
    names = {IMPLICIT: "implicit little endian", EXPLICIT: "explicit little endian", BIG_ENDIAN: "big endian"}
    declared = found.syntax if found.syntax in (IMPLICIT, BIG_ENDIAN) else EXPLICIT
    if guess and guess != declared:
        found.problem = _mismatch(names[declared], names[guess])
        found.syntax = guess  # to know at least which series it belongs to


def walk(reader: _Reader, found: Elements, start: int) -> None:
    """Go through the elements from ``start`` to the pixel data and keep those of :data:`KEPT`."""
    explicit, order = found.syntax != IMPLICIT, found.order
    step, unpack = _element(reader, explicit, order), struct.Struct(order + "HH2sH").unpack_from
    at, values = start, found.values
    size = reader.size
    while at < size:
        index, data = at - reader.base, reader.data
        if explicit and 0 <= index <= len(data) - 12:  # most elements: short, and within the piece at hand
            group, number, vr, length = unpack(data, index)
            if vr in _SHORT_VRS and group < 0x7FE0:
                tag = group << 16 | number
                if tag in KEPT:
                    values[tag] = reader.bytes_at(at + 8, length)
                at += 8 + length
                continue
        tag, length, at = step(at)
        if tag in _PIXELS:
            _measure_pixels(reader, found, tag, length, at)
            return
        if tag > 0x7FE00010:
            return
        if length == _UNDEFINED:
            if tag in KEPT:
                values[tag] = b""
            at = _skip_sequence(reader, at, explicit, order, 0)
            continue
        if at + length > size:
            raise _Cut
        if tag in KEPT:
            values[tag] = reader.bytes_at(at, length) if length <= _VALUE_BYTES else b""
        at += length
    if at > size:
        raise _Cut


def _element(reader: _Reader, explicit: bool, order: str) -> Callable[[int], tuple[int, int, int]]:
    """A function from the offset of an element to its tag, its length and the offset of its value."""
    short, long = struct.Struct(order + "HH2sH"), struct.Struct(order + "HHI")
    word = struct.Struct(order + "I")

    def step(at: int) -> tuple[int, int, int]:
        index = at - reader.base
        if index < 0 or index + 12 > len(reader.data):
            index = reader.load(at, min(12, max(8, reader.size - at)))
        data = reader.data
        if explicit:
            group, number, vr, length = short.unpack_from(data, index)
            if group != 0xFFFE:  # items and delimiters have no type in any syntax
                if vr in _SHORT_VRS:
                    return group << 16 | number, length, at + 8
                if vr in _LONG_VRS and index + 12 <= len(data):
                    return group << 16 | number, word.unpack_from(data, index + 8)[0], at + 12
                raise _Cut
        group, number, length = long.unpack_from(data, index)
        return group << 16 | number, length, at + 8

    return step


def _skip_sequence(reader: _Reader, at: int, explicit: bool, order: str, depth: int) -> int:
    """The offset after the delimiter of a sequence of undefined length whose items begin at ``at``."""
    step = _element(reader, explicit, order)
    while True:
        tag, length, at = step(at)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM or depth > _DEPTH:
            raise _Cut
        if length != _UNDEFINED:
            at += length
            continue
        # an item of a sequence in an element of unknown type is implicit whatever the file is (PS3.5 section 6.2.2)
        head = reader.bytes_at(at, 8)
        inner = explicit and (head[4:6] in _SHORT_VRS or head[4:6] in _LONG_VRS)
        inner_step = _element(reader, inner, order)
        while True:
            tag, length, at = inner_step(at)
            if tag == _ITEM_END:
                break
            at = _skip_sequence(reader, at, inner, order, depth + 1) if length == _UNDEFINED else at + length


def _measure_pixels(reader: _Reader, found: Elements, tag: int, length: int, at: int) -> None:
    """Note where the pixel data lie, and a ``problem`` where they are not what the syntax promises or not whole."""
    native = found.syntax in _NATIVE
    if found.problem is not None:
        return
    if native and length == _UNDEFINED:
        found.problem = _mismatch("uncompressed pixels", "compressed")
        return
    if not native and length != _UNDEFINED:
        found.problem = _mismatch("compressed pixels", "uncompressed")
        return
    if native:
        if at + length > reader.size:
            there = max(0, reader.size - at)
            found.problem = corrupt(f"the pixel data of a slice break off after {there} of {length} bytes")
        found.pixels = PixelBlock(at, length, _PIXELS[tag], False)
        return
    end, items, stream = at, 0, ""
    while True:
        try:
            head = reader.bytes_at(end, 8)
        except _Cut:
            head = b""
        if head[:4] != b"\xfe\xff\x00\xe0":
            break
        length, items = int.from_bytes(head[4:], "little"), items + 1
        if items == 2 and end + 8 + length <= reader.size:  # the first one is a table of offsets
            stream = stream_of(reader.bytes_at(end + 8, min(length, 1024)))
        end += 8 + length
    if head[:4] != b"\xfe\xff\xdd\xe0":
        found.problem = corrupt("the compressed pixel data of a slice break off before their end")
    found.pixels = PixelBlock(at, end - at, _PIXELS[tag], True)
    promised = promised_stream(found.syntax)
    if found.problem is None and stream and promised and stream != promised:
        found.problem = _mismatch(promised, stream)
