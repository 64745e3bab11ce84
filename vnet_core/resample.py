"""Separable interpolation between grids that share their axes.

Because preprocessing only swaps, reverses, crops and rescales axes, the way back from the network's grid to the scan's
is one linear function per axis. Everything here works axis by axis and slab by slab, so memory stays bounded by the
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.blocks import Region
from vnet_core.decide import Decision
from vnet_core.geometry import Geometry, Shape
from vnet_core.volume import Voxels

Coordinates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Fractional source index of every target index along (z, y, x); float64, one 1-D array per axis."""

SLAB_VALUES = 1 << 25
"""Float values held at once while probabilities are interpolated onto a scan's grid (128 MiB)."""

LARGEST_LINEAR_STEP = 1.5
"""Target voxels up to this many source voxels apart are interpolated; larger ones are means."""


def coordinates(source: Geometry, target: Geometry) -> Coordinates:
    """Where the voxel centres of ``target`` lie in ``source``; the two must share their direction."""
    direction = np.asarray(source.direction)
    assert np.allclose(direction, target.direction, atol=1e-6), "grids must share their axes"
    shift_mm = (np.asarray(target.origin_mm) - np.asarray(source.origin_mm)) @ direction
    z, y, x = (
        _snap((shift_mm[a] + np.arange(target.shape[a]) * target.spacing_mm[a]) / source.spacing_mm[a])
        for a in range(3)
    )
    return z, y, x


def _snap(index: np.ndarray) -> np.ndarray:
    """Indices within 1e-6 of a whole number become it, so that equal grids are copied and not interpolated."""
    whole = np.round(index)
    return np.where(np.abs(index - whole) < 1e-6, whole, index)


@dataclass(frozen=True, slots=True)
class Planes:
    """Some target planes along z, and the source planes that are held for them."""

    wanted: slice
    """Of the target."""
    held: slice
    """Of the source."""
    voxels: int
    """All planes of the source."""


def planes_for(at: Coordinates, step: Sequence[float], voxels: int, wanted: slice) -> Planes:
    """The planes of a source of ``voxels`` planes that :func:`averaged` looks at for ``wanted`` target planes."""
    if step[0] > LARGEST_LINEAR_STEP:
        first, _, _ = _covered(at[0][wanted], step[0], voxels)
        a, b = int(first.min()), int(first.max()) + int(np.ceil(step[0])) + 1
    else:
        places = np.clip(at[0][wanted], 0, voxels - 1)
        a, b = int(np.floor(places.min())), int(np.floor(places.max())) + 2
    return Planes(wanted, slice(min(a, voxels - 1), min(b, voxels)), voxels)


def linear(
    values: torch.Tensor, at: Coordinates, order: Sequence[int] | None = None, planes: Planes | None = None
) -> torch.Tensor:
    """Values (..., Z, Y, X), float, interpolated at ``at``; the outermost value is kept beyond the edge.

    ``order`` of the axes decides how a value is rounded: a part of a volume is given that of the whole. ``planes``: the
    values are those that are held, and only the wanted planes of the target are made, to the last bit as among all.
    """
    for axis in order or _order(values.shape[-3:], [len(c) for c in at]):
        values = _linear_axis(values, at[axis], axis - 3, planes if axis == 0 else None)
    return values


