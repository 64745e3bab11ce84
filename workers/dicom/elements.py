"""What a walk over the header of one DICOM file gives, and how its values are read."""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vnet_core.errors import ScanError

BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
PYDICOM_FAULTS = (
    AttributeError, KeyError, IndexError, TypeError, ValueError, EOFError, OSError, ArithmeticError,
    NotImplementedError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""What pydicom and its decoders raise on damaged input."""


class NotDicom(Exception):
    """The file is no DICOM file at all."""


@dataclass(frozen=True, slots=True)
class PixelBlock:
    """Where the pixel data of a file lie."""

    start: int
    """Offset of the value in the file, or in the inflated data set of the deflated syntax."""
    length: int
    """Bytes; of encapsulated data up to the closing delimiter."""
    kind: str
    """``integer``, ``float`` or ``double``."""
    encapsulated: bool


@dataclass(slots=True, repr=False)
class Elements:
    """What the walk has found in one file."""

    path: Path
    syntax: str
    """Transfer syntax UID: that of the file meta information, or of the data set's look where there is none."""
    values: dict[int, bytes]
    pixels: PixelBlock | None = None
    problem: ScanError | None = None
    """Why the file cannot be used, found on the way: ``dicom.corrupt-slice``, ``dicom.syntax-mismatch``."""

    @property
    def order(self) -> str:
        """Byte order for ``struct``."""
        return ">" if self.syntax == BIG_ENDIAN else "<"

    def text(self, tag: int) -> str:
        """A value of a character type as Latin letters, without padding; '' where absent."""
        return shown(self.values.get(tag, b""))

    def numbers(self, tag: int) -> tuple[float, ...]:
        """A value of type DS or IS; () where it is absent or no finite number."""
        return decimals(self.values.get(tag, b""))

    def number(self, tag: int) -> float | None:
        """The first of :meth:`numbers`."""
        return next(iter(self.numbers(tag)), None)

    def integer(self, tag: int, default: int = 0) -> int:
        """A value of type US."""
        value = self.values.get(tag, b"")
        return int(struct.unpack(self.order + "H", value[:2])[0]) if len(value) >= 2 else default

    def reals(self, tag: int, code: str = "d") -> tuple[float, ...]:
        """A value of type FD, or of FL with the code ``f``; () as for :meth:`numbers`."""
        value, width = self.values.get(tag, b""), struct.calcsize(code)
        count = len(value) // width
        numbers = struct.unpack(f"{self.order}{count}{code}", value[: count * width])
        return numbers if all(map(math.isfinite, numbers)) else ()


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep what pydicom warns of and logs to itself: it quotes the header."""
    logger = logging.getLogger("pydicom")
    before = logger.propagate
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.propagate = before


@lru_cache(maxsize=8192)
def shown(value: bytes) -> str:
    """Bytes as Latin text without padding; equal values are one object."""
    return value.rstrip(b"\0 ").lstrip(b" ").decode("latin-1")


@lru_cache(maxsize=8192)
def decimals(value: bytes) -> tuple[float, ...]:
    """Numbers written as text with backslashes between them; () where one of them is none, NaN or infinite."""
    try:
        numbers = tuple(float(word) for word in value.rstrip(b"\0 ").split(b"\\"))
    except ValueError:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def corrupt(what: str) -> ScanError:
    """The refusal of a damaged file."""
    return ScanError("dicom.corrupt-slice", f"{what}; copy the series again from its source")
