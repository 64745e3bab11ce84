"""Schedules checked before they are served; what of them was missed, and whether a night has ended well."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.schedules.timetable import check_schedules, last_moment, missed, without_success
from vnet_core.errors import ConfigError
from workers.leases import run
from workers.ledger import Outcome
from workers.nights.record import Night, begin, save
from workers.nights.record import ended as end
from workers.settings.site import Nightly
from workers.storage.store import Root

LIVER = Nightly(cohort="liver", model="organs", cron="0 1 * * *")
BERLIN = "Europe/Berlin"
NOON = datetime(2026, 1, 10, 12, tzinfo=UTC)
"""The last moment of LIVER before it is midnight of this day in UTC."""


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def add_night(
    root: Root, started: datetime, *states: str, stopped: str = "", ended: bool = True, run_id: str = ""
) -> Night:
    night = begin(root, Night("", "liver", "organs@v1", "", run=run_id), started)
    if not ended:
        return night
    outcomes = [Outcome(str(number), "segment", state) for number, state in enumerate(states)]
    over = end(night, outcomes, stopped, started + timedelta(hours=1))
    save(root, over)
    return over


@pytest.mark.parametrize(
    ("entry", "timezone", "code", "named"),
    [
        (LIVER, "Europe/Nowhere", "site.timezone", "'Europe/Nowhere'"),
        (LIVER, "", "site.timezone", "''"),
        (LIVER.model_copy(update={"cron": "0 25 * * *"}), BERLIN, "site.cron", "'0 25 \\* \\* \\*'"),
        (LIVER.model_copy(update={"cron": "nightly"}), BERLIN, "site.cron", "liver .* 'nightly'"),
        (LIVER.model_copy(update={"cron": ""}), BERLIN, "site.cron", "''"),
        (LIVER.model_copy(update={"cron": "0 0 30 2 *"}), BERLIN, "site.cron", "never comes"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_named(entry: Nightly, timezone: str, code: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        check_schedules([entry], timezone)
    assert caught.value.code == code


def test_good_schedules_pass_and_two_of_one_cohort_do_not() -> None:
    brain = LIVER.model_copy(update={"cohort": "brain", "cron": "*/15 22-23,0-5 * * mon-fri"})
    check_schedules([], "UTC")
    check_schedules([LIVER, brain], BERLIN)
    with pytest.raises(ConfigError, match="liver has 2 schedules") as caught:
        check_schedules([LIVER, brain, LIVER], BERLIN)
    assert caught.value.code == "site.nightly"


@pytest.mark.parametrize(
    ("cron", "timezone", "now", "moment"),
    [
        # one o'clock in Berlin is midnight UTC in winter, and eleven in the evening in summer
        ("0 1 * * *", BERLIN, "2026-01-10T12:00", "2026-01-10T00:00"),
        ("0 1 * * *", BERLIN, "2026-07-10T12:00", "2026-07-09T23:00"),
        ("0 1 * * *", BERLIN, "2026-01-10T00:00", "2026-01-10T00:00"),
        ("0 1 * * *", BERLIN, "2026-01-09T23:59", "2026-01-09T00:00"),
        ("* * * * *", "UTC", "2026-01-10T12:00", "2026-01-10T12:00"),
        ("0 1 * * mon", "UTC", "2026-01-10T12:00", "2026-01-05T01:00"),
        ("0 0 29 2 *", "UTC", "2026-01-10T12:00", "2024-02-29T00:00"),
    ],
)
def test_the_last_moment_of_a_schedule(cron: str, timezone: str, now: str, moment: str) -> None:
    found = last_moment(cron, timezone, datetime.fromisoformat(now).replace(tzinfo=UTC))
    assert found == datetime.fromisoformat(moment).replace(tzinfo=UTC)


def test_a_night_is_missed_when_none_has_been_since_it_was_due(root: Root) -> None:
    due = datetime(2026, 1, 10, tzinfo=UTC)
    assert missed(root, LIVER, BERLIN, NOON) == due
    add_night(root, due - timedelta(seconds=1), "computed")
    assert missed(root, LIVER, BERLIN, NOON) == due
    add_night(root, due, "failed", stopped="hours")
    assert missed(root, LIVER, BERLIN, NOON) is None
    assert missed(root, LIVER, BERLIN, NOON + timedelta(days=5)) == due + timedelta(days=5)


def test_a_night_that_died_does_not_count_and_one_under_way_does(root: Root) -> None:
    add_night(root, NOON - timedelta(hours=2), ended=False, run_id="gone")
    add_night(root, NOON - timedelta(hours=2), "computed", stopped="died")
    assert missed(root, LIVER, BERLIN, NOON) is not None
    with run(root) as alive:
        add_night(root, NOON - timedelta(hours=1), ended=False, run_id=alive.id)
        assert missed(root, LIVER, BERLIN, NOON) is None


def why(root: Root) -> str | None:
    return without_success(root, "liver", LIVER.cron, BERLIN, NOON)


def test_what_is_told_of_a_night_that_did_not_end_well(root: Root) -> None:
    assert why(root) == "the night of cohort liver that was due at 2026-01-10 01:00 Europe/Berlin has not begun"
    add_night(root, NOON - timedelta(days=1), "computed")
    assert "has not begun" in why(root)
    add_night(root, NOON - timedelta(hours=9), "computed", stopped="cancelled")
    assert why(root) == "night 2026-01-10_030000 of cohort liver was stopped: cancelled"
    add_night(root, NOON - timedelta(hours=8), "failed", "refused", "failed")
    assert why(root) == ("night 2026-01-10_040000 of cohort liver ended without a single result: 1 refused, 2 failed")
    add_night(root, NOON - timedelta(hours=7), ended=False)
    assert why(root) == "night 2026-01-10_050000 of cohort liver died before its end"
    with run(root) as alive:
        add_night(root, NOON - timedelta(hours=6), ended=False, run_id=alive.id)
        assert why(root) == "night 2026-01-10_060000 of cohort liver is still under way"
    # what came before it does not matter
    add_night(root, NOON - timedelta(hours=5), "cached", "failed")
    assert why(root) is None


@pytest.mark.parametrize(
    ("states", "stopped"), [(["computed", "carried-over"], "deadline"), (["cached"], "hours"), ([], "")]
)
def test_a_night_within_its_budget_or_of_an_empty_cohort_ended_well(
    root: Root, states: list[str], stopped: str
) -> None:
    add_night(root, NOON - timedelta(hours=5), *states, stopped=stopped)
    assert why(root) is None
