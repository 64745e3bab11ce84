"""What this process may open and start, which the system decides before anything runs."""

from __future__ import annotations

import os
import resource

from vnet_core.errors import EngineError

OPEN_FILES = 256
"""With 64 Ray breaks off with a stack trace in the middle of a night; Ray alone holds 32 open in it."""
PROCESSES = 512
"""Processes and threads; Ray alone starts about 150 for one worker."""


def check_machine() -> None:
    """EngineError ``machine.open-files`` or ``machine.processes`` where a limit of the system would break the engines
    half way."""
    _check(resource.RLIMIT_NOFILE, OPEN_FILES, "machine.open-files", "open files", "ulimit -n")
    if os.getuid():  # root has no such limit, whatever is set
        _check(resource.RLIMIT_NPROC, PROCESSES, "machine.processes", "processes and threads", "ulimit -u")


def _check(kind: int, needed: int, code: str, what: str, command: str) -> None:
    limit, _ = resource.getrlimit(kind)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise EngineError(
            code,
            f"this process may have {limit} {what}, the engines need {needed}; raise the limit with {command} {needed}"
            " or more before the command, or in the unit or container that starts it",
        )
