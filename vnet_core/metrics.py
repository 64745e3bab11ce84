"""How well a mask agrees with the truth, structure by structure.

    Dice = 2 |P and T| / (|P| + |T|)     IoU = |P and T| / |P or T|     volume error = (|P| - |T|) / |T|
    precision = |P and T| / |P|          recall = |P and T| / |T|

with |.| the number of voxels of the prediction P and of the truth T (Dice 1945, Jaccard 1912). Distances between the
surfaces are those of :mod:`vnet_core.surface`.

A mask without voxels: where both are empty there was nothing to find, and every score is NaN, never a flattering 1.
Where one is empty, overlaps are 0 and distances infinite. Tables show NaN and infinity as not applicable, and means
say over how many cases they run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from vnet_core.errors import ConfigError
from vnet_core.geometry import Triple
from vnet_core.plan import Label, Region
from vnet_core.surface import surface_distances
from vnet_core.volume import check_shapes

Box = tuple[slice, slice, slice]

FIGURES = (
    "dice",
    "iou",
    "precision",
    "recall",
    "hd_mm",
    "hd95_mm",
    "assd_mm",
    "abd_mm",
    "volume_ml",
    "truth_volume_ml",
    "volume_error_ml",
    "volume_error",
)
"""Figures of every score; ``surface_dice_<tolerance>mm`` come on top."""


def dice(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> float:
    """Dice overlap of two bool masks (Z, Y, X), 0 to 1. One empty: 0. Both empty: NaN, there was nothing to find."""
    check_shapes(prediction_ZYX, truth_ZYX)
    common = int(np.count_nonzero(prediction_ZYX & truth_ZYX))
    return _ratio(2 * common, int(np.count_nonzero(prediction_ZYX)) + int(np.count_nonzero(truth_ZYX)))


@dataclass(frozen=True, slots=True)
class Structure:
    """What is scored as one thing: a label, or labels that are one together, such as a whole tumour."""

    name: str
    values: tuple[int, ...]
    """Values in the label maps, each above 0."""

    def __post_init__(self) -> None:
        if not self.values or min(self.values) < 1:
            raise ConfigError(
                "metrics.structure", f"structure {self.name!r} has the values {self.values}; name one or more above 0"
            )


def structures(of: Iterable[Label | Region]) -> tuple[Structure, ...]:
    """The structures of a plan's labels or regions."""
    return tuple(Structure(item.name, (item.value,) if isinstance(item, Label) else tuple(item.values)) for item in of)


@dataclass(frozen=True, slots=True)
class Score:
    """Agreement of one structure with the truth."""

    structure: Structure
    dice: float
    """0 to 1. One mask empty: 0. Both empty: NaN, here and in all that follows but volumes."""
    iou: float
    """0 to 1. One mask empty: 0."""
    precision: float
    """Share of the predicted voxels that are true, 0 to 1. One mask empty: 0."""
    recall: float
    """Share of the true voxels that were predicted, 0 to 1. One mask empty: 0."""
    hd_mm: float
    """Hausdorff distance. One mask empty: infinity."""
    hd95_mm: float
    """The larger of the two directions' distance within which 95 % of the surface lies. One mask empty: infinity."""
    assd_mm: float
    """Average symmetric surface distance, weighted by area. One mask empty: infinity."""
    abd_mm: float
    """Average boundary distance as in PROMISE12, not weighted. One mask empty: infinity."""
    surface_dice: tuple[tuple[float, float], ...]
    """Tolerance in mm and share of both surfaces within it, 0 to 1. One mask empty: 0."""
    volume_ml: float
    """Predicted volume."""
    truth_volume_ml: float
    volume_error_ml: float
    """Predicted minus true volume; positive is too much."""
    volume_error: float
    """The same as a share of the true volume: 0.1 is 10 % too much, -1 is nothing found. Truth empty: NaN."""

    def row(self) -> dict[str, Any]:
        """The score as one flat mapping. ``label`` is the value of a structure of one label, else None."""
        values = self.structure.values
        figures = {name: getattr(self, name) for name in FIGURES}
        tolerant = {surface_dice_name(tolerance): value for tolerance, value in self.surface_dice}
        before = {name: figures.pop(name) for name in FIGURES[: FIGURES.index("volume_ml")]}
        label = values[0] if len(values) == 1 else None
        return {"label": label, "name": self.structure.name, **before, **tolerant, **figures}


def surface_dice_name(tolerance_mm: float) -> str:
    """Name of surface Dice at a tolerance: ``surface_dice_1mm``, ``surface_dice_0.5mm``."""
    return f"surface_dice_{tolerance_mm:g}mm"


def score_labels(
    prediction_ZYX: np.ndarray,
    truth_ZYX: np.ndarray,
    wanted: Sequence[Structure],
    spacing_mm: Triple,
    tolerances_mm: Sequence[float] = (1.0,),
) -> list[Score]:
    """One score per structure, in their order, of two integer label maps (Z, Y, X) on one grid.

    ``spacing_mm``: (z, y, x). Values that belong to no structure count as background. Each structure is looked at in
    the box that holds it in both maps, its distances are computed once.
    Raises ScanError ``metrics.shape`` when the maps differ in shape, ConfigError ``metrics.tolerance`` below 0 mm.
    """
    check_shapes(prediction_ZYX, truth_ZYX)
    largest = max((value for structure in wanted for value in structure.values), default=1)
    boxes = [ndimage.find_objects(labels, max_label=largest) for labels in (prediction_ZYX, truth_ZYX)]
    scores = []
    for structure in wanted:
        mine = [found[value - 1] for found in boxes for value in structure.values if found[value - 1] is not None]
        box = _around(mine)
        prediction, truth = (_mask(labels[box], structure.values) for labels in (prediction_ZYX, truth_ZYX))
        scores.append(_score(structure, (prediction, truth), spacing_mm, tolerances_mm))
    return scores


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them; an empty one where there is none."""
    spans = [
        slice(min((box[axis].start for box in boxes), default=0), max((box[axis].stop for box in boxes), default=0))
        for axis in range(3)
    ]
    return spans[0], spans[1], spans[2]


def _mask(labels_ZYX: np.ndarray, values: Sequence[int]) -> np.ndarray:
    mask_ZYX = labels_ZYX == values[0]
    for value in values[1:]:
        mask_ZYX |= labels_ZYX == value
    return mask_ZYX


def _score(
    structure: Structure,
    masks_ZYX: tuple[np.ndarray, np.ndarray],
    spacing_mm: Triple,
    tolerances_mm: Sequence[float],
) -> Score:
    prediction, truth = masks_ZYX
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    p, t = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    both = int(np.count_nonzero(prediction & truth))
    # one empty: 0 for each overlap alike, although nothing was divided by nothing
    apart = 0.0 if p or t else float("nan")
    distances = surface_distances(prediction, truth, spacing_mm)
    return Score(
        structure=structure,
        dice=_ratio(2 * both, p + t),
        iou=_ratio(both, p + t - both),
        precision=both / p if p else apart,
        recall=both / t if t else apart,
        hd_mm=distances.hausdorff_mm(),
        hd95_mm=distances.hausdorff_mm(95),
        assd_mm=distances.assd_mm(),
        abd_mm=distances.abd_mm(),
        surface_dice=tuple((tolerance, distances.dice(tolerance)) for tolerance in tolerances_mm),
        volume_ml=p * voxel_ml,
        truth_volume_ml=t * voxel_ml,
        volume_error_ml=(p - t) * voxel_ml,
        volume_error=_ratio(p - t, t),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
