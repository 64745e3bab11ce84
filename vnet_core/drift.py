"""Whether a scan is like those that a model was trained on: a few figures of each scan, and their ranges over many."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from vnet_core.plan import Plan
from vnet_core.volume import Volume, canonical

PERCENTILES = (5, 25, 50, 75, 95)
"""Of the foreground's intensities. Not the extremes, which an implant or a noisy voxel decides."""
SAMPLED = 1 << 20
"""Most voxels of a channel that the percentiles are taken over: every n-th along each axis."""
FEWEST_SCANS = 20
"""Training scans from which ranges are told; of fewer, ordinary scans would look strange."""
OUTER = (1.0, 99.0)
"""Percentiles over the training scans between which a figure is usual."""
MARGIN = 0.5
"""A figure may lie this part of its range beyond either end. A choice: a normally distributed figure does not do so in
one scan of 300 after a training with 20 scans, and of 3,000 after one with 50."""
LEAST_MARGIN = 0.1
"""The margin is at least this part of the median, or for intensities of the median distance between their 5th and 95th
percentile: scans that are all alike have no range."""

FIXED_SCALES = ("window", "percentiles")
"""Intensity schemes of a plan that are the same numbers for every scan."""

Profile = dict[str, Any]
"""Plain JSON. Of a scan, axes z, y, x in the order of the network's grids: ``spacing_mm`` and ``extent_mm`` as the scan
came, and per channel the PERCENTILES of its foreground, ``intensities`` as they came and ``normalised``. Of a model:
the same shape with [low, high, margin] for each figure, ``scans`` and ``channels``."""

_PER_CHANNEL = {"intensities": "intensity", "normalised": "normalised intensity"}
_PER_AXIS = {"spacing_mm": "spacing", "extent_mm": "extent"}


class Sample:
    """Some voxels of channels (C, Z, Y, X) of a shape. Planes are added in turn, and samples of other planes joined."""

    def __init__(self, shape: Sequence[int], first: int = 0) -> None:
        """``first``: the plane that is added first."""
        self._step = max(1, int(np.ceil((prod(shape[1:]) / SAMPLED) ** (1 / 3))))
        self._lowest: list[np.ndarray] = []
        self._taken: list[np.ndarray] = []
        self._next = first

    @classmethod
    def of(cls, voxels: np.ndarray) -> Sample:
        """Of all planes at once."""
        sample = cls(voxels.shape)
        sample.add(voxels)
        return sample

    def add(self, planes: np.ndarray) -> None:
        """The next planes (C, n, Y, X)."""
        first = -self._next % self._step
        taken = planes[:, first :: self._step, :: self._step, :: self._step]
        self.join(planes.min(axis=(1, 2, 3)), taken.reshape(len(planes), -1).copy())
        self._next += planes.shape[1]

    def join(self, lowest: np.ndarray, taken: np.ndarray) -> None:
        """What :meth:`told` says of other planes."""
        self._lowest.append(lowest)
        self._taken.append(taken)

    def told(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every channel its lowest value (C,), and the voxels that were taken (C, n)."""
        return np.min(self._lowest, axis=0), np.concatenate(self._taken, axis=1)

    def percentiles(self) -> list[list[float]]:
        """Of every channel's foreground."""
        return [_percentiles(channel, low) for low, channel in zip(*self.told(), strict=True)]


def profile(image: Volume, normalised: Sample) -> Profile:
    """The figures of one scan: voxels (C, Z, Y, X) as they came, and a sample of its channels on the network's grid.

    Foreground is what lies above a channel's minimum, as for the normalisation.
    """
    return {**profile_as_it_came(image), "normalised": normalised.percentiles()}


def profile_as_it_came(image: Volume) -> Profile:
    """Those figures that need nothing of the network's grid."""
    grid = canonical(image)[0].geometry
    return {
        "spacing_mm": [_rounded(mm) for mm in grid.spacing_mm],
        "extent_mm": [_rounded(n * mm) for n, mm in zip(grid.shape, grid.spacing_mm, strict=True)],
        "intensities": Sample.of(image.voxels).percentiles(),
    }


def _percentiles(sample: np.ndarray, lowest: float) -> list[float]:
    foreground = sample[sample > lowest]
    # a channel of which no sampled voxel is above the minimum has one value as far as this can see
    values = foreground if foreground.size else sample
    return [_rounded(value) for value in np.percentile(values.astype(np.float64), PERCENTILES)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def model_profile(profiles: Sequence[Profile], plan: Plan) -> Profile | None:
    """The usual range of every figure over the training scans; None below ``FEWEST_SCANS``.

    Where the plan's intensity scale is taken from each scan anew (`zscore`, `range`), the scale in which a scan came is
    no part of it: the network never sees it.
    """
    if len(profiles) < FEWEST_SCANS:
        return None
    told: Profile = {"scans": len(profiles), "channels": list(plan.channels)}
    for name in _PER_AXIS:
        axes = zip(*(scan[name] for scan in profiles), strict=True)
        told[name] = [_range(values, LEAST_MARGIN * float(np.median(values))) for values in axes]
    names = [name for name in _PER_CHANNEL if name != "intensities" or plan.preprocess.intensity in FIXED_SCALES]
    for name in names:
        told[name] = []
        for channel in zip(*(scan[name] for scan in profiles), strict=True):
            width = float(np.median([values[-1] - values[0] for values in channel]))
            told[name].append([_range(values, LEAST_MARGIN * width) for values in zip(*channel, strict=True)])
    return told


def _range(values: Sequence[float], least_margin: float) -> list[float]:
    low, high = np.percentile(np.asarray(values, float), OUTER)
    return [_rounded(low), _rounded(high), _rounded(max(MARGIN * (high - low), least_margin))]


def drift(scan: Profile, model: Profile) -> list[str]:
    """What is unlike the training scans, in words: ``spacing 5 mm along z, training 1 to 1.5 mm``; empty: nothing.

    ``scan`` of :func:`profile`, ``model`` of :func:`model_profile`. Of a channel's percentiles only the one farthest
    out is told. Figures that either side lacks are passed over.
    """
    reasons = []
    for name, word in _PER_AXIS.items():
        for axis, value, usual in zip("zyx", scan.get(name, ()), model.get(name, ()), strict=False):
            if _beyond(value, usual) > 0:
                reasons.append(f"{word} {value:.4g} mm along {axis}, training {_range_text(usual)} mm")
    for name, word in _PER_CHANNEL.items():
        channels = zip(model["channels"], scan.get(name, ()), model.get(name, ()), strict=False)
        for channel, values, ranges in channels:
            beyond = [_beyond(value, usual) for value, usual in zip(values, ranges, strict=True)]
            worst = int(np.argmax(beyond))
            if beyond[worst] > 0:
                reasons.append(
                    f"{_place(PERCENTILES[worst])} of the {word} of channel {channel} {values[worst]:.4g},"
                    f" training {_range_text(ranges[worst])}"
                )
    return reasons


def _beyond(value: float, usual: Sequence[float]) -> float:
    """How many margins a figure lies outside what is allowed; 0 or less inside."""
    low, high, margin = usual
    outside = max(low - margin - value, value - high - margin)
    return outside / margin if margin else outside


def _range_text(usual: Sequence[float]) -> str:
    low, high = f"{usual[0]:.4g}", f"{usual[1]:.4g}"
    return low if low == high else f"{low} to {high}"


def _place(percentile: int) -> str:
    return "median" if percentile == 50 else f"{percentile}th percentile"
