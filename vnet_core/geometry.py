"""Where voxels lie in the world.

One convention for the whole program: arrays are indexed ``(z, y, x)``, the world is LPS millimetres ``(x, y, z)``
(x grows to the patient's left, y to the back, z to the head, as in DICOM and ITK). Column ``a`` of ``direction`` is the
unit vector in the world along array axis ``a``. Readers and writers of files turn their own order into this one;
nothing else in the program reorders axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations
from math import ceil
from typing import Any

import numpy as np

from vnet_core.errors import ScanError

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]
Matrix = tuple[Triple, Triple, Triple]

CANONICAL_DIRECTION: Matrix = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
"""Array axes z, y, x along world +z (head), +y (back), +x (left)."""

ORTHONORMAL_TOLERANCE = 1e-3
"""Largest deviation of ``direction.T @ direction`` from the identity that still counts as orthonormal."""

ANISOTROPIC = 3.0
"""An axis whose spacing is more than this many times the finest has thick slices."""

SAME_VOXELS = 0.1
"""Voxels of two grids farther apart than this share of the finest spacing are not the same."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape and place of a voxel grid."""

    shape: Shape
    """Voxels along (z, y, x)."""
    spacing_mm: Triple
    """Distance of voxel centres along array axes (z, y, x), > 0."""
    origin_mm: Triple
    """World (x, y, z) of the centre of voxel (0, 0, 0)."""
    direction: Matrix = CANONICAL_DIRECTION
    """3 x 3, rows world (x, y, z), columns array axes (z, y, x)."""

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.shape):
            raise ScanError("scan.empty", f"the grid {self.shape} has no voxel; every axis needs at least 1")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ScanError(
                "geometry.spacing", f"spacing_mm {self.spacing_mm} is not finite and positive; correct the header"
            )
        if not np.isfinite([*self.origin_mm, *np.ravel(self.direction)]).all():
            raise ScanError("geometry.nonfinite", "origin or direction holds NaN or Inf; correct the header")
        d = np.asarray(self.direction)
        deviation = float(np.abs(d.T @ d - np.eye(3)).max())
        if deviation > ORTHONORMAL_TOLERANCE:
            raise ScanError(
                "geometry.not-orthonormal",
                f"direction cosines deviate from orthonormal by {deviation:.4f} (at most {ORTHONORMAL_TOLERANCE});"
                " resample the scan onto an orthogonal grid first",
            )

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres (1 mL = 1000 mm^3)."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4) float64, from homogeneous index (z, y, x, 1) to world (x, y, z, 1) in mm."""
        m = np.eye(4)
        m[:3, :3] = np.asarray(self.direction) * np.asarray(self.spacing_mm)
        m[:3, 3] = self.origin_mm
        return m


def world_mm(geometry: Geometry, index_zyx: np.ndarray) -> np.ndarray:
    """World (x, y, z) in mm of voxel indices; ``index_zyx`` float (..., 3), result float64 (..., 3)."""
    m = geometry.matrix
    return np.asarray(index_zyx, float) @ m[:3, :3].T + m[:3, 3]


def voxel_index(geometry: Geometry, point_mm: np.ndarray) -> np.ndarray:
    """Fractional voxel index (z, y, x) of world points (x, y, z) in mm; the inverse of :func:`world_mm`."""
    m = geometry.matrix
    return (np.asarray(point_mm, float) - m[:3, 3]) @ np.linalg.inv(m[:3, :3]).T


def same_grid(a: Geometry, b: Geometry, tolerance_mm: float = 1e-2) -> bool:
    """Whether two grids have one shape and every voxel of them lies within ``tolerance_mm`` of its counterpart.

    Nor may it lie farther than ``SAME_VOXELS`` times the finest spacing: a voxel may be smaller than the tolerance.
    """
    if a.shape != b.shape:
        return False
    tolerance_mm = min(tolerance_mm, SAME_VOXELS * min(*a.spacing_mm, *b.spacing_mm))
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.asarray(a.shape) - 1)
    return bool(np.abs(world_mm(a, corners) - world_mm(b, corners)).max() <= tolerance_mm)


@dataclass(frozen=True, slots=True)
class Reorientation:
    """A lossless change of axes: canonical axis ``a`` is source axis ``source_axis[a]``, reversed where ``flip[a]``."""

    source_axis: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @property
    def _reversal(self) -> tuple[Any, ...]:
        return (..., *(slice(None, None, -1 if f else 1) for f in self.flip))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """A view of ``array`` (..., Z, Y, X) in canonical order."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + a for a in self.source_axis))
        return moved[self._reversal]

    def undo(self, array: np.ndarray) -> np.ndarray:
        """A view of ``array`` (..., Z, Y, X) from canonical order back in the source's order."""
        lead = array.ndim - 3
        flipped = array[self._reversal]
        return flipped.transpose(*range(lead), *(lead + self.source_axis.index(a) for a in range(3)))


