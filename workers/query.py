"""Questions over the rows of all nights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vnet_core.errors import ConfigError
from workers.report import night_ids, read_rows
from workers.store import Root


@dataclass(frozen=True, slots=True)
class Query:
    """Filters; what is None does not restrict. Ranges include their ends."""

    cohort: str | None = None
    label: str | None = None
    """Name of a label or region."""
    case: str | None = None
    state: str | None = None
    volume_min_ml: float | None = None
    volume_max_ml: float | None = None
    change_min_percent: float | None = None
    """Smallest absolute change since the night before, in percent."""
    nights: int | None = None
    """Only the newest so many nights of each cohort."""
    flag: str | None = None
    limit: int = 1000
    """Most rows, newest night first."""


def query(root: Root, wanted: Query) -> list[dict[str, Any]]:
    """Rows that pass every filter, newest night first. ConfigError ``query.cohort`` names the cohorts there are."""
    cohorts = root.names("reports")
    if wanted.cohort is not None and wanted.cohort not in cohorts:
        known = ", ".join(cohorts) or "none"
        raise ConfigError("query.cohort", f"cohort {wanted.cohort!r} has no report (known: {known}); run vnet nightly")
    chosen = [wanted.cohort] if wanted.cohort else cohorts
    found = []
    for row in _rows(root, chosen, wanted.nights):
        if _passes(row, wanted):
            found.append(row)
            if len(found) == wanted.limit:
                break
    return found


def _rows(root: Root, cohorts: list[str], nights: int | None) -> Iterator[dict[str, Any]]:
    ids = sorted(
        ((night, cohort) for cohort in cohorts for night in night_ids(root, cohort)[-(nights or 0) :]), reverse=True
    )
    for night, cohort in ids:
        yield from read_rows(root, cohort, night)


def _passes(row: dict[str, Any], wanted: Query) -> bool:
    volume, change = row["volume_ml"], row["change_percent"]
    return not (
        (wanted.label is not None and row["name"] != wanted.label)
        or (wanted.case is not None and row["case"] != wanted.case)
        or (wanted.state is not None and row["state"] != wanted.state)
        or (wanted.flag is not None and wanted.flag not in (row["flags"] or "").split())
        or (wanted.volume_min_ml is not None and (volume is None or volume < wanted.volume_min_ml))
        or (wanted.volume_max_ml is not None and (volume is None or volume > wanted.volume_max_ml))
        or (wanted.change_min_percent is not None and (change is None or abs(change) < wanted.change_min_percent))
    )
