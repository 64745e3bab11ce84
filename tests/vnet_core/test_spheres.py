"""Spheres on grids, by pencil."""

import math

import numpy as np
import pytest

from vnet_core.errors import ScanError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, world_mm
from vnet_core.phantoms import SAGITTAL_DIRECTION, oblique_direction
from vnet_core.spheres import sphere

FLIPPED = ((0.0, 0.0, -1.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0))
"""As in fourteen of LUNA16's scans."""
DIRECTIONS = [CANONICAL_DIRECTION, FLIPPED, SAGITTAL_DIRECTION, oblique_direction((20, -30, 40))]


def painted(geometry: Geometry, centre_mm, diameter_mm: float) -> np.ndarray:
    window, inside = sphere(geometry, centre_mm, diameter_mm)
    mask = np.zeros(geometry.shape, bool)
    mask[window] = inside
    return mask


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [(0, 0, 0), (0.3, -0.2, 0.45)])
def test_a_sphere_of_ten_millimetres_has_its_volume_and_its_place(direction, offset):
    geometry = Geometry((24, 26, 28), (1.0, 1.0, 1.0), (-30.0, 12.5, 7.0), direction)
    centre_mm = world_mm(geometry, np.array([12, 13, 14]) + offset)
    mask = painted(geometry, tuple(centre_mm), 10.0)
    assert mask.sum() == pytest.approx(523.6, rel=0.02)
    assert world_mm(geometry, np.argwhere(mask).mean(axis=0)) == pytest.approx(centre_mm, abs=0.1)


def test_every_voxel_centre_within_the_radius_and_no_other():
    geometry = Geometry((9, 30, 31), (2.5, 0.7, 0.8), (5.0, -4.0, 3.0), oblique_direction((10, 20, 30)))
    centre_mm = tuple(world_mm(geometry, np.array([4.2, 15.4, 14.9])))
    points = world_mm(geometry, np.stack(np.indices(geometry.shape), axis=-1))
    distance_mm = np.linalg.norm(points - np.asarray(centre_mm), axis=-1)
    assert np.array_equal(painted(geometry, centre_mm, 9.0), distance_mm <= 4.5)


def test_a_sphere_at_the_border_is_cut_there():
    geometry = Geometry((20, 20, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    whole = painted(geometry, (10.0, 10.0, 10.0), 8.0)
    cut = painted(geometry, (10.0, 10.0, 0.0), 8.0)
    assert cut[0].any()
    assert np.array_equal(cut[:5], whole[10:15])


def test_a_sphere_that_meets_no_voxel_centre_is_the_nearest_voxel():
    geometry = Geometry((5, 5, 5), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    mask = painted(geometry, (6.3, 9.5, 5.9), 1.0)
    assert np.argwhere(mask).tolist() == [[1, 2, 2]]


def test_a_single_voxel_can_hold_a_sphere():
    assert painted(Geometry((1, 1, 1), (1.0, 1.0, 1.0), (3.0, 4.0, 5.0)), (3.0, 4.0, 5.0), 30.0).tolist() == [[[True]]]


@pytest.mark.parametrize("centre", [(-0.6, 5, 5), (5, 9.6, 5), (5, 5, 40)])
def test_a_centre_outside_is_told_with_its_voxel(centre):
    with pytest.raises(ScanError, match=r"is voxel \(.*\) of a grid") as caught:
        sphere(Geometry((10, 10, 10), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), centre, 4.0)
    assert caught.value.code == "sphere.outside"


def test_a_centre_in_the_outer_half_of_a_border_voxel_is_inside():
    assert painted(Geometry((3, 3, 3), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), (-0.4, 0.0, 2.4), 1.0).sum() == 1


@pytest.mark.parametrize("diameter", [0.0, -3.0, math.nan, math.inf])
def test_a_diameter_that_is_none_is_refused(diameter):
    with pytest.raises(ScanError) as caught:
        sphere(Geometry((3, 3, 3), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), (1.0, 1.0, 1.0), diameter)
    assert caught.value.code == "sphere.diameter"
