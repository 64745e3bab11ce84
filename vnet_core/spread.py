"""How far the passes of an ensemble lie apart: the technical uncertainty of a mask, label by label.

The passes, one per network and mirror image, are compared with the mean on the network's grid, after the cleanings of
the plan. With v_p voxels of pass p, v voxels of the mean, and the published volume V in mL,

    low = V min_p(v_p) / v     high = V max_p(v_p) / v     agreement = min_p 2 |p and mean| / (v_p + v)

so that the mean's voxels on the network's grid stand for the volume on the scan's own grid. Where v or V is 0 there is
no such scale, and a voxel counts with its own volume on the network's grid. The range is widened to hold V.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vnet_core.plan import Plan
from vnet_core.postprocess import clean
from vnet_core.sections import Cleaning

SLAB_VOXELS = 1 << 22
"""Voxels that are counted at once; each takes 16 bytes meanwhile."""


@dataclass(frozen=True, slots=True)
class PartSpread:
    """Of one label or region."""

    volume_low_ml: float
    """Smallest volume over the passes; at most the published one."""
    volume_high_ml: float
    """Largest volume over the passes; at least the published one."""
    agreement: float
    """Lowest Dice of a pass with the mean, 0 to 1; 1 where both are empty."""


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How the classes of the passes fall on those of the mean."""

    counts: np.ndarray
    """int64 (passes, classes, classes): voxels of class i in the mean and class j in the pass."""
    values: tuple[int, ...]
    """Label value of each class, the first 0 for background."""
    voxel_ml: float
    """Volume of a voxel of the network's grid."""

    def of(self, values: Sequence[int], volume_ml: float) -> PartSpread:
        """Of what the label ``values`` make up together and whose published volume is ``volume_ml``."""
        chosen = sorted({self.values.index(value) for value in values})
        mean = int(self.counts[0][chosen].sum())
        each = self.counts[:, :, chosen].sum(axis=(1, 2))
        both = self.counts[np.ix_(range(len(self.counts)), chosen, chosen)].sum(axis=(1, 2))
        scale_ml = volume_ml / mean if mean and volume_ml else self.voxel_ml
        together = each + mean
        dice = np.divide(2 * both, together, out=np.ones(len(both)), where=together > 0)
        return PartSpread(
            volume_low_ml=min(float(each.min()) * scale_ml, volume_ml),
            volume_high_ml=max(float(each.max()) * scale_ml, volume_ml),
            agreement=float(dice.min()),
        )


def spread_of(mean_ZYX: np.ndarray, passes: Sequence[np.ndarray], plan: Plan, voxel_ml: float) -> Spread | None:
    """How the passes fall on the mean, all of them class indices (Z, Y, X) on the network's grid; None without passes.

    Every map is cleaned as the plan cleans masks, ``voxel_ml`` being the volume of a voxel of this grid; the maps that
    are handed in stay as they are.
    """
    if not passes:
        return None
    cleanings = class_cleanings(plan)
    mean = clean(mean_ZYX, voxel_ml, cleanings)
    counts = [class_counts(mean, clean(alone, voxel_ml, cleanings), plan.classes) for alone in passes]
    return Spread(np.stack(counts), _values(plan), voxel_ml)


def spread_of_slabs(slabs: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]], plan: Plan, voxel_ml: float) -> Spread:
    """As :func:`spread_of`, of slabs of the mean with those of every pass, cleaned by :func:`class_cleanings`."""
    counts: np.ndarray | int = 0
    for mean, passes in slabs:
        counts = counts + np.stack([class_counts(mean, alone, plan.classes) for alone in passes])
    return Spread(np.asarray(counts), _values(plan), voxel_ml)


def class_cleanings(plan: Plan) -> list[Cleaning]:
    """The cleanings of a plan for maps of classes, not of label values: a table over those could have 65536 rows."""
    values = _values(plan)
    return [one.model_copy(update={"label": values.index(one.label)}) for one in plan.inference.cleaning]


def _values(plan: Plan) -> tuple[int, ...]:
    return (0, *(label.value for label in plan.labels))


def class_counts(mean_ZYX: np.ndarray, pass_ZYX: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): voxels of each class of the mean by their class in a pass."""
    mean, other = mean_ZYX.ravel(), pass_ZYX.ravel()
    counts = np.zeros(classes * classes, np.int64)
    for start in range(0, mean.size, SLAB_VOXELS):
        part = slice(start, start + SLAB_VOXELS)
        counts += np.bincount(mean[part].astype(np.int64) * classes + other[part], minlength=counts.size)
    return counts.reshape(classes, classes)
