"""A month of nights: arrivals, changes, faults, a promotion, a rollback; the ledger is checked after each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.nights_of_a_month import DEADLINE, KILLED, NIGHTS, PROMOTED, ROLLED_BACK
from tests.walkthrough import REPOSITORY, environment


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_case_is_lost_doubled_or_computed_without_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.flows.nights_of_a_month", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    nights = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(nights) == NIGHTS
    # the month did hold what it is meant to hold
    assert nights[DEADLINE]["carried-over"] >= 1
    assert "killed" in nights[KILLED]
    assert nights[PROMOTED]["computed"] > 5, "a new model does all cases again"
    rolled_back = nights[ROLLED_BACK]
    assert rolled_back["cached"] > 2 * rolled_back.get("computed", 0), "the old one's masks are there"
    assert sum(night.get("failed", 0) for night in nights) >= 5
    assert any(night["cached"] == sum(v for k, v in night.items() if k != "night") for night in nights[1:5])
