"""The pure parts of training: which patches are drawn, the learning rate, one step, the running average.

Every sample is drawn by a generator of its own, seeded by (seed, step, position in the global batch). So the data of a
step do not depend on how many workers share it, nor on where an interrupted run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vnet_core.errors import TrainingError
from vnet_core.geometry import Shape
from vnet_core.plan import TrainingPlan

# B batch, C channel, K class, Z Y X


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a patch is cut from a volume and how it is mirrored."""

    start: Shape
    """First voxel (z, y, x); negative where the patch is larger than the volume."""
    flip: tuple[bool, bool, bool]
    """Mirrored along (z, y, x)."""


def sample_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """The generator of one sample of one step."""
    return np.random.default_rng([seed, step, position])


def place(
    generator: np.random.Generator, shape: Shape, foreground: Mapping[int, np.ndarray], plan: TrainingPlan
) -> Placement:
    """A random patch of ``plan.patch_size`` in a volume of ``shape``.

    ``foreground`` holds voxels (N, 3) per label value; with probability ``plan.foreground_fraction`` the patch is
    centred on one of them, of a label drawn uniformly. Then it is shifted by up to ``plan.shift_voxels`` and, where
    the volume is larger than the patch, kept inside.
    """
    patch = np.asarray(plan.patch_size)
    room = np.asarray(shape) - patch
    centred = generator.random() < plan.foreground_fraction and len(foreground) > 0
    if centred:
        voxels = foreground[int(generator.choice(sorted(foreground)))]
        start = voxels[generator.integers(len(voxels))] - patch // 2
    else:
        start = np.floor(generator.random(3) * (np.maximum(room, 0) + 1)).astype(int)
    shift = generator.integers(-plan.shift_voxels, plan.shift_voxels + 1, 3)
    inside = np.clip(start + shift, 0, np.maximum(room, 0))
    around = np.clip(room // 2 + shift, np.minimum(room, 0), 0)
    z, y, x = (int(v) for v in np.where(room >= 0, inside, around))
    flip = [bool(axis in plan.flip_axes and generator.random() < 0.5) for axis in range(3)]
    return Placement((z, y, x), (flip[0], flip[1], flip[2]))


def cut(array: np.ndarray, placement: Placement, patch_size: Shape) -> np.ndarray:
    """The patch (..., *patch_size) of an array (..., Z, Y, X); zeros where it reaches beyond the array."""
    result = np.zeros((*array.shape[:-3], *patch_size), array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for start, size, n in zip(placement.start, patch_size, array.shape[-3:], strict=True):
        first, last = max(start, 0), min(start + size, n)
        source.append(slice(first, last))
        target.append(slice(first - start, last - start))
    result[tuple(target)] = array[tuple(source)]
    axes = tuple(axis - 3 for axis in range(3) if placement.flip[axis])
    return np.flip(result, axes) if axes else result


def class_table(values: Sequence[int]) -> np.ndarray:
    """Lookup from label value to class index: ``values[i]`` becomes class i + 1, every other value 0; int64."""
    table = np.zeros(max(values) + 1, np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table


def split_patients(
    cases: Iterable[tuple[str, str | None]], fraction: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Case ids (training, validation) from (case id, patient or None), by a seeded draw over patients.

    Cases of one patient stay together; a case without patient is a patient of its own. At least one patient stays in
    training, and with a positive fraction and two patients or more at least one is kept for validation.
    """
    groups: dict[str, list[str]] = {}
    for case, patient in sorted(cases):
        groups.setdefault(f"patient {patient}" if patient else f"case {case}", []).append(case)
    order = np.random.default_rng(seed).permutation(sorted(groups))
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction > 0 else 0
    held = {case for group in order[:count] for case in groups[group]}
    every = sorted(case for members in groups.values() for case in members)
    return tuple(c for c in every if c not in held), tuple(c for c in every if c in held)


def learning_rate_factor(plan: TrainingPlan, progress: float) -> float:
    """Share of the peak learning rate at ``progress`` (0 .. 1) of the budget."""
    if progress < plan.warmup_fraction:
        return max(progress / plan.warmup_fraction, 1e-3)
    rest = min((progress - plan.warmup_fraction) / (1 - plan.warmup_fraction), 1.0)
    if plan.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if plan.schedule == "polynomial":
        return (1 - rest) ** 0.9
    return 1.0


def build_optimiser(network: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """The plan's optimiser; weight decay spares biases, norms and activation slopes. One kernel updates all weights."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if plan.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=plan.learning_rate, momentum=0.99, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What stays the same from step to step."""

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From logits (B, K, Z, Y, X) and classes (B, Z, Y, X) to a scalar."""
    precision: torch.dtype
    """bfloat16 runs the forward pass under autocast."""
    gradient_clip: float


def train_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: torch.Tensor,
    classes: torch.Tensor,
    settings: StepSettings,
) -> float:
    """One step on images (B, C, Z, Y, X) and classes (B, Z, Y, X) int64; returns the loss before it.

    Raises TrainingError ``train.diverged`` when loss or gradient is not finite; the weights are then untouched.
    """
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, settings.precision, enabled=settings.precision != torch.float32):
        logits = network(images)
    loss = settings.loss(logits, classes)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            "train.diverged",
            f"loss {loss.item()} and gradient norm {norm.item()} are not both finite; lower training.learning_rate or"
            " training.gradient_clip, then train again with --resume",
        )
    optimiser.step()
    return float(loss.detach())


class WeightAverage:
    """Exponential running average of a network's parameters and buffers, in float32."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts at the network's present state; ``decay`` 0 follows it exactly."""
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the state after ``step`` (counted from 1); early steps weigh more, so that the start fades."""
        decay = min(self.decay, step / (step + 9))
        for name, value in network.state_dict().items():
            average = self.state[name]
            if average.is_floating_point():
                average.lerp_(value.detach(), 1 - decay)
            else:
                average.copy_(value)
