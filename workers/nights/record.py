"""The record of a night: begun before any work, ended with it, and closed by the next run when its own died."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from workers.leases import is_alive
from workers.ledger import Outcome, counts
from workers.segmentation.masks import MaskFormat
from workers.storage.store import Root

Stopped = Literal["", "deadline", "hours", "cancelled", "died"]
"""Why a night ended before all its cases were done; empty: it did not."""
LOOK_BACK = 50
"""How many of the newest records are looked through for a night whose run died."""


@dataclass(frozen=True, slots=True)
class Night:
    """One run over a cohort."""

    id: str
    """Start as ``YYYY-MM-DD_HHMMSS`` in UTC; sorts by time."""
    cohort: str
    model: str
    """``name@version``."""
    started: str
    """ISO 8601."""
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    """Cases by state."""
    ended: str = ""
    """ISO 8601; empty while it runs."""
    stopped: Stopped = ""
    mask_format: MaskFormat = "nifti"
    run: str = ""
    """Id of the run that works on it."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Its :class:`workers.settings.rules.NightRules`."""


def night_id(started: datetime) -> str:
    """The id of a night from the moment it started, in UTC."""
    return started.strftime("%Y-%m-%d_%H%M%S")


def begin(root: Root, night: Night, started: datetime) -> Night:
    """Write the record of a night that starts now and return it with its id; of two in one second, one waits its turn
    in the order of ids. ``started`` is in UTC."""
    moment = started
    while True:
        begun = replace(night, id=night_id(moment), started=started.isoformat(timespec="seconds"))
        if root.create(_key(begun), json.dumps(asdict(begun), indent=1).encode()):
            return begun
        moment += timedelta(seconds=1)


def ended(night: Night, outcomes: Sequence[Outcome], stopped: Stopped, now: datetime) -> Night:
    """The night when it is over; :func:`save` it after everything else of it is written."""
    return replace(
        night,
        # a clock that was set back makes no negative time
        seconds=max(0.0, round((now - datetime.fromisoformat(night.started)).total_seconds(), 1)),
        counts=counts(outcomes),
        ended=now.isoformat(timespec="seconds"),
        stopped=stopped,
    )


def save(root: Root, night: Night) -> None:
    """Write the record."""
    root.put_json(_key(night), asdict(night))


def load_night(root: Root, cohort: str, night: str) -> Night:
    """One record; StorageError ``store.missing``."""
    mapping = root.get_json(f"nights/{cohort}/{night}.json")
    # records of version 0.3 were only written at the end
    return Night(**{"ended": mapping["started"], **mapping})


def records(root: Root, cohort: str) -> list[str]:
    """Ids of all nights of a cohort, oldest first, those under way and those that died too."""
    return [name.removesuffix(".json") for name in root.names(f"nights/{cohort}") if name.endswith(".json")]


def abandoned(root: Root, cohort: str) -> list[Night]:
    """Nights that have not ended and whose run is dead, oldest first."""
    found = [load_night(root, cohort, night) for night in records(root, cohort)[-LOOK_BACK:]]
    return [night for night in found if not night.ended and not is_alive(root, night.run)]


def _key(night: Night) -> str:
    return f"nights/{night.cohort}/{night.id}.json"
