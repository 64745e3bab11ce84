"""Whether files have arrived in the sources of a cohort, and whether they are whole."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from workers.sources.mirrors import is_remote, listed


def snapshot(sources: Sequence[str | Path], without: Path | None = None) -> str:
    """SHA-256 (hex) of the paths, sizes and times of modification of all files in the sources; none is opened.

    Sources are files, folders or prefixes of buckets. What a link points to is not looked at, so that the walk stays
    in the sources, and the folder ``without``, the storage root, is left out. A source that is not there, or a folder
    that may not be read, counts as empty.
    """
    skipped = None if without is None else os.path.realpath(without)
    found = hashlib.sha256()
    for source in sources:
        found.update(os.fsencode(source) + b"\0\0")
        if is_remote(str(source)):
            for stored in listed(str(source)):
                found.update(f"{stored.key}\0{stored.size}\0{stored.modified.timestamp()}\0".encode())
            continue
        for path, status in sorted(_files(os.path.realpath(source), skipped)):
            found.update(b"%s\0%d\0%d\0" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
    return found.hexdigest()


def _files(source: str, skipped: str | None) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and link at or under a path."""
    try:
        status = os.stat(source)
    except OSError:
        return
    if not stat.S_ISDIR(status.st_mode):
        yield source, status
        return
    waiting = [source]
    while waiting:
        folder = waiting.pop()
        if folder == skipped:
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        try:
                            yield entry.path, entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # it has gone since the folder was listed
                            continue
        except OSError:
            continue


class Debounce:
    """Says once that something has changed and is at rest again.

    The first state that it is shown is where it begins. A pure state machine: the caller brings state and time.
    """

    def __init__(self, quiet_s: float) -> None:
        """``quiet_s``: how long a state must last until it counts, in seconds."""
        self._quiet_s = quiet_s
        self._told: str | None = None
        self._seen: str | None = None
        self._since = 0.0

    def __call__(self, state: str, now_s: float) -> bool:
        """Whether a new state has lasted for ``quiet_s``; true once for each. ``now_s`` is a clock that never goes
        back."""
        if self._told is None:
            self._told = state
        if state != self._seen:
            self._seen, self._since = state, now_s
        if state == self._told or now_s - self._since < self._quiet_s:
            return False
        self._told = state
        return True
