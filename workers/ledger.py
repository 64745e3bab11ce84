"""What became of each case: one outcome per case and stage, whatever happens."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from vnet_core.errors import MemoryLimitError, ScanError, VnetError
from workers.identity import hush_readers

log = logging.getLogger("vnet")

TRACEBACKS_VARIABLE = "VNET_TRACEBACKS"
"""Set to anything, unexpected errors are logged whole; their texts may quote paths and headers, which name patients."""
FRAMES = 6
"""Places of an unexpected error that are told, innermost first."""

State = Literal["accepted", "warned", "refused", "computed", "cached", "failed", "carried-over"]
UNDONE: tuple[State, ...] = ("refused", "failed", "carried-over")
"""States of a case whose result does not exist."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one stage ended for one case."""

    case: str
    stage: str
    state: State
    codes: tuple[str, ...] = ()
    """Coded reasons and warnings."""
    message: str = ""
    """What was found and the remedy, for a person."""
    key: str | None = None
    """Where in the storage root the result lies, when there is one."""
    seconds: float = 0.0
    """Wall time of the stage for this case."""
    peak_bytes: int = 0
    """Largest resident size so far of the process that did it."""

    @property
    def done(self) -> bool:
        """Whether the case has a result."""
        return self.state not in UNDONE


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Number of outcomes by state, states in a fixed order, those without any left out."""
    found = Counter(outcome.state for outcome in outcomes)
    order: tuple[State, ...] = ("accepted", "warned", "computed", "cached", "carried-over", "refused", "failed")
    return {state: found[state] for state in order if found[state]}


class Costs:
    """Seconds of work since it was made, without those spent waiting for other cases, and the memory of the process."""

    def __init__(self) -> None:
        self._start, self._waited, self._elsewhere_s = time.perf_counter(), 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count what other processes have done of the same work."""
        self._elsewhere_s += seconds

    @contextmanager
    def waiting(self, turn: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter ``turn``, such as a lock, for the block; the time until it is entered does not count."""
        began = time.perf_counter()
        with turn:
            self._waited += time.perf_counter() - began
            yield

    def facts(self) -> dict[str, Any]:
        """For a receipt: ``seconds``, ``peak_bytes``, and the moment ``finished`` in ISO 8601."""
        seconds = time.perf_counter() - self._start - self._waited + self._elsewhere_s
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        return {"seconds": round(seconds, 4), "peak_bytes": process_peak_bytes(), "finished": finished}


def settle(stage: str, case: str, compute: Callable[[], tuple[State, str | None, tuple[str, ...]]]) -> Outcome:
    """Run one case's work and turn whatever happens into its outcome.

    ``compute`` returns state, key and warning codes. A ScanError refuses the case, any other error fails it; only
    what asks the whole process to end (KeyboardInterrupt, SystemExit) passes. Of an unexpected error only its kind
    and place are told, see :func:`nameless`.
    """
    hush_readers()
    start = time.perf_counter()
    codes: tuple[str, ...]
    try:
        with nameless(f"{stage} of case {case}"):
            state, key, codes = compute()
        message = ""
    except VnetError as error:
        state, key, codes, message = error_state(error), None, (error.code,), error.message
    seconds = time.perf_counter() - start
    return Outcome(case, stage, state, codes, message, key, round(seconds, 4), process_peak_bytes())


@contextmanager
def nameless(what: str) -> Iterator[None]:
    """Turn an unexpected error into VnetError ``internal.<kind>`` and log it, both without its own text.

    The text of such an error quotes paths and headers, and so may name a patient. Its kind and the modules and lines
    that it came through are told; with VNET_TRACEBACKS set, all of it is logged. Our own errors pass as they are, and
    memory that was refused becomes MemoryLimitError ``engine.memory``.
    """
    try:
        yield
    except VnetError:
        raise
    except Exception as error:
        if memory_refused(error):
            raise MemoryLimitError(
                "engine.memory",
                f"{what} was refused memory (the process had up to {process_peak_bytes() / 2**30:.1f} GiB); use fewer"
                " workers or a coarser spacing_mm, or give it more memory, and run again",
            ) from None
        whole = error if os.environ.get(TRACEBACKS_VARIABLE) else None
        log.error("%s failed: %s", what, kind_and_place(error), exc_info=whole)
        raise VnetError(
            f"internal.{type(error).__name__}",
            f"{kind_and_place(error)}; set {TRACEBACKS_VARIABLE}=1 to have all of it logged, paths included",
        ) from None


def memory_refused(error: BaseException) -> bool:
    """Whether an allocation of Python, NumPy, the system or torch on the processor was refused, or the stack of a
    thread."""
    # neither has a class of its own
    words = ("DefaultCPUAllocator", "can't start new thread")
    by_words = isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or by_words or of_system


def kind_and_place(error: Exception) -> str:
    """Kind and place: ``PermissionError (Permission denied) at workers.sources.scans:61 < workers.cohort:170``."""
    # the system's own words for the number; the error's text goes on with the file's name
    number = error.errno if isinstance(error, OSError) else None
    why = f" ({os.strerror(number)})" if number is not None else ""
    places = [f"{frame.f_globals.get('__name__')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"{type(error).__name__}{why} at {' < '.join(places[: -FRAMES - 1 : -1])}"


def error_state(error: VnetError) -> State:
    """`refused` when the scan is at fault, else `failed`."""
    return "refused" if isinstance(error, ScanError) else "failed"


def process_peak_bytes() -> int:
    """Largest resident size of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
