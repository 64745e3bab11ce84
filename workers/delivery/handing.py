"""Finished masks in a folder that others read: copied whole or not at all, and taken away when they are rejected.

<folder>/<cohort>/
    <case>.nii.gz ...   one mask per case, in the night's format
    delivered.csv       one row per mask: volumes, model, digest, night, review
    delivered.json      the same, and what this folder was given: nothing else in it is ever changed or removed

Masks that wait for a decision, were rejected or are to be corrected are not delivered.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet_core.errors import ConfigError, StorageError
from workers.delivery.delivered import Index, announce, digest, joined, read_index, stamp, sync_folder, write_index
from workers.identity import NAME
from workers.nights.decisions import latest, published
from workers.nights.record import Night, load_night
from workers.reports.report import night_ids, read_rows, refresh_review
from workers.storage.locks import alone
from workers.storage.modes import Readers, let_read
from workers.storage.store import RECEIPT, Root, raise_if_silent

_LOCK = ".delivered.lock"
_PIECE_BYTES = 1 << 20

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a delivery did, by case id where it names cases."""

    written: tuple[str, ...]
    unchanged: int
    """Masks that lay there already."""
    removed: tuple[str, ...]
    held: tuple[str, ...]
    """Waiting for a decision, rejected, or to be corrected."""
    left: tuple[str, ...]
    """Something that was not delivered from here lies in the mask's place, or ours was changed; left as it is."""
    damaged: tuple[str, ...]
    """The mask in the storage root is gone, or not what its receipt says; not delivered."""


def deliver(root: Root, night: Night, rows: Sequence[Row], folder: str, readers: Readers = "owner") -> Delivered:
    """Copy the masks of a night's rows to ``folder/<cohort>``, where ``readers`` may read them; one delivery at a time,
    another waits.

    ConfigError ``deliver.folder`` for a folder that is not absolute or lies in the storage root. StorageError
    ``deliver.foreign`` when the place of the cohort or of the index is taken by something else, ``deliver.unwritable``.
    """
    place = _place(root, folder, night.cohort, readers)
    try:
        with alone(place / _LOCK):
            return _deliver(root, night, rows, place, readers)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            "deliver.unwritable",
            f"masks cannot be delivered to the folder ({error.strerror or error}); mend its permissions, free space, or"
            " correct rules.deliver",
        ) from error


def follow_up(root: Root, cohort: str, since: str) -> Delivered | None:
    """After decisions: the review columns of night ``since`` and of all later ones, and what the newest one delivers.

    None when the newest night delivers nothing.
    """
    nights = [night for night in night_ids(root, cohort) if night >= since]
    for night in nights:
        refresh_review(root, cohort, night)
    if not nights:
        return None
    newest = load_night(root, cohort, nights[-1])
    folder = newest.rules.get("deliver", "")
    if not folder:
        return None
    return deliver(
        root, newest, read_rows(root, cohort, newest.id), folder, newest.rules.get("deliver_readers", "owner")
    )


def _place(root: Root, folder: str, cohort: str, readers: Readers) -> Path:
    """The cohort's folder, made when it is not there."""
    wanted = Path(folder).expanduser()
    if not wanted.is_absolute():
        raise ConfigError("deliver.folder", f"the folder of delivery {folder!r} is not absolute; write its whole path")
    if root.home in (resolved := wanted.resolve(), *resolved.parents):
        raise ConfigError("deliver.folder", "the folder of delivery lies in the storage root; choose one outside of it")
    place = resolved / cohort
    missing = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        for made in missing:
            let_read(made, readers)
    except FileExistsError:
        pass  # a file or a dangling link, told below
    except OSError as error:
        raise StorageError(
            "deliver.unwritable", f"the folder of delivery cannot be made ({error.strerror}); mend its permissions"
        ) from None
    if not stat.S_ISDIR(place.lstat().st_mode):
        raise StorageError(
            "deliver.foreign", f"{cohort} in the folder of delivery is a link or a file, not a folder; move it away"
        )
    return place


def _deliver(root: Root, night: Night, rows: Sequence[Row], place: Path, readers: Readers) -> Delivered:
    index = read_index(place)
    _recover(place, index)
    lists: dict[str, list[str]] = {what: [] for what in ("written", "removed", "held", "left", "damaged")}
    cases = _finished(rows)
    # what lies there and may not, whether its case is in this night or not
    for name, entry in list(index.files.items()):
        if _withdrawn(root, night.cohort, entry, cases.get(entry["case"])):
            if _is_ours(place, name, index):
                _discard(place / name)
                lists["removed"].append(entry["case"])
            elif (place / name).is_symlink() or (place / name).exists():
                lists["left"].append(entry["case"])
            del index.files[name]
    names = {(entry["case"], entry["result"]): name for name, entry in index.files.items()}
    todo: dict[str, tuple[str, dict[str, Any]]] = {}
    unchanged = 0
    for case, found in cases.items():
        if not published(found[0]["review"]):
            lists["held"].append(case)
            continue
        if not NAME.fullmatch(case):
            # tables lie in the root, and who can write there shall not write elsewhere through this
            lists["damaged"].append(case)
            continue
        known = names.get((case, found[0]["result"]))
        if known and index.files[known]["stamp"] == stamp(place / known):
            # as it was written: ten thousand masks are not read again every night
            _let_read_all(place / known, readers)
            index.files[known] |= _told(found) | {"stamp": stamp(place / known)}
            unchanged += 1
            continue
        try:
            source, entry = _entry(root, night.id, found)
        except StorageError as error:
            raise_if_silent(error)
            lists["damaged"].append(case)
            continue
        name = f"{case}{source.rpartition('/')[2].removeprefix('mask')}"
        there = digest(place / name)
        if there == entry["sha256"]:
            index.files[name] = entry | {"stamp": stamp(place / name)}
            unchanged += 1
        elif there is None or _is_ours(place, name, index):
            todo[name] = source, entry
        else:
            lists["left"].append(case)
            index.files.pop(name, None)
    _copy_all(root, place, index, todo, lists, readers)
    write_index(place, night.cohort, index, readers)
    return Delivered(unchanged=unchanged, **{what: tuple(sorted(found)) for what, found in lists.items()})


