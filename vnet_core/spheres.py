"""Spheres on voxel grids: label maps from points and diameters, such as a radiologist's list of nodules."""

from __future__ import annotations

import math

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Triple, voxel_index

Window = tuple[slice, slice, slice]
"""A box of a grid, along (z, y, x)."""

ROUNDING_MM = 1e-6
"""A voxel centre this little beyond the surface counts as on it, whichever way the axes run."""


def sphere(geometry: Geometry, centre_mm: Triple, diameter_mm: float) -> tuple[Window, np.ndarray]:
    """The voxels of a sphere: the smallest box that holds them, and which voxels of the box are inside, bool.

    ``centre_mm`` is a world point (x, y, z), LPS. A voxel is inside when its centre is at most half the diameter away.
    A sphere between voxel centres that holds none of them is the one voxel nearest to its centre.

    Raises ScanError ``sphere.diameter`` when the diameter is not positive and finite, ``sphere.outside`` when the
    centre lies outside the grid, that is more than half a voxel beyond the outermost voxel centres.
    """
    if not (math.isfinite(diameter_mm) and diameter_mm > 0):
        raise ScanError("sphere.diameter", f"a sphere has the diameter {diameter_mm} mm; it must be above 0")
    shape, spacing_mm = np.asarray(geometry.shape), np.asarray(geometry.spacing_mm)
    centre = voxel_index(geometry, np.asarray(centre_mm))
    if not ((centre >= -0.5) & (centre <= shape - 0.5)).all():
        where, place = (", ".join(f"{v:.1f}" for v in point) for point in (centre_mm, centre))
        raise ScanError(
            "sphere.outside",
            f"the centre ({where}) mm is voxel ({place}) of a grid of {geometry.shape}; check that the table belongs to"
            " this scan and is in LPS millimetres",
        )
    radius_mm = diameter_mm / 2 + ROUNDING_MM
    reach = radius_mm / spacing_mm
    start = np.maximum(np.ceil(centre - reach), 0).astype(int)
    stop = np.minimum(np.floor(centre + reach) + 1, shape).astype(int)
    axes_mm = [(np.arange(a, b) - c) * s for a, b, c, s in zip(start, stop, centre, spacing_mm, strict=True)]
    z, y, x = axes_mm
    inside = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 <= radius_mm**2
    if not inside.any():
        start = np.clip(np.rint(centre), 0, shape - 1).astype(int)
        stop, inside = start + 1, np.ones((1, 1, 1), bool)
    window = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return (window[0], window[1], window[2]), inside
