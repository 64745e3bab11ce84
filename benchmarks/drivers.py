"""What handing out costs: many cases through many workers that only sleep.

    python -m benchmarks.drivers --cases 10000 --workers 64 --seconds 2 --hardware NAME

The stage ``preprocess``, its executor by address, its versions check, marks and receipts are the program's; a case's
work is a sleep between half and one and a half of ``--seconds``. The scheduler is a process of its own, and so are all
workers together, each of which is a Dask worker of one thread on a port of its own. Idle is the time of the workers
between the call of the stage and its return in which they do not sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.workers.through import Through
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Plan
from workers.cohort import Case
from workers.engines.dask_engine import DaskExecutor, dask_executor
from workers.engines.tries import Work
from workers.ledger import Outcome, process_peak_bytes
from workers.preprocess import STAGE, preprocess
from workers.storage.store import Root

PLAN = Plan(labels=(Label(value=1, name="organ"),))
GRID = Geometry((200, 512, 512), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
MOST_MIB = 1024
MOST_CORES = 1.0
MOST_IDLE = 0.05


@dataclass(frozen=True)
class Measured:
    """One call of the stage."""

    cases: int
    workers: int
    wall_s: float
    slept_s: float
    """Of all workers together."""
    driver_cpu_s: float
    driver_peak_mib: float
    others_cpu_s: float
    """Of the scheduler and the workers together."""

    @property
    def idle(self) -> float:
        """Share of the workers' time."""
        return 1 - self.slept_s / (self.workers * self.wall_s)

    @property
    def cores(self) -> float:
        """Of the driver, on average."""
        return self.driver_cpu_s / self.wall_s


class Sleeping(Through):
    """The program's executor, with a sleep in place of each case's work."""

    def __init__(self, executor: DaskExecutor, seconds: float) -> None:
        super().__init__(executor)
        self._seconds, self._random = seconds, random.Random(7)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As the program submits it, with other work."""
        root_url, mark, work, this_worker = args
        seconds = self._seconds * self._random.uniform(0.5, 1.5)
        asleep: Work = replace(work, function=sleep, arguments=(work.case, seconds))
        return super().submit(fn, root_url, mark, asleep, this_worker)


def sleep(case: str, seconds: float) -> Outcome:
    """What a worker does."""
    began = time.perf_counter()
    time.sleep(seconds)
    return Outcome(case, STAGE, "computed", seconds=time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--hardware", default="this-machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = measure(options.cases, options.workers, options.seconds)
    # brings torch in, which the process of a night does without
    from benchmarks.machine import RESULTS, provenance, tell

    output = options.output or RESULTS / f"drivers_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    tell([*lines(found, options.seconds), *provenance("dask", "distributed")], output)


def measure(number: int, workers: int, seconds: float) -> Measured:
    cases = [Case(f"case-{n:05d}", (f"/scans/{n}.nii.gz",), digest=f"{n:064x}", geometry=GRID) for n in range(number)]
    with tempfile.TemporaryDirectory(prefix="vnet-drivers-") as folder, served(workers) as (address, others_cpu_s):
        root = Root(Path(folder) / "root")
        with dask_executor(address, workers) as executor:
            cpu_s, others_before_s, began = time.process_time(), others_cpu_s(), time.perf_counter()
            outcomes = preprocess(root, cases, PLAN, Sleeping(executor, seconds))
            wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
            others_s = others_cpu_s() - others_before_s
        assert [outcome.state for outcome in outcomes] == ["computed"] * number
        assert root.names("volumes") == [], "no mark stays"
    slept_s = sum(outcome.seconds for outcome in outcomes)
    return Measured(number, workers, wall_s, slept_s, cpu_s, process_peak_bytes() / 2**20, others_s)


@contextmanager
def served(workers: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Address of a scheduler with its workers, and what tells the processor seconds of both so far."""
    with (
        beside(scheduler) as (address, scheduler_cpu_s),
        beside(all_workers, address, workers) as (_, workers_cpu_s),
    ):
        yield address, lambda: scheduler_cpu_s() + workers_cpu_s()


@contextmanager
def beside(
    part: Callable[..., Coroutine[Any, Any, None]], *arguments: Any
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What another process says once it serves, and what tells its processor seconds so far."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(part, *arguments, theirs), daemon=True)
    process.start()

    def cpu_s() -> float:
        ours.send("cpu")
        return float(ours.recv())

    try:
        yield ours.recv(), cpu_s
    finally:
        ours.send("end")
        process.join()


def serve(part: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
    """One part, in its process, until it is told to end; without twelve lines of Dask's log for each worker."""
    import distributed  # sets the levels of its log

    logging.getLogger(distributed.__name__).setLevel(logging.WARNING)
    asyncio.run(part(*arguments))


async def scheduler(connection: Connection) -> None:
    import distributed

    async with distributed.Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as one:
        await _serve(one.address, connection)


async def all_workers(address: str, workers: int, connection: Connection) -> None:
    import distributed

    # a worker has a thread, files and connections of its own
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    async with AsyncExitStack() as started:
        for name in range(workers):
            one = distributed.Worker(address, name=name, nthreads=1, host="127.0.0.1", memory_limit=0, dashboard=False)
            await started.enter_async_context(one)
        await _serve(address, connection)


async def _serve(address: str, connection: Connection) -> None:
    connection.send(address)
    while await asyncio.to_thread(connection.recv) != "end":
        connection.send(time.process_time())


def lines(found: Measured, seconds: float) -> list[str]:
    """The results file."""
    held = {
        f"driver below {MOST_MIB} MiB": found.driver_peak_mib < MOST_MIB,
        f"below {MOST_CORES:.0f} core": found.cores < MOST_CORES,
        f"workers idle below {MOST_IDLE:.0%}": found.idle < MOST_IDLE,
    }
    return [
        "# What handing out costs",
        "",
        f"{found.cases:,} cases of {0.5 * seconds:g} to {1.5 * seconds:g} s, asleep, through {found.workers} Dask"
        " workers of one thread, by address. The driver is the process that calls the stage; idle is the share of the"
        " workers' time, from the call to its return, in which they do not sleep: waiting, marks, and the tail at the"
        " end.",
        "",
        "| cases | workers | wall, s | without idling, s | idle | driver, CPU s | of a core | driver's peak, MiB"
        " | scheduler and workers, CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {found.cases} | {found.workers} | {found.wall_s:.1f} | {found.slept_s / found.workers:.1f}"
        f" | {found.idle:.2%} | {found.driver_cpu_s:.1f} | {found.cores:.2f} | {found.driver_peak_mib:.0f}"
        f" | {found.others_cpu_s:.1f} |",
        "",
        "; ".join(f"{what}: **{'yes' if true else 'no'}**" for what, true in held.items()) + ".",
        "",
    ]


if __name__ == "__main__":
    main()
