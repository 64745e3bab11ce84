"""Engines and machines that give way under a night: it ends in time and says so, and the next one finishes it."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.conftest import finished, nightly, rows
from tests.walkthrough import environment

pytestmark = pytest.mark.faults

Start = Callable[..., Command]
END_S = 60.0
"""How long a run may go on after what it stands on has died."""


@pytest.fixture
def root(taken_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken_in, tmp_path / "root"))


def named(command: Command, name: str) -> psutil.Process | None:
    """A process of the command, by its own name."""
    for process in command.left():
        try:
            if process.name() == name:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("raylet", marks=pytest.mark.fault("F3")),
        pytest.param("gcs_server", marks=pytest.mark.fault("F4")),
    ],
)
def test_a_dead_node_of_ray_ends_the_night_in_time(
    vnet: Start, root: Path, tiny_receipts: dict[str, Any], name: str, record_property
) -> None:
    command = vnet(*nightly(), root=root, VNET_FAIL="segment:computed:3:sleep")
    command.until(lambda: len(receipts(root)) >= 2)
    process = named(command, name)
    assert process is not None
    process.kill()
    died = time.monotonic()
    code = command.wait(END_S)
    seconds = time.monotonic() - died
    assert code not in (0, 130), command.out
    assert "ray.lost" in command.err, command.err
    assert "Traceback" not in command.err
    until(command.over, END_S)
    found = rows(root)
    assert len(found) == CASES
    record_property("seen", f"exit code {code} after {seconds:.0f} s")
    record_property("seconds", seconds)
    finished(vnet, root, tiny_receipts)


# --- a machine with little


def run_within(before: Sequence[str], root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A night of which every process stands under another command's limits."""
    return subprocess.run(
        [*before, "vnet", *nightly("--retries", "0"), "--root", str(root)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.fault("F15")
def test_shared_memory_that_is_too_small_stops_no_night(
    root: Path, tiny_receipts: dict[str, Any], record_property
) -> None:
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("no mount of its own can be made here")
    done = run_within(small, root)
    assert done.returncode == 0, done.stderr
    assert receipts(root) == tiny_receipts
    record_property("seen", "a whole night with 16 MiB of /dev/shm")


@pytest.mark.fault("F35")
def test_too_few_open_files_are_told_before_any_work(root: Path, record_property) -> None:
    if not shutil.which("prlimit"):
        pytest.skip("no prlimit here")
    before = sorted(root.rglob("*"))
    began = time.monotonic()
    done = run_within(["prlimit", "--nofile=64"], root)
    seconds = time.monotonic() - began
    assert done.returncode == 2, done.stderr
    assert '"machine.open-files"' in done.stdout
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(root.rglob("*")) == before
    record_property("seen", "machine.open-files, exit code 2")
    record_property("seconds", seconds)
