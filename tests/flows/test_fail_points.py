"""kill -9 of every kind of process at every exact point of a night: the next run finishes it with the same bytes."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.conftest import finished, nightly
from tests.walkthrough import REPOSITORY, environment
from vnet_core.errors import ConfigError
from workers.failpoints import POINTS, fail_point
from workers.storage.store import Root

Start = Callable[..., Command]
END_S = 60.0
"""How long a run may go on after the death of one of its processes, unless it finishes its night."""


@pytest.mark.faults
@pytest.mark.fault("F7")
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_dies_at_a_point_costs_no_case(
    vnet: Start, taken_in: Path, tiny_receipts: dict[str, Any], tmp_path: Path, point: str
) -> None:
    root = Path(shutil.copytree(taken_in, tmp_path / "root"))
    number = 3 if point in ("night:settled", "segment:sealed", "preprocess:sealed") else 1
    once = tmp_path / "died"
    command = vnet(*nightly(), root=root, VNET_FAIL=f"{point}:{number}:kill", VNET_FAIL_ONCE=str(once))
    command.until(once.exists)
    died = time.monotonic()
    command.wait(END_S if point.startswith("night:") else 300)
    survived = not point.startswith("night:")
    assert survived or time.monotonic() - died < END_S
    until(command.over, END_S)
    finished(vnet, root, tiny_receipts)


@pytest.mark.faults
@pytest.mark.fault("F8")
@pytest.mark.parametrize("masks", [0, 2, CASES - 1])
def test_a_prefect_server_that_dies_costs_no_case(
    vnet: Start, taken_in: Path, tiny_receipts: dict[str, Any], tmp_path: Path, masks: int
) -> None:
    root = Path(shutil.copytree(taken_in, tmp_path / "root"))
    command = vnet(*nightly(), root=root)
    command.until(lambda: Root(root).names("runs") and len(receipts(root)) >= masks)
    server = command.process("flows.server")
    assert server is not None
    server.kill()
    died = time.monotonic()
    command.wait(END_S)
    until(command.over, END_S - (time.monotonic() - died) + 1)
    finished(vnet, root, tiny_receipts)


def test_a_point_acts_at_the_passage_that_was_named_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VNET_FAIL", "segment:read:2:raise,segment:computed:1:raise")
    monkeypatch.setenv("VNET_FAIL_ONCE", str(tmp_path / "acted"))
    fail_point("segment:read")
    with pytest.raises(OSError, match="segment:read"):
        fail_point("segment:read")
    fail_point("segment:computed")  # another has acted
    monkeypatch.setenv("VNET_FAIL", "segment:nowhere:1:kill")
    with pytest.raises(ConfigError, match="segment:nowhere:1:kill"):
        fail_point("segment:read")


def test_what_is_made_at_a_point_is_logged_even_where_the_process_is_killed_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    passes = "from workers.failpoints import fail_point\nfail_point('night:begun')\nfail_point('segment:read', 'a/b')\n"
    env = environment() | {"VNET_FAIL_LOG": str(log), "VNET_FAIL": "segment:read:1:kill"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", passes], cwd=REPOSITORY, env=env)
        assert done.returncode == -signal.SIGKILL
    lines = [line.split(" ") for line in log.read_text("utf-8").splitlines()]
    assert [line[:2] for line in lines] == [["segment:read", "a/b"]] * 2
    assert 0 < int(lines[0][2]) < int(lines[1][2]) <= time.time_ns()
