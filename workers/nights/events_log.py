"""The log of a night for programs: one JSON line per case and stage, in ``logs/<cohort>/<night>.jsonl``.

Objects of a bucket cannot grow: there the lines are written on this machine, and put into the root at the end.

A line holds ids, states, codes and numbers. Messages are left out, because a message may quote a header; a case's
message stands in the rows of its night.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime
from typing import Any

from workers.ledger import Outcome
from workers.storage.folders import raise_if_full
from workers.storage.store import Root


class EventLog:
    """Appends lines; several threads and processes may do so at once, each with a log of its own or with one."""

    def __init__(self, root: Root, cohort: str, night: str) -> None:
        self._root, self._cohort, self._night = root, cohort, night
        self._path = root.home / _key(cohort, night)
        self._lock = threading.Lock()
        self._begun = False

    def __call__(self, outcome: Outcome, now: datetime, attempt: int = 1, worker: str = "") -> None:
        """Append how one stage ended for one case; ``now`` is aware.

        ``attempt``: which try of this night it was; ``worker``: the machine and process that did it, where it is known.
        StorageError ``store.full`` when no space is left.
        """
        event = {
            "time": now.isoformat(timespec="milliseconds"),
            "cohort": self._cohort,
            "night": self._night,
            "case": outcome.case,
            "stage": outcome.stage,
            "state": outcome.state,
            "codes": list(outcome.codes),
            "seconds": outcome.seconds,
            "peak_bytes": outcome.peak_bytes,
            "attempt": attempt,
            "worker": worker,
        }
        try:
            self._append(json.dumps(event, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise_if_full(error, self._root.home)
            raise

    def _append(self, line: bytes) -> None:
        """One write of a whole line, so that the system keeps those of several processes apart."""
        with self._lock:
            if not self._begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                size = os.fstat(handle).st_size
                if not self._begun and size and os.pread(handle, 1, size - 1) != b"\n":
                    # what a kill in the middle of a line left
                    line = b"\n" + line
                written = os.write(handle, line)
                if written < len(line):
                    os.write(handle, line[written:])
            finally:
                os.close(handle)
            self._begun = True


def keep_events(root: Root, cohort: str, night: str) -> None:
    """Put the log of a night that is over into the root; in a folder it lies there already."""
    path = root.home / _key(cohort, night)
    if not root.is_here and path.exists():
        root.put(_key(cohort, night), path.read_bytes())


def read_events(root: Root, cohort: str, night: str) -> list[dict[str, Any]]:
    """The events of a night in the order in which they were written; lines that a kill cut are left out."""
    path = root.home / _key(cohort, night)
    if path.exists():
        content = path.read_bytes()
    elif root.is_object(_key(cohort, night)):
        content = root.get(_key(cohort, night))
    else:
        return []
    events = []
    for line in content.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _key(cohort: str, night: str) -> str:
    return f"logs/{cohort}/{night}.jsonl"
