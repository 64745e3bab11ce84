"""Statistics of a cohort that add up: the fingerprint of two cohorts together is the sum of their fingerprints.

One case's fingerprint is taken when the case is ingested and kept with it, so adding a case never rescans the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import cc3d
import numpy as np

from vnet_core.volume import Volume, canonical, crop, foreground_box

Grid = tuple[tuple[int, int, int], tuple[float, float, float]]
"""Shape and spacing_mm, (z, y, x) in canonical order."""

INTENSITY_FIRST = -1100.0
INTENSITY_WIDTH = 10.0
INTENSITY_BINS = 432
"""Intensities of labelled voxels are counted in bins of this width, the first and the last open: Hounsfield units from
-1100 to 3200. Counts add up; the moments and quantiles that are read from them are right to within a bin."""


SIZES_PER_DOUBLING = 4


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Grids of the foreground boxes, voxels per label and their intensities, over any number of cases."""

    grids: Counter[Grid] = field(default_factory=Counter)
    """How many cases have each grid, after reorientation and crop."""
    label_voxels: Counter[int] = field(default_factory=Counter)
    """Voxels per label value, background (0) included."""
    label_cases: Counter[int] = field(default_factory=Counter)
    """Cases in which each label value occurs."""
    intensities: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Labelled voxels per (channel, bin of intensity); bin 0 is all below ``INTENSITY_FIRST``."""
    components: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Connected components (26 neighbours) per (label value, size): size n is 2^(n / 4) mL, to the nearest."""

    @property
    def component_ml(self) -> dict[int, list[float]]:
        """Volumes in mL of the components of each label, ascending, to the nearest quarter of a doubling."""
        volumes: dict[int, list[float]] = {}
        for (value, size), n in sorted(self.components.items()):
            volumes.setdefault(value, []).extend([2.0 ** (size / SIZES_PER_DOUBLING)] * n)
        return volumes

    @property
    def cases(self) -> int:
        """Number of cases."""
        return sum(self.grids.values())

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(
            self.grids + other.grids,
            self.label_voxels + other.label_voxels,
            self.label_cases + other.label_cases,
            self.intensities + other.intensities,
            self.components + other.components,
        )


def fingerprint(image: Volume, label: Volume | None) -> Fingerprint:
    """The fingerprint of one case; image (C, Z, Y, X), label (1, Z, Y, X) on the same grid or None."""
    scan = canonical(image)[0]
    box = crop(scan, *foreground_box(scan.voxels)).geometry
    spacing = tuple(round(s, 4) for s in box.spacing_mm)
    grids: Counter[Grid] = Counter({(box.shape, (spacing[0], spacing[1], spacing[2])): 1})
    if label is None:
        return Fingerprint(grids)
    values, voxels = np.unique(label.labels, return_counts=True)
    return Fingerprint(
        grids,
        Counter({int(v): int(n) for v, n in zip(values, voxels, strict=True)}),
        Counter({int(v): 1 for v in values}),
        _counted(image.voxels[:, label.labels > 0]),
        _components(label.labels, label.geometry.voxel_ml),
    )


