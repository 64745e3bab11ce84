"""Signals, databases, disks and pipes that fail a whole night: it ends in time, says why, and the next finishes it."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.conftest import finished, nightly, rows
from tests.flows.test_faults import tmpfs
from tests.patience import slowness
from tests.walkthrough import environment
from workers.leases import GRACE_S
from workers.reports.report import read_rows
from workers.storage.store import Root

pytestmark = pytest.mark.faults

Start = Callable[..., Command]
END_S = 30.0
"""How long everything may take to end that has been asked to, on a quiet machine."""


@pytest.fixture
def root(taken_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken_in, tmp_path / "root"))


# --- signals


def once(command: Command, number: int) -> None:
    os.killpg(command.pid, number)


def twice(command: Command, number: int) -> None:
    """As somebody who loses patience does."""
    os.killpg(command.pid, number)
    time.sleep(0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.pid, number)


def to_itself(command: Command, number: int) -> None:
    """To the command alone, as a service manager does."""
    os.kill(command.pid, number)


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGTERM, to_itself), (signal.SIGINT, once), (signal.SIGINT, twice)],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C twice"],
)
def test_a_night_that_is_asked_to_end_does_so_with_all_that_it_has_started(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], number: int, send: Callable, record_property
) -> None:
    command = vnet(*nightly(), root=root, VNET_FAIL="segment:computed:3:sleep")
    command.until(lambda: len(receipts(root)) >= 2)
    began = time.monotonic()
    send(command, number)
    code = command.wait(END_S)
    until(lambda: not command.left(), END_S)
    seconds = time.monotonic() - began
    assert seconds < END_S * slowness()
    assert code != 0
    assert "Traceback" not in command.err
    record_property("seen", f"exit code {code}, nothing left after {seconds:.0f} s")
    record_property("seconds", seconds)
    finished(vnet, root, tiny_receipts)


@pytest.mark.fault("F25", "F30")
def test_a_night_that_was_stopped_and_goes_on_publishes_nothing_that_another_has_taken_over(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    asleep = vnet(*nightly("--retries", "0"), root=root, VNET_FAIL="segment:computed:3:sleep")
    asleep.until(lambda: len(receipts(root)) >= 2)
    everybody = asleep.left()
    for process in everybody:
        process.suspend()
    began = time.monotonic()
    other = vnet(*nightly(), root=root)
    assert other.wait(GRACE_S + 240) == 0, other.err
    seconds = time.monotonic() - began
    assert receipts(root) == tiny_receipts
    stamps = {path: path.stat().st_mtime_ns for path in root.glob("results/many/*/*/receipt.json")}
    for process in everybody:
        with contextlib.suppress(Exception):
            process.resume()
    time.sleep(5)  # its actor sleeps for an hour; everything else goes on
    asleep.interrupt()
    until(asleep.over, END_S + 60)
    assert {path: path.stat().st_mtime_ns for path in root.glob("results/many/*/*/receipt.json")} == stamps
    record_property("seen", f"taken over after {GRACE_S:.0f} s of silence, done after {seconds:.0f} s; nothing twice")
    record_property("seconds", seconds)


# --- Prefect's database


@pytest.mark.fault("F9")
def test_a_database_that_is_locked_for_a_while_changes_no_result(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    database = root / "prefect" / "prefect.db"
    command = vnet(*nightly(), root=root)
    command.until(lambda: Root(root).names("runs") and database.exists())
    with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        time.sleep(20)
        lock.execute("ROLLBACK")
    code = command.wait()
    assert "Traceback" not in command.err
    record_property("seen", f"locked for 20 s: exit code {code}, {len(receipts(root))} of {CASES} masks at once")
    finished(vnet, root, tiny_receipts)


@pytest.mark.fault("F9")
def test_a_database_that_is_none_is_told_and_no_result_depends_on_it(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    database = root / "prefect" / "prefect.db"
    database.parent.mkdir(exist_ok=True)
    database.write_bytes(b"no database at all" * 1000)
    command = vnet(*nightly(), root=root)
    code = command.wait(120)
    assert code == 2, command.out + command.err
    assert "prefect.server-start" in command.out
    assert "Traceback" not in command.err.replace("Traceback (most recent call last)", "", 1), (
        "the server's own at most"
    )
    record_property("seen", "prefect.server-start, exit code 2; the same night after the file was removed")
    for path in database.parent.glob("prefect.db*"):
        path.unlink()
    finished(vnet, root, tiny_receipts)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write, root neither; skips where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault("F9", "F13")
def test_a_folder_of_the_database_that_is_read_only_is_told_before_any_work(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    with read_only(root / "prefect"):
        command = vnet(*nightly(), root=root)
        assert command.wait(120) == 2, command.out + command.err
        assert "store.unwritable" in command.out
        assert "Traceback" not in command.err
        assert receipts(root) == {}
    record_property("seen", "store.unwritable, exit code 2")
    finished(vnet, root, tiny_receipts)


# --- disks


@pytest.mark.fault("F13")
def test_results_that_cannot_be_written_fail_case_by_case_and_are_made_by_the_next_night(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    with read_only(root / "results"):
        command = vnet(*nightly("--retries", "0"), root=root)
        assert command.wait() == 4, command.out + command.err
        assert set(rows(root).values()) == {"failed"}
        assert "Read-only file system" in command.out
    record_property("seen", "a failed row for every case, with the system's words")
    finished(vnet, root, tiny_receipts)


@pytest.mark.fault("F12")
def test_a_disk_without_inodes_is_told_and_the_same_command_finishes_after_it_was_enlarged(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], tmp_path: Path, record_property
) -> None:
    used = sum(1 for _ in root.rglob("*"))
    with tmpfs(tmp_path / "disk", f"size=256m,nr_inodes={used + 120}") as disk:
        small = Path(shutil.copytree(root, disk / "root"))
        full = vnet(*nightly("--retries", "0"), root=small)
        code = full.wait()
        assert code != 0
        assert "store.full: no space is left" in full.err + full.out or "store.full" in full.out, full.err
        assert len(receipts(small)) < CASES
        subprocess.run(["mount", "-o", "remount,nr_inodes=100000", str(disk)], check=True)
        finished(vnet, small, tiny_receipts)
        record_property("seen", f"store.full, exit code {code}; done after it was enlarged")


# --- pipes


def output_to(target: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    """A command whose output goes where a line of the shell says."""
    line = f'vnet "$@" --root "{root}" {target}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300 * slowness(),
    )


@pytest.mark.fault("F34")
def test_a_reader_that_goes_away_is_no_error(root: Path, record_property) -> None:
    # head is gone before the first line
    done = output_to("| (exec <&-; sleep 0.1)", "models", "list", root=root)
    assert (done.returncode, done.stderr) == (0, "")
    done = output_to("| head -1", "models", "list", root=root)
    assert (done.returncode, done.stderr) == (0, "")
    record_property("seen", "exit code 0, nothing on standard error")


@pytest.mark.fault("F34")
def test_output_that_is_full_is_told(root: Path, record_property) -> None:
    done = output_to("> /dev/full", "models", "list", root=root)
    assert done.returncode == 2
    assert done.stderr == "vnet: the work is done, but standard output cannot be written (No space left on device)\n"
    record_property("seen", "told on standard error, exit code 2")


@pytest.mark.fault("F34")
def test_a_night_whose_log_is_full_or_gone_is_a_night(
    root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    for target in ("2> /dev/full", "2> >(exec <&-)"):
        done = output_to(target, *nightly(), root=root)
        assert done.returncode == 0, done.stderr
    assert receipts(root) == tiny_receipts
    newest = Root(root).names("nights/many")[-1].removesuffix(".json")
    assert len({row["case"] for row in read_rows(Root(root), "many", newest)}) == CASES
    record_property("seen", "a whole night")
