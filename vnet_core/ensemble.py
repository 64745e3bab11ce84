"""Several passes over one image, by several networks and of mirror images: their mean, and what each decides alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
from torch import Tensor, nn

from vnet_core.decide import decision
from vnet_core.geometry import Shape
from vnet_core.inference import predict_logits
from vnet_core.plan import Plan
from vnet_core.resample import decided


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the passes over one image say together, and each alone, on the network's grid."""

    logits: Tensor
    """Mean logits (K, Z, Y, X), float32 on the processor."""
    passes: tuple[np.ndarray, ...]
    """Classes (Z, Y, X) that each pass alone decides, uint8 or uint16; empty where there is one pass."""


def predict(networks: Sequence[nn.Module], image_CZYX: Tensor, plan: Plan) -> Prediction:
    """The mean of the logits of an image (C, Z, Y, X), and the decision of each pass.

    The mean runs over the networks, each as :func:`vnet_core.inference.prepare` made it, and for each over the image
    and its mirror images along every choice of ``plan.inference.mirror_axes``, brought back before they are added. One
    network without mirrors gives exactly :func:`vnet_core.inference.predict_logits`. Each pass decides as the mean does
    (:func:`vnet_core.decide.decision`). What is held beside the pass that runs: :func:`held_bytes`.

    Raises MemoryLimitError ``memory.tile``.
    """
    total: Tensor | None = None
    alone: list[np.ndarray] = []
    count = number_of_passes(len(networks), plan)
    for network in networks:
        for axes in mirrors(plan.inference.mirror_axes):
            flipped = predict_logits(network, image_CZYX.flip(axes) if axes else image_CZYX, plan)
            logits = flipped.flip(axes) if axes else flipped
            if count > 1:
                alone.append(decide_on_grid(logits, plan))  # before the sum, which takes the first pass's place
            total = logits if total is None else total.add_(logits)
    assert total is not None, "an ensemble has a network"
    return Prediction(total if count == 1 else total.div_(count), tuple(alone))


def decide_on_grid(logits: Tensor, plan: Plan) -> np.ndarray:
    """Classes (Z, Y, X), uint8 or uint16, of logits (K, Z, Y, X) on their own grid, slab by slab."""
    z, y, x = (np.arange(n, dtype=float) for n in logits.shape[1:])
    return decided(logits, (z, y, x), decision(plan))


def mirrors(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every choice of the axes (0 z, 1 y, 2 x), as dimensions of (C, Z, Y, X), none of them first."""
    dimensions = sorted({axis + 1 for axis in axes})
    return [chosen for size in range(len(dimensions) + 1) for chosen in combinations(dimensions, size)]


def number_of_passes(networks: int, plan: Plan) -> int:
    """Passes over one image of so many networks."""
    return networks * len(mirrors(plan.inference.mirror_axes))


def held_bytes(plan: Plan, shape: Shape, passes: int) -> int:
    """Bytes that are held beside the pass that runs, for a volume of ``shape`` (z, y, x) on the network's grid.

    They are the sum of the logits so far, float32, and one class per voxel of every pass, since the mean that each is
    compared with is known last. One pass holds nothing.
    """
    class_bytes = 1 if plan.classes <= 256 else 2
    return prod(shape) * (4 * plan.outputs + class_bytes * passes) if passes > 1 else 0
