"""Leave to work: one run at a time, takeover from the dead, and fencing of those that come back."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from tests.flows.command import until
from vnet_core.errors import StorageError
from workers import leases
from workers.leases import GRACE_S, Claim, Run, check, is_alive, process_table, renewed, run, sweep
from workers.storage.store import Root

LOOK = """
import socket, sys
from workers.leases import is_alive
from workers.storage.store import Root
print(socket.gethostname())
print(is_alive(Root(sys.argv[1]), sys.argv[2]))
"""
WORK = "results/liver/a/0123"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def heard_of(root: Root, run_id: str, seconds_ago: float, host: str = "elsewhere") -> Run:
    """A run on another machine whose last beat is so old."""
    beat = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
    root.put_json(f"runs/{run_id}.json", {"host": host, "pid": 1, "born": 0.0, "beat": beat})
    return Run(root, run_id)


@pytest.mark.fault("F24")
def test_of_two_runs_one_gets_the_work_and_the_other_after_it_is_given_back(root: Root) -> None:
    with run(root) as first, run(root) as second:
        claim = first.claim(WORK)
        assert claim is not None
        assert claim.number == 1
        assert second.claim(WORK) is None
        assert first.claim(WORK) == claim, "asking twice is no second claim"
        first.give_back(claim)
        assert root.names("leases") == []
        assert second.claim(WORK) is not None


def test_a_second_try_fences_the_first_and_both_are_given_back_at_once(root: Root) -> None:
    with run(root) as own, run(root) as other:
        first = own.claim(WORK)
        assert first is not None
        second = renewed(root, first)
        assert second.number == 2
        check(root, second)
        with pytest.raises(StorageError, match="taken the case over"):
            check(root, first)
        with pytest.raises(StorageError, match="taken the case over"):
            renewed(root, first)
        assert other.claim(WORK) is None
        own.give_back(first)
        assert root.names("leases") == []
        assert other.claim(WORK) is not None


def test_what_another_run_has_taken_over_is_not_given_back(root: Root) -> None:
    silent = heard_of(root, "silent", GRACE_S + 1)
    first = silent.claim(WORK)
    assert first is not None
    with run(root) as other:
        taken = other.claim(WORK)
        assert taken is not None
        assert taken.number == 2
        silent.give_back(first)
        check(root, taken)
        with pytest.raises(StorageError, match="taken the case over"):
            renewed(root, first)


def test_other_work_is_free(root: Root) -> None:
    with run(root) as first, run(root) as second:
        assert first.claim(WORK)
        assert second.claim(f"{WORK}4")


@pytest.mark.fault("F24")
def test_of_many_threads_exactly_one_gets_it(root: Root) -> None:
    runs = [heard_of(root, f"run{n}", 0) for n in range(8)]
    start = threading.Barrier(8)

    def claim(one: Run) -> Claim | None:
        start.wait()
        return one.claim(WORK)

    for round_number in range(20):
        with ThreadPoolExecutor(8) as pool:
            got = [found for found in pool.map(claim, runs) if found]
        assert len(got) == 1, round_number
        Run(root, got[0].run).give_back(got[0])


@pytest.mark.parametrize(("seconds", "alive"), [(0, True), (GRACE_S - 10, True), (GRACE_S + 1, False)])
def test_a_run_elsewhere_lives_as_long_as_it_is_heard_of(root: Root, seconds: float, alive: bool) -> None:
    heard_of(root, "far", seconds)
    assert is_alive(root, "far") is alive


def test_a_run_of_this_machine_is_dead_as_soon_as_its_process_is(root: Root) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {
        "host": process_table(),
        "pid": process.pid,
        "born": psutil.Process(process.pid).create_time(),
        "beat": datetime.now(UTC).isoformat(),
    }
    root.put_json("runs/near.json", facts)
    assert is_alive(root, "near")
    process.kill()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert not is_alive(root, "near"), "a zombie does no work"
    process.communicate()
    assert not is_alive(root, "near")
    # its number under another process is not the run
    root.put_json("runs/near.json", {**facts, "pid": psutil.Process().pid, "born": 0.0})
    assert not is_alive(root, "near")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a process table of its own wants root")
def test_a_run_in_another_container_of_the_same_name_is_not_dead_because_its_process_is_not_seen(root: Root) -> None:
    with run(root) as own:
        found = subprocess.run(
            [
                "unshare",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                sys.executable,
                "-c",
                LOOK,
                root.home,
                own.id,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    name, alive = found.stdout.splitlines()
    assert name == socket.gethostname(), "only the processes are others"
    assert alive == "True"


@pytest.mark.fault("F25")
def test_a_dead_run_is_taken_over_and_must_not_publish_when_it_wakes(root: Root) -> None:
    asleep = heard_of(root, "asleep", 0)
    old = asleep.claim(WORK)
    assert old is not None
    heard_of(root, "asleep", GRACE_S + 1)
    with run(root) as own:
        new = own.claim(WORK)
        assert new is not None
        assert new.number == old.number + 1
        check(root, new)
        heard_of(root, "asleep", 0)  # it wakes
        with pytest.raises(StorageError, match="another has taken the case over") as raised:
            check(root, old)
        assert raised.value.code == "night.taken-over"
        asleep.give_back(old)
        check(root, new)  # what it gives back is not the other's
        own.give_back(new)
        with pytest.raises(StorageError):
            check(root, old)
    assert root.names("leases") == []


def test_a_run_that_is_over_leaves_nothing(root: Root) -> None:
    with run(root) as own:
        assert is_alive(root, own.id)
    assert not is_alive(root, own.id)
    assert root.names("runs") == []


def claim_and_wait(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    with run(Root(folder)) as own:
        assert own.claim(WORK)
        ready.set()
        signal.pause()


@pytest.mark.fault("F25")
def test_a_killed_process_leaves_a_claim_that_the_next_run_takes_over_at_once(root: Root) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=claim_and_wait, args=(str(root.home), ready))
    process.start()
    assert ready.wait(60)
    with run(root) as own:
        assert own.claim(WORK) is None
        process.kill()
        process.join()
        claim = own.claim(WORK)
    assert claim is not None
    assert claim.number == 2


def test_what_dead_runs_left_is_swept_away_and_what_live_ones_hold_stays(root: Root) -> None:
    dead, gone, live = heard_of(root, "dead", 0), heard_of(root, "gone", 0), heard_of(root, "live", 0)
    old = dead.claim(WORK)
    assert old is not None
    assert gone.claim(f"{WORK}2")
    kept = live.claim(f"{WORK}3")
    assert kept is not None
    heard_of(root, "dead", GRACE_S + 1)
    root.delete("runs/gone.json")
    sweep(root)
    assert root.names("runs") == ["live.json"]
    assert [f"leases/{name}" for name in root.names("leases")] == [kept.key]
    with pytest.raises(StorageError):
        check(root, old)


class Jumped(datetime):
    """The system's clock after somebody has set it."""

    by = timedelta()

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + cls.by


@pytest.mark.fault("F23")
@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_by_a_day_lets_no_two_runs_publish(
    root: Root, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    far = heard_of(root, "far", 0)
    first = far.claim(WORK)
    assert first is not None
    monkeypatch.setattr(leases, "datetime", Jumped)
    monkeypatch.setattr(Jumped, "by", timedelta(days=days))
    with run(root) as own:
        second = own.claim(WORK)
        # back: it is alive for a day longer. forward: it seems dead, and is fenced
        assert (second is None) is (days < 0)
        allowed = []
        for claim in filter(None, (first, second)):
            try:
                check(root, claim)
            except StorageError:
                continue
            allowed.append(claim)
        assert allowed == [second or first]


def test_a_claim_holds_only_its_runs_id(root: Root) -> None:
    with run(root) as own:
        claim = own.claim(WORK)
        assert claim is not None
        assert json.loads(root.get(claim.key)) == {"run": own.id}
