"""When nights are due: schedules checked before anything is served, their last moment, and what was missed since."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from vnet_core.errors import ConfigError
from workers.leases import is_alive
from workers.nights.record import Night, load_night, night_id, records
from workers.settings.site import Nightly
from workers.storage.store import Root

WINDOWS = (timedelta(hours=2), timedelta(days=1), timedelta(days=8), timedelta(days=32), timedelta(days=1500))
"""Looked through for the last moment, each only when the one before holds none: of a crowded schedule Prefect gives the
first thousand moments, and four years hold every 29th of February."""
START = datetime(2024, 1, 1, tzinfo=UTC)
"""A schedule must have a moment after this."""
WELL = ("", "deadline", "hours")
"""How a night may have stopped that did what it could: all of its cases, or those that its budget allows."""


def check_schedules(nightlies: Sequence[Nightly], timezone: str) -> None:
    """Refuse what could not be scheduled: ConfigError ``site.timezone``, ``site.cron`` or ``site.nightly``."""
    from prefect.server.schemas.schedules import CronSchedule

    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ConfigError(
            "site.timezone", f"time zone {timezone!r} is not known; use a name of the IANA list such as Europe/Berlin"
        ) from None
    for entry in nightlies:
        try:
            # the 30th of February is well written and never comes
            asyncio.run(CronSchedule(cron=entry.cron).get_dates(1, START))
        except ValueError:
            raise ConfigError(
                "site.cron",
                f"cohort {entry.cohort} has the schedule {entry.cron!r}, which is no cron expression or never comes;"
                " write minute, hour, day, month and weekday, such as '0 1 * * *' for every night at one o'clock",
            ) from None
    cohorts = [entry.cohort for entry in nightlies]
    if twice := sorted({cohort for cohort in cohorts if cohorts.count(cohort) > 1}):
        raise ConfigError(
            "site.nightly",
            f"cohort {twice[0]} has {cohorts.count(twice[0])} schedules, of which the last would win; keep one, a cron"
            " expression can name several hours",
        )


def last_moment(cron: str, timezone: str, now: datetime) -> datetime | None:
    """The last moment of a schedule that is not after ``now`` (aware), as Prefect reckons it; None in four years
    without one."""
    from prefect.server.schemas.schedules import CronSchedule

    schedule = CronSchedule(cron=cron, timezone=timezone)
    for window in WINDOWS:
        found = [moment for moment in asyncio.run(schedule.get_dates(1000, now - window, now)) if moment <= now]
        if found:
            return datetime.fromtimestamp(max(found).timestamp(), UTC)
    return None


def missed(root: Root, entry: Nightly, timezone: str, now: datetime) -> datetime | None:
    """The last moment of a cohort's schedule when no night has begun since, or only ones whose run died; else None.

    The storage root says so, not Prefect, whose runs may have been deleted or stand in another database.
    """
    moment = last_moment(entry.cron, timezone, now)
    if moment is None or any(_counts(root, night) for night in _nights_since(root, entry.cohort, moment)):
        return None
    return moment


def without_success(root: Root, cohort: str, cron: str, timezone: str, now: datetime) -> str | None:
    """Why no night has ended well since the schedule's last moment, in words; None when one has."""
    moment = last_moment(cron, timezone, now)
    if moment is None:
        return None
    nights = _nights_since(root, cohort, moment)
    if any(_went_well(night) for night in nights):
        return None
    due = f"{moment.astimezone(ZoneInfo(timezone)):%Y-%m-%d %H:%M} {timezone}"
    if not nights:
        return f"the night of cohort {cohort} that was due at {due} has not begun"
    last = nights[-1]
    if not last.ended:
        under_way = is_alive(root, last.run)
        return f"night {last.id} of cohort {cohort} {'is still under way' if under_way else 'died before its end'}"
    if last.stopped not in WELL:
        return f"night {last.id} of cohort {cohort} was stopped: {last.stopped}"
    return f"night {last.id} of cohort {cohort} ended without a single result: {_text(last)}"


def _nights_since(root: Root, cohort: str, moment: datetime) -> list[Night]:
    first = night_id(moment.astimezone(UTC))
    return [load_night(root, cohort, night) for night in records(root, cohort) if night >= first]


def _counts(root: Root, night: Night) -> bool:
    """Whether a night has been, or is under way."""
    return night.stopped != "died" and (bool(night.ended) or is_alive(root, night.run))


def _went_well(night: Night) -> bool:
    done = sum(number for state, number in night.counts.items() if state in ("computed", "cached"))
    return bool(night.ended) and night.stopped in WELL and (done > 0 or not sum(night.counts.values()))


def _text(night: Night) -> str:
    return ", ".join(f"{number} {state}" for state, number in night.counts.items())
