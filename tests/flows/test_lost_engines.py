"""The death of Ray itself in the middle of a night: named, within a minute, and the next run finishes."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.test_night_engine import nightly

Start = Callable[..., Command]
END_S = 60.0


@pytest.mark.slow
@pytest.mark.parametrize("process", ["gcs_server", "raylet/raylet"])
@pytest.mark.fault("F3", "F4")
def test_a_night_that_loses_ray_ends_in_a_minute_and_goes_on_when_run_again(
    vnet: Start, taken_in: Path, tmp_path: Path, process: str
) -> None:
    root = Path(shutil.copytree(taken_in, tmp_path / "root"))
    # the first case that is computed never ends: so it is in the midst of its work when Ray dies
    once = tmp_path / "asleep"
    command = vnet(*nightly(), root=root, VNET_FAIL="segment:computed:2:sleep", VNET_FAIL_ONCE=str(once))
    command.until(once.exists)
    found = command.process(process)
    assert found is not None
    found.kill()
    died = time.monotonic()
    assert command.wait(END_S) == 2, command.err
    assert time.monotonic() - died < END_S
    assert "ray.lost" in command.err
    assert "run the same command again" in command.err
    assert "Traceback" not in command.err
    until(command.over, END_S)
    again = vnet(*nightly(), root=root)
    assert again.wait() == 0, again.err
    assert len(receipts(root)) == CASES
