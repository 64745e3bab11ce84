"""Nights from the command line on a cohort of tiny scans: two at once, pauses, limits, quarantine, plans."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES as CASES
from tests.flows.conftest import nightly, rows
from tests.workers.tiny_cohort import write_scan
from workers.nights import attempts
from workers.nights.events_log import read_events
from workers.nights.record import load_night, records
from workers.storage.store import Root

Start = Callable[..., Command]


@pytest.fixture
def root(taken_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken_in, tmp_path / "root"))


def test_what_a_night_would_do_is_said_before_and_true(at_site: Start, root: Path, taken_in: Path) -> None:
    before = at_site(*nightly("--plan-only"), root=root)
    assert before.wait() == 0, before.err
    document = json.loads(before.out)
    assert document["forecast"]["counts"] == {"new": CASES}
    assert document["forecast"]["seconds"] is None, "nothing was recorded yet"
    assert not (root / "results").exists()

    first = at_site(*nightly(), root=root)
    assert first.wait() == 0, first.err
    assert first.states == {f"case{number}": "computed" for number in range(CASES)}

    # one changes, one arrives, one is cut short; the sources of the copied root are those of the original
    scans = taken_in.parent / "scans"
    kept = (scans / "case3.nii").read_bytes()
    write_scan(scans, "case3", 99)
    write_scan(scans, "case9", 9)
    broken = scans / "case8.nii"
    broken.write_bytes(kept[:-64])
    try:
        after = at_site(*nightly("--plan-only"), root=root)
        assert after.wait() == 0, after.err
        found = json.loads(after.out)["forecast"]
        assert found["counts"] == {"new": 2, "changed": 1, "cached": CASES - 1}, "what is cut short is not read yet"
        assert found["receipts"] == CASES - 1
        assert 0 < found["seconds"] < 60
        assert 50e6 < found["peak_bytes"] < 4e9

        second = at_site(*nightly(), root=root)
        assert second.wait() == 3, second.err
        states = {**{f"case{number}": "cached" for number in range(CASES)}, "case3": "computed"}
        assert second.states == {**states, "case8": "refused", "case9": "computed"}
    finally:
        broken.unlink()
        (scans / "case9.nii").unlink()
        (scans / "case3.nii").write_bytes(kept)


@pytest.mark.fault("F24")
def test_two_runs_at_once_do_every_case_once(vnet: Start, root: Path) -> None:
    """Each with engines and a server of its own, which make the tables of one database."""
    both = [vnet(*nightly(), root=root) for _ in range(2)]
    for command in both:
        assert command.wait() == 0, command.err
    for case in range(CASES):
        found = sorted(command.states[f"case{case}"] for command in both)
        assert found == ["cached", "computed"], case
    runs = {json.loads(path.read_bytes())["run"] for path in root.glob("results/many/*/*/receipt.json")}
    assert len(receipts(root)) == CASES
    assert runs <= {load_night(Root(root), "many", night).run for night in records(Root(root), "many")}
    events = [event for night in records(Root(root), "many") for event in read_events(Root(root), "many", night)]
    assert sorted(event["case"] for event in events if event["state"] == "computed") == sorted(receipts(root))
    assert Root(root).names("leases") == []
    assert Root(root).names("runs") == []


def test_a_night_waits_while_it_is_paused_and_lets_its_engines_go(at_server: Start, root: Path) -> None:
    assert at_server("pause", "--cohort", "many", root=root).wait() == 0
    command = at_server(*nightly(), root=root)
    command.until(lambda: records(Root(root), "many"))
    command.until(lambda: len(Root(root).names("runs")) == 1)
    assert command.process("raylet") is None
    assert receipts(root) == {}
    assert at_server("resume", "--cohort", "many", root=root).wait() == 0
    assert command.wait() == 0, command.err
    assert len(receipts(root)) == CASES
    again = at_server("resume", "--cohort", "many", root=root)
    assert again.wait() == 2
    assert "pause.none" in again.err


def test_a_case_that_fails_night_after_night_is_left_alone_until_it_is_released(at_site: Start, root: Path) -> None:
    (root / "results" / "many").mkdir(parents=True)
    in_the_way = root / "results" / "many" / "case0"
    in_the_way.write_bytes(b"not a folder")
    rules = ("--retries", "1", "--quarantine-after", "1")
    first = at_site(*nightly(*rules), root=root)
    assert first.wait() == 3, first.err
    assert first.states["case0"] == "failed"
    (night,) = records(Root(root), "many")
    tries = [event for event in read_events(Root(root), "many", night) if event["case"] == "case0"]
    assert [event["state"] for event in tries] == ["failed", "failed"], "the first try and the retry"
    assert attempts.failures(Root(root), "many").keys() == {"case0"}

    in_the_way.unlink()
    second = at_site(*nightly(*rules), root=root)
    assert second.wait() == 3, second.err
    (alone,) = (case for case in json.loads(second.out)["cases"] if case["case"] == "case0")
    assert alone["codes"][0] == "night.quarantined"
    assert "vnet quarantine release --cohort many --case case0" in alone["message"]

    listed = at_site("quarantine", "list", "--cohort", "many", "--json", root=root)
    assert listed.wait() == 0, listed.err
    assert [failure["case"] for failure in json.loads(listed.out)["failures"]] == ["case0"]
    assert at_site("quarantine", "release", "--cohort", "many", "--case", "case0", root=root).wait() == 0
    third = at_site(*nightly(*rules), root=root)
    assert third.wait() == 0, third.err
    assert third.states["case0"] == "computed"
    assert attempts.failures(Root(root), "many") == {}


def test_a_night_without_time_carries_everything_over(at_server: Start, root: Path) -> None:
    command = at_server(*nightly("--hours", "1e-9"), root=root)
    assert command.wait() == 4, command.err
    assert set(rows(root).values()) == {"carried-over"}
    newest = load_night(Root(root), "many", records(Root(root), "many")[-1])
    assert (newest.stopped, newest.counts) == ("hours", {"carried-over": CASES})
    assert datetime.fromisoformat(newest.ended) >= datetime.fromisoformat(newest.started)


@pytest.mark.fault("F10")
def test_an_interrupted_night_has_a_row_for_every_case(at_server: Start, root: Path) -> None:
    command = at_server(*nightly(), root=root, VNET_FAIL="segment:computed:3:sleep")
    command.until(lambda: len(receipts(root)) >= 2)
    assert command.interrupt() == 130
    until(lambda: not command.left(), 30)
    newest = load_night(Root(root), "many", records(Root(root), "many")[-1])
    assert newest.stopped == "cancelled"
    found = rows(root)
    assert len(found) == CASES
    assert set(found.values()) == {"computed", "carried-over"}
    assert {case for case, state in found.items() if state == "computed"} <= receipts(root).keys()
