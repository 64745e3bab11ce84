"""Text from headers, forms and plans as Markdown that shows it and does nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from typing import Any

from workers.harmless import one_line

LONGEST_TEXT = 400
"""Characters of one text; the rest is cut off."""


def text(value: Any) -> str:
    """One line that Markdown and HTML show as it is."""
    line = one_line(value)
    if len(line) > LONGEST_TEXT:
        line = f"{line[: LONGEST_TEXT - 2]} …"
    line = re.sub(r"([\\`*_~|\[\]#!])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(value: Any) -> str:
    """A code span, in which nothing can be escaped, so that what would end it is left out."""
    return f"`{re.sub(r'[`|<>&]', '', one_line(value))[:LONGEST_TEXT]}`"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose cells are shown as they are."""
    lines = [f"| {' | '.join(map(text, header))} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(text, row))} |" for row in rows)])


def picture(name: str, png: bytes) -> str:
    """A PNG inside the page."""
    return f"![{text(name)}](data:image/png;base64,{base64.b64encode(png).decode()})"
