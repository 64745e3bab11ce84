"""Figures of a cohort with what chance alone could do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vnet_core.errors import ConfigError

CONFIDENCE = 0.95
"""Of the intervals."""
RESAMPLES = 10_000
"""Draws of a bootstrap."""

_DRAWN_TOGETHER = 1 << 20
"""Most draws of groups that are held at a time."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure over the cases of a cohort."""

    cases: int
    """Cases that have the figure, over which mean, interval and median run."""
    infinite: int
    """Cases left out because the figure is infinite: prediction or truth was empty."""
    missing: int
    """Cases left out because the figure does not exist: both were empty, or there is no true volume to compare to."""
    mean: float | None
    """None where no case has the figure."""
    low: float | None
    """Lower end of the 95 % interval of the mean; None below two groups of cases."""
    high: float | None
    median: float | None
    worst: float | None
    """Figure of the worst case; infinite distances are not among them, ``infinite`` counts them."""
    worst_case: str | None


def summarise(
    values: Sequence[float], cases: Sequence[str], best: float | None, groups: Sequence[str] = (), seed: int = 0
) -> Summary:
    """A figure over cases. ``values``: one per case, NaN or infinite where it does not apply.

    ``best``: the value that cannot be bettered (1 for Dice, 0 for an error of either sign), from which the worst case
    is the farthest; None for a figure without better or worse. ``groups``: one name per case, cases of one name (one
    patient) are drawn together; none: every case is a group.
    """
    _check_lengths(len(values), len(cases), len(groups))
    figures = np.asarray(values, float)
    finite = np.isfinite(figures)
    infinite, missing = int(np.isinf(figures).sum()), int(np.isnan(figures).sum())
    if not finite.any():
        return Summary(0, infinite, missing, None, None, None, None, None, None)
    kept = figures[finite]
    names = [case for case, keep in zip(cases, finite, strict=True) if keep]
    patients = [group for group, keep in zip(groups or cases, finite, strict=True) if keep]
    ends = bootstrap_interval(kept, patients, seed)
    low, high = ends or (None, None)
    farthest = None if best is None else int(np.abs(kept - best).argmax())
    return Summary(
        cases=len(kept),
        infinite=infinite,
        missing=missing,
        mean=float(kept.mean()),
        low=low,
        high=high,
        median=float(np.median(kept)),
        worst=None if farthest is None else float(kept[farthest]),
        worst_case=None if farthest is None else names[farthest],
    )


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[str] = (), seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean (Efron 1979). None below two groups, whose spread says nothing.

    ``values``: finite. ``groups``: one name per value; whole groups are drawn, with replacement.
    """
    means = bootstrap_means(values, groups, seed)
    if means is None:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_means(
    values: Sequence[float] | np.ndarray, groups: Sequence[str] = (), seed: int = 0
) -> np.ndarray | None:
    """Means of RESAMPLES cohorts drawn from this one, float64; None below two groups. Arguments as above."""
    figures = np.asarray(values, float)
    _check_lengths(len(figures), len(figures), len(groups))
    _, group = np.unique(groups or np.arange(len(figures)), return_inverse=True)
    number = int(group.max(initial=-1)) + 1
    if number < 2:
        return None
    sums = np.bincount(group, figures, minlength=number)
    sizes = np.bincount(group, minlength=number)
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWN_TOGETHER // number)
    means = []
    for first in range(0, RESAMPLES, step):
        draws = min(step, RESAMPLES - first)
        drawn = generator.integers(number, size=(draws, number))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _check_lengths(values: int, cases: int, groups: int) -> None:
    if values != cases or groups not in (0, values):
        raise ConfigError(
            "statistics.length", f"{values} values of {cases} cases in {groups} groups; give one of each per case"
        )
