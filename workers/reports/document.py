"""A page before it is Markdown or HTML: blocks of text without markup, so that both say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Strong:
    """Words that stand out."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """What is typed or stored in exactly this way."""

    text: str


@dataclass(frozen=True, slots=True)
class Link:
    """Words that lead somewhere."""

    text: str
    url: str


Text = tuple[str | Strong | Code | Link, ...]
"""One run of words."""


@dataclass(frozen=True, slots=True)
class Heading:
    """``level`` 1 is the title of the page."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Words that belong together."""

    text: Text


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of few columns, so that it fits on a phone."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with what it shows in words."""

    words: str
    content: bytes
    kind: Literal["png", "webp"] = "png"


Block = Heading | Paragraph | Items | Grid | Picture


def paragraph(*words: str | Strong | Code | Link) -> Paragraph:
    """A paragraph of these words."""
    return Paragraph(words)


def named(names: Sequence[str], most: int) -> str:
    """``a, b, c and 9 more``: at most ``most`` names."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
