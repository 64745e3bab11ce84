"""Random changes of the shape of training samples, composed into one sampling of image and label.

A rotation, a zoom and any number of B-splines give every voxel of a patch the point that it is taken from. The values
are interpolated once, so several changes blur no more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from vnet_core.geometry import Shape, Triple
from vnet_core.sections import AugmentationPlan

# C channel, Z Y X


@dataclass(frozen=True, slots=True, eq=False)
class Spline:
    """A smooth displacement of the voxels of a patch: a uniform cubic B-spline along each axis."""

    rows_voxels: torch.Tensor
    """Control points (Z, Y, C, 3) along x of every row of voxels: displacements along (z, y, x), in voxels, float32."""
    along_x: torch.Tensor
    """Share of each of them in every voxel of a row, float32 (X, C)."""

    @property
    def reach_voxels(self) -> np.ndarray:
        """No displacement (z, y, x) is larger: a B-spline stays within its control points."""
        return (self.rows_voxels.abs().amax((0, 1, 2)) * self.along_x.sum(dim=1).max()).double().numpy()

    @property
    def displacement(self) -> torch.Tensor:
        """float32 (Z, Y, X, 3) along (z, y, x), in voxels."""
        return torch.einsum("zycd,xc->zyxd", self.rows_voxels, self.along_x)


def spline_of(control_voxels: np.ndarray, weights: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Spline:
    """From displacements (A, B, C, 3) of control points and their shares (Z, A), (Y, B), (X, C) in every voxel."""
    control, z, y, x = (torch.from_numpy(values) for values in (control_voxels, *weights))
    planes = torch.matmul(z, control.flatten(1)).reshape(len(z), len(y.T), -1)
    return Spline(torch.matmul(y, planes).reshape(len(z), len(y), -1, 3).float(), x.float())


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """Where the voxels of a patch are taken from."""

    matrix: np.ndarray
    """(3, 3), from offsets to the new patch's centre to offsets to the old one's, in voxels (z, y, x)."""
    splines: tuple[Spline, ...]
    """Displacements added after it."""

    def margin_voxels(self, shape: Shape) -> Shape:
        """How far beyond a patch of ``shape`` it looks, along (z, y, x)."""
        half = (np.asarray(shape) - 1) / 2
        reach = np.abs(self.matrix) @ half + sum(spline.reach_voxels for spline in self.splines)
        z, y, x = (max(0, int(n)) for n in np.ceil(reach - half - 1e-6))
        return z, y, x


def random_warp(
    generator: np.random.Generator, shape: Shape, spacing_mm: Triple, plan: AugmentationPlan
) -> Warp | None:
    """A random warp of a patch of ``shape``, None where nothing of the plan is drawn."""
    drawn = generator.random(4) < plan.probability
    degrees = plan.rotation_degrees if drawn[0] else 0.0
    matrix = rotation_zoom(generator, degrees, plan.scaling if drawn[1] else 0.0, spacing_mm)
    splines = []
    if plan.bspline_voxels and drawn[2]:
        splines.append(bspline(generator, shape, plan))
    if plan.elastic_voxels and drawn[3]:
        splines.append(elastic(generator, shape, plan.elastic_voxels, plan.elastic_smoothness_voxels))
    if not splines and np.array_equal(matrix, np.eye(3)):
        return None
    return Warp(matrix, tuple(splines))


def rotation_zoom(
    generator: np.random.Generator, rotation_degrees: float, scaling: float, spacing_mm: Triple
) -> np.ndarray:
    """A random matrix (3, 3) from offsets of the new patch to offsets of the old one, in voxels (z, y, x).

    A rotation by up to ``rotation_degrees`` about each axis and one zoom between ``1 - scaling`` and ``1 + scaling``,
    in millimetres, so that anatomy stays rigid on anisotropic grids. The identity where both are 0.
    """
    angles = np.deg2rad(generator.uniform(-rotation_degrees, rotation_degrees, 3))
    zoom = generator.uniform(1 - scaling, 1 + scaling)
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (i for i in range(3) if i != axis)
        plane = np.eye(3)
        plane[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ plane
    spacing = np.asarray(spacing_mm)
    return turn / zoom * (spacing[None, :] / spacing[:, None])


def bspline(generator: np.random.Generator, shape: Shape, plan: AugmentationPlan) -> Spline:
    """The paper's deformation: ``plan.bspline_points`` cells over the patch, control points moved at random.

    A cubic B-spline over n cells has n + 3 control points along an axis, those beyond the edge included, as in the
    published code. Their displacements are normal with deviation ``plan.bspline_voxels`` along ``plan.bspline_axes``.
    Between the control points the deviation is smaller: at a knot by a factor of (1/2)^1.5, about 0.35.
    """
    counts = [cells + 3 for cells in plan.bspline_points]
    control = generator.normal(0.0, plan.bspline_voxels, (*counts, 3))
    control *= [axis in plan.bspline_axes for axis in range(3)]
    z, y, x = (
        spline_weights((np.arange(n) + 0.5) * cells / n, cells + 3)
        for n, cells in zip(shape, plan.bspline_points, strict=True)
    )
    return spline_of(control, (z, y, x))


def elastic(generator: np.random.Generator, shape: Shape, deviation_voxels: float, smoothness_voxels: float) -> Spline:
    """White noise made smooth by a Gaussian of ``smoothness_voxels``, with ``deviation_voxels`` at every voxel.

    The Gaussian is a cubic B-spline of the same variance, h^2 / 3 for knots h apart; so only the values at its knots
    are drawn.
    """
    knot_voxels = smoothness_voxels * np.sqrt(3.0)
    offset = generator.random(3)
    weights = []
    for n, first in zip(shape, offset, strict=True):
        at = first + np.arange(n) / knot_voxels
        weight = spline_weights(at, int(at[-1]) + 4)
        weights.append(weight / np.linalg.norm(weight, axis=1, keepdims=True))
    control = generator.normal(0.0, deviation_voxels, (*(weight.shape[1] for weight in weights), 3))
    return spline_of(control, (weights[0], weights[1], weights[2]))


def spline_weights(at: np.ndarray, count: int) -> np.ndarray:
    """Weights (N, count) of the control points of a uniform cubic B-spline at ``at`` (N,), in cells, 0 .. count - 3.

    Control point k has its centre at k - 1. Every row adds up to 1.
    """
    cell = np.clip(np.floor(at).astype(int), 0, count - 4)
    t = at - cell
    four = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    weights = np.zeros((len(at), count))
    np.put_along_axis(weights, cell[:, None] + np.arange(4), four, axis=1)
    return weights


def warped(
    image: torch.Tensor, classes: torch.Tensor, warp: Warp | None, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image float32 (C, *shape), linearly, and classes (*shape), by nearest voxel, seen through ``warp``.

    ``image`` (C, Z, Y, X) and ``classes`` (Z, Y, X) lie around the same centre as the patch and may be larger, so that
    its corners see what is there; beyond them is zero (background). Same devices and dtypes as given. Without a warp
    both are given back as they are.
    """
    if warp is None:
        assert tuple(classes.shape) == shape, "only a warp needs a margin"
        return image, classes
    grid = _grid(warp, shape, classes.shape, image.device)
    moved = F.grid_sample(image[None], grid, "bilinear", "zeros", align_corners=True)[0]
    # class indices up to 2^24 are exact in float32
    named = F.grid_sample(classes[None, None].float(), grid, "nearest", "zeros", align_corners=True)[0, 0]
    return moved, named.to(classes.dtype)


