"""Cases that wait for an actor of a pool or are with one, whole or in portions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from workers.ledger import Outcome
from workers.segmentation.actors import IN_FLIGHT
from workers.segmentation.segment import OUT_OF_MEMORY, Job
from workers.segmentation.shares import Division, Step

ATTEMPTS = 2
"""How often a case is given to an actor; the second time it has the actor for itself, so that it alone is to blame."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A case's turn with an actor, or that of one of its portions."""

    job: Job
    attempt: int = 1

    @property
    def places(self) -> int:
        """Places that it takes with an actor."""
        return 1 if self.attempt == 1 else IN_FLIGHT

    @property
    def voxels(self) -> int:
        """Of the scan; 0 where that is not known."""
        return prod(self.job.case.geometry.shape) if self.job.case.geometry else 0

    @property
    def is_portion(self) -> bool:
        """Whether it is of a part of a case that others do too."""
        return self.job.step is not None and self.job.step.portion is not None


@dataclass(eq=False, slots=True)
class Worker:
    """An actor as the pool sees it."""

    handle: Any
    ready: bool = False
    held: dict[int, Turn] = field(default_factory=dict)
    """By ticket."""
    heard_s: float = 0.0
    """When it was last given a case while it had none, or gave one back, on the pool's clock."""


@dataclass(frozen=True, slots=True)
class Event:
    """An answer of a worker: to a ticket, or that it is ready."""

    worker: Worker
    ticket: int | None
    answer: Future[Any]


@dataclass(slots=True)
class _Shared:
    """A case whose portions are out."""

    attempt: int
    """Which try of the case it is."""
    out: int
    """Portions that have not come back."""
    problem: Outcome | None = None
    """Of the first portion that failed."""


@dataclass(slots=True)
class Batch:
    """Cases that are being worked off."""

    fresh: deque[Turn]
    settled: Callable[[Outcome], None]
    may_begin: Callable[[Job], bool]
    suspects: deque[Turn] = field(default_factory=deque)
    """Held by an actor that was replaced; they come last, each alone."""
    _shared: dict[str, _Shared] = field(default_factory=dict)
    """By the key of the case's result."""

    @property
    def waiting(self) -> bool:
        """Whether any case waits for its turn."""
        return bool(self.fresh or self.suspects)

    def share_out(self, key: str, turn: Turn, division: Division) -> None:
        """Every portion of the case whose result will lie under ``key`` is the next turn of somebody."""
        self._shared[key] = _Shared(turn.attempt, division.count)
        job = replace(turn.job, divide=False)
        portions = [Turn(replace(job, step=Step(division, number))) for number in range(division.count)]
        self.fresh.extendleft(reversed(portions))

    def settle(self, key: str, turn: Turn, outcome: Outcome) -> None:
        """Tell what became of a case; of a portion, do what follows when it was the last that was out."""
        step = turn.job.step
        if step is None or step.portion is None:
            self.settled(outcome)
            return
        shared = self._shared[key]
        shared.out -= 1
        if not outcome.done:
            shared.problem = shared.problem or outcome
            shared.out -= self._drop(step.division, turn.job.case.id)
        if shared.out:
            return
        del self._shared[key]
        if shared.problem is None:
            self.fresh.appendleft(Turn(replace(turn.job, step=Step(step.division, None)), shared.attempt))
        elif OUT_OF_MEMORY in shared.problem.codes:  # alone it is tried in smaller tiles
            self.fresh.appendleft(Turn(replace(turn.job, step=None), ATTEMPTS))
        else:
            self.settled(shared.problem)

    def _drop(self, division: Division, case: str) -> int:
        """Forget the portions of a case that wait; how many there were."""

        def stays(turn: Turn) -> bool:
            step = turn.job.step
            return step is None or turn.job.case.id != case or step.division != division

        before = len(self.fresh) + len(self.suspects)
        self.fresh = deque(filter(stays, self.fresh))
        self.suspects = deque(filter(stays, self.suspects))
        return before - len(self.fresh) - len(self.suspects)
