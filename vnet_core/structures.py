"""Which structures the classes of a network make up. Needs no torch, which a night's own process does without.

Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vnet_core.plan import Plan


@dataclass(frozen=True, slots=True)
class Structure:
    """Something that a training is judged by."""

    name: str
    classes: tuple[int, ...]
    """The class indices that it is made of."""

    def mask(self, classes_ZYX: np.ndarray) -> np.ndarray:
        """Where it is, bool (Z, Y, X)."""
        if len(self.classes) == 1:
            return classes_ZYX == self.classes[0]
        return np.isin(classes_ZYX, self.classes)


def structures(plan: Plan) -> tuple[Structure, ...]:
    """The regions of a plan, or its labels where it has none."""
    index = class_of(plan)
    return tuple(Structure(region.name, tuple(index[v] for v in region.values)) for region in plan.told_regions)


def class_of(plan: Plan) -> Mapping[int, int]:
    """Class index of every label value."""
    return {label.value: number for number, label in enumerate(plan.labels, 1)}
