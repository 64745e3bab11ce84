"""Scans on grids with right angles, where their own has none, and one channel on the grid of another.

Three cases come here: slices displaced in their plane by a tilted gantry (:func:`untilted`), axes that do not stand at
right angles (:func:`straightened`), and a channel on another grid of the same frame of reference (:func:`onto`).

The rule of a straight grid: two axes keep their plane, their directions within it (made perpendicular, both turned by
the same angle, where they are not) and their spacing; the third becomes the normal of that plane, with the distance
of the planes as its spacing. Kept are rows and columns (y, x) if they stand at right angles within
``ORTHONORMAL_TOLERANCE``, else (z, x), else (z, y), and if no pair does, the pair that comes nearest. So slices stay
where they are, and only values within a slice are interpolated. The grid holds voxel (0, 0, 0) of the old one, and
grows by whole voxels until every centre of the old one lies within its outermost centres.

Images are interpolated linearly from the eight voxels about a point. Up to half a voxel beyond the outermost centres
of the old grid the outermost value is kept; farther out is the volume's minimum. Coordinates within ``WHOLE_VOXELS``
of a whole voxel all over the grid become it, so that a shift by whole voxels copies values. The result is float32,
which holds integers up to 2^24 exactly. Beside source and result only slabs of ``SLAB_VOXELS`` are held (and, for
means of small voxels, the source in float32).

``steps_mm`` is always (3, 3), rows world (x, y, z), columns array axes (z, y, x): the step in mm from one voxel to the
next along that axis, which is direction times spacing.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from vnet_core.errors import ScanError
from vnet_core.geometry import ORTHONORMAL_TOLERANCE, Geometry, Shape, matrix_of, same_grid
from vnet_core.volume import Volume

LARGEST_SHEAR_DEGREES = 45.0
"""Axes farther from right angles than this are an error of the header and not a way to scan."""
WHOLE_VOXELS = 1e-4
"""Largest distance from a whole voxel that counts as rounding of a header in float32."""
SLAB_VOXELS = 1 << 22
"""Voxels of the result for which it is decided at once whether they lie outside."""

_PLANES = ((1, 2), (0, 2), (0, 1))
"""Pairs of array axes in the order in which they are kept."""


def straight_grid(shape: Shape, origin_mm: np.ndarray, steps_mm: np.ndarray) -> Geometry:
    """The grid onto which :func:`straightened` brings ``shape`` voxels (z, y, x) from ``origin_mm`` by ``steps_mm``.

    From the header alone: ask for it before voxels are allocated, since it is larger than the source.
    ``ScanError``: ``geometry.spacing`` for a step without length, ``geometry.not-orthonormal`` beyond
    ``LARGEST_SHEAR_DEGREES``.
    """
    direction, spacing = _straight_axes(np.asarray(steps_mm, float))
    return _grown(shape, np.asarray(origin_mm, float), np.asarray(steps_mm, float), direction, spacing)


def straightened(volume: Volume, steps_mm: np.ndarray) -> Volume:
    """An image (C, Z, Y, X) whose axes are sheared, float32 on :func:`straight_grid`.

    Of ``volume.geometry`` count the shape and the origin; what it says of spacing and direction is replaced by
    ``steps_mm``, because no :class:`Geometry` can say it. ``ScanError`` as :func:`straight_grid`.
    """
    grid = straight_grid(volume.geometry.shape, np.asarray(volume.geometry.origin_mm), steps_mm)
    return _straightened(volume.voxels, volume.geometry, np.asarray(steps_mm, float), grid)


def straightened_labels(volume: Volume, steps_mm: np.ndarray) -> Volume:
    """A label map (1, Z, Y, X) of integers on the same grid as :func:`straightened`, in its dtype.

    Each voxel gets the label whose indicator, interpolated linearly, is largest, of equals the smallest; outside is 0.
    """
    grid = straight_grid(volume.geometry.shape, np.asarray(volume.geometry.origin_mm), steps_mm)
    matrix, offset = _matrix(volume.geometry, np.asarray(steps_mm, float), grid)
    best, share = np.zeros(grid.shape, np.float32), np.empty(grid.shape, np.float32)
    result = np.zeros((1, *grid.shape), volume.voxels.dtype)
    for value in np.unique(volume.labels):
        indicator = (volume.voxels == value).view(np.uint8)
        _sample(indicator[0], matrix, offset, share)
        _outside(indicator.shape[1:], matrix, offset, share, 0.0)
        better = share > best + 1e-6
        result[0][better] = value
        best[better] = share[better]
    return Volume(result, grid)


def untilted_grid(geometry: Geometry, shift_mm_per_slice: np.ndarray) -> Geometry:
    """The grid onto which :func:`untilted` brings a scan; the slices stay as many and as far apart as they are."""
    spacing = np.asarray(geometry.spacing_mm)
    steps = _tilted_steps(geometry, shift_mm_per_slice)
    return _grown(geometry.shape, np.asarray(geometry.origin_mm), steps, np.asarray(geometry.direction), spacing)


def untilted(voxels: np.ndarray, geometry: Geometry, shift_mm_per_slice: np.ndarray) -> Volume:
    """Voxels (Z, Y, X) of a tilted gantry as a volume (1, Z, Y, X), float32, on :func:`untilted_grid`.

    ``geometry``: axis z is the normal of the slices, its spacing their distance along it, the origin that of the first
    slice. ``shift_mm_per_slice`` (2,): how far each slice lies beside its predecessor along array axes (y, x) of the
    geometry, in mm; only rows and columns are interpolated. ``ScanError`` ``geometry.not-orthonormal`` beyond
    ``LARGEST_SHEAR_DEGREES``.
    """
    grid = untilted_grid(geometry, shift_mm_per_slice)
    return _straightened(voxels[None], geometry, _tilted_steps(geometry, shift_mm_per_slice), grid)


def onto(volume: Volume, geometry: Geometry) -> Volume:
    """An image (C, Z, Y, X) on another grid of the same frame of reference: float32, or as it is on the same grid.

    Along an axis of the source where a target voxel is larger than 1.5 source voxels, the mean of
    what it covers is taken first, so that nothing is skipped (see :func:`vnet_core.resample.averaged`).
    ``ScanError`` ``geometry.no-overlap`` where no voxel centre of the target lies in the source.
    """
    if same_grid(volume.geometry, geometry):
        return Volume(volume.voxels, geometry)
    matrix, offset = _matrix(volume.geometry, volume.geometry.matrix[:3, :3], geometry)
    result = np.empty((len(volume.voxels), *geometry.shape), np.float32)
    for values, sampled in zip(volume.voxels, result, strict=True):
        _sample(*_coarser(values, matrix, offset), sampled)
        if not _outside(values.shape, matrix, offset, sampled, float(values.min())):
            raise ScanError(
                "geometry.no-overlap",
                f"no voxel of the grid {geometry.shape} lies in that of {values.shape} voxels: the two show different"
                " places; register them, or take this channel out",
            )
    return Volume(result, geometry)


def _straightened(voxels: np.ndarray, source: Geometry, steps: np.ndarray, target: Geometry) -> Volume:
    """An image (C, Z, Y, X) of voxels with ``steps`` from the origin of ``source``, on ``target``."""
    matrix, offset = _matrix(source, steps, target)
    result = np.empty((len(voxels), *target.shape), np.float32)
    for values, sampled in zip(voxels, result, strict=True):
        _sample(values, matrix, offset, sampled)
        _outside(values.shape, matrix, offset, sampled, float(values.min()))
    return Volume(result, target)


def _straight_axes(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Direction (3, 3) by columns and spacing (3,) of the straight grid for steps (3, 3); see the module's rule."""
    lengths = np.linalg.norm(steps, axis=0)
    if not (np.isfinite(lengths).all() and lengths.min() > 0):
        raise ScanError("geometry.spacing", f"an axis has steps of {lengths} mm along (z, y, x); correct the header")
    unit = steps / lengths
    cosine = {plane: abs(float(unit[:, plane[0]] @ unit[:, plane[1]])) for plane in _PLANES}
    right_angled = [plane for plane in _PLANES if cosine[plane] <= ORTHONORMAL_TOLERANCE]
    plane = right_angled[0] if right_angled else min(_PLANES, key=lambda p: cosine[p])
    third = 3 - sum(plane)
    _refuse_flat(np.degrees(np.arcsin(min(1.0, cosine[plane]))))
    left, _, right = np.linalg.svd(unit[:, plane], full_matrices=False)
    direction, spacing = np.empty((3, 3)), lengths.copy()
    direction[:, plane] = left @ right  # the nearest perpendicular pair
    normal = np.cross(direction[:, plane[0]], direction[:, plane[1]])
    along = float(normal @ steps[:, third])
    _refuse_flat(np.degrees(np.arccos(min(1.0, abs(along) / lengths[third]))))
    direction[:, third], spacing[third] = normal * np.sign(along), abs(along)
    return direction, spacing


