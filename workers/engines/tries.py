"""Work that may cost its worker: who had begun it, what is tried again, and what is to blame.

Before a worker begins a case it leaves a mark in the storage root, and takes it away at the end. A mark that is still
there when the case comes back without an outcome says that its worker died of it, or beside it. So engines that give
the lost work of a dead worker to the next one change nothing: the second finds the mark and does nothing.

A case that was waiting for a dead worker goes to another one. One that was begun is a suspect, and suspects are tried
again when all others are done, one at a time, so that each is alone and only the one that kills its worker is blamed.
"""

from __future__ import annotations

import json
import os
import queue
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from vnet_core.errors import EngineError, StorageError
from workers.ledger import Outcome, settle
from workers.storage.store import Root

TRIES = 3
"""Workers that a case may cost before it is left alone: the first in company, the others alone."""
POLL_S = 2.0
"""How often the engine is looked at while no case ends."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Who does a case."""

    name: str
    """Names a process among all machines of an engine."""
    memory_limit_bytes: int = 0
    """At which its supervisor ends it; 0: none is known."""


@runtime_checkable
class Supervised(Protocol):
    """What an executor adds whose workers are processes that may end alone."""

    @property
    def this_worker(self) -> Callable[[], Worker]:
        """Tells on a worker which one it is, and travels there; EngineError where no work may be done on it."""

    def loss(self) -> EngineError | None:
        """Why futures are cancelled; None where the executor was closed."""

    def check(self) -> None:
        """EngineError when the work cannot go on: nobody hands it out any more, or nobody is there to do it."""

    def is_death(self, error: BaseException) -> bool:
        """Whether a future failed since its worker died."""

    def is_gone(self, worker: Worker) -> bool:
        """Whether a worker is there no more."""

    def memory_at_end(self, worker: Worker) -> int | None:
        """Bytes that a worker held when it was ended for holding too many; None when it was not, as far as is known."""


@dataclass(frozen=True, slots=True)
class Work:
    """One case of a stage, as it travels to a worker."""

    stage: str
    case: str
    key: str
    """Where its result will lie."""
    function: Callable[..., Outcome]
    arguments: tuple[Any, ...]


def this_process() -> Worker:
    """The worker that is a thread or process of an executor of the standard library."""
    return Worker(f"{socket.gethostname()} {os.getpid()}")


def attempt(root_url: str, mark: str, work: Work, this_worker: Callable[[], Worker]) -> Outcome | None:
    """Do a case under a mark; None where another worker has begun it under the same one. Runs on a worker, and raises
    nothing but the EngineError of ``this_worker``."""
    root, has_begun, worker = Root(root_url), False, this_worker()

    def begin() -> tuple[Any, None, tuple[str, ...]]:
        nonlocal has_begun
        facts = {"worker": worker.name, "memory_limit_bytes": worker.memory_limit_bytes}
        has_begun = root.create(f"{mark}/begun.json", json.dumps(facts).encode())
        return "computed", None, ()

    begun = settle(work.stage, work.case, begin)
    if not begun.done:
        return begun  # the storage root is at fault
    if not has_begun:
        return None
    outcome = work.function(*work.arguments)
    with suppress(OSError):  # it only names what is over
        root.delete(mark)
    return outcome


@dataclass(slots=True)
class _Losses:
    deaths: list[Worker]
    """Workers that had begun the case and died."""
    waits: int = 0
    """How often the worker that it waited for died."""