def _grid(warp: Warp, shape: Shape, seen: Sequence[int], device: torch.device) -> torch.Tensor:
    """Places (1, *shape, 3) as torch counts them: x, y, z, from -1 to 1 between the outermost centres of ``seen``.

    All of a row is one product: what depends on z and y, times what depends on x.
    """
    scale = 1 / np.maximum((np.asarray(seen) - 1) / 2, 0.5)
    columns = (warp.matrix * scale[:, None])[::-1].T
    z, y, x = ((np.arange(n) - (n - 1) / 2)[:, None] * columns[axis] for axis, n in enumerate(shape))
    offset = torch.from_numpy(x.reshape(1, -1).astype(np.float32))
    scale_xyz = torch.from_numpy(scale[::-1].astype(np.float32))
    of_rows = [torch.from_numpy((z[:, None] + y).reshape(-1, 3).astype(np.float32))]
    of_columns = [torch.eye(3).repeat(1, shape[2])]
    for spline in warp.splines:
        of_rows.append((spline.rows_voxels.flip(-1) * scale_xyz).reshape(len(of_rows[0]), -1))
        of_columns.append(torch.einsum("xc,de->cdxe", spline.along_x, torch.eye(3)).reshape(-1, offset.shape[1]))
    rows, by_columns = torch.cat(of_rows, dim=1), torch.cat(of_columns)
    return torch.addmm(offset.to(device), rows.to(device), by_columns.to(device)).reshape(1, *shape, 3)
