"""How far two surfaces lie apart: surface elements with areas, and distances between them in mm.

The surface of a mask is made of elements, as in Nikolov et al. 2018 (arXiv:1809.04430). Eight voxels meet at every
corner of the voxel grid. Where some of the eight are inside the mask and some outside, an element of its surface
passes through the cell that their eight centres span, and the corner stands for its place. Its area is that of the
triangles that marching cubes (Lorensen and Cline 1987) lays through the cell: through the middles of the cell's edges
that join inside and outside.

Distances are Euclidean, from each element of one surface to the nearest element of the other. Means, percentiles and
shares weigh an element with its area, so that they do not depend on how finely the grid cuts a surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

import numpy as np
from scipy.spatial import ConvexHull, cKDTree

from vnet_core.errors import ConfigError
from vnet_core.geometry import Shape, Triple
from vnet_core.volume import check_shapes

SLAB_VOXELS = 1 << 24
"""Most voxels of which neighbourhoods are looked at together."""
TOLERANCE_SLACK = 1e-6
"""Share of a tolerance by which a distance may exceed it. Headers keep spacings as float32, so five voxels of 0.2 mm
are 1.000000015 mm; that is within 1 mm."""


@dataclass(frozen=True, slots=True)
class Surface:
    """The elements of a mask's surface, in C order of their corners."""

    corners: np.ndarray
    """int32 (N, 3): corner (z, y, x) lies half a voxel before the centre of voxel (z, y, x)."""
    areas_mm2: np.ndarray
    """float64 (N,), > 0."""


