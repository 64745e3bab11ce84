"""What became of each case: one outcome per case and stage, whatever happens."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from vnet_core.errors import ScanError, VnetError

log = logging.getLogger("vnet")

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


def settle(stage: str, case: str, compute: Callable[[], tuple[State, str | None, tuple[str, ...]]]) -> Outcome:
    """Run one case's work and turn whatever happens into its outcome.

    ``compute`` returns state, key and warning codes. A ScanError refuses the case, any other error fails it; only
    what asks the whole process to end (KeyboardInterrupt, SystemExit) passes.
    """
    start = time.perf_counter()
    codes: tuple[str, ...]
    try:
        state, key, codes = compute()
        message = ""
    except VnetError as error:
        state, key, codes, message = error_state(error), None, (error.code,), error.message
    except Exception as error:
        log.exception("%s of case %s failed", stage, case)
        state, key, codes, message = "failed", None, (f"internal.{type(error).__name__}",), f"{error}"
    seconds = time.perf_counter() - start
    return Outcome(case, stage, state, codes, message, key, round(seconds, 4), process_peak_bytes())


def error_state(error: VnetError) -> State:
    """`refused` when the scan is at fault, else `failed`."""
    return "refused" if isinstance(error, ScanError) else "failed"


def process_peak_bytes() -> int:
    """Largest resident size of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
