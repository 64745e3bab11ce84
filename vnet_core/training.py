"""Which patches a training draws.

Every sample is drawn by a generator of its own, seeded by (seed, step, position in the global batch). So the data of a
step do not depend on how many workers share it, nor on where an interrupted run was resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnet_core.geometry import Shape
from vnet_core.sections import TrainingPlan

# B batch, C channel, K class, Z Y X


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a patch is cut from a volume and how it is mirrored."""

    start: Shape
    """First voxel (z, y, x); negative where the patch is larger than the volume."""
    flip: tuple[bool, bool, bool]
    """Mirrored along (z, y, x)."""

    def widened(self, margin: Shape) -> Placement:
        """Of a patch that is larger by ``margin`` (z, y, x) voxels on either side."""
        z, y, x = (first - more for first, more in zip(self.start, margin, strict=True))
        return Placement((z, y, x), self.flip)


def sample_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """The generator of one sample of one step."""
    return np.random.default_rng([seed, step, position])


def place(
    generator: np.random.Generator, shape: Shape, foreground: Mapping[int, np.ndarray], plan: TrainingPlan
) -> Placement:
    """A random patch of ``plan.patch_size`` in a volume of ``shape``.

    ``foreground`` holds voxels (N, 3) per label value; with probability ``plan.foreground_fraction`` the patch is
    centred on one of them, of a label drawn uniformly. Then it is shifted by up to ``plan.augmentation.shift_voxels``
    and, where the volume is larger than the patch, kept inside.
    """
    change = plan.augmentation
    patch = np.asarray(plan.patch_size)
    room = np.asarray(shape) - patch
    centred = generator.random() < plan.foreground_fraction and len(foreground) > 0
    if centred:
        voxels = foreground[int(generator.choice(sorted(foreground)))]
        start = voxels[generator.integers(len(voxels))] - patch // 2
    else:
        start = np.floor(generator.random(3) * (np.maximum(room, 0) + 1)).astype(int)
    shift = generator.integers(-change.shift_voxels, change.shift_voxels + 1, 3)
    if generator.random() >= change.probability:
        shift[:] = 0
    inside = np.clip(start + shift, 0, np.maximum(room, 0))
    around = np.clip(room // 2 + shift, np.minimum(room, 0), 0)
    z, y, x = (int(v) for v in np.where(room >= 0, inside, around))
    flip = [bool(axis in change.flip_axes and generator.random() < 0.5) for axis in range(3)]
    return Placement((z, y, x), (flip[0], flip[1], flip[2]))


def cut(array: np.ndarray, placement: Placement, patch_size: Shape) -> np.ndarray:
    """The patch (..., *patch_size) of an array (..., Z, Y, X); zeros where it reaches beyond the array."""
    result = np.zeros((*array.shape[:-3], *patch_size), array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for start, size, n in zip(placement.start, patch_size, array.shape[-3:], strict=True):
        first = min(max(start, 0), n)
        last = max(min(start + size, n), first)
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