def surface_of(mask_ZYX: np.ndarray, spacing_mm: Triple) -> Surface:
    """The surface of a bool mask (Z, Y, X) at spacing (z, y, x) in mm; outside the array is background.

    An empty mask has no element.
    """
    areas = element_areas_mm2(spacing_mm)
    planes, rows, columns = mask_ZYX.shape
    step = max(1, SLAB_VOXELS // max(1, (rows + 2) * (columns + 2)))
    corners, found = [np.empty((0, 3), np.int32)], [np.empty(0)]
    for first in range(0, planes + 1, step):
        # corner plane z lies between voxel planes z - 1 and z
        last = min(first + step, planes + 1)
        slab = np.zeros((last - first + 1, rows + 2, columns + 2), np.uint8)
        inside = mask_ZYX[max(first - 1, 0) : last]
        begin = 1 if first == 0 else 0
        slab[begin : begin + len(inside), 1:-1, 1:-1] = inside
        codes = _codes(slab)
        # 0 is all outside and 255 all inside; adding 1 in uint8 makes them 1 and 0
        where = np.nonzero(codes + np.uint8(1) > 1)
        found.append(areas[codes[where]])
        corners.append(np.stack(where, axis=1).astype(np.int32) + np.array([first, 0, 0], np.int32))
    return Surface(np.concatenate(corners), np.concatenate(found))


def _codes(voxels_ZYX: np.ndarray) -> np.ndarray:
    """uint8, one smaller along each axis: bit 4 dz + 2 dy + dx of a corner is the voxel dz, dy, dx behind it."""
    pairs = voxels_ZYX[:, :, :-1] | voxels_ZYX[:, :, 1:] << 1
    fours = pairs[:, :-1] | pairs[:, 1:] << 2
    return fours[:-1] | fours[1:] << 4


# --- areas


def element_areas_mm2(spacing_mm: Triple) -> np.ndarray:
    """float64 (256,): area in mm^2 of the surface element of each neighbourhood, at spacing (z, y, x) in mm."""
    codes, normals = _normals()
    z, y, x = spacing_mm
    # stretching the axes by s stretches the area normal to axis i by the other two
    lengths = np.linalg.norm(normals * np.array([y * x, z * x, z * y]), axis=1)
    return np.bincount(codes, lengths, minlength=256)


@cache
def _normals() -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 (N,) and area normals float64 (N, 3) of all triangles in all 256 cells, at spacing 1.

    What is inside and what is outside can be exchanged, so the half with fewer corners is looked at. Corners that share
    no edge are cut off separately.
    """
    codes, normals = [], []
    everything = [(z, y, x) for z, y, x in product((0, 1), repeat=3)]
    for code in range(256):
        inside = {corner for bit, corner in enumerate(everything) if code >> bit & 1}
        if len(inside) > 4:
            inside = set(everything) - inside
        for piece in _pieces(inside):
            for a, b, c in _triangles(piece):
                codes.append(code)
                normals.append(np.cross(b - a, c - a) / 2)
    return np.array(codes), np.array(normals)


def _neighbours(corner: Shape) -> list[Shape]:
    """The three corners of the cell that share an edge with ``corner``."""
    z, y, x = corner
    return [(1 - z, y, x), (z, 1 - y, x), (z, y, 1 - x)]


def _pieces(inside: set[Shape]) -> list[list[Shape]]:
    """Corners that hang together along edges of the cell."""
    waiting, pieces = set(inside), []
    while waiting:
        piece = [min(waiting)]
        waiting.remove(piece[0])
        for corner in piece:
            more = [near for near in _neighbours(corner) if near in waiting]
            waiting.difference_update(more)
            piece += more
        pieces.append(piece)
    return pieces


def _triangles(piece: Sequence[Shape]) -> list[np.ndarray]:
    """Triangles, each float64 (3, 3), that divide a piece of one to four corners from the rest of the cell."""
    ends = [corner for corner in piece if sum(near in piece for near in _neighbours(corner)) == 1]
    if len(piece) == 4 and len(ends) == 2:
        return _triangles_of_path(piece, ends)
    middles = [
        (np.array(corner) + np.array(near)) / 2 for corner in piece for near in _neighbours(corner) if near not in piece
    ]
    points = np.array([*piece, *middles], float)
    triangles = points[ConvexHull(points).simplices]
    # the sides of the hull that lie on the cell's faces are no surface: there the neighbouring cell goes on
    return [t for t in triangles if not any((t[:, i] == side).all() for i in range(3) for side in (0, 1))]


def _triangles_of_path(piece: Sequence[Shape], ends: Sequence[Shape]) -> list[np.ndarray]:
    """Four corners one after the other along three axes: as many outside as inside, in the same form.

    The hexagon that divides them is not flat, and its convex hull would favour the inside. It is cut from the one
    end's crossing parallel to the middle step to the other's: that stays the same when inside and outside change
    places.
    """
    first, last = ends
    second, third = (next(n for n in _neighbours(end) if n in piece) for end in (first, last))
    p, q, r, s = (np.array(corner, float) for corner in (first, second, third, last))
    one, four = p + (r - q) / 2, s - (r - q) / 2
    two, three, five, six = p + (s - r) / 2, q + (s - r) / 2, s - (q - p) / 2, r - (q - p) / 2
    return [np.array(t) for t in ((one, two, three), (one, three, four), (four, five, six), (four, six, one))]


# --- distances


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface element to the other surface, ascending, each with its area.

    All four arrays are float64. A mask without voxels has no elements, and every distance to it is infinite.
    """

    to_truth_mm: np.ndarray
    """(P,): of the prediction's elements."""
    predicted_areas_mm2: np.ndarray
    """(P,)"""
    to_prediction_mm: np.ndarray
    """(T,): of the truth's elements."""
    truth_areas_mm2: np.ndarray
    """(T,)"""

    @cached_property
    def state(self) -> float | None:
        """NaN where both masks are empty, infinity where one is, None where both have a surface."""
        if self.to_truth_mm.size and self.to_prediction_mm.size:
            return None
        return float("inf") if self.to_truth_mm.size or self.to_prediction_mm.size else float("nan")

    def hausdorff_mm(self, percent: float = 100.0) -> float:
        """The larger of the two directions' distance within which ``percent`` of the area lies.

        100 is the Hausdorff distance. One mask empty: infinity. Both empty: NaN.
        """
        if self.state is not None:
            return self.state
        return max(
            _percentile(self.to_truth_mm, self.predicted_areas_mm2, percent),
            _percentile(self.to_prediction_mm, self.truth_areas_mm2, percent),
        )

    def average_mm(self) -> tuple[float, float]:
        """Mean distance, weighted by area, from prediction to truth and from truth to prediction.

        One mask empty: infinity. Both empty: NaN.
        """
        if self.state is not None:
            return self.state, self.state
        return (
            float(np.average(self.to_truth_mm, weights=self.predicted_areas_mm2)),
            float(np.average(self.to_prediction_mm, weights=self.truth_areas_mm2)),
        )

    def assd_mm(self) -> float:
        """Average symmetric surface distance: the mean over the area of both surfaces together (Heimann et al. 2009).

        One mask empty: infinity. Both empty: NaN.
        """
        if self.state is not None:
            return self.state
        total = self.to_truth_mm @ self.predicted_areas_mm2 + self.to_prediction_mm @ self.truth_areas_mm2
        return float(total / (self.predicted_areas_mm2.sum() + self.truth_areas_mm2.sum()))

    def abd_mm(self) -> float:
        """Average boundary distance of PROMISE12 (Litjens et al. 2014): the plain mean over the elements of both.

        One mask empty: infinity. Both empty: NaN.
        """
        if self.state is not None:
            return self.state
        elements = self.to_truth_mm.size + self.to_prediction_mm.size
        return float((self.to_truth_mm.sum() + self.to_prediction_mm.sum()) / elements)

    def overlap(self, tolerance_mm: float) -> tuple[float, float]:
        """Share of the predicted and of the true area that lies within ``tolerance_mm`` of the other, 0 to 1.

        The share of an empty mask's surface is NaN.
        """
        near, far = self._within_mm2(tolerance_mm)
        predicted, true = self.predicted_areas_mm2.sum(), self.truth_areas_mm2.sum()
        return float(near / predicted) if predicted else float("nan"), float(far / true) if true else float("nan")

    def dice(self, tolerance_mm: float) -> float:
        """Surface Dice: share of both areas together within ``tolerance_mm`` of the other, 0 to 1.

        One mask empty: 0. Both empty: NaN.
        """
        total = self.predicted_areas_mm2.sum() + self.truth_areas_mm2.sum()
        return float(sum(self._within_mm2(tolerance_mm)) / total) if total else float("nan")

    def _within_mm2(self, tolerance_mm: float) -> tuple[float, float]:
        if not tolerance_mm >= 0:
            raise ConfigError("metrics.tolerance", f"a tolerance of {tolerance_mm} mm is none; use 0 or more")
        limit = tolerance_mm * (1 + TOLERANCE_SLACK)
        return (
            float(self.predicted_areas_mm2[self.to_truth_mm <= limit].sum()),
            float(self.truth_areas_mm2[self.to_prediction_mm <= limit].sum()),
        )


def surface_distances(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, spacing_mm: Triple) -> SurfaceDistances:
    """Distances between the surfaces of two bool masks (Z, Y, X) on one grid of spacing (z, y, x) in mm.

    Raises ScanError ``metrics.shape`` when they differ in shape.
    """
    check_shapes(prediction_ZYX, truth_ZYX)
    prediction, truth = surface_of(prediction_ZYX, spacing_mm), surface_of(truth_ZYX, spacing_mm)
    to_truth = _nearest_mm(prediction.corners, truth.corners, spacing_mm)
    to_prediction = _nearest_mm(truth.corners, prediction.corners, spacing_mm)
    predicted_order = np.lexsort((prediction.areas_mm2, to_truth))
    truth_order = np.lexsort((truth.areas_mm2, to_prediction))
    return SurfaceDistances(
        to_truth[predicted_order],
        prediction.areas_mm2[predicted_order],
        to_prediction[truth_order],
        truth.areas_mm2[truth_order],
    )


def _nearest_mm(corners: np.ndarray, others: np.ndarray, spacing_mm: Triple) -> np.ndarray:
    """float64 (N,): from each of the corners (N, 3) to the nearest of ``others`` (M, 3); infinite without others."""
    distances_mm = np.zeros(len(corners))
    if not len(others):
        return np.full(len(corners), np.inf)
    # good masks share most of their surface, and what is shared needs no search
    apart = ~_among(corners, others)
    spacing = np.array(spacing_mm)
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(corners[apart] * spacing)
    # from whole steps and not from positions, whose differences are rounded: 1.2 - 0.2 is above 1
    distances_mm[apart] = np.sqrt(np.square((corners[apart] - others[nearest]) * spacing).sum(axis=1))
    return distances_mm


def _among(corners: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool (N,): which of the corners are among ``others``; both are in C order."""
    low = np.minimum(corners.min(axis=0, initial=0), others.min(axis=0))
    high = np.maximum(corners.max(axis=0, initial=0), others.max(axis=0))
    shape = tuple(high - low + 1)
    theirs = np.ravel_multi_index(tuple((others - low).T), shape)
    ours = np.ravel_multi_index(tuple((corners - low).T), shape)
    place = np.searchsorted(theirs, ours)
    return theirs[np.minimum(place, len(theirs) - 1)] == ours


def _percentile(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    share = np.cumsum(areas_mm2) / np.sum(areas_mm2)
    return float(distances_mm[min(int(np.searchsorted(share, percent / 100)), len(distances_mm) - 1)])
