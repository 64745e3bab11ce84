"""Grids with a pencil: millilitres, world points, the 48 axis orders, other spacings and crops."""

import json
from itertools import permutations, product

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vnet_core.errors import ScanError
from vnet_core.geometry import (
    CANONICAL_DIRECTION,
    Geometry,
    cropped,
    from_mapping,
    matrix_of,
    resampled,
    same_grid,
    to_canonical,
    to_mapping,
    voxel_index,
    world_mm,
)

SHAPE = (3, 4, 5)
SPACING_MM = (5.0, 2.0, 1.0)
ORIGIN_MM = (10.0, 20.0, 30.0)
TILTED = Rotation.from_euler("zyx", [20, -35, 50], degrees=True).as_matrix()


def signed_permutations() -> list[np.ndarray]:
    """Every way to lay three array axes along the world's, both ways round: 48."""
    orders, signs = permutations(range(3)), list(product((1, -1), repeat=3))
    return [np.eye(3)[:, list(order)] * np.array(sign) for order in orders for sign in signs]


def grid(direction=CANONICAL_DIRECTION, shape=SHAPE, spacing_mm=SPACING_MM, origin_mm=ORIGIN_MM) -> Geometry:
    return Geometry(shape, spacing_mm, origin_mm, matrix_of(direction))


def voxel_places(geometry: Geometry) -> np.ndarray:
    """World (x, y, z) of every voxel, as an array (3, Z, Y, X) that can be moved about like an image."""
    indices = np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), axis=-1)
    return np.moveaxis(world_mm(geometry, indices), -1, 0)


# --- volumes and points


def test_a_10_mm_cube_at_2_mm_is_125_voxels_and_1_ml():
    cube = resampled(grid(shape=(10, 10, 10), spacing_mm=(1.0, 1.0, 1.0)), (2.0, 2.0, 2.0))
    assert cube.shape == (5, 5, 5)
    assert 125 * cube.voxel_ml == pytest.approx(1.0)


def test_a_voxel_of_5_by_2_by_1_mm_is_a_hundredth_of_a_millilitre():
    assert grid().voxel_ml == pytest.approx(0.01)


def test_world_points_by_hand():
    np.testing.assert_allclose(world_mm(grid(), np.array([0, 0, 0])), ORIGIN_MM)
    # three steps of 1 mm along x, two of 2 mm along y, one of 5 mm along z
    np.testing.assert_allclose(world_mm(grid(), np.array([1, 2, 3])), [13, 24, 35])
    # array z runs to the patient's left, y down to the feet, x to the front
    sagittal = grid([[1, 0, 0], [0, 0, -1], [0, -1, 0]])
    np.testing.assert_allclose(world_mm(sagittal, np.array([1, 2, 3])), [10 + 5, 20 - 3, 30 - 4])


@pytest.mark.parametrize("direction", [CANONICAL_DIRECTION, TILTED, TILTED[:, ::-1]])
def test_voxel_index_undoes_world_mm(direction):
    geometry = grid(direction)
    points = np.random.default_rng(0).uniform(-50, 50, (2, 7, 3))
    np.testing.assert_allclose(voxel_index(geometry, world_mm(geometry, points)), points, atol=1e-9)
    np.testing.assert_allclose(world_mm(geometry, voxel_index(geometry, points)), points, atol=1e-9)


def test_the_matrix_is_world_mm():
    geometry = grid(TILTED)
    np.testing.assert_allclose((geometry.matrix @ [1, 2, 3, 1])[:3], world_mm(geometry, np.array([1, 2, 3])))


# --- equal grids


def test_grids_are_the_same_within_a_hundredth_of_a_millimetre_at_every_voxel():
    assert same_grid(grid(), grid())
    assert same_grid(grid(), grid(origin_mm=(10.009, 20.0, 30.0)))
    assert not same_grid(grid(), grid(origin_mm=(10.011, 20.0, 30.0)))
    assert not same_grid(grid(), grid(shape=(3, 4, 6)))


def test_a_small_error_of_spacing_counts_at_the_far_end():
    long = (1, 1, 101)
    assert same_grid(grid(shape=long), grid(shape=long, spacing_mm=(5.0, 2.0, 1.00009)))
    assert not same_grid(grid(shape=long), grid(shape=long, spacing_mm=(5.0, 2.0, 1.00011)))


def test_a_flipped_grid_on_the_same_field_of_view_is_another_grid():
    assert not same_grid(grid(), grid(np.array(CANONICAL_DIRECTION) * [1, 1, -1], origin_mm=(14.0, 20.0, 30.0)))


# --- reorientation


@pytest.mark.parametrize("turn", [np.eye(3), Rotation.from_euler("zyx", [9, -7, 11], degrees=True).as_matrix()])
def test_all_48_axis_orders_come_to_one_and_every_voxel_keeps_its_place(turn):
    assert len({tuple(d.ravel()) for d in signed_permutations()}) == 48
    for direction in signed_permutations():
        source = grid(turn @ direction)
        way, target = to_canonical(source)
        np.testing.assert_allclose(target.direction, turn @ np.array(CANONICAL_DIRECTION), atol=1e-12)
        places = voxel_places(source)
        np.testing.assert_allclose(way.apply(places), voxel_places(target), atol=1e-9)
        np.testing.assert_array_equal(way.undo(way.apply(places)), places)
        assert way.apply(places).shape[1:] == target.shape
        assert np.prod(target.spacing_mm) == pytest.approx(np.prod(SPACING_MM))


