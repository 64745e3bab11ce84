"""When a night stops."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from workers.settings.rules import NightRules, stop_time

BERLIN = ZoneInfo("Europe/Berlin")


def test_without_a_limit_it_goes_on() -> None:
    assert stop_time(NightRules(), datetime(2026, 1, 1, 22, tzinfo=BERLIN)) is None


@pytest.mark.parametrize(
    ("started", "stops"),
    [
        (datetime(2026, 1, 1, 22, tzinfo=BERLIN), datetime(2026, 1, 2, 5, tzinfo=UTC)),
        (datetime(2026, 1, 2, 1, tzinfo=BERLIN), datetime(2026, 1, 2, 5, tzinfo=UTC)),
        (datetime(2026, 1, 2, 6, tzinfo=BERLIN), datetime(2026, 1, 3, 5, tzinfo=UTC)),
        # the night in which summer time begins, and that in which it ends: six o'clock is six o'clock
        (datetime(2026, 3, 28, 22, tzinfo=BERLIN), datetime(2026, 3, 29, 4, tzinfo=UTC)),
        (datetime(2026, 10, 24, 22, tzinfo=BERLIN), datetime(2026, 10, 25, 5, tzinfo=UTC)),
    ],
)
def test_a_deadline_is_the_next_such_time_of_day_in_the_sites_zone(started: datetime, stops: datetime) -> None:
    found = stop_time(NightRules(deadline="06:00"), started)
    assert found is not None
    assert (found[0].astimezone(UTC), found[1]) == (stops, "deadline")


def test_hours_are_hours_also_when_the_clock_is_changed() -> None:
    found = stop_time(NightRules(hours=8), datetime(2026, 3, 28, 22, tzinfo=BERLIN))
    assert found == (datetime(2026, 3, 29, 5, tzinfo=UTC), "hours")


def test_of_two_limits_the_first_counts() -> None:
    started = datetime(2026, 1, 1, 22, tzinfo=BERLIN)
    assert stop_time(NightRules(deadline="06:00", hours=3), started) == (datetime(2026, 1, 2, 0, tzinfo=UTC), "hours")
    assert stop_time(NightRules(deadline="23:00", hours=3), started)[1] == "deadline"


@pytest.mark.parametrize("text", ["6:00", "24:00", "06:60", "six", "06:00:00"])
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        NightRules(deadline=text)
