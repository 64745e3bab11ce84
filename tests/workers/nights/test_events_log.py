"""One whole line per case and stage, whoever writes at the same time, and nothing that names a patient."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.files import file_of
from tests.walkthrough import REPOSITORY
from tests.workers.storage.test_store import tmpfs
from vnet_core.errors import StorageError
from workers.ledger import Outcome
from workers.nights.events_log import EventLog, read_events
from workers.storage.store import Root

NOW = datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=UTC)
NIGHT = "2026-11-23_010000"
FAILED = Outcome("a", "segment", "failed", ("segment.memory",), "DOE^JOHN needs 9 GiB", None, 1.25, 4096)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_line_by_hand(root: Root) -> None:
    log = EventLog(root, "liver", NIGHT)
    log(FAILED, NOW, attempt=2, worker="gpu1:77")
    log(Outcome("b", "ingest", "refused", ("scan.empty",)), NOW + timedelta(seconds=1))
    lines = file_of(root, f"logs/liver/{NIGHT}.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "time": "2026-11-23T01:02:03.456+00:00",
        "cohort": "liver",
        "night": NIGHT,
        "case": "a",
        "stage": "segment",
        "state": "failed",
        "codes": ["segment.memory"],
        "seconds": 1.25,
        "peak_bytes": 4096,
        "attempt": 2,
        "worker": "gpu1:77",
    }
    assert "DOE" not in "".join(lines)
    assert read_events(root, "liver", NIGHT) == [json.loads(line) for line in lines]
    assert [event["attempt"] for event in read_events(root, "liver", NIGHT)] == [2, 1]


def test_a_night_without_a_log_has_no_events(root: Root) -> None:
    EventLog(root, "liver", NIGHT)
    assert read_events(root, "liver", NIGHT) == []
    assert root.names("logs") == []


def test_threads_write_whole_lines(root: Root) -> None:
    log = EventLog(root, "liver", NIGHT)
    outcomes = [Outcome(f"case-{n}", "segment", "computed", ("x" * 200,)) for n in range(500)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda outcome: log(outcome, NOW), outcomes))
    events = read_events(root, "liver", NIGHT)
    assert {event["case"] for event in events} == {outcome.case for outcome in outcomes}
    assert len(events) == len(file_of(root, f"logs/liver/{NIGHT}.jsonl").read_bytes().splitlines()) == 500


PROGRAM = """
import sys
from datetime import UTC, datetime
from workers.nights.events_log import EventLog
from workers.ledger import Outcome
from workers.storage.store import Root
from tests.files import file_of
log = EventLog(Root(sys.argv[1]), "liver", sys.argv[2])
for number in range(300):
    log(Outcome(f"{sys.argv[3]}-{number}", "segment", "computed"), datetime.now(UTC))
"""


def test_processes_write_whole_lines(root: Root) -> None:
    command = [sys.executable, "-c", PROGRAM, str(root.home), NIGHT]
    running = [subprocess.Popen([*command, name], cwd=REPOSITORY) for name in ("one", "two")]
    assert [process.wait() for process in running] == [0, 0]
    cases = [event["case"] for event in read_events(root, "liver", NIGHT)]
    assert sorted(cases) == sorted(f"{name}-{number}" for name in ("one", "two") for number in range(300))


def test_a_line_that_a_kill_cut_costs_no_other(root: Root) -> None:
    EventLog(root, "liver", NIGHT)(FAILED, NOW)
    path = file_of(root, f"logs/liver/{NIGHT}.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    log = EventLog(root, "liver", NIGHT)
    log(FAILED, NOW)
    log(FAILED, NOW)
    assert path.read_bytes() == whole + whole[:20] + b"\n" + whole + whole
    assert len(read_events(root, "liver", NIGHT)) == 3


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=64k") as root:
        log = EventLog(root, "liver", NIGHT)
        with pytest.raises(StorageError) as caught:
            [log(FAILED, NOW) for _ in range(1000)]
        assert caught.value.code == "store.full"