def _refuse_flat(degrees: float) -> None:
    if degrees > LARGEST_SHEAR_DEGREES + 1e-6:
        raise ScanError(
            "geometry.not-orthonormal",
            f"an axis leans {degrees:.1f} degrees from its right angle, at most {LARGEST_SHEAR_DEGREES:g} can be"
            " straightened; convert the scan again from its source",
        )


def _tilted_steps(geometry: Geometry, shift_mm_per_slice: np.ndarray) -> np.ndarray:
    shift = np.asarray(shift_mm_per_slice, float)
    _refuse_flat(np.degrees(np.arctan2(np.linalg.norm(shift), geometry.spacing_mm[0])))
    steps = np.asarray(geometry.direction) * np.asarray(geometry.spacing_mm)
    steps[:, 0] += np.asarray(geometry.direction)[:, 1:] @ shift
    return steps


def _grown(shape: Shape, origin: np.ndarray, steps: np.ndarray, direction: np.ndarray, spacing: np.ndarray) -> Geometry:
    """The grid of ``direction`` and ``spacing`` through ``origin`` that holds all voxel centres of the old grid."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.asarray(shape) - 1)
    places = corners @ (np.linalg.inv(direction * spacing) @ steps).T
    first = np.floor(places.min(axis=0) + WHOLE_VOXELS)
    last = np.ceil(places.max(axis=0) - WHOLE_VOXELS)
    z, y, x = (int(n) for n in last - first + 1)
    a, b, c = (float(v) for v in origin + direction @ (spacing * first))
    return Geometry(
        (z, y, x), (float(spacing[0]), float(spacing[1]), float(spacing[2])), (a, b, c), matrix_of(direction)
    )


def _matrix(source: Geometry, steps: np.ndarray, target: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and offset (3,) from an index of ``target`` to one of the source, which has ``steps``."""
    inverse = np.linalg.inv(steps)
    reach = np.maximum(np.asarray(target.shape) - 1, 1)
    matrix = inverse @ target.matrix[:3, :3]
    matrix = np.where(np.abs(matrix - np.round(matrix)) * reach <= WHOLE_VOXELS, np.round(matrix), matrix)
    offset = inverse @ (np.asarray(target.origin_mm) - np.asarray(source.origin_mm))
    return matrix, np.where(np.abs(offset - np.round(offset)) <= WHOLE_VOXELS, np.round(offset), offset)