def _components(labels_ZYX: np.ndarray, voxel_ml: float) -> Counter[tuple[int, int]]:
    """Components per (label value, size); all labels in one pass."""
    rows = [np.flatnonzero((labels_ZYX > 0).any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if len(rows[0]) == 0:
        return Counter()
    box = labels_ZYX[tuple(slice(row[0], row[-1] + 1) for row in rows)]
    # cc3d joins voxels of equal value only
    components = cc3d.connected_components(np.ascontiguousarray(box).astype(np.uint16), connectivity=26)
    voxels = np.bincount(components.ravel())
    values = np.zeros(len(voxels), np.int64)
    values[components.ravel()] = box.ravel()
    sizes = np.round(SIZES_PER_DOUBLING * np.log2(np.maximum(voxels, 1) * voxel_ml)).astype(int)
    return Counter((int(values[number]), int(sizes[number])) for number in range(1, len(voxels)))


def _counted(values: np.ndarray) -> Counter[tuple[int, int]]:
    """Voxels per (channel, bin) of values (C, N)."""
    result: Counter[tuple[int, int]] = Counter()
    for channel, row in enumerate(values):
        bins = np.floor((row.astype(np.float64) - INTENSITY_FIRST) / INTENSITY_WIDTH) + 1
        counts = np.bincount(np.clip(bins, 0, INTENSITY_BINS - 1).astype(np.int64), minlength=INTENSITY_BINS)
        result.update({(channel, int(b)): int(counts[b]) for b in np.flatnonzero(counts)})
    return result


@dataclass(frozen=True, slots=True)
class Intensities:
    """What a cohort's labelled voxels say of one channel."""

    window: tuple[float, float]
    """Their 0.5 and 99.5 percentiles."""
    mean: float
    """Of the values clipped to the window."""
    deviation: float
    """Standard deviation of the values clipped to the window."""


def labelled_intensities(value: Fingerprint, channel: int) -> Intensities | None:
    """Percentiles, mean and deviation of a channel's labelled voxels, within one bin of the exact ones.

    None where they give no scale: without a labelled voxel, as in fingerprints of older versions, or with all in one
    bin. Values in the open bins count as their edges.
    """
    counts = np.zeros(INTENSITY_BINS)
    for (where, number), n in value.intensities.items():
        if where == channel:
            counts[number] = n
    if np.count_nonzero(counts) < 2:
        return None
    edges = INTENSITY_FIRST + INTENSITY_WIDTH * np.clip(np.arange(-1, INTENSITY_BINS), 0, INTENSITY_BINS - 2)
    reached = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    lower, upper = (_quantile(reached, edges, share) for share in (0.005, 0.995))
    if lower >= upper:
        return None
    centres = np.clip((edges[1:] + edges[:-1]) / 2, lower, upper)
    mean = float(np.average(centres, weights=counts))
    variance = float(np.average((centres - mean) ** 2, weights=counts))
    return Intensities((lower, upper), mean, float(np.sqrt(variance)))


def _quantile(reached: np.ndarray, edges: np.ndarray, share: float) -> float:
    """Where the share of values that lie below, ``reached`` at each of ``edges``, is ``share``; linear in a bin."""
    number = int(np.searchsorted(reached, share, side="right")) - 1
    part = (share - reached[number]) / (reached[number + 1] - reached[number])
    return float(edges[number] + part * (edges[number + 1] - edges[number]))


def total(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of all cases together."""
    result = Fingerprint()
    for part in parts:
        result = result + part
    return result


def to_mapping(value: Fingerprint) -> dict:
    """Plain JSON form."""
    return {
        "grids": [[list(shape), list(spacing), n] for (shape, spacing), n in sorted(value.grids.items())],
        "label_voxels": sorted([v, n] for v, n in value.label_voxels.items()),
        "label_cases": sorted([v, n] for v, n in value.label_cases.items()),
        "intensities": _runs(value.intensities),
        "components": sorted([v, size, n] for (v, size), n in value.components.items()),
    }


def _runs(counts: Counter[tuple[int, int]]) -> list[list]:
    """[channel, first bin, [count, count, ...]] from the first to the last bin of each channel."""
    result = []
    for channel in sorted({channel for channel, _ in counts}):
        bins = [number for where, number in counts if where == channel]
        first, last = min(bins), max(bins)
        result.append([channel, first, [counts[channel, number] for number in range(first, last + 1)]])
    return result


def from_mapping(mapping: dict) -> Fingerprint:
    """The inverse of :func:`to_mapping`; what an older version did not write is empty."""
    return Fingerprint(
        Counter({(tuple(shape), tuple(spacing)): n for shape, spacing, n in mapping["grids"]}),
        Counter(dict(mapping["label_voxels"])),
        Counter(dict(mapping["label_cases"])),
        Counter(
            {
                (channel, first + place): n
                for channel, first, counts in mapping.get("intensities", ())
                for place, n in enumerate(counts)
                if n
            }
        ),
        Counter({(v, size): n for v, size, n in mapping.get("components", ())}),
    )