def to_canonical(geometry: Geometry) -> tuple[Reorientation, Geometry]:
    """The reorientation that brings array axes nearest to head, back and left, and the grid after it.

    Oblique grids stay oblique: axes are only swapped and reversed, so no voxel is interpolated. Of the six axis
    orders the one with the largest sum of absolute cosines is taken, so that 45 degree ties resolve the same way
    every time.
    """
    d = np.asarray(geometry.direction)
    target = np.asarray(CANONICAL_DIRECTION)
    order = max(permutations(range(3)), key=lambda p: round(sum(abs(d[:, p[a]] @ target[:, a]) for a in range(3)), 9))
    flip = tuple(bool(d[:, order[a]] @ target[:, a] < 0) for a in range(3))
    first = np.zeros(3)
    for a in range(3):
        if flip[a]:
            first[order[a]] = geometry.shape[order[a]] - 1
    columns = [d[:, order[a]] * (-1 if flip[a] else 1) for a in range(3)]
    canonical = Geometry(
        shape=_triple_int(geometry.shape[a] for a in order),
        spacing_mm=_triple(geometry.spacing_mm[a] for a in order),
        origin_mm=_triple(world_mm(geometry, first)),
        direction=matrix_of(np.stack(columns, axis=1)),
    )
    return Reorientation((order[0], order[1], order[2]), (flip[0], flip[1], flip[2])), canonical


def resampled(geometry: Geometry, spacing_mm: Triple) -> Geometry:
    """The grid of another spacing that covers the same field of view, with the same centre and axes.

    The field of view along an axis is ``shape * spacing``; the number of voxels is rounded up, so that
    no voxel of the source lies outside.
    """
    shape = _triple_int(
        max(1, ceil(n * old / new - 1e-6))
        for n, old, new in zip(geometry.shape, geometry.spacing_mm, spacing_mm, strict=True)
    )
    centre_mm = world_mm(geometry, (np.asarray(geometry.shape) - 1) / 2)
    half = np.asarray(geometry.direction) @ ((np.asarray(shape) - 1) / 2 * np.asarray(spacing_mm))
    return replace(geometry, shape=shape, spacing_mm=_triple(spacing_mm), origin_mm=_triple(centre_mm - half))


def cropped(geometry: Geometry, start: Shape, stop: Shape) -> Geometry:
    """The grid of the voxels ``start <= index < stop``, both (z, y, x)."""
    return replace(
        geometry,
        shape=_triple_int(b - a for a, b in zip(start, stop, strict=True)),
        origin_mm=_triple(world_mm(geometry, np.asarray(start))),
    )


def to_mapping(geometry: Geometry) -> dict[str, object]:
    """Plain JSON form; floats keep all their digits."""
    return {
        "shape": list(geometry.shape),
        "spacing_mm": list(geometry.spacing_mm),
        "origin_mm": list(geometry.origin_mm),
        "direction": [list(row) for row in geometry.direction],
    }


def from_mapping(mapping: dict) -> Geometry:
    """The inverse of :func:`to_mapping`."""
    return Geometry(
        _triple_int(mapping["shape"]),
        _triple(mapping["spacing_mm"]),
        _triple(mapping["origin_mm"]),
        matrix_of(mapping["direction"]),
    )


def matrix_of(rows: Any) -> Matrix:
    """A 3 x 3 array-like as nested tuples of float."""
    a, b, c = (_triple(row) for row in rows)
    return (a, b, c)


def _triple(values: Iterable[Any]) -> Triple:
    a, b, c = (float(v) for v in values)
    return (a, b, c)


def _triple_int(values: Iterable[Any]) -> Shape:
    a, b, c = (int(v) for v in values)
    return (a, b, c)


def check_label_grid(image: Geometry, label: Geometry) -> None:
    """Raise ScanError ``label.grid`` unless the label's grid is the image's, naming both."""
    if not same_grid(image, label):
        raise ScanError(
            "label.grid",
            f"the label's grid (shape {label.shape}, spacing {_mm(label.spacing_mm)}, origin {_mm(label.origin_mm)}) "
            f"is not the image's (shape {image.shape}, spacing {_mm(image.spacing_mm)}, origin "
            f"{_mm(image.origin_mm)}); export the label on the image's grid",
        )


def _mm(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ") mm"
