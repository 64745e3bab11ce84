"""What a segmenting actor asks its cluster for."""

from __future__ import annotations

from collections.abc import Sequence

from vnet_core.geometry import Geometry, resampled, to_canonical
from vnet_core.networks.memory import predicted_peak_bytes
from vnet_core.plan import Plan

PROCESS_BYTES = 1 << 30
"""An actor without a case: the interpreter, its libraries and the weights, and a mask that is written meanwhile."""
FLOAT32_BYTES = 4


def needed_bytes(plan: Plan, networks: int, geometry: Geometry, on_gpu: bool) -> int:
    """Predicted peak of an actor's main memory over one scan of this grid, by so many networks.

    At most that of a pass within the plan's limit, and what stays held beside it, within the same limit; the pass of a
    GPU lies in the GPU's own. The scan is taken to be uncropped, and the precision float32: it is no less than what
    will be needed.

    The same as ``computed_shape`` and ``held_bytes`` say, which would bring torch into the night's own process.
    """
    grid = resampled(to_canonical(geometry)[1], plan.preprocess.spacing_mm).shape
    z, y, x = (max(n, patch) for n, patch in zip(grid, plan.training.patch_size, strict=True))
    predicted = predicted_peak_bytes(plan.network, len(plan.channels), plan.outputs, (z, y, x), FLOAT32_BYTES)
    limit = int(plan.inference.memory_limit_gib * 2**30)
    in_pass = 0 if on_gpu else min(predicted, limit)
    passes = networks * 2 ** len(set(plan.inference.mirror_axes))
    class_bytes = 1 if plan.classes <= 256 else 2
    held = z * y * x * (FLOAT32_BYTES * plan.outputs + class_bytes * passes) if passes > 1 else 0
    # what would hold more goes through in portions, which take no more than the limit with their passes
    return PROCESS_BYTES + (in_pass + held if held <= limit else limit)


def memory_to_ask(needs: Sequence[int], largest: int) -> int:
    """What an actor asks for so that it can do the largest case that fits a node of ``largest`` bytes.

    One scan that fits nowhere does not keep the others from being done: it is refused memory when its turn comes.
    Where none fits it is the need of the smallest, which no node can give.
    """
    return max((need for need in needs if need <= largest), default=min(needs))
