"""The nights of a cohort before this one, as far as a report needs them: read by column, since cohorts are large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.reports.report import night_ids
from workers.storage.store import Root

TREND_NIGHTS = 30
"""Nights of a trend, this one included."""
_COMPARED = ("case", "state", "label", "name", "flags")


@dataclass(frozen=True, slots=True)
class Before:
    """The night before, with the columns that are compared."""

    night: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sums:
    """One night of a trend."""

    night: str
    cases: Mapping[str, int]
    """Cases by state."""
    median_ml: Mapping[str, float]
    """By label."""


def night_before(root: Root, cohort: str, night: str) -> Before | None:
    """The cohort's last night before this one that has rows."""
    earlier = [known for known in night_ids(root, cohort) if known < night]
    if not earlier:
        return None
    return Before(earlier[-1], _columns(root, cohort, earlier[-1], _COMPARED).to_pylist())


def trend(root: Root, cohort: str, night: str) -> list[Sums]:
    """The last ``TREND_NIGHTS`` nights up to this one, oldest first."""
    known = [known for known in night_ids(root, cohort) if known <= night]
    found = (_sums(root, cohort, one) for one in known[-TREND_NIGHTS:])
    return [sums for sums in found if sums is not None]


def _sums(root: Root, cohort: str, night: str) -> Sums | None:
    """None for a damaged table: a gap in a plot must not cost the report."""
    try:
        table = _columns(root, cohort, night, ("case", "state", "name", "volume_ml"))
    except (pa.ArrowException, OSError):
        return None
    states = table.group_by(["case", "state"]).aggregate([]).column("state").to_pylist()
    by_label = table.group_by("name").aggregate([("volume_ml", "list")])
    medians = {}
    for name, volumes in zip(by_label["name"].to_pylist(), by_label["volume_ml_list"].to_pylist(), strict=True):
        found = [volume for volume in volumes if volume is not None]
        if name is not None and found:
            medians[name] = float(np.median(found))
    return Sums(night, dict(Counter(states)), medians)


def _columns(root: Root, cohort: str, night: str, names: tuple[str, ...]) -> Any:
    with root.open(f"reports/{cohort}/{night}.parquet") as file:
        return pq.read_table(file, columns=list(names))