def _recover(place: Path, index: Index) -> None:
    """Take up what a run that died had copied, and remove what it had copied in part."""
    for name, entry in index.writing.items():
        _discard(place / _part(name))
        if digest(place / name) == entry["sha256"]:
            index.files[name] = entry | {"stamp": stamp(place / name)}
    index.writing = {}


def _finished(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows with a result, by case."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["result"]:
            cases.setdefault(row["case"], []).append(row)
    return cases


def _withdrawn(root: Root, cohort: str, entry: Mapping[str, Any], rows: Sequence[Row] | None) -> bool:
    """Whether what was delivered may no longer lie there: by its row of this night, else by its own last decision."""
    if rows and rows[0]["result"] == entry["result"]:
        return not published(rows[0]["review"])
    decision = latest(root, cohort, entry["case"], entry["result"])
    return decision is not None and not published(decision.review)


def _entry(root: Root, night: str, rows: Sequence[Row]) -> tuple[str, dict[str, Any]]:
    """The key of a case's mask, and what the index says of it."""
    first = rows[0]
    key, receipt = first["result"], root.receipt(first["result"])
    if receipt is None:
        raise StorageError("store.missing", f"{key}/{RECEIPT} is not in the storage root {root.shown}")
    mask = root.get_json(f"{key}/report.json")["mask"]
    parts = {
        path.removeprefix(mask).removeprefix("/"): sha256
        for path, sha256 in receipt["files"].items()
        if path == mask or path.startswith(f"{mask}/")
    }
    return f"{key}/{mask}", {
        "case": first["case"],
        "model": first["model"],
        "result": key,
        "sha256": joined(parts),
        "night": night,
        **_told(rows),
    }


def _told(rows: Sequence[Row]) -> dict[str, Any]:
    """What a later night or a decision may tell otherwise of the same mask."""
    return {"volumes_ml": {row["name"]: row["volume_ml"] for row in rows}, "review": rows[0]["review"] or ""}


# --- copying


def _copy_all(
    root: Root,
    place: Path,
    index: Index,
    todo: Mapping[str, tuple[str, dict[str, Any]]],
    lists: Mapping[str, list[str]],
    readers: Readers,
) -> None:
    if not todo:
        return
    # a copy that ends with this process is known to the next one
    index.writing = {name: entry for name, (_, entry) in todo.items()}
    announce(place, index, readers)
    for name, (key, entry) in todo.items():
        temporary = place / _part(name)
        try:
            try:
                with root.at_hand(key) as source:
                    (_copy_folder if source.is_dir() else _copy_file)(source, temporary)
            except FileExistsError:
                lists["left"].append(entry["case"])
                continue
            except StorageError as error:
                raise_if_silent(error)
            if digest(temporary) != entry["sha256"]:
                lists["damaged"].append(entry["case"])
                _discard(temporary)
                continue
            _let_read_all(temporary, readers)
            _name(temporary, place / name)
        except BaseException:
            _discard(temporary)
            raise
        index.files[name] = entry | {"stamp": stamp(place / name)}
        lists["written"].append(entry["case"])
    sync_folder(place)
    index.writing = {}


def _part(name: str) -> str:
    return f".{name}.part"


def _copy_file(source: Path, target: Path) -> None:
    """Copy to a file that must not exist, and make it durable."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with source.open("rb") as file, os.fdopen(handle, "wb") as copy:
        shutil.copyfileobj(file, copy, _PIECE_BYTES)
        copy.flush()
        os.fsync(copy.fileno())


def _copy_folder(source: Path, target: Path) -> None:
    """Copy to a folder that must not exist, and make it durable."""
    target.mkdir()
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            _copy_file(path, copy)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        sync_folder(folder)


def _let_read_all(path: Path, readers: Readers) -> None:
    """Give a file, or a folder and all in it, the modes for its readers."""
    for one in (path, *(path.rglob("*") if path.is_dir() else ())):
        let_read(one, readers)


def _name(temporary: Path, target: Path) -> None:
    """Give a finished copy its name; a folder cannot replace one, so that one goes first."""
    if temporary.is_dir() and target.is_dir():
        _discard(target)
    os.replace(temporary, target)


def _discard(path: Path) -> None:
    """Remove a file, a link or a folder of ours; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_ours(place: Path, name: str, index: Index) -> bool:
    """Whether the file has the bytes that the index says were put there."""
    return name in index.files and digest(place / name) == index.files[name]["sha256"]
