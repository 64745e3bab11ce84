"""Prefect tasks: one per stage over a batch of cases. Cases, keys and outcomes pass between them, never voxels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from flows.ui.artifacts import artifact_key
from flows.ui.pages import publish_night
from vnet_core.plan import Plan
from workers import preprocess as preprocess_stage
from workers.cohort import Case, Cohort, Entry, load_cohort
from workers.engines.clusters import processors
from workers.ingest import Names, ingest
from workers.ledger import Outcome, counts, nameless
from workers.nights.record import Night
from workers.reports.report import write_night
from workers.segmentation.pool import SegmentPool
from workers.segmentation.segment import Job
from workers.storage.store import Root

T = TypeVar("T")

PROGRESS_SECONDS = 2.0
"""A progress artifact is updated at most this often."""


class Progress:
    """A progress bar in the UI over a known number of cases, and a log line for each case without a result."""

    def __init__(self, key: str, total: int, description: str) -> None:
        self._what, self._total, self._done, self._sent = description, total, 0, time.monotonic()
        self._log = get_run_logger()
        artifact = create_progress_artifact(progress=0.0, key=artifact_key(key), description=description)
        assert isinstance(artifact, UUID)
        self._artifact = artifact

    def __call__(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self._done += 1
        if not outcome.done:
            self._log.warning(
                "%s %s: %s %s: %s", outcome.stage, outcome.case, outcome.state, ",".join(outcome.codes), outcome.message
            )
        self.show(self._done / self._total, f"{self._what}: {self._done} of {self._total}")

    def show(self, share: float, text: str) -> None:
        """Set the bar to a share of 0 .. 1, and say the text where a person watches a terminal."""
        if sys.stderr.isatty():
            # back to the start of the line, and clear what a longer text left behind it
            print(f"\r{text}\x1b[K", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)
        if share >= 1 or time.monotonic() - self._sent >= PROGRESS_SECONDS:
            update_progress_artifact(self._artifact, progress=min(100.0, 100 * share))
            self._sent = time.monotonic()


def unsearched(many: T) -> T:
    """``many`` as an argument of a task in which Prefect does not search every field for what other runs have left."""
    return cast(T, quote(many))


def batches(cases: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Successive slices of at most ``size`` cases."""
    return (cases[i : i + size] for i in range(0, len(cases), size))


@task(name="ingest", cache_policy=NO_CACHE)
def refresh_cohort(root: Root, name: str) -> list[Outcome]:
    """Look through the cohort's sources again; new and changed files are read."""
    cohort: Cohort = load_cohort(root, name)
    with nameless(f"ingest of cohort {name}"), ThreadPoolExecutor(processors()) as executor:
        _, outcomes = ingest(root, name, cohort.sources, executor, Names(cohort.channels, cohort.labels))
    get_run_logger().info("%s: %s", name, counts(outcomes))
    return outcomes


@task(name="preprocess", cache_policy=NO_CACHE)
def preprocess_batch(
    root: Root,
    cases: Sequence[Case],
    plan: Plan,
    executor: Executor,
    on_outcome: Callable[[Outcome], None],
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[Outcome]:
    """Preprocess a batch of cases on Dask, as far as there is time."""
    return preprocess_stage.preprocess(root, cases, plan, executor, on_outcome, may_go_on)


@task(name="segment", cache_policy=NO_CACHE)
def segment_batch(
    pool: SegmentPool,
    jobs: Sequence[Job],
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    may_begin: Callable[[Job], bool] = lambda job: True,
) -> list[Outcome]:
    """Segment a batch of cases on the pool of Ray actors, as far as there is time."""
    return pool.run(jobs, on_outcome, may_begin)


@task(name="report", cache_policy=NO_CACHE)
def report_night(
    root: Root, night: Night, outcomes: Sequence[Outcome], entries: Sequence[Entry]
) -> list[dict[str, Any]]:
    """Write the night's tables, and its report and table of volumes as artifacts; returns the rows."""
    rows = write_night(root, night, outcomes, entries)
    publish_night(root, night, rows)
    return rows
