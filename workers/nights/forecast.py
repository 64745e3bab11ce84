"""What a night would do, and what it would cost, before anything runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, Literal

from vnet_core.geometry import Geometry
from workers.cohort import Case
from workers.nights.attempts import Failure, quarantined
from workers.storage.store import Root

Kind = Literal["new", "changed", "failed", "stale", "cached", "quarantined", "refused"]
ORDER: tuple[Kind, ...] = ("new", "changed", "failed", "stale")
"""Kinds of work, what comes first in a night first: a patient that nobody has looked at yet before an old one."""
RECEIPTS = 200
"""Most receipts that a forecast reads."""


def kind_of(root: Root, cohort: str, case: Case, key: str, found: Sequence[Failure], after: int) -> Kind:
    """What a usable case is to the night that wants its result under ``key``.

    ``stale`` has a result of these bytes by another plan or model; ``changed`` has one of other bytes; ``after`` is the
    number of failures that puts a case in quarantine.
    """
    if root.receipt(key):
        return "cached"
    if found:
        return "quarantined" if quarantined(found, key, after) else "failed"
    earlier = [receipt for _, receipt in _receipts(root, cohort, [case.id])]
    if not earlier:
        return "new"
    return "stale" if any(receipt["case_digest"] == case.digest for receipt in earlier) else "changed"


@dataclass(frozen=True, slots=True)
class Cost:
    """What work took that was done before, per voxel of the scan."""

    seconds_per_voxel: float
    peak_bytes: int
    """The largest seen."""
    receipts: int
    """How many it is told from."""

    def seconds(self, geometry: Geometry | None) -> float:
        """For one case."""
        return self.seconds_per_voxel * prod(geometry.shape) if geometry else 0.0


def recorded_cost(root: Root, cases: Mapping[str, Case], cohort: str, model_digest: str) -> Cost | None:
    """From the receipts of the cohort's newest results by this model, or by any where it has none; None without one.

    Reads the receipts of at most ``RECEIPTS`` results, and of the volumes that they were made from.
    """
    by_model: list[tuple[Case, dict[str, Any]]] = []
    by_any: list[tuple[Case, dict[str, Any]]] = []
    for name, receipt in islice(_receipts(root, cohort, cases), RECEIPTS):
        if "seconds" in receipt and cases[name].geometry:
            (by_model if receipt["model_digest"] == model_digest else by_any).append((cases[name], receipt))
    told = by_model or by_any
    if not told:
        return None
    rates, peaks = [], []
    for case, receipt in told:
        volume = root.receipt(receipt["volume"]) or {}
        assert case.geometry is not None
        rates.append((receipt["seconds"] + volume.get("seconds", 0.0)) / prod(case.geometry.shape))
        peaks += [receipt["peak_bytes"], volume.get("peak_bytes", 0)]
    return Cost(statistics.median(rates), max(peaks), len(told))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a night would do."""

    counts: dict[str, int]
    """Cases by kind."""
    seconds: float | None
    """Work that there is, shared out over the workers; None where nothing was recorded to tell it from."""
    peak_bytes: int | None
    """Largest process."""
    receipts: int
    """How many receipts the figures are told from."""

    @property
    def words(self) -> str:
        """``12 new, 3 changed, 980 cached, 2 refused, about 41 minutes, peak 3.1 GiB``."""
        parts = [f"{number} {kind}" for kind, number in self.counts.items()] or ["no cases"]
        work = sum(self.counts.get(kind, 0) for kind in ORDER)
        if work and self.seconds is None:
            parts.append("time unknown: this cohort has no result with a receipt yet")
        elif work and self.seconds is not None and self.peak_bytes is not None:
            parts += [f"about {_duration(self.seconds)}", f"peak {self.peak_bytes / 2**30:.1f} GiB"]
        return ", ".join(parts)


def forecast(kinds: Iterable[tuple[Kind, Geometry | None]], cost: Cost | None, workers: int) -> Forecast:
    """Add up; a case of unknown size is taken to be as large as the median of the others."""
    listed = list(kinds)
    found = Counter(kind for kind, _ in listed)
    order: tuple[Kind, ...] = (*ORDER, "cached", "quarantined", "refused")
    counts: dict[str, int] = {kind: found[kind] for kind in order if found[kind]}
    if cost is None:
        return Forecast(counts, None, None, 0)
    sizes = [cost.seconds(geometry) for _, geometry in listed if geometry]
    usual = statistics.median(sizes) if sizes else 0.0
    todo = [cost.seconds(geometry) if geometry else usual for kind, geometry in listed if kind in ORDER]
    return Forecast(counts, sum(todo) / workers, cost.peak_bytes, cost.receipts)


def _duration(seconds: float) -> str:
    if seconds < 1.5:
        return "a second"
    if seconds < 100:
        return f"{round(seconds)} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _receipts(root: Root, cohort: str, cases: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Receipts of the results of cases, with the case."""
    for case in cases:
        for name in root.names(f"results/{cohort}/{case}"):
            receipt = root.receipt(f"results/{cohort}/{case}/{name}")
            if receipt is not None:
                yield case, receipt
