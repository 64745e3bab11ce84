"""Machines with little shared memory or few open files: a whole night, or a word before any work."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import receipts
from tests.flows.conftest import nightly
from tests.patience import slowness
from tests.walkthrough import environment

pytestmark = pytest.mark.faults


@pytest.fixture
def root(taken_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken_in, tmp_path / "root"))


def run_within(before: Sequence[str], root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A night of which every process stands under another command's limits."""
    return subprocess.run(
        [*before, "vnet", *nightly("--retries", "0"), "--root", str(root)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300 * slowness(),
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
