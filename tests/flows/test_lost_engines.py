"""The death of Ray itself in the middle of the work: named, within a minute, and the next run finishes."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.conftest import finished, nightly, rows
from tests.patience import slowness
from tests.workers.tiny_cohort import TRAINED, write_labelled
from workers.storage.store import Root

pytestmark = pytest.mark.faults

Start = Callable[..., Command]
END_S = 60.0
"""How long a command may go on after Ray has died, on a quiet machine."""
PROCESSES = [
    pytest.param("raylet/raylet", marks=pytest.mark.fault("F3"), id="raylet"),
    pytest.param("gcs/gcs_server", marks=pytest.mark.fault("F4"), id="gcs_server"),
]


def end_in_time(command: Command, process: str) -> float:
    """Kill a process of Ray, and see its command end with ``ray.lost`` and leave nothing; seconds to its end."""
    found = command.process(process)
    assert found is not None
    found.kill()
    died = time.monotonic()
    assert command.wait(END_S) == 2, command.err
    seconds = time.monotonic() - died
    assert seconds < END_S * slowness()
    assert "ray.lost" in command.err
    assert "Traceback" not in command.err
    until(command.over, END_S)
    return seconds


@pytest.mark.parametrize("process", PROCESSES)
def test_a_night_that_loses_ray_ends_in_a_minute_and_goes_on_when_run_again(
    vnet: Start, taken_in: Path, tiny_receipts: dict[str, Any], tmp_path: Path, process: str, record_property
) -> None:
    root = Path(shutil.copytree(taken_in, tmp_path / "root"))
    # the third case never ends: so the night is in the midst of its work when Ray dies
    command = vnet(*nightly(), root=root, VNET_FAIL="segment:computed:3:sleep")
    command.until(lambda: len(receipts(root)) >= 2)
    seconds = end_in_time(command, process)
    assert "run the same command again" in command.err
    assert len(rows(root)) == CASES
    record_property("seen", f"ray.lost, exit code 2, after {seconds:.0f} s")
    record_property("seconds", seconds)
    finished(vnet, root, tiny_receipts)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_training_that_loses_ray_ends_in_a_minute_and_goes_on_from_its_checkpoint(
    vnet: Start, tmp_path: Path, process: str, record_property
) -> None:
    plan, root = tmp_path / "plan.toml", Root(tmp_path / "root")
    plan.write_text(f"{TRAINED}full_validation_every = 100\n")
    for number in range(4):
        write_labelled(tmp_path / "scans", f"case{number}", number)
    taken = vnet("ingest", tmp_path / "scans", "--cohort", "train", "--label", "2=cuboid", root=root.home)
    assert taken.wait() == 0, taken.err
    train = ("train", "--cohort", "train", "--model", "cuboids")
    command = vnet(*train, "--plan", plan, "--minutes", "60", root=root.home)
    prefix = "training/cuboids/v1/checkpoints"
    command.until(lambda: any(root.receipt(f"{prefix}/{step}") for step in root.names(prefix)))
    seconds = end_in_time(command, process)
    assert "--resume" in command.err
    record_property("seen", f"a training: ray.lost, exit code 2, after {seconds:.0f} s; resumed from its checkpoint")
    record_property("seconds", seconds)
    again = vnet(*train, "--resume", "--minutes", "0.1", root=root.home)
    assert again.wait() == 0, again.err
    first, second = root.get_json("models/cuboids/v1/model.json")["training"]["attempts"]
    assert first["from_step"] == 0 < second["from_step"]
