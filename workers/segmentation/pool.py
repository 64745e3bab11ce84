"""A pool of actors that segment: each takes the next case when it is free; those that die, hang or lose their GPU are
replaced, and what they held is tried again.

Everything that happens comes through one queue, and every step over a case takes the same time, however many actors
there are and however many cases wait.

A case that is larger than memory is divided by the first actor that takes it; its portions then are turns like cases,
and when all have come back one more turn publishes the mask.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from vnet_core.errors import EngineError, StorageError
from workers.engines.clusters import Engines
from workers.engines.ray_watch import lost, watching
from workers.leases import renewed
from workers.ledger import Outcome
from workers.registry.models import Model
from workers.segmentation.actors import IN_FLIGHT, Actors, fate
from workers.segmentation.placement import PROCESS_BYTES, memory_to_ask, needed_bytes
from workers.segmentation.roster import Roster
from workers.segmentation.segment import GPU_LOST, STAGE, Job, key_of, plan_of
from workers.segmentation.shares import Division
from workers.segmentation.turns import ATTEMPTS as ATTEMPTS
from workers.segmentation.turns import Batch, Event, Turn, Worker
from workers.storage.store import Root

log = logging.getLogger("vnet")

TICK_S = 1.0
"""How often the pool looks after actors of which it hears nothing."""
SLOW_TIMES = 20.0
"""A case may take so many times as long, by its voxels, as the slowest that the pool has seen."""
STILLBORN = 3
"""So many actors in a row that end before they have begun, and no more are started."""
DIED, HUNG = "engine.worker-died", "engine.case-hung"


class SegmentPool:
    """Actors that hold one model. Start it once, feed it batch after batch, and close it.

    Needs a running Ray session (:func:`workers.engines.clusters.ray_session`).
    """

    def __init__(self, root: Root, model: Model, engines: Engines, actors: Actors | None = None) -> None:
        self.root, self.model, self.engines = root, model, engines
        self._actors = actors or Actors(root.url, model.reference, engines)
        self._workers: dict[Worker, None] = {}
        self._roster: Roster[Worker] = Roster(IN_FLIGHT)
        self._events: queue.SimpleQueue[Event | str] = queue.SimpleQueue()
        self._tickets = self._held = self._stillborn = 0
        self._memory_bytes = PROCESS_BYTES
        self._slowest_s = 0.0
        """Per voxel, of all cases that were done."""
        # a clock that stands still while this process does: then nobody is late
        self._now_s = self._hired_s = self._looked_s = 0.0
        self._seen = time.monotonic()
        self._told_missing = 0
        self.replaced = 0
        """Actors that were replaced."""

    def run(
        self,
        jobs: Sequence[Job],
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        may_begin: Callable[[Job], bool] = lambda job: True,
    ) -> list[Outcome]:
        """One outcome per job that was begun, by case id.

        A job with a receipt is `cached`. The cases of an actor that is replaced are tried again, each at most
        ``ATTEMPTS`` times, and never when their receipt is there. ``may_begin`` is asked before a case is handed to an
        actor. EngineError ``ray.placement`` when no actor finds a place within the site's ``ray_wait_s``,
        ``ray.actor-start`` when all end before they begin, ``ray.lost`` when the head or this machine's raylet dies.
        """
        outcomes: list[Outcome] = []

        def settled(outcome: Outcome) -> None:
            outcomes.append(outcome)
            on_outcome(outcome)

        batch = Batch(deque(), settled, may_begin)
        for job in jobs:
            key = key_of(job, self.model)
            if self.root.receipt(key):
                settled(Outcome(job.case.id, STAGE, "cached", key=key))
            else:
                batch.fresh.append(Turn(replace(job, divide=self._may_divide)))
        if batch.waiting:
            self._work_off(batch)
        return sorted(outcomes, key=lambda outcome: outcome.case)

    @property
    def _may_divide(self) -> bool:
        return self.engines.segment_workers > 1

    def close(self) -> None:
        """End the actors; the next run starts others."""
        for worker in list(self._workers):
            self._dismiss(worker)

    # --- the loop

    def _work_off(self, batch: Batch) -> None:
        with watching(self._events.put):
            wanted = min(self.engines.segment_workers, len(batch.fresh)) - len(self._workers)
            if wanted > 0:
                self._memory_bytes = self._memory_for(batch)
                self._hire(wanted)
            while True:
                self._hand_out(batch)
                if not self._held and not batch.waiting:
                    return
                try:
                    event = self._events.get(timeout=TICK_S)
                except queue.Empty:
                    pass
                else:
                    self._take_in(event, batch)
                self._look_after(batch)

    def _hand_out(self, batch: Batch) -> None:
        """Give what waits to those that have room."""
        while turns := batch.fresh or batch.suspects:
            worker = self._roster.take(turns[0].places)
            if worker is None:
                return
            turn = turns.popleft()
            if turn.job.step is None and not batch.may_begin(turn.job):
                self._roster.free(worker, turn.places)
                continue
            if not worker.held:
                worker.heard_s = self._now_s
            self._tickets += 1
            self._held += 1
            worker.held[self._tickets] = turn
            self._tell(worker, self._tickets, self._actors.ask(worker.handle, turn.job))

    def _take_in(self, event: Event | str, batch: Batch) -> None:
        if isinstance(event, str):
            raise _lost(event)
        worker, ticket = event.worker, event.ticket
        if worker not in self._workers or (ticket is not None and ticket not in worker.held):
            return  # of one that was replaced
        error = event.answer.exception()
        if error is not None and fate(error) == "lost":
            raise _lost(_first_line(error))
        if ticket is None:
            self._has_begun(worker, error)
        elif error is None:
            self._is_done(worker, ticket, event.answer.result(), batch)
        elif fate(error) == "gone":
            self._replace(worker, DIED, _first_line(error), batch)
        else:
            turn = self._taken_back(worker, ticket)
            batch.settle(key_of(turn.job, self.model), turn, _failed(turn, DIED, _first_line(error)))

    def _is_done(self, worker: Worker, ticket: int, answer: Outcome | Division, batch: Batch) -> None:
        if isinstance(answer, Outcome) and GPU_LOST in answer.codes:
            self._replace(worker, GPU_LOST, answer.message, batch)
            return
        turn = self._taken_back(worker, ticket)
        worker.heard_s = self._now_s
        if isinstance(answer, Division):
            batch.share_out(key_of(turn.job, self.model), turn, answer)
            self._hire(max(0, min(self.engines.segment_workers, answer.count) - len(self._workers)))
            return
        if turn.voxels:
            self._slowest_s = max(self._slowest_s, answer.seconds / turn.voxels)
        batch.settle(key_of(turn.job, self.model), turn, answer)

    def _taken_back(self, worker: Worker, ticket: int) -> Turn:
        turn = worker.held.pop(ticket)
        self._held -= 1
        self._roster.free(worker, turn.places)
        return turn

    # --- actors that come and go

    def _memory_for(self, batch: Batch) -> int:
        """What an actor asks for, as the cases at hand have it."""
        networks, on_gpu = len(self.model.facts["weights"]), self.engines.gpus_per_worker > 0
        kinds = {(turn.job.mirror_axes, turn.job.case.geometry): turn.job for turn in batch.fresh}
        needs = [
            needed_bytes(plan_of(job, self.model), networks, geometry, on_gpu)
            for (_, geometry), job in kinds.items()
            if geometry
        ]
        return memory_to_ask(needs or [PROCESS_BYTES], self._actors.largest_node_bytes())

    def _hire(self, count: int) -> None:
        self._hired_s = self._now_s
        for _ in range(count):
            worker = Worker(self._actors.start(self._memory_bytes))
            self._workers[worker] = None
            self._tell(worker, None, self._actors.ready(worker.handle))

    def _tell(self, worker: Worker, ticket: int | None, answer: Future[Any]) -> None:
        answer.add_done_callback(lambda done: self._events.put(Event(worker, ticket, done)))

    def _has_begun(self, worker: Worker, error: BaseException | None) -> None:
        if error is None:
            self._stillborn = 0
            worker.ready = True
            self._roster.add(worker)
            return
        self._dismiss(worker)
        self._stillborn += 1
        if self._stillborn < STILLBORN:
            self._hire(1)
        elif not self._workers:
            raise EngineError(
                "ray.actor-start",
                f"{self._stillborn} segmenting actors in a row ended before they had begun ({_first_line(error)}); the"
                " nodes need the same installation as this machine, and reach the storage root under the same URL",
            )

    def _dismiss(self, worker: Worker) -> None:
        self._actors.end(worker.handle)
        del self._workers[worker]
        self._held -= len(worker.held)
        if worker.ready:
            self._roster.remove(worker)

    def _replace(self, worker: Worker, code: str, why: str, batch: Batch) -> None:
        """Another actor for one that is of no use any more; what it held is tried again."""
        turns = list(worker.held.values())
        log.warning("a segmenting actor is replaced, and %d of its cases tried again: %s", len(turns), why)
        self._dismiss(worker)
        self.replaced += 1
        self._hire(1)
        for turn in turns:
            self._try_again(turn, code, why, batch)

    def _try_again(self, turn: Turn, code: str, why: str, batch: Batch) -> None:
        job, key = turn.job, key_of(turn.job, self.model)
        receipt = None if turn.is_portion else self.root.receipt(key)
        if receipt is not None:
            costs = {name: receipt[name] for name in ("seconds", "peak_bytes")}
            batch.settled(Outcome(job.case.id, STAGE, "computed", key=key, **costs))
        elif turn.attempt >= ATTEMPTS:
            batch.settle(key, turn, _failed(turn, code, why))
        elif turn.is_portion:  # others of the case go on meanwhile, so that its number stays
            batch.suspects.append(Turn(job, turn.attempt + 1))
        else:
            try:
                claim = renewed(self.root, job.claim) if job.claim else None
            except StorageError as error:
                batch.settled(Outcome(job.case.id, STAGE, "failed", (error.code,), error.message))
            else:
                # what was half published is divided again: a map that is half cleaned is no map
                again = replace(job, claim=claim, step=None, divide=self._may_divide)
                batch.suspects.append(Turn(again, turn.attempt + 1))

    # --- actors of which nothing is heard

    def _look_after(self, batch: Batch) -> None:
        """At most once a tick: replace those that hang, and give up where nobody comes."""
        seen = time.monotonic()
        self._now_s += min(seen - self._seen, TICK_S)
        self._seen = seen
        if self._now_s - self._looked_s < TICK_S:
            return
        self._looked_s = self._now_s
        for worker in list(self._workers):
            limit_s = self._limit_s(worker)
            if worker.held and self._now_s - worker.heard_s > limit_s:
                self._replace(worker, HUNG, f"it held a case for more than {limit_s:.0f} s", batch)
        missing = len(self._workers) - len(self._roster)
        if missing and self._now_s - self._hired_s > self.engines.ray_wait_s:
            self._tell_missing(missing)

    def _limit_s(self, worker: Worker) -> float:
        """How long a worker may be silent over what it holds."""
        voxels = max((turn.voxels for turn in worker.held.values()), default=0)
        return max(self.engines.case_limit_s, SLOW_TIMES * self._slowest_s * voxels)

    def _tell_missing(self, missing: int) -> None:
        """EngineError ``ray.placement`` where nobody is there, or else a word when their number has grown."""
        found = self._actors.asked_and_there(self._memory_bytes)
        if not len(self._roster):
            raise EngineError(
                "ray.placement",
                f"no segmenting actor found a place within {self.engines.ray_wait_s:g} s: {found}; add nodes, or lower"
                " segment_cpus, gpus_per_worker or the plan's inference.memory_limit_gib",
            )
        if missing > self._told_missing:
            log.warning(
                "%d of %d segmenting actors have a place, the others wait for one: %s",
                len(self._roster),
                len(self._workers),
                found,
            )
        self._told_missing = missing


def _failed(turn: Turn, code: str, why: str) -> Outcome:
    message = f"its actor was lost {turn.attempt} times over this case ({why}); run the command again"
    return Outcome(turn.job.case.id, STAGE, "failed", (code,), message)


def _lost(what: str) -> EngineError:
    return lost(what, "run the same command again to go on")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
