"""From the outputs of a network to classes.

K output, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vnet_core.plan import Plan
from vnet_core.structures import class_of


@dataclass(frozen=True, slots=True)
class Decision:
    """How logits become classes, in two steps: what is interpolated between them is the probability."""

    classes: int
    """Class indices run from 0 to one below this."""
    probability: Callable[[Tensor], Tensor]
    """(K, Z, Y, X) from logits of that shape."""
    choose: Callable[[Tensor], Tensor]
    """Class indices (Z, Y, X), int64, from probabilities (K, Z, Y, X)."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Class indices (Z, Y, X), int64, of logits (K, Z, Y, X)."""
        return self.choose(self.probability(logits))


def decision(plan: Plan) -> Decision:
    """How a plan's head decides.

    `softmax`: the most probable class, of equal ones the first. `sigmoid`: where a region's probability is above one
    half its voxels get the class of the label that it paints, later regions over earlier ones.
    """
    if plan.head == "softmax":
        return most_probable(plan.classes)
    index = class_of(plan)
    painted = [index[region.paints] for region in plan.told_regions]

    def paint(probability: Tensor) -> Tensor:
        classes = torch.zeros(probability.shape[1:], dtype=torch.int64, device=probability.device)
        for share, value in zip(probability, painted, strict=True):
            classes[share > 0.5] = value
        return classes

    return Decision(plan.classes, torch.sigmoid, paint)


def most_probable(classes: int) -> Decision:
    """The class with the largest softmax probability, of equal ones the first."""
    # on a processor max is ten times as fast as argmax along the first axis
    return Decision(classes, lambda logits: torch.softmax(logits, dim=0), lambda probability: probability.max(0)[1])
