"""The stages of a night as flows call them: which cases, on which engines, with one outcome per case."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from types import TracebackType

from flows.session import Session
from flows.tasks import Progress, batches, preprocess_batch, segment_batch, unsearched
from vnet_core.plan import Plan
from workers.cohort import Case, Entry, volume_key
from workers.engines.clusters import ray_session
from workers.engines.dask_engine import dask_executor
from workers.ledger import Outcome
from workers.registry.models import Model
from workers.segmentation.pool import SegmentPool
from workers.segmentation.segment import STAGE, Job, key_of


def usable(entries: Sequence[Entry]) -> list[Case]:
    """Cases that were not refused."""
    return [entry.case for entry in entries if entry.verdict.usable]


def refusals(entries: Sequence[Entry]) -> list[Outcome]:
    """The rows of the cases that ingest refused."""
    return [
        Outcome(entry.case.id, "ingest", "refused", entry.verdict.codes, entry.verdict.message)
        for entry in entries
        if not entry.verdict.usable
    ]


def preprocess_cases(session: Session, cohort: str, cases: Sequence[Case], plan: Plan) -> list[Outcome]:
    """One outcome per case; Dask is only started when there is something to do."""
    engines = session.site.engines
    keys = {case.id: volume_key(case, plan) for case in cases}
    missing = [case for case in cases if not session.root.receipt(keys[case.id])]
    waiting = {case.id for case in missing}
    ready = [Outcome(case.id, "preprocess", "cached", key=keys[case.id]) for case in cases if case.id not in waiting]
    if not missing:
        return ready
    progress = Progress(f"preprocess {cohort}", len(missing), f"Preprocessing of cohort {cohort}")
    workers = min(engines.preprocess_workers, len(missing))
    with dask_executor(engines.dask_address, workers, engines.dask_tls) as executor:
        done = [
            outcome
            for batch in batches(missing, session.site.batch_cases)
            for outcome in preprocess_batch(session.root, unsearched(batch), plan, executor, progress)
        ]
    return sorted([*ready, *done], key=lambda outcome: outcome.case)


class Crew:
    """Dask and Ray, each started when it is first asked for and let go at the end of the block."""

    def __init__(self, session: Session, model: Model, cases: int) -> None:
        self._session, self._model, self._cases = session, model, cases
        self._stack = ExitStack()
        self._executor: Executor | None = None
        self._pool: SegmentPool | None = None

    @property
    def executor(self) -> Executor:
        """Preprocesses."""
        if self._executor is None:
            engines = self._session.site.engines
            workers = min(engines.preprocess_workers, self._cases)
            self._executor = self._stack.enter_context(dask_executor(engines.dask_address, workers, engines.dask_tls))
        return self._executor

    @property
    def pool(self) -> SegmentPool:
        """Segments."""
        if self._pool is None:
            engines = self._session.site.engines
            self._stack.enter_context(ray_session(engines.ray_address, engines.ray_cpus))
            self._pool = SegmentPool(self._session.root, self._model, engines)
            self._stack.callback(self._pool.close)
        return self._pool

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def segment_cases(session: Session, model: Model, jobs: Sequence[Job]) -> list[Outcome]:
    """Preprocess and segment, one outcome per job; engines are only started when there is something to do."""
    root, outcomes, missing = session.root, [], []
    for job in jobs:
        key = key_of(job, model)
        if root.receipt(key):
            outcomes.append(Outcome(job.case.id, STAGE, "cached", key=key))
        else:
            missing.append(job)
    if missing:
        prepared = preprocess_cases(session, missing[0].cohort, [job.case for job in missing], model.plan)
        failed = {outcome.case: outcome for outcome in prepared if not outcome.done}
        outcomes += failed.values()
        ready = [job for job in missing if job.case.id not in failed]
        with Crew(session, model, len(ready)) as crew:
            for batch in batches(ready, session.site.batch_cases):
                outcomes += segment_batch(crew.pool, unsearched(batch))
    return sorted(outcomes, key=lambda outcome: outcome.case)
