"""The text headers of MetaImage and NRRD: their fields, and the data file that they may name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vnet_core.errors import ScanError
from workers.formats.blocks import open_regular

HEADER_BYTES = 1 << 20
"""Longest text header that is read."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields by name."""

    fields: dict[str, str]

    def word(self, *names: str, default: str = "") -> str:
        """The first of the named fields that is there, in lower case."""
        return next((self.fields[n] for n in names if n in self.fields), default).lower()

    def flag(self, *names: str, default: str = "false") -> bool:
        """A field that is True or False; ``scan.header`` otherwise."""
        word = self.word(*names, default=default)
        if word not in ("true", "false"):
            raise ScanError("scan.header", f"the header field {names[0]!r} is neither True nor False; rewrite the file")
        return word == "true"

    def integers(self, name: str, default: str = "") -> tuple[int, ...]:
        """One or more whole numbers; ``scan.header`` otherwise."""
        return tuple(int(n) for n in _numbers(self.fields.get(name, default), None, name, int))

    def reals(self, count: int, *names: str, default: np.ndarray | None = None) -> np.ndarray:
        """``count`` numbers of the first named field that is there; ``scan.header`` otherwise."""
        name = next((n for n in names if n in self.fields), "")
        if not name and default is not None:
            return default
        return reals(self.fields.get(name, ""), count, name or names[0])


def fields_of(pairs: Iterable[tuple[str, str]]) -> Fields:
    """Fields from the pairs of a header; ``scan.header`` where one is there twice with two values."""
    fields: dict[str, str] = {}
    for key, value in pairs:
        if fields.setdefault(key, value) != value:
            raise ScanError("scan.header", "the header gives one field twice, with two values; rewrite the file")
    return Fields(fields)


def reals(text: str, count: int, key: str) -> np.ndarray:
    """``count`` numbers, float64; ``scan.header`` with the name of the field otherwise."""
    return np.array(_numbers(text, count, key, float))


def first_bytes(path: Path, count: int) -> bytes:
    """At most ``count`` bytes; ``scan.unreadable``."""
    with open_regular(path) as file:
        return file.read(count)


def beside(header: Path, name: str) -> Path:
    """The data file that a header names, which must lie in the header's own folder and be named plainly.

    ``ScanError``: ``scan.path-escape``, ``scan.unreadable`` where it is missing.
    """
    plain = str(Path(name)) == Path(name).name and name not in ("", ".", "..") and not set(name) & set('\\"%\0')
    if not plain or name.split()[0].lower() == "list" or _leaves(header, name):
        raise ScanError(
            "scan.path-escape",
            "the header names its voxels by a path, a list or a link; they must be one file beside the header",
        )
    if not os.path.exists(header.parent / name):  # False for a name that no file can have
        raise ScanError("scan.unreadable", "the data file that the header names is missing; copy it beside the header")
    return header.parent / name


def _leaves(header: Path, name: str) -> bool:
    try:
        return (header.parent / name).resolve().parent != header.parent.resolve()
    except (OSError, RuntimeError):  # a loop of links, a name too long
        return True


def _numbers(text: str, count: int | None, key: str, kind: Callable[[str], float]) -> list:
    try:
        numbers = [kind(word) for word in text.split()]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise ScanError("scan.header", f"the header field {key!r} is absent or not {count or 'a list of'} numbers")
    return numbers
