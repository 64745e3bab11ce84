"""``vnet serve`` from its start to its end: a missed night is caught up, cancelled in the UI, and run to its end."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.browser import call_api
from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES
from workers.nights.record import load_night, records
from workers.reports.report import read_rows
from workers.storage.store import Root

SITE = """
timezone = "Europe/Berlin"

[[nightly]]
cohort = "many"
model = "known"
cron = "0 1 * * *"
most_failures = 0
"""


def answer(url: str, path: str, body: Any = None) -> Any:
    """What the API says; None while it does not answer."""
    try:
        return call_api(url, path, body)
    except OSError:
        return None


def caught_up(url: str) -> list[dict]:
    return answer(url, "/flow_runs/filter", {"flow_runs": {"tags": {"all_": ["catch-up"]}}}) or []


@pytest.mark.slow
def test_a_missed_night_is_caught_up_cancelled_and_done_by_the_next_run(
    vnet: Callable[..., Command], taken_in: Path, prefect_home: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(taken_in, tmp_path / "root"))
    root = Root(folder)
    prefect_home(folder / "prefect")
    (tmp_path / "site.toml").write_text(SITE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ("serve", "--site", str(tmp_path / "site.toml"), "--port", str(port))
    served = vnet(*options, root=folder)
    served.until(lambda: "catching up: many" in served.err)
    assert "created: nightly/many" in served.err
    assert "created: vnet: many with too many failures" in served.err

    # cancelled while its engines work
    served.until(lambda: served.process("raylet/raylet") and records(root, "many"))
    (run,) = caught_up(url)
    call_api(url, f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    engines = ("raylet", "gcs_server", "prefect.engine", "distributed", "ray::")
    until(lambda: not any(served.process(part) for part in engines), 30)
    served.until(lambda: call_api(url, f"/flow_runs/{run['id']}")["state_type"] == "CANCELLED")
    (night,) = (load_night(root, "many", one) for one in records(root, "many"))
    assert night.stopped == "cancelled"
    done = receipts(folder)
    rows = read_rows(root, "many", night.id)
    assert {row["case"] for row in rows if row["state"] == "computed"} == done.keys()
    assert len({row["case"] for row in rows}) == TINY_CASES

    # by Quick run
    deployment = call_api(url, "/deployments/name/nightly/many")
    asked = {"state": {"type": "SCHEDULED"}}
    again = call_api(url, f"/deployments/{deployment['id']}/create_flow_run", asked)["id"]
    served.until(lambda: call_api(url, f"/flow_runs/{again}")["state_type"] == "COMPLETED")
    states = load_night(root, "many", records(root, "many")[-1]).counts
    assert states.get("cached", 0) + states["computed"] == TINY_CASES
    assert states.get("cached", 0) == len(done)
    assert served.interrupt() == 0
    until(lambda: not served.left(), 30)

    # a night has been since: nothing is caught up, and nothing made anew
    served = vnet(*options, root=folder)
    served.until(lambda: "nightly/many" in served.err)
    served.until(lambda: (answer(url, "/deployments/name/nightly/many") or {}).get("status") == "READY")
    assert "catching up" not in served.err
    assert not any(change in served.err for change in ("created:", "changed:", "removed:")), served.err
    assert len(caught_up(url)) == 1
    assert served.interrupt() == 0
    assert json.loads((folder / "nights" / "many" / f"{night.id}.json").read_text("utf-8"))["stopped"] == "cancelled"
