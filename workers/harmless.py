"""Text from headers, file names and label tables, made harmless for where it is shown: terminals, tables, sheets."""

from __future__ import annotations

import re
from typing import Any

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")
"""Control characters, which steer terminals, and those that break lines or turn the direction of writing."""
_SURROGATES = re.compile("[\ud800-\udfff]")
# a sheet that is split at semicolons starts a cell after each
_FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@＝＋－＠])")  # noqa: RUF001


def one_line(value: Any) -> str:
    """One line of text that can be stored and printed anywhere."""
    return _SURROGATES.sub("\ufffd", UNSEEN.sub(" ", str(value)))


def printable(text: str) -> str:
    """Text of several lines for a terminal; only the line ends steer it."""
    return "\n".join(one_line(line) for line in text.split("\n"))


def sheet_cell(value: Any) -> Any:
    """A value for a cell of a CSV; text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return _FORMULA.sub(r"\1\2'", one_line(value)) if isinstance(value, str) else value