def _order(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """z first, so that slabs of a volume are rounded as the whole; then the axis that shrinks more, which is cheaper"""
    return [0, *sorted((1, 2), key=lambda a: target[a] / source[a])]


def _linear_axis(values: torch.Tensor, at: np.ndarray, axis: int, planes: Planes | None = None) -> torch.Tensor:
    n = planes.voxels if planes else values.shape[axis]
    wanted, start = (planes.wanted, planes.held.start) if planes else (slice(None), 0)
    if planes is None and len(at) == n and np.array_equal(at, np.arange(n)):
        return values
    clipped = np.clip(at, 0, n - 1)
    below = np.floor(clipped).astype(np.int64)
    above = np.minimum(below + 1, n - 1)
    weights = (clipped - below).astype(np.float32)
    is_whole = not (clipped - below).any()  # of all, so that a part is rounded as they are
    below, above, weights = (part[wanted] for part in (below, above, weights))
    shape = [1] * values.ndim
    shape[axis] = len(below)
    low = values.index_select(axis, torch.from_numpy(below - start).to(values.device))
    if is_whole:
        return low
    weight = torch.from_numpy(weights).reshape(shape).to(values.device)
    high = values.index_select(axis, torch.from_numpy(above - start).to(values.device))
    return torch.lerp(low, high, weight)


def nearest(at: Coordinates, axis: int) -> Coordinates:
    """The same coordinates with those of ``axis`` at the nearest whole index; halves go up."""
    z, y, x = (np.floor(c + 0.5) if a == axis else c for a, c in enumerate(at))
    return z, y, x


def averaged(
    values: torch.Tensor, at: Coordinates, step: Sequence[float], planes: Planes | None = None
) -> torch.Tensor:
    """Values (..., Z, Y, X), float, as :func:`linear`, but where voxels become larger the mean of what they cover.

    ``step`` is the distance of target voxels along (z, y, x) in source voxels. Along an axis where it is above
    ``LARGEST_LINEAR_STEP`` a target voxel is the mean of the source under it, so that what lies between two centres
    is not skipped (aliasing); beyond the edge the mean is taken over what is inside. ``planes`` as for :func:`linear`.
    """
    z, y, x = at
    for axis in range(3):
        if step[axis] > LARGEST_LINEAR_STEP:
            values = _mean_axis(values, at[axis], step[axis], axis - 3, planes if axis == 0 else None)
            z, y, x = (np.arange(values.shape[a - 3]) + 0.0 if a == axis else c for a, c in enumerate((z, y, x)))
    return linear(values, (z, y, x), planes=None if step[0] > LARGEST_LINEAR_STEP else planes)


def _covered(at: np.ndarray, step: float, voxels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first voxel under each target voxel, and where it begins and ends in source voxels."""
    lower, upper = np.clip([at - step / 2, at + step / 2], -0.5, voxels - 0.5)
    return np.floor(lower + 0.5).astype(np.int64), lower, upper


def _mean_axis(
    values: torch.Tensor, at: np.ndarray, step: float, axis: int, planes: Planes | None = None
) -> torch.Tensor:
    n = planes.voxels if planes else values.shape[axis]
    wanted, start = (planes.wanted, planes.held.start) if planes else (slice(None), 0)
    first, lower, upper = _covered(at[wanted], step, n)
    shape = [1] * values.ndim
    shape[axis] = len(first)
    result: torch.Tensor | None = None
    for offset in range(int(np.ceil(step)) + 1):
        index = first + offset
        covered = np.clip(np.minimum(upper, index + 0.5) - np.maximum(lower, index - 0.5), 0, None)
        weight = torch.from_numpy((covered / np.maximum(upper - lower, 1e-9)).astype(np.float32)).reshape(shape)
        part = values.index_select(axis, torch.from_numpy(np.minimum(index, n - 1) - start).to(values.device))
        weight = weight.to(values.device)
        result = part * weight if result is None else result.addcmul_(part, weight)
    assert result is not None
    return result


def nearest_labels(values: Voxels, at: Coordinates, wanted: slice = slice(None)) -> np.ndarray:
    """Label map (Z, Y, X) of integers at ``at``: the label of the nearest voxel; halves go up. Same dtype. Only the
    ``wanted`` planes are made."""
    z, y, x = (np.clip(np.floor(c + 0.5), 0, n - 1).astype(np.int64) for c, n in zip(at, values.shape, strict=True))
    z = z[wanted]
    held = values[int(z.min()) : int(z.max()) + 1]
    return np.ascontiguousarray(held[np.ix_(z - z.min(), y, x)])


def labels(values: Voxels, at: Coordinates, wanted: slice = slice(None)) -> np.ndarray:
    """Label map (Z, Y, X) of integers at ``at``: the label whose indicator, interpolated linearly, is largest.

    Labels are never interpolated as numbers. Ties go to the smaller value. Same dtype as ``values``. Only the
    ``wanted`` planes are made.
    """
    if all(np.array_equal(c, np.arange(n)) for c, n in zip(at, values.shape, strict=True)):
        return values[wanted].copy()
    planes = planes_for(at, (1.0, 1.0, 1.0), values.shape[0], wanted)
    held = values[planes.held]
    shape = (len(at[0][wanted]), len(at[1]), len(at[2]))
    best, result = torch.zeros(shape), np.zeros(shape, values.dtype)
    for value in np.unique(held):
        share = linear(torch.from_numpy((held == value).astype(np.float32)), at, planes=planes)
        better = share > best + 1e-6
        result[better.numpy()] = value
        best = torch.maximum(best, share)
    return result


def decided(logits: torch.Tensor, at: Coordinates, decide: Decision) -> np.ndarray:
    """Classes (Z, Y, X), uint8 or uint16, of network outputs (K, Z, Y, X) at ``at``.

    Probabilities, not classes, are interpolated. A voxel centre that lies outside the network's grid is background.
    Only a slab of probabilities exists at a time, at most ``SLAB_VALUES`` values.
    """
    shape: Shape = (logits.shape[1], logits.shape[2], logits.shape[3])
    return decided_part(logits, Region((0, 0, 0), shape), shape, at, Region((0, 0, 0), _lengths(at)), decide)


def reach(at: Coordinates, shape: Shape, part: Region) -> Region | None:
    """The voxels of a network's grid of ``shape`` that decide those of ``part`` of the target; None: all is background.

    ``at`` are the places of the whole target.
    """
    start, stop = [], []
    for axis, inside in enumerate(_inside(at, shape, part)):
        if inside is None:
            return None
        wanted = np.clip(at[axis][inside], 0, shape[axis] - 1)
        start.append(int(np.floor(wanted[0])))
        stop.append(int(np.ceil(wanted[-1])) + 1)
    return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def decided_part(
    logits: torch.Tensor, held: Region, shape: Shape, at: Coordinates, part: Region, decide: Decision
) -> np.ndarray:
    """The voxels of ``part`` of what :func:`decided` gives for a network's whole grid of ``shape``.

    ``logits`` (K, Z, Y, X) are those of ``held``, which contains the :func:`reach` of ``part``. The exponentials of a
    softmax may be rounded otherwise in the last place.
    """
    result = np.zeros(part.shape, np.uint8 if decide.classes <= 256 else np.uint16)
    inside = _inside(at, shape, part)
    if None in inside:
        return result
    whole = [slice_ for slice_ in _inside(at, shape, Region((0, 0, 0), _lengths(at))) if slice_ is not None]
    order = _order(shape, [rows.stop - rows.start for rows in whole])
    places = [
        np.clip(c[rows], 0, n - 1) - first
        for c, rows, n, first in zip(at, inside, shape, held.start, strict=True)
        if rows is not None
    ]
    top, left, front = (rows.start - a for rows, a in zip(inside, part.start, strict=True) if rows is not None)
    y, x = slice(left, left + len(places[1])), slice(front, front + len(places[2]))
    rows_per_row = max(1.0, float(np.diff(at[0]).max(initial=0)))
    plane = max(part.shape[1] * part.shape[2], held.shape[1] * held.shape[2])
    step = max(1, int(SLAB_VALUES / (len(logits) * plane * rows_per_row)))
    for begin in range(0, len(places[0]), step):
        wanted = places[0][begin : begin + step]
        first, last = int(np.floor(wanted[0])), int(np.ceil(wanted[-1]))
        probability = decide.probability(logits[:, first : last + 1].float())
        probability = linear(probability, (wanted - first, places[1], places[2]), order)
        result[top + begin : top + begin + len(wanted), y, x] = decide.choose(probability).numpy().astype(result.dtype)
    return result


def _inside(at: Coordinates, shape: Shape, part: Region) -> list[slice | None]:
    """Along each axis the indices of the part whose places lie within a grid of ``shape``; None: there are none."""
    found: list[slice | None] = []
    for c, n, a, b in zip(at, shape, part.start, part.stop, strict=True):
        rows = a + np.flatnonzero((c[a:b] >= -0.5 - 1e-6) & (c[a:b] <= n - 0.5 + 1e-6))
        found.append(slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else None)
    return found


def _lengths(at: Coordinates) -> Shape:
    z, y, x = (len(c) for c in at)
    return z, y, x
