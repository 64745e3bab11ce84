"""Figures of the newest nights for Prometheus: what is watched from outside, in its text format.

Everything is read from the storage root when it is asked for, so one process answers for all that write there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from vnet_core.errors import StorageError
from workers.ledger import UNDONE, State
from workers.nights.attempts import QUARANTINED
from workers.nights.record import Night, load_night, records
from workers.storage.store import Root

PREFIX = "vnet"
LOOK_BACK = 100
"""How many of the newest records of a cohort are looked through for one that ended well."""
_COLUMNS = ("case", "state", "codes", "flags", "seconds", "peak_bytes")
_OF_NIGHT = ("cohort", "model")


def metrics_text(root: Root) -> str:
    """All figures in the text exposition format, version 0.0.4."""
    return generate_latest(registry(root)).decode()


def registry(root: Root) -> CollectorRegistry:
    """A registry that reads the root at each scrape."""
    found = CollectorRegistry(auto_describe=False)
    found.register(_Nights(root))
    return found


class _Nights:
    """Collector over the newest night that is over of every cohort."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def collect(self) -> Iterable[Metric]:
        """All metrics. A night that cannot be read is counted as such and hides no other."""
        metrics = _Metrics()
        for cohort in self._root.names("nights"):
            try:
                metrics.add(cohort, *self._newest(cohort))
                metrics.unreadable.add_metric([cohort], 0)
            except (StorageError, pa.ArrowException, OSError, KeyError, TypeError, ValueError):
                metrics.unreadable.add_metric([cohort], 1)
        if self._root.home.is_dir() and (space := self._root.place.space()):
            free, size = space
            metrics.free.add_metric([], free)
            metrics.size.add_metric([], size)
        return metrics.all()

    def _newest(self, cohort: str) -> tuple[Night | None, float | None, Sequence[dict[str, Any]]]:
        """The newest night that is over, the end of the last one with a result in Unix seconds, and its rows."""
        newest: Night | None = None
        succeeded: float | None = None
        for night in reversed(records(self._root, cohort)[-LOOK_BACK:]):
            record = load_night(self._root, cohort, night)
            newest = newest or (record if record.ended else None)
            if record.ended and any(number and state not in UNDONE for state, number in record.counts.items()):
                succeeded = datetime.fromisoformat(record.started).timestamp() + record.seconds
                break
        if newest is None:
            return None, succeeded, []
        with self._root.open(f"reports/{cohort}/{newest.id}.parquet") as file:
            table = pq.ParquetFile(file)
            columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
            return newest, succeeded, table.read(columns=columns).to_pylist()


class _Metrics:
    """The metric families, filled cohort by cohort."""

    def __init__(self) -> None:
        self.cases = _gauge("cases", "Cases of the newest night by state.", *_OF_NIGHT, "state")
        self.failures = _gauge("failures", "Failed cases of the newest night by code.", *_OF_NIGHT, "code")
        self.flagged = _gauge("flagged_cases", "Cases of the newest night with a flag.", *_OF_NIGHT)
        self.quarantined = _gauge("quarantined_cases", "Cases that are left alone.", *_OF_NIGHT)
        self.duration = _gauge("night_duration_seconds", "Wall time of the newest night.", *_OF_NIGHT)
        self.work = _gauge("night_case_seconds", "Seconds spent on the newest night's cases.", *_OF_NIGHT)
        self.peak = _gauge("night_peak_bytes", "Largest resident size of a process of the newest night.", *_OF_NIGHT)
        self.started = _gauge("night_start_timestamp_seconds", "When the newest night began.", *_OF_NIGHT)
        self.success = _gauge("last_success_timestamp_seconds", "End of the last night with a result.", "cohort")
        self.unreadable = _gauge("night_unreadable", "1 when the newest night cannot be read.", "cohort")
        self.free = _gauge("storage_free_bytes", "Free bytes of the storage root's disk.")
        self.size = _gauge("storage_size_bytes", "Size of the storage root's disk.")

    def all(self) -> list[Metric]:
        """In a fixed order."""
        return list(vars(self).values())

    def add(self, cohort: str, night: Night | None, succeeded: float | None, rows: Sequence[dict[str, Any]]) -> None:
        """What is known of a cohort."""
        if succeeded is not None:
            self.success.add_metric([cohort], succeeded)
        if night is None:
            return
        labels = [cohort, night.model]
        cases = list(_by_case(rows))
        for state in get_args(State):
            self.cases.add_metric([*labels, state], night.counts.get(state, 0))
        codes = Counter(case["codes"].split(" ")[0] for case in cases if case["state"] == "failed" and case["codes"])
        for code, number in sorted(codes.items()):
            self.failures.add_metric([*labels, code], number)
        self.flagged.add_metric(labels, sum(case["flagged"] for case in cases))
        self.quarantined.add_metric(labels, codes[QUARANTINED])
        self.duration.add_metric(labels, night.seconds)
        self.work.add_metric(labels, sum(case["seconds"] or 0.0 for case in cases))
        self.peak.add_metric(labels, max((case.get("peak_bytes") or 0 for case in cases), default=0))
        self.started.add_metric(labels, datetime.fromisoformat(night.started).timestamp())


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, labels=labels)


def _by_case(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first row of each case, and whether any of its rows has a flag."""
    flagged = {row["case"] for row in rows if row["flags"]}
    seen = set()
    for row in rows:
        if row["case"] not in seen:
            seen.add(row["case"])
            yield row | {"flagged": row["case"] in flagged}
