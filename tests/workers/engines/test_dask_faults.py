"""Processes of a Dask cluster that are killed while cases are preprocessed, and cases that kill theirs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask as dask_library
import psutil
import pytest

from tests.patience import slowness, until
from tests.workers.dask_processes import Dask, dask_processes
from tests.workers.known_model import known_plan
from tests.workers.misfortune import Watched, begun, pids
from tests.workers.tiny_cohort import SPACING_MM, take_in, write_scan
from vnet_core.errors import EngineError
from workers.cohort import Case, load_entries
from workers.engines.dask_engine import DaskExecutor, dask_executor
from workers.ledger import Outcome
from workers.preprocess import preprocess
from workers.storage.store import Root

pytestmark = pytest.mark.faults

PLAN = known_plan(SPACING_MM, crop=False)
LIMIT_BYTES = 900 << 20
"""Above what a worker takes that has imported torch and reads a tiny scan."""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("scans")
    names = [*(f"fine-{number}" for number in range(6)), "slow-a", "slow-b", "poison-a", "hog-a"]
    for seed, name in enumerate(names):
        write_scan(folder / "scans", name, seed)
    root = Root(folder / "root")
    take_in(root, "all", [folder / "scans"])
    return {entry.case.id: entry.case for entry in load_entries(root, "all")}


class Trial:
    """A run of the stage in a thread, on a cluster of two workers, with its root and log."""

    def __init__(self, folder: Path, dask: Dask) -> None:
        self.root, self.log, self.dask = Root(folder / "root"), folder / "log" / "begun", dask
        self.log.parent.mkdir()
        self._thread = ThreadPoolExecutor(1)

    def start(self, cases: Sequence[Case], executor: DaskExecutor) -> None:
        watched = Watched(executor, self.log)
        self._run = self._thread.submit(preprocess, self.root, cases, PLAN, watched)

    def start_with_two_slow(self, scans: dict[str, Case], executor: DaskExecutor) -> None:
        """Return when both workers have a case in hand that waits."""
        self.start(named(scans, "fine", "slow"), executor)
        until(lambda: begun(self.log)["slow-a"] and begun(self.log)["slow-b"])

    def worker(self, case: str) -> psutil.Process:
        """That began a case first."""
        return psutil.Process(pids(self.log, case)[0])

    def outcomes(self) -> dict[str, Outcome]:
        return {outcome.case: outcome for outcome in self._run.result(300 * slowness())}

    def sealed(self) -> set[str]:
        return {name for name in self.root.names("volumes") if self.root.receipt(f"volumes/{name}")}

    def go(self) -> None:
        """Let those go on that wait."""
        (self.log.parent / "go").touch()


def trial(folder: Path, dask: Dask, workers: int = 2, *arguments: str) -> Trial:
    for _ in range(workers):
        dask.add_worker(*arguments)
    return Trial(folder, dask)


def named(scans: dict[str, Case], *kinds: str) -> list[Case]:
    return [case for name, case in scans.items() if name.partition("-")[0] in kinds]


def done_once_but(run: Trial, outcomes: dict[str, Outcome], *twice: str) -> None:
    """All are done, and only those named were begun twice."""
    assert all(outcome.done for outcome in outcomes.values())
    assert begun(run.log) == dict.fromkeys(outcomes, 1) | dict.fromkeys(twice, 2)


@pytest.mark.fault("F5")
def test_a_worker_that_is_killed_costs_what_it_had_in_hand(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start_with_two_slow(scans, executor)
        before = run.sealed()
        run.worker("slow-a").kill()
        run.go()
        outcomes = run.outcomes()
    done_once_but(run, outcomes, "slow-a")
    assert len(run.sealed()) == len(outcomes) > len(before)


@pytest.mark.fault("F5")
def test_a_nanny_that_is_killed_takes_its_worker_along_and_the_other_goes_on(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start_with_two_slow(scans, executor)
        worker = run.worker("slow-a")
        nanny = next(nanny for nanny in dask.workers if worker in nanny.children(recursive=True))
        nanny.kill()
        until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 60)
        run.go()
        outcomes = run.outcomes()
    done_once_but(run, outcomes, "slow-a")


@pytest.mark.fault("F5")
def test_workers_that_are_killed_together_cost_what_they_had_in_hand(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start_with_two_slow(scans, executor)
        for name in ("slow-a", "slow-b"):
            run.worker(name).kill()
        run.go()
        outcomes = run.outcomes()
    done_once_but(run, outcomes, "slow-a", "slow-b")


@pytest.mark.fault("F5")
def test_a_scheduler_that_is_stopped_is_told(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start_with_two_slow(scans, executor)
        stopped = time.monotonic()
        dask.scheduler.suspend()
        run.go()
        with pytest.raises(EngineError) as caught:
            run.outcomes()
    assert caught.value.code == "dask.lost"
    assert time.monotonic() - stopped < 90 * slowness(), (
        "with the end of the client, which asks the scheduler once more"
    )


@pytest.mark.fault("F5")
def test_a_scheduler_that_is_killed_is_told_and_what_was_published_is_not_done_again(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start_with_two_slow(scans, executor)
        died = time.monotonic()
        dask.scheduler.kill()
        with pytest.raises(EngineError) as caught:
            run.outcomes()
    assert time.monotonic() - died < 60 * slowness()
    assert caught.value.code == "dask.lost"
    assert dask.address in caught.value.message
    published, before = run.sealed(), begun(run.log)
    run.go()
    with dask_processes() as other, dask_executor(other.address, 2) as executor:
        for _ in range(2):
            other.add_worker()
        run.start(named(scans, "fine", "slow"), executor)
        outcomes = run.outcomes()
    assert all(outcome.done for outcome in outcomes.values())
    again = begun(run.log) - before
    assert set(again.values()) == {1}
    assert len(again) == len(outcomes) - len(published) >= 2


class LastWords:
    """An answer that ends its worker as soon as it is fetched."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return LastWords, ()


