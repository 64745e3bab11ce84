"""A night's work on its cases: what is settled, what comes next, and whether there is time for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flows.session import Session
from flows.stages import Crew
from flows.tasks import preprocess_batch, segment_batch, unsearched
from workers.cohort import Case, volume_key
from workers.failpoints import fail_point
from workers.leases import Run
from workers.ledger import Outcome
from workers.nights.attempts import Failure, quarantine_outcome, quarantined
from workers.nights.forecast import ORDER, Cost, Kind, kind_of, recorded_cost
from workers.nights.pauses import is_paused
from workers.nights.record import Stopped
from workers.registry.models import Model
from workers.segmentation.segment import STAGE, Job, key_of
from workers.settings.rules import NightRules, stop_time

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture

POLL_S = 1.0
"""How often a night that waits looks whether it can go on."""
CARRIED_OVER: dict[Stopped, str] = {
    "deadline": "the deadline came before its turn; the next night does it",
    "hours": "the night's hours were used up before its turn; the next night does it",
    "cancelled": "the night was cancelled before it was done; the next night does it",
    "died": "the night's process ended before it was done; the next night does it",
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a night is to do."""

    cohort: str
    model: Model
    rules: NightRules
    started: datetime
    """In the site's time zone."""


def carried_over(case: str, why: Stopped) -> Outcome:
    """The row of a case that was not reached."""
    return Outcome(case, STAGE, "carried-over", (f"night.{why}",), CARRIED_OVER[why])