def _sample(values: np.ndarray, matrix: np.ndarray, offset: np.ndarray, out: np.ndarray) -> None:
    """Values (Z, Y, X) at ``matrix @ index + offset`` of every index of ``out``; the outermost ones continue."""
    ndimage.affine_transform(values, matrix, offset, out.shape, output=out, order=1, mode="nearest")


def _outside(shape: tuple[int, ...], matrix: np.ndarray, offset: np.ndarray, values: np.ndarray, fill: float) -> bool:
    """Put ``fill`` where ``matrix @ index + offset`` lies outside ``shape``; whether any voxel lies inside.

    A voxel reaches half a voxel beyond its centre.
    """
    met = False
    rows = max(1, SLAB_VOXELS // (values.shape[1] * values.shape[2]))
    for start in range(0, len(values), rows):
        slab = values[start : start + rows]
        inside = np.ones((1, 1, 1), bool)
        indices = np.ogrid[start : start + len(slab), : slab.shape[1], : slab.shape[2]]
        for axis in range(3):
            terms = [matrix[axis, a] * indices[a] for a in range(3) if matrix[axis, a] != 0]
            at = sum(terms, np.full((1, 1, 1), offset[axis]))
            inside = inside & (at >= -0.5 - WHOLE_VOXELS) & (at <= shape[axis] - 0.5 + WHOLE_VOXELS)
        slab[~np.broadcast_to(inside, slab.shape)] = fill
        met = met or bool(inside.any())
    return met


def _coarser(values: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The source in voxels as large as the target's along those axes where these are much larger, and its matrix.

    The first voxel of the target lies on one of the means, so that between grids of the same axes they are the result.
    """
    import torch  # which only channels of small voxels need, and no reading process

    from vnet_core.resample import LARGEST_LINEAR_STEP, averaged

    step = np.linalg.norm(matrix, axis=1)
    step = np.where(step > LARGEST_LINEAR_STEP, step, 1.0)
    if (step == 1.0).all():
        return values, matrix, offset
    at = [np.arange(n, dtype=float) for n in values.shape]
    for axis in np.flatnonzero(step > 1.0):
        n = values.shape[axis]
        first = np.ceil((-0.5 - offset[axis]) / step[axis])
        last = np.floor((n - 0.5 - offset[axis]) / step[axis])
        places = offset[axis] + step[axis] * np.arange(first, last + 1)
        at[axis] = places if len(places) else np.array([(n - 1) / 2])
    means = averaged(torch.from_numpy(values.astype(np.float32)), (at[0], at[1], at[2]), list(step))
    begin = np.array([places[0] for places in at])
    return means.numpy(), matrix / step[:, None], (offset - begin) / step
