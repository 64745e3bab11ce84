"""Records of nights: one id each, closed once, and those of dead runs found."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from workers.leases import run
from workers.ledger import Outcome
from workers.nights.record import Night, abandoned, begin, ended, load_night, records, save
from workers.storage.store import Root

STARTED = datetime(2026, 1, 2, 1, 30, tzinfo=UTC)
OUTCOMES = [Outcome("a", "segment", "computed"), Outcome("b", "segment", "failed"), Outcome("c", "segment", "computed")]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def night(run_id: str = "") -> Night:
    return Night("", "liver", "liver@v1", "", run=run_id)


def test_a_night_has_the_moment_of_its_start_as_id_and_two_in_one_second_have_two(root: Root) -> None:
    first, second = begin(root, night(), STARTED), begin(root, night(), STARTED)
    assert (first.id, second.id) == ("2026-01-02_013000", "2026-01-02_013001")
    assert records(root, "liver") == [first.id, second.id]
    assert first.started == second.started == "2026-01-02T01:30:00+00:00"


def test_a_record_says_how_it_ended(root: Root) -> None:
    begun = begin(root, night(), STARTED)
    assert load_night(root, "liver", begun.id).ended == ""
    save(root, ended(begun, OUTCOMES, "deadline", datetime(2026, 1, 2, 6, 0, 5, tzinfo=UTC)))
    found = load_night(root, "liver", begun.id)
    assert (found.seconds, found.counts, found.stopped) == (16205.0, {"computed": 2, "failed": 1}, "deadline")
    assert found.ended == "2026-01-02T06:00:05+00:00"


def test_a_night_whose_run_is_dead_is_abandoned_until_it_is_closed(root: Root) -> None:
    with run(root) as own:
        under_way = begin(root, night(own.id), STARTED)
        dead = begin(root, night("of-a-run-that-is-gone"), STARTED)
        assert [one.id for one in abandoned(root, "liver")] == [dead.id]
        save(root, ended(dead, OUTCOMES, "died", STARTED))
        assert abandoned(root, "liver") == []
    assert [one.id for one in abandoned(root, "liver")] == [under_way.id], "its run has ended without closing it"


def test_a_record_of_version_0_3_counts_as_ended(root: Root) -> None:
    old = {"id": "2025-12-01_013000", "cohort": "liver", "model": "liver@v1", "started": "2025-12-01T01:30:00+00:00"}
    root.put_json("nights/liver/2025-12-01_013000.json", {**old, "seconds": 3.0, "counts": {"computed": 1}})
    assert load_night(root, "liver", old["id"]).counts == {"computed": 1}
    assert abandoned(root, "liver") == []