class Shift:
    """Works off the cases of one night; every case ends settled or is carried over."""

    def __init__(
        self, session: Session, run: Run, assignment: Assignment, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._session, self._run, self._assignment, self._on_outcome = session, run, assignment, on_outcome
        self._limit = stop_time(assignment.rules, assignment.started)
        self._cost: Cost | None = None
        self.settled: dict[str, Outcome] = {}
        """Outcomes by case."""
        self.todo: list[Job] = []
        """Cases without a result, in the order of their turns."""

    # --- what there is to do

    def sort_out(self, jobs: Sequence[Job], failures: dict[str, tuple[Failure, ...]]) -> None:
        """Settle what is done or left alone, and put the rest in the order of its turns."""
        root, model = self._session.root, self._assignment.model
        cohort, after = self._assignment.cohort, self._assignment.rules.quarantine_after
        turns: list[tuple[int, str, Job]] = []
        for job in jobs:
            key, found = key_of(job, model), failures.get(job.case.id, ())
            kind: Kind = kind_of(root, cohort, job.case, key, found, after)
            if kind == "cached":
                self.settle(Outcome(job.case.id, STAGE, "cached", key=key))
            elif kind == "quarantined":
                last = quarantined(found, key, after)
                assert last is not None
                self.settle(quarantine_outcome(cohort, job.case.id, found, last))
            else:
                turns.append((ORDER.index(kind), job.case.id, job))
        self.todo = [job for _, _, job in sorted(turns, key=lambda turn: turn[:2])]
        if self.todo and self._limit:
            cases: dict[str, Case] = {job.case.id: job.case for job in jobs}
            self._cost = recorded_cost(root, cases, cohort, model.digest)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Settle cases that are not worked on."""
        for outcome in outcomes:
            self.settle(outcome)

    # --- the work

    def work(self) -> Stopped:
        """Do everything that there is time for, failed cases again as often as the rules say; why it stopped."""
        rules, todo = self._assignment.rules, self.todo
        for attempt in range(rules.retries + 1):
            if attempt:
                self._rest(rules.retry_delay_s * 2 ** (attempt - 1))
            self._work_off(todo)
            todo = [job for job in todo if self._has_failed(job)]
            if not todo or self._why_stop():
                break
        late = [job.case.id for job in self.todo if job.case.id not in self.settled]
        if not late:
            return ""
        assert self._limit is not None, "only a limit leaves a case undone"
        self.carry_over(late, self._limit[1])
        return self._limit[1]

    def carry_over(self, cases: Sequence[str], why: Stopped) -> None:
        """Settle what is not settled yet as left for the next night."""
        for case in cases:
            if case not in self.settled:
                self.settle(carried_over(case, why))

    def _work_off(self, jobs: Sequence[Job]) -> None:
        """Stint after stint until all are settled, by this run or another, or time is up."""
        waiting = deque(jobs)
        while waiting and not self._why_stop():
            if self.is_paused():
                self._rest(POLL_S)
                continue
            with Crew(self._session, self._assignment.model, len(waiting)) as crew:
                elsewhere = Stint(self, crew, waiting).work()
            # what another run has in hand is looked at again, until it is there or that run is dead
            waiting.extend(job for job in elsewhere if not self._is_published(job))
            if elsewhere and len(waiting) == len(elsewhere):
                self._rest(POLL_S)

    def _is_published(self, job: Job) -> bool:
        key = key_of(job, self._assignment.model)
        if self._session.root.receipt(key) is None:
            return False
        self.settle(Outcome(job.case.id, STAGE, "cached", message="made by another run meanwhile", key=key))
        return True

    # --- for its stints

    @property
    def session(self) -> Session:
        """Where it works."""
        return self._session

    @property
    def model(self) -> Model:
        """What it works with."""
        return self._assignment.model

    def claimed(self, job: Job) -> Job | None:
        """The job with leave to do it; None while another run has it."""
        claim = self._run.claim(key_of(job, self._assignment.model))
        return replace(job, claim=claim) if claim else None

    def let_go(self, job: Job) -> None:
        """Give the leave back."""
        assert job.claim is not None
        self._run.give_back(job.claim)

    def is_paused(self) -> bool:
        """Whether somebody wants it to wait."""
        return is_paused(self._session.root, self._assignment.cohort)

    def has_time(self, job: Job) -> bool:
        """Whether there is time for a case, as far as the receipts of others tell how long it takes."""
        return not self._why_stop(self._cost.seconds(job.case.geometry) if self._cost else 0.0)

    def may_go_on(self) -> bool:
        """Whether more may be begun at all."""
        return not self.is_paused() and not self._why_stop()

    def may_begin(self, job: Job) -> bool:
        """Whether a case may be begun now."""
        return not self.is_paused() and self.has_time(job)

    def settle(self, outcome: Outcome) -> None:
        """Take note of what became of a case."""
        self.settled[outcome.case] = outcome
        self._on_outcome(outcome)

    # --- time

    def _why_stop(self, seconds: float = 0.0) -> Stopped:
        """The rule that ends the night before ``seconds`` more have passed, or nothing."""
        if self._limit is None:
            return ""
        moment, rule = self._limit
        left_s = (moment - self._session.clock()).total_seconds()
        return rule if left_s <= seconds else ""

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._why_stop():
            time.sleep(min(POLL_S, left))

    def _has_failed(self, job: Job) -> bool:
        outcome = self.settled.get(job.case.id)
        return outcome is not None and outcome.state == "failed"


class Stint:
    """Batch after batch on one crew: the next is preprocessed while one is segmented."""

    def __init__(self, shift: Shift, crew: Crew, waiting: deque[Job]) -> None:
        self._shift, self._crew, self._waiting = shift, crew, waiting
        self._elsewhere: list[Job] = []
        self._settled: set[str] = set()

    def work(self) -> list[Job]:
        """Take jobs from those that wait, and put back what there was no time for; returns what another run has."""
        held: list[list[Job]] = []
        try:
            ahead = self._prepare(held)
            pool = self._crew.pool if ahead else None  # Ray starts while the first batch is preprocessed
            while ahead and pool:
                batch, prepared = ahead
                without = {outcome.case for outcome in prepared.result() if not outcome.done} if prepared else set()
                ahead = self._prepare(held)
                ready = [job for job in batch if job.case.id not in without and self._has_volume(job)]
                if ready:
                    segment_batch(pool, unsearched(ready), self._take, self._shift.may_begin)
                self._let_go(held.pop(0))
        finally:
            for batch in held:
                self._let_go(batch)
        return self._elsewhere

    def _prepare(self, held: list[list[Job]]) -> tuple[list[Job], PrefectFuture[Any] | None] | None:
        """Claim a batch, and start preprocessing what has no volume yet; None when nothing waits or time is up."""
        batch: list[Job] = []
        size = self._shift.session.site.batch_cases
        while self._waiting and len(batch) < size and not self._shift.is_paused():
            job = self._waiting.popleft()
            if not self._shift.has_time(job):
                continue  # a smaller one may still fit
            claimed = self._shift.claimed(job)
            if claimed is None:
                self._elsewhere.append(job)
            else:
                batch.append(claimed)
        if not batch:
            return None
        held.append(batch)
        fail_point("night:claimed")
        missing = [job.case for job in batch if not self._has_volume(job)]
        if not missing:
            return batch, None
        root, plan = self._shift.session.root, self._shift.model.plan
        return batch, preprocess_batch.submit(
            root, unsearched(missing), plan, self._crew.executor, self._take_prepared, self._shift.may_go_on
        )

    def _has_volume(self, job: Job) -> bool:
        return self._shift.session.root.receipt(volume_key(job.case, self._shift.model.plan)) is not None

    def _take_prepared(self, outcome: Outcome) -> None:
        if not outcome.done:
            self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        self._settled.add(outcome.case)
        self._shift.settle(outcome)

    def _let_go(self, batch: Sequence[Job]) -> None:
        """Give a batch's leave back; what there was no time for waits again, before all others."""
        for job in reversed(batch):
            self._shift.let_go(job)
            if job.case.id not in self._settled:
                self._waiting.appendleft(replace(job, claim=None))
