"""Boxes of voxels and how they cover a grid: arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np

from vnet_core.geometry import Shape

SIGMA_SHARE = 1 / 8
"""Standard deviation of the blending weight, as a share of the tile's edge (as MONAI's `sigma_scale`)."""
SMALLEST_WEIGHT = 1e-3
"""Floor of the blending weight, whose largest value is about 1."""


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """The voxels ``start <= (z, y, x) < stop``."""

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        assert all(0 <= a < b for a, b in zip(self.start, self.stop, strict=True)), self

    @property
    def shape(self) -> Shape:
        """Voxels along (z, y, x)."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The index of the region in an array (Z, Y, X)."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x


def tiles(shape: Shape, tile_shape: Shape, overlap: float) -> list[Region]:
    """Regions that together cover a grid of ``shape``, x fastest, then y, then z.

    All have one shape: ``tile_shape``, or the grid's where that is smaller. Neighbours share at least the fraction
    ``overlap`` (0 <= overlap < 1) of their edge; the last along an axis ends with the grid. Ten voxels in tiles of
    four with overlap 0.25::

        0 1 2 3 . . . . . .
        . . . 3 4 5 6 . . .
        . . . . . . 6 7 8 9
    """
    axes = []
    for n, edge in zip(shape, tile_shape, strict=True):
        axes.append([(start, start + min(edge, n)) for start in tile_starts(n, edge, overlap)])
    return [Region((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in product(*axes)]


def tile_starts(voxels: int, edge: int, overlap: float) -> list[int]:
    """Where the tiles of :func:`tiles` begin along one axis, ascending."""
    assert 0 <= overlap < 1, overlap
    edge = min(edge, voxels)
    step = max(1, int(edge * (1 - overlap)))
    count = 1 + ceil((voxels - edge) / step)
    return [min(number * step, voxels - edge) for number in range(count)]


def gaussian_weights(tile_shape: Shape) -> np.ndarray:
    """Weight of each voxel of a tile when overlapping tiles are averaged; float32 (Z, Y, X), in 0.001 .. 1.

    A Gaussian around the tile's centre whose standard deviation is an eighth of each edge, floored so that no voxel
    is without weight.
    """
    z, y, x = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n * SIGMA_SHARE)) ** 2) for n in tile_shape)
    weights = z[:, None, None] * y[:, None] * x
    return np.maximum(weights, SMALLEST_WEIGHT).astype(np.float32)
