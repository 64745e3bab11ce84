"""Places where a process can be made to die, fail or hang on purpose, so that tests can show what follows.

``VNET_FAIL=stage:point:n:action`` makes the n-th passage of a process through a point do ``kill`` (SIGKILL to itself),
``raise`` (an OSError), or ``sleep`` (an hour). Several are separated by commas. ``VNET_FAIL_ONCE`` names a file: the
first process that acts makes it, and where it is there nothing happens.

``VNET_FAIL_LOG`` names a file to which every process appends a line when it passes a point at which something is known
by a key: point, key and nanoseconds since 1970. Nothing is ever lost from it by a kill, so it tells what was done how
often.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

from vnet_core.errors import ConfigError

VARIABLE = "VNET_FAIL"
ONCE_VARIABLE = "VNET_FAIL_ONCE"
LOG_VARIABLE = "VNET_FAIL_LOG"
POINTS = (
    "night:begun",
    "night:claimed",
    "night:settled",
    "night:rows",
    "night:record",
    "preprocess:read",
    "preprocess:written",
    "preprocess:sealed",
    "segment:read",
    "segment:computed",
    "segment:written",
    "segment:sealed",
)
"""All points, by stage and what has just been done; rows and record: what is about to be written."""
ASLEEP_S = 3600.0

_passed: Counter[str] = Counter()


def fail_point(point: str, key: str = "") -> None:
    """Pass a point, with the key of what is made there. ConfigError ``fail.point`` where VNET_FAIL is not as above."""
    log = os.environ.get(LOG_VARIABLE)
    if log and key:
        _append(log, f"{point} {key} {time.time_ns()}\n".encode())
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _passed[point] += 1
    for text in wanted.split(","):
        where, number, action = _parsed(text)
        if where == point and number == _passed[point] and _is_first():
            _act(action, point)


def _append(path: str, line: bytes) -> None:
    """One write, which the system keeps apart from those of other processes."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def _parsed(text: str) -> tuple[str, int, str]:
    parts = text.split(":")
    if len(parts) != 4 or ":".join(parts[:2]) not in POINTS or not parts[2].isdigit():
        raise ConfigError(
            "fail.point", f"{VARIABLE} {text!r} is not stage:point:number:action with one of {', '.join(POINTS)}"
        )
    return ":".join(parts[:2]), int(parts[2]), parts[3]


def _is_first() -> bool:
    once = os.environ.get(ONCE_VARIABLE)
    if not once:
        return True
    try:
        Path(once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(action: str, point: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise OSError(f"made to fail at {point}")
        case "sleep":
            time.sleep(ASLEEP_S)
        case _:
            raise ConfigError("fail.point", f"{VARIABLE} action {action!r} is not kill, raise or sleep")
