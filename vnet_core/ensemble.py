"""The mean of several passes over one image: several networks, and mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor, nn

from vnet_core.inference import predict_logits
from vnet_core.plan import Plan


def predict_mean(networks: Sequence[nn.Module], image_CZYX: Tensor, plan: Plan) -> Tensor:
    """Mean logits (K, Z, Y, X), float32 on the processor, of an image (C, Z, Y, X).

    The mean runs over the networks, each as :func:`vnet_core.inference.prepare` made it, and for each over the image
    and its mirror images along every choice of ``plan.inference.mirror_axes``, brought back before they are added. One
    network without mirrors gives exactly :func:`vnet_core.inference.predict_logits`. Two results are held at once.

    Raises MemoryLimitError ``memory.tile``.
    """
    total: Tensor | None = None
    count = 0
    for network in networks:
        for axes in mirrors(plan.inference.mirror_axes):
            flipped = predict_logits(network, image_CZYX.flip(axes) if axes else image_CZYX, plan)
            logits = flipped.flip(axes) if axes else flipped
            total = logits if total is None else total.add_(logits)
            count += 1
    assert total is not None, "an ensemble has a network"
    return total if count == 1 else total.div_(count)


def mirrors(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every choice of the axes (0 z, 1 y, 2 x), as dimensions of (C, Z, Y, X), none of them first."""
    dimensions = sorted({axis + 1 for axis in axes})
    return [chosen for size in range(len(dimensions) + 1) for chosen in combinations(dimensions, size)]