def test_reorientation_copies_nothing_and_takes_arrays_with_and_without_channels():
    way, target = to_canonical(grid([[0, -1, 0], [0, 0, 1], [1, 0, 0]]))
    voxels = np.arange(60).reshape(SHAPE)
    assert np.shares_memory(way.apply(voxels), voxels)
    assert np.shares_memory(way.undo(voxels.reshape(target.shape)), voxels)
    np.testing.assert_array_equal(way.apply(voxels[None, None])[0, 0], way.apply(voxels))


def test_a_canonical_grid_stays_as_it_is():
    way, target = to_canonical(grid())
    assert target == grid()
    assert (way.source_axis, way.flip) == ((0, 1, 2), (False, False, False))


def test_a_sagittal_scan_by_hand():
    # array z to the patient's left, y to the feet, x to the back
    source = grid([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    way, target = to_canonical(source)
    assert (way.source_axis, way.flip) == ((1, 2, 0), (True, False, False))
    assert target.shape == (4, 5, 3)
    assert target.spacing_mm == (2.0, 1.0, 5.0)
    assert target.origin_mm == (10.0, 20.0, 30.0 - 3 * 2.0)


def test_an_oblique_grid_is_not_straightened():
    _, target = to_canonical(grid(TILTED))
    cosines = np.sort(np.abs(np.array(target.direction).T @ TILTED).ravel())
    np.testing.assert_allclose(cosines, [0] * 6 + [1] * 3, atol=1e-12)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("direction", signed_permutations()[::7])
def test_at_45_degrees_rounding_does_not_decide(axis, direction):
    ways = set()
    for noise in (-1e-12, 0.0, 1e-12):
        turn = Rotation.from_euler(axis, np.pi / 4 + noise).as_matrix()
        source = grid(turn @ direction)
        way, target = to_canonical(source)
        ways.add(way)
        np.testing.assert_allclose(way.apply(voxel_places(source)), voxel_places(target), atol=1e-9)
    assert len(ways) == 1


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_just_off_45_degrees_the_nearest_axes_win(axis):
    ways = [
        to_canonical(grid(Rotation.from_euler(axis, angle, degrees=True).as_matrix() @ np.array(CANONICAL_DIRECTION)))[
            0
        ]
        for angle in (0, 44.9, 45.1, 90)
    ]
    assert ways[0] == ways[1] != ways[2] == ways[3]


def test_a_single_voxel_has_an_orientation_too():
    way, target = to_canonical(grid([[0, 0, -1], [0, -1, 0], [-1, 0, 0]], shape=(1, 1, 1)))
    assert way.flip == (True, True, True)
    assert target.origin_mm == ORIGIN_MM


# --- other spacings and crops


@pytest.mark.parametrize(
    ("voxels", "old_mm", "new_mm", "expected"),
    [(10, 1.0, 2.0, 5), (10, 2.0, 1.0, 20), (3, 1.0, 0.4, 8), (1, 1.0, 9.0, 1), (512, 0.7, 1.5, 239)],
)
def test_voxels_at_another_spacing(voxels, old_mm, new_mm, expected):
    source = grid(shape=(voxels, 4, 4), spacing_mm=(old_mm, 1.0, 1.0))
    assert resampled(source, (new_mm, 1.0, 1.0)).shape == (expected, 4, 4)


@pytest.mark.parametrize("direction", [CANONICAL_DIRECTION, TILTED])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.5, 0.4, 3.0), (40.0, 40.0, 40.0)])
def test_another_spacing_keeps_centre_and_axes(direction, spacing_mm):
    source = grid(direction)
    target = resampled(source, spacing_mm)
    centres = [world_mm(g, (np.array(g.shape) - 1) / 2) for g in (source, target)]
    np.testing.assert_allclose(*centres, atol=1e-9)
    assert target.direction == source.direction
    assert target.spacing_mm == spacing_mm


def test_the_same_spacing_is_the_same_grid():
    assert same_grid(resampled(grid(TILTED), SPACING_MM), grid(TILTED), tolerance_mm=1e-9)


def test_a_crop_keeps_every_voxel_in_its_place():
    source = grid(TILTED)
    part = cropped(source, (1, 0, 2), (3, 3, 5))
    assert part.shape == (2, 3, 3)
    np.testing.assert_allclose(voxel_places(part), voxel_places(source)[:, 1:3, 0:3, 2:5], atol=1e-9)


# --- JSON and refusals


def test_json_keeps_every_digit():
    geometry = grid(TILTED, spacing_mm=(0.1, 1 / 3, 2e-7), origin_mm=(-1e-9, np.pi, 1e5 + 1 / 7))
    assert from_mapping(json.loads(json.dumps(to_mapping(geometry)))) == geometry


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"shape": (3, 0, 5)}, "scan.empty", ["(3, 0, 5)"]),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "geometry.spacing", ["0.0"]),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "geometry.spacing", ["-1.0"]),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, "geometry.spacing", ["nan"]),
        ({"origin_mm": (0.0, float("inf"), 0.0)}, "geometry.nonfinite", []),
        ({"direction": np.eye(3) * [1, 1, 1.1]}, "geometry.not-orthonormal", ["0.2100", "0.001"]),
        ({"direction": [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]]}, "geometry.not-orthonormal", ["0.1000"]),
        ({"direction": np.zeros((3, 3))}, "geometry.not-orthonormal", ["1.0000"]),
    ],
)
def test_a_grid_that_cannot_be_is_refused_with_its_numbers(change, code, words):
    with pytest.raises(ScanError) as caught:
        grid(**change)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_direction_cosines_of_a_header_with_few_digits_are_accepted():
    grid(np.round(TILTED, 4))