class Tries:
    """Works off cases on an executor, each until it has an outcome."""

    def __init__(
        self,
        root: Root,
        executor: Executor,
        on_outcome: Callable[[Outcome], None],
        may_go_on: Callable[[], bool],
    ) -> None:
        """As soon as ``may_go_on`` is false after a case, nothing more is waited for."""
        self._root, self._executor = root, executor
        self._settle, self._may_go_on = on_outcome, may_go_on
        self._supervisor = executor if isinstance(executor, Supervised) else None
        self._this_worker = self._supervisor.this_worker if self._supervisor else this_process
        self._held: dict[Future[Outcome | None], tuple[Work, str]] = {}
        self._ended: queue.SimpleQueue[Future[Outcome | None]] = queue.SimpleQueue()
        self._losses: dict[str, _Losses] = {}
        self._suspects: deque[Work] = deque()
        self._marks: list[str] = []
        self._unheard: set[str] = set()
        """Marks of what was over, or whose worker was gone, at the last look, and whose job had not ended."""

    def work_off(self, work: Sequence[Work]) -> None:
        """Until all have an outcome, or no more may be begun, or somebody closes the executor.

        Raises EngineError where the engine cannot go on; what was published stays.
        """
        try:
            for one in work:
                self._submit(one)
            while self._held or self._suspects:
                if not self._held:
                    self._submit(self._suspects.popleft())
                elif not self._goes_on():
                    return
        finally:
            for job in self._held:
                job.cancel()
            for mark in self._marks:
                with suppress(OSError):
                    self._root.delete(mark)

    def _submit(self, work: Work) -> None:
        mark = f"{work.key}.try-{uuid4().hex[:12]}"
        try:
            job = self._executor.submit(attempt, self._root.url, mark, work, self._this_worker)
        except BrokenExecutor as error:  # it does not start workers again
            self._settle(_died(work, f"{type(error).__name__}, and none takes its place"))
            return
        self._held[job] = work, mark
        job.add_done_callback(self._ended.put)

    def _goes_on(self) -> bool:
        """Take the next job that ends, if one does; whether more may follow. No job is kept: an engine does again what
        somebody may still ask for and a worker has taken with it."""
        try:
            job = self._ended.get(timeout=POLL_S)
        except queue.Empty:
            if self._supervisor:
                self._supervisor.check()
                self._look_after(self._supervisor)
            return True
        if job not in self._held:  # it was given up
            return True
        if job.cancelled():
            if self._supervisor and (loss := self._supervisor.loss()):
                raise loss
            return False  # the executor was closed, since something else ended the work
        self._take(job)
        return self._may_go_on()

    def _look_after(self, supervisor: Supervised) -> None:
        """Settle what the storage root says is over, and give up what a worker that is gone had begun: of several
        workers that end together an engine may lose the answers."""
        unheard = set()
        for job, (work, mark) in list(self._held.items()):
            worker = self._beginner(mark)
            if not (supervisor.is_gone(worker) if worker else self._root.receipt(work.key)):
                continue
            unheard.add(mark)
            if mark in self._unheard:
                del self._held[job]
                job.cancel()
                self._lost(work, mark)
        self._unheard = unheard

    def _take(self, job: Future[Outcome | None]) -> None:
        work, mark = self._held.pop(job)
        error = job.exception()
        outcome = job.result() if error is None else None
        if outcome is not None:
            self._settle(outcome)
        elif error is None or self._is_death(error):
            self._lost(work, mark)
        elif isinstance(error, EngineError):
            raise error
        elif not self._is_published(work):  # the worker cannot load it, or its answer cannot be read
            self._settle(
                Outcome(
                    work.case,
                    work.stage,
                    "failed",
                    ("engine.worker-failed",),
                    f"the worker could not begin it, or not tell how it ended ({type(error).__name__}); install"
                    " vnet-cohort and the same requirements.lock there as here",
                )
            )

    def _is_death(self, error: BaseException) -> bool:
        return isinstance(error, BrokenExecutor) or (self._supervisor is not None and self._supervisor.is_death(error))

    def _lost(self, work: Work, mark: str) -> None:
        """What follows when a case comes back without an outcome."""
        losses = self._losses.setdefault(work.key, _Losses([]))
        worker = self._begun(mark)
        if worker:
            losses.deaths.append(worker)
        else:
            losses.waits += 1
        if self._is_published(work):  # it died between the last step and the answer
            return
        if len(losses.deaths) >= TRIES:
            self._settle(self._blamed(work, losses.deaths))
        elif losses.waits >= 2 * TRIES:
            self._settle(_died(work, f"{losses.waits} times before it was begun"))
        elif losses.deaths or losses.waits >= TRIES:
            self._suspects.append(work)
        else:
            self._submit(work)

    def _is_published(self, work: Work) -> bool:
        """Whether a case has its result although nobody said so; then that is its outcome."""
        receipt = self._root.receipt(work.key)
        if receipt is None:
            return False
        costs = {name: receipt[name] for name in ("seconds", "peak_bytes") if name in receipt}
        self._settle(Outcome(work.case, work.stage, "computed", key=work.key, **costs))
        return True

    def _begun(self, mark: str) -> Worker | None:
        """Who had begun it under a mark. It stays until the end: the engine may do the same once more, when another
        worker dies that has the answer."""
        worker = self._beginner(mark)
        if worker:
            self._marks.append(mark)
        return worker

    def _beginner(self, mark: str) -> Worker | None:
        try:
            facts = self._root.get_json(f"{mark}/begun.json")
        except StorageError as error:
            if error.code != "store.missing":
                raise
            return None
        return Worker(facts["worker"], facts["memory_limit_bytes"])

    def _blamed(self, work: Work, deaths: Sequence[Worker]) -> Outcome:
        """The row of a case that took its worker with it each time."""
        times = f"{len(deaths)} times, the last {len(deaths) - 1} with no other case beside it"
        ends = [(worker, self._supervisor.memory_at_end(worker)) for worker in deaths] if self._supervisor else []
        for worker, held_bytes in reversed(ends):
            if held_bytes is None:
                continue
            limit = f" of {worker.memory_limit_bytes / 2**20:.0f} MiB" if worker.memory_limit_bytes else ""
            return Outcome(
                work.case,
                work.stage,
                "failed",
                ("case.out-of-memory",),
                f"its worker was ended {times}; it held {held_bytes / 2**20:.0f} MiB, and its limit{limit} was near:"
                " give the workers more memory, have fewer of them, or raise preprocess.spacing_mm in the plan",
            )
        return Outcome(
            work.case,
            work.stage,
            "failed",
            ("case.kills-worker",),
            f"its worker died {times}: look at this scan and at the workers' logs and memory, or take it out of the"
            " cohort",
        )


def _died(work: Work, how: str) -> Outcome:
    return Outcome(
        work.case,
        work.stage,
        "failed",
        ("engine.worker-died",),
        f"the worker died ({how}); run the command again",
    )
