"""How a night is run: when it stops, how often it tries, whom it asks, and where its masks go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from workers.storage.modes import Readers

CLOCK = r"^$|^([01]\d|2[0-3]):[0-5]\d$"
"""Empty, or a time of day from 00:00 to 23:59."""


class NightRules(BaseModel):
    """Rules of a night; as they stand, it works until all cases are done and asks nobody."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    deadline: str = Field(default="", pattern=CLOCK, title="Deadline")
    """Time of day in the site's time zone, such as 06:00, at which the night stops; the rest is carried over."""
    hours: float = Field(default=0.0, ge=0, title="Hours")
    """Most hours of work; the rest is carried over. 0: no limit."""
    retries: int = Field(default=1, ge=0, le=10, title="Retries")
    """How often a failed case is tried again within the night."""
    retry_delay_s: float = Field(default=30.0, ge=0, title="Seconds before a retry")
    """Pause before the first retry; it doubles with each further one."""
    quarantine_after: int = Field(default=3, ge=1, title="Quarantine after")
    """Nights in which a case has failed before it is left alone until somebody releases it."""
    review: Literal["none", "flagged"] = Field(default="none", title="Review")
    """`flagged`: masks with a flag wait for a person's decision; `none`: nobody is asked."""
    deliver: str = Field(default="", title="Deliver to")
    """Folder that gets a copy of every mask that is not waiting for a decision or rejected."""
    deliver_readers: Readers = Field(default="owner", title="Who may read what is delivered")
    """Who may read the delivered masks: the `owner` of the program's processes, its `group` too, or `everyone`."""
    challenger_share: float = Field(default=0.0, ge=0, le=1, title="Challenger's share")
    """Share of the cases that the model's challenger segments too, to be compared."""


DEFAULT_RULES = NightRules()


Limit = Literal["deadline", "hours"]


def stop_time(rules: NightRules, started: datetime) -> tuple[datetime, Limit] | None:
    """When the night has to stop and which rule says so, ``deadline`` or ``hours``; None without a limit.

    ``started`` is aware; a deadline is the next moment with that time of day in its time zone.
    """
    limits: list[tuple[datetime, Limit]] = []
    if rules.hours:
        limits.append((started.astimezone(UTC) + timedelta(hours=rules.hours), "hours"))
    if rules.deadline:
        hour, minute = map(int, rules.deadline.split(":"))
        moment = started.replace(hour=hour, minute=minute, second=0, microsecond=0)
        limits.append((moment if moment > started else moment + timedelta(days=1), "deadline"))
    return min(limits, default=None)
