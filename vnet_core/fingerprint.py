"""Statistics of a cohort that add up: the fingerprint of two cohorts together is the sum of their fingerprints.

One case's fingerprint is taken when the case is ingested and kept with it, so adding a case never rescans the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vnet_core.errors import ConfigError
from vnet_core.plan import Label, NetworkPlan, Plan, PreprocessPlan, TrainingPlan
from vnet_core.preprocess import foreground_box
from vnet_core.volume import Volume, canonical, crop

Grid = tuple[tuple[int, int, int], tuple[float, float, float]]
"""Shape and spacing_mm, (z, y, x) in canonical order."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Grids of the foreground boxes and voxels per label, over any number of cases."""

    grids: Counter[Grid] = field(default_factory=Counter)
    """How many cases have each grid, after reorientation and crop."""
    label_voxels: Counter[int] = field(default_factory=Counter)
    """Voxels per label value, background (0) included."""
    label_cases: Counter[int] = field(default_factory=Counter)
    """Cases in which each label value occurs."""

    @property
    def cases(self) -> int:
        """Number of cases."""
        return sum(self.grids.values())

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(
            self.grids + other.grids,
            self.label_voxels + other.label_voxels,
            self.label_cases + other.label_cases,
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
    )


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
    }


def from_mapping(mapping: dict) -> Fingerprint:
    """The inverse of :func:`to_mapping`."""
    return Fingerprint(
        Counter({(tuple(shape), tuple(spacing)): n for shape, spacing, n in mapping["grids"]}),
        Counter(dict(mapping["label_voxels"])),
        Counter(dict(mapping["label_cases"])),
    )


STEP_GMACS_PER_CORE = 110.0
"""Multiply-accumulates (10^9) of one forward pass of a batch that a plan allows per processor core. With the backward
pass about twice that again; a core with bfloat16 units does some 100 such a second, so a step takes about three seconds
at the most."""

STEP_GMACS_PER_GPU = 20_000.0
"""The same for one GPU."""


def derive_plan(
    value: Fingerprint, channels: tuple[str, ...], labels: tuple[Label, ...], step_gmacs: float = STEP_GMACS_PER_CORE
) -> Plan:
    """A plan from a cohort's fingerprint.

    Spacing: the median along each axis. Patch: the 95th percentile of the foreground boxes, rounded up to what the
    network divides, at most about 128^3 voxels. Levels: as many as leave at least 3 voxels along each axis at the
    bottom, at most the published 5. Width: the largest of 4, 8, 16 whose batch stays within ``step_gmacs``. Channels
    whose name is CT get an intensity window, all others z-scores. Mirroring is left out along x when a label's name
    tells left from right.

    Raises ConfigError ``plan.empty-cohort`` without a case.
    """
    if value.cases == 0:
        raise ConfigError("plan.empty-cohort", "the cohort has 0 usable cases; a plan needs at least 1")
    spacings = np.array([spacing for (_, spacing) in value.grids.elements()])
    spacing = np.median(spacings, axis=0)
    extents = np.array([np.multiply(shape, s) for (shape, s) in value.grids.elements()])
    voxels = np.quantile(extents, 0.95, axis=0) / spacing
    levels = 5
    while levels > 2 and (np.ceil(voxels / 2 ** (levels - 1)) < 3).any():
        levels -= 1
    divisor = 2 ** (levels - 1)
    patch = np.maximum(np.ceil(voxels / divisor), 1) * divisor
    while patch.prod() > 128**3:
        patch[patch.argmax()] -= divisor
    batch = 4 if patch.prod() <= 64**3 else 2
    convolutions = NetworkPlan().convolutions[:levels]
    width = max(w for w in (4, 8, 16) if w == 4 or _relative_gmacs(w, patch) * batch <= step_gmacs)
    sided = any(word in re.split(r"[^a-z]+", label.name.lower()) for label in labels for word in ("left", "right"))
    return Plan(
        channels=channels,
        labels=labels,
        preprocess=PreprocessPlan(
            spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            intensity="window" if all(name.upper() == "CT" for name in channels) else "zscore",
        ),
        network=NetworkPlan(width=width, convolutions=convolutions, normalisation="instance"),
        training=TrainingPlan(
            patch_size=(int(patch[0]), int(patch[1]), int(patch[2])),
            batch_size=batch,
            flip_axes=() if sided else (2,),
        ),
    )


def _relative_gmacs(width: int, patch: np.ndarray) -> float:
    """Forward cost of one patch, from the published network's 502 GMAC at width 16 and 128 x 128 x 64 voxels."""
    return 502.0 * (width / 16) ** 2 * float(patch.prod()) / (128 * 128 * 64)
