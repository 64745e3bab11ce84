"""A folder of delivery: what lies in it, and the index of what it was given."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vnet_core.errors import StorageError
from workers.harmless import one_line, sheet_cell
from workers.storage.modes import Readers, let_read, mode_for

INDEX = "delivered.json"
SHEET = "delivered.csv"
FORMAT = "vnet-delivery-1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = {"case", "model", "result", "sha256", "night", "volumes_ml", "review", "stamp"}
_COLUMNS = ("cohort", "case", "file", "model", "night", "review", "sha256")
"""Of the sheet, before the volumes."""


@dataclass(slots=True)
class Index:
    """What the folder was given."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name of the file or folder: which case, model and result it is of, its SHA-256, the night that brought it, its
    volumes and review, and the stamp of what was written."""
    writing: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is being copied: known to the next run, should this one end before it can tell."""


def read_index(place: Path) -> Index:
    """The index of the place; empty where there is none."""
    path = place / INDEX
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("no plain file")
        facts = json.loads(path.read_bytes())
        if facts["format"] != FORMAT:
            raise ValueError("another format")
        files = {entry.pop("file"): entry for entry in facts["masks"]}
        index = Index(files, dict(facts["writing"]))
        entries = [*files.values(), *(entry | {"stamp": ""} for entry in index.writing.values())]
        names = [*files, *index.writing, *(entry["case"] for entry in entries)]
        if not all(map(_NAME.fullmatch, names)) or not all(map(_usual, entries)):
            raise ValueError("unusual entries")
    except FileNotFoundError:
        _check_sheet(place / SHEET)
        return Index()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            "deliver.foreign",
            f"{INDEX} in the folder of delivery was not written by vnet, or was changed; move it away, and masks that"
            " lie there unchanged are known again by their bytes",
        ) from None
    return index


def _usual(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has the keys and kinds of values that ours have."""
    texts = all(isinstance(value, str) for key, value in entry.items() if key != "volumes_ml")
    return set(entry) == _KEYS and texts and isinstance(entry["volumes_ml"], dict)


def _check_sheet(path: Path) -> None:
    """StorageError ``deliver.foreign`` for a sheet that is none of ours, which the first delivery would replace."""
    try:
        ours = stat.S_ISREG(path.lstat().st_mode) and path.read_bytes().startswith(",".join(_COLUMNS).encode())
    except FileNotFoundError:
        return
    if not ours:
        raise StorageError(
            "deliver.foreign",
            f"{SHEET} in the folder of delivery was not written by vnet; move it away, or choose another folder",
        )


def write_index(place: Path, cohort: str, index: Index, readers: Readers) -> None:
    """Both forms of the index, where they would change."""
    for name, content in ((SHEET, _sheet(cohort, index)), (INDEX, _json(index))):
        path = place / name
        known = path.is_file() and not path.is_symlink() and path.read_bytes() == content
        if known:
            let_read(path, readers)
        else:
            _put(place, name, content, readers)


def announce(place: Path, index: Index, readers: Readers) -> None:
    """Write the index alone, before what it announces is done."""
    _put(place, INDEX, _json(index), readers)


def _json(index: Index) -> bytes:
    masks = [{"file": name, **entry} for name, entry in sorted(index.files.items())]
    facts = {"format": FORMAT, "masks": masks, "writing": index.writing}
    return (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()


def _sheet(cohort: str, index: Index) -> bytes:
    """One row per mask; what a label has no volume in is empty."""
    labels = sorted({label for entry in index.files.values() for label in entry["volumes_ml"]})
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([*_COLUMNS, *(f"volume_ml {one_line(label)}" for label in labels)])
    for name, entry in sorted(index.files.items()):
        facts = {"cohort": cohort, "file": name, **entry}
        volumes = (entry["volumes_ml"].get(label, "") for label in labels)
        writer.writerow([*(sheet_cell(facts[column]) for column in _COLUMNS), *volumes])
    return sink.getvalue().encode()


def _put(place: Path, name: str, content: bytes, readers: Readers) -> None:
    """Write a file of ours whole; a link in its place is replaced, not followed."""
    handle, temporary = tempfile.mkstemp(dir=place, prefix=".index-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode_for(readers))
            os.fsync(file.fileno())
        os.replace(temporary, place / name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(place)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- what lies there


def digest(path: Path) -> str | None:
    """Digest of a file, or of a folder's files; ``""`` for anything else, links too; None when nothing is there."""
    files = _files(path)
    if files is None:
        return None
    if not all(stat.S_ISREG(status.st_mode) for status in files.values()):
        return ""
    return joined({name: _file_digest(path / name) for name in files})


def stamp(path: Path) -> str:
    """Sizes and times of modification of a file, or of a folder's files; ``""`` when nothing is there."""
    facts = [
        f"{name} {status.st_mode:o} {status.st_size} {status.st_mtime_ns}"
        for name, status in sorted((_files(path) or {}).items())
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest() if facts else ""


def _files(path: Path) -> dict[str, os.stat_result] | None:
    """What lies at a path that is no folder, by its path within; links are not followed. None when nothing is there."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return {"": status}
    found = {}
    for entry in os.scandir(path):
        for name, inner in (_files(path / entry.name) or {}).items():
            found[f"{entry.name}/{name}".rstrip("/")] = inner
    return found


def _file_digest(path: Path) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined(parts: Mapping[str, str]) -> str:
    """One digest for the digests of files by their path in a folder; of a single file, whose path is empty, its own."""
    if list(parts) == [""]:
        return parts[""]
    text = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(parts.items()))
    return hashlib.sha256(text.encode()).hexdigest()