def answer_once(folder: str) -> LastWords:
    """The second worker does not even come to an answer."""
    if (Path(folder) / "answered").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / "answered").touch()
    return LastWords()


@pytest.mark.fault("F5")
def test_an_answer_that_is_lost_with_one_worker_after_another_is_a_death(tmp_path: Path) -> None:
    """Work that has ended, is done again since its worker died with the answer, and then costs another one."""
    with dask_executor(None, 1) as executor:
        error = executor.submit(answer_once, str(tmp_path)).exception(120 * slowness())
        assert error is not None
        assert executor.is_death(error)


@pytest.mark.fault("F6")
def test_poison_by_address_costs_three_workers_and_no_neighbour(scans, tmp_path: Path) -> None:
    """A stock scheduler gives the work of a dead worker to the next, three times over."""
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask)
        run.start(named(scans, "fine", "poison"), executor)
        outcomes = run.outcomes()
    counts = begun(run.log)
    poison = outcomes.pop("poison-a")
    assert (poison.state, poison.codes, counts["poison-a"]) == ("failed", ("case.kills-worker",), 3)
    assert all(outcome.done for outcome in outcomes.values())
    assert all(counts[name] == 1 for name in outcomes), counts


@pytest.mark.fault("F14")
def test_a_case_that_takes_more_memory_than_its_worker_may_is_named(scans, tmp_path: Path) -> None:
    with dask_processes() as dask, dask_executor(dask.address, 2) as executor:
        run = trial(tmp_path, dask, 2, "--memory-limit", str(LIMIT_BYTES))
        run.start(named(scans, "fine", "hog"), executor)
        outcomes = run.outcomes()
    counts = begun(run.log)
    hog = outcomes.pop("hog-a")
    assert (hog.state, hog.codes, counts["hog-a"]) == ("failed", ("case.out-of-memory",), 3)
    assert f"limit of {LIMIT_BYTES >> 20} MiB" in hog.message
    assert all(outcome.done for outcome in outcomes.values())


@pytest.mark.fault("F14")
def test_memory_is_named_on_this_machines_own_cluster_too(scans, tmp_path: Path) -> None:
    """Its limit is this machine's memory by core, of which a share is taken here."""
    share = LIMIT_BYTES / (psutil.virtual_memory().total / psutil.cpu_count())
    with (
        dask_library.config.set({"distributed.worker.memory.terminate": share}),
        dask_executor(None, 2) as executor,
    ):
        log = tmp_path / "log" / "begun"
        log.parent.mkdir()
        outcomes = preprocess(Root(tmp_path / "root"), named(scans, "fine", "hog"), PLAN, Watched(executor, log))
    told = {outcome.case: outcome.codes for outcome in outcomes}
    assert told.pop("hog-a") == ("case.out-of-memory",)
    assert set(told.values()) == {()}
