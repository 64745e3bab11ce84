"""Pickles that give themselves away when somebody loads them, and the search for pickles in what is left behind."""

from __future__ import annotations

import base64
import io
import os
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

_BASE64 = re.compile(rb"gA[I-X][A-Za-z0-9+/\\n]{12,}={0,2}")
"""How a pickle of protocol 2 to 5 begins in base64: 0x80 and the number of the protocol."""


class Bird:
    """Unpickling it makes the folder ``sang``."""

    def __init__(self, sang: Path) -> None:
        self.sang = sang

    def __reduce__(self) -> tuple:
        return os.makedirs, (str(self.sang), 0o700, True)


def bird(sang: Path) -> bytes:
    return pickle.dumps(Bird(sang))


def is_pickle(content: bytes) -> bool:
    """Whether the whole is one pickle, or a zip file with one, as torch.save writes it. Of protocols 0 and 1, which are
    text, only those that call something: a line that begins with V is one of those too."""
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    if not content.endswith(b"."):
        return False
    try:
        operations = [(operation.name, place) for operation, _, place in pickletools.genops(content)]
    except Exception:  # noqa: BLE001  whatever it is, it is no pickle
        return False
    named, last = {name for name, _ in operations}, operations[-1][1]
    return last == len(content) - 1 and bool(named & {"PROTO", "GLOBAL", "INST", "REDUCE"})


def holds_pickle(content: bytes) -> bool:
    """The same, and pickles in base64 within a text, as Prefect's results have them."""
    if is_pickle(content):
        return True
    for match in _BASE64.finditer(content):
        text = match[0].replace(b"\\n", b"").rstrip(b"=")
        # one letter more than a multiple of four stands for nothing
        text = text[:-1] if len(text) % 4 == 1 else text
        if is_pickle(base64.b64decode(text + b"=" * (-len(text) % 4))):
            return True
    return False


def pickles(folder: Path) -> list[str]:
    """Files below a folder that are, or hold, a pickle."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path.relative_to(folder).as_posix() for path in files if holds_pickle(path.read_bytes())]
