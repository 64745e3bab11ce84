"""Right angles for scans that have none: ramps, boxes and shifts whose answer is known by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tests.vnet_core.test_geometry import TILTED, grid, signed_permutations, voxel_places
from vnet_core import straighten
from vnet_core.errors import ScanError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of, resampled, same_grid, voxel_index, world_mm
from vnet_core.resample import averaged, coordinates
from vnet_core.straighten import onto, straight_grid, straightened, straightened_labels, untilted, untilted_grid
from vnet_core.volume import Volume

TILT_MM = np.array([-1.3, 0.45])
"""Along (y, x) per slice of 5 mm: 15.4 degrees."""
SLICES = Geometry((6, 9, 8), (5.0, 2.0, 1.0), (10.0, 20.0, 30.0), matrix_of(TILTED))
RAMP = np.array([0.7, -1.1, 0.4])
"""Grey values per mm along world x, y, z."""


def tilted_steps(geometry: Geometry, shift_mm=TILT_MM) -> np.ndarray:
    steps = geometry.matrix[:3, :3].copy()
    steps[:, 0] += np.array(geometry.direction)[:, 1:] @ shift_mm
    return steps


def places(shape, origin_mm, steps_mm) -> np.ndarray:
    """World (x, y, z) of every voxel of a sheared grid, (Z, Y, X, 3), by the definition of a step."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.asarray(origin_mm) + indices @ np.asarray(steps_mm).T


def ramp(points_mm: np.ndarray) -> np.ndarray:
    return points_mm @ RAMP + 100


def covered(grid: Geometry, shape, origin_mm, steps_mm) -> np.ndarray:
    """Voxels of ``grid`` whose centre lies between the outermost centres of the sheared grid, bool (Z, Y, X)."""
    points = np.moveaxis(voxel_places(grid), 0, -1)
    index = (points - origin_mm) @ np.linalg.inv(steps_mm).T
    return ((index >= -1e-6) & (index <= np.array(shape) - 1 + 1e-6)).all(axis=-1)


def random_steps(seed: int, lean: float) -> np.ndarray:
    """Steps of about (2, 1, 0.7) mm, turned at random, every axis leaning by up to about ``lean`` of its length."""
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=rng).as_matrix() * rng.choice([-1, 1], 3)
    sheared = np.eye(3) + rng.uniform(-lean, lean, (3, 3)) * (1 - np.eye(3))
    return turn @ sheared * rng.uniform(0.5, 3, 3)


# --- gantry tilt


def test_a_tilt_of_one_pixel_per_slice_moves_every_slice_by_whole_pixels():
    voxels = np.arange(1, 13, dtype=np.int16).reshape(3, 2, 2)
    scan = Geometry((3, 2, 2), (5.0, 2.0, 1.0), (10.0, 20.0, 30.0))
    found = untilted(voxels, scan, np.array([2.0, 0.0]))  # slice 1 lies one row of 2 mm further back, slice 2 two rows
    assert found.geometry == Geometry((3, 4, 2), (5.0, 2.0, 1.0), (10.0, 20.0, 30.0))
    low = 1.0  # the minimum
    assert found.voxels[0].tolist() == [
        [[1, 2], [3, 4], [low, low], [low, low]],
        [[low, low], [5, 6], [7, 8], [low, low]],
        [[low, low], [low, low], [9, 10], [11, 12]],
    ]
    assert found.voxels.dtype == np.float32


def test_a_tilt_the_other_way_begins_the_grid_before_the_first_slice():
    scan = Geometry((3, 2, 2), (5.0, 2.0, 1.0), (10.0, 20.0, 30.0))
    voxels = np.arange(1, 13, dtype=np.int16).reshape(3, 2, 2)
    found = untilted(voxels, scan, np.array([-2.0, 1.0]))
    assert found.geometry == Geometry((3, 4, 4), (5.0, 2.0, 1.0), (10.0, 16.0, 30.0))
    np.testing.assert_array_equal(found.voxels[0, 0, 2:, :2], voxels[0])
    np.testing.assert_array_equal(found.voxels[0, 1, 1:3, 1:3], voxels[1])
    np.testing.assert_array_equal(found.voxels[0, 2, :2, 2:], voxels[2])
    assert np.count_nonzero(found.voxels != 1) == 11


def test_half_a_pixel_is_the_mean_of_two():
    scan = Geometry((2, 1, 4), (5.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    voxels = np.array([[[0, 10, 30, 70]], [[0, 10, 30, 70]]], np.uint8)
    found = untilted(voxels, scan, np.array([0.0, 0.5]))
    # slice 1 lies half a pixel further left: its grid points fall between its own pixels, or half beyond them
    assert found.voxels[0, :, 0].tolist() == [[0, 10, 30, 70, 0], [0, 5, 20, 50, 70]]


@pytest.mark.parametrize("direction", [CANONICAL_DIRECTION, TILTED, TILTED[:, ::-1], TILTED * [-1, 1, 1]])
@pytest.mark.parametrize("shift_mm", [(-1.3, 0.45), (0.9, 0.0), (0.0, -2.0), (4.9, 0.3)])
def test_a_ramp_of_a_tilted_scan_is_exact_inside(direction, shift_mm):
    scan = Geometry(SLICES.shape, SLICES.spacing_mm, SLICES.origin_mm, matrix_of(direction))
    steps = tilted_steps(scan, shift_mm)
    found = untilted(ramp(places(scan.shape, scan.origin_mm, steps)).astype(np.float32), scan, np.array(shift_mm))
    inside = covered(found.geometry, scan.shape, scan.origin_mm, steps)
    assert inside.sum() >= 6 * 8 * 7
    expected = ramp(np.moveaxis(voxel_places(found.geometry), 0, -1))
    np.testing.assert_allclose(found.voxels[0][inside], expected[inside], rtol=1e-5)
    assert found.geometry.direction == scan.direction
    assert found.geometry.spacing_mm == scan.spacing_mm
    assert found.geometry == untilted_grid(scan, np.array(shift_mm))


def test_without_tilt_nothing_changes():
    voxels = np.arange(432, dtype=np.uint16).reshape(SLICES.shape)
    found = untilted(voxels, SLICES, np.zeros(2))
    assert same_grid(found.geometry, SLICES, 1e-9)
    np.testing.assert_array_equal(found.voxels[0], voxels)


def test_a_tilted_box_comes_back_upright_with_its_volume():
    """A box of 20 x 30 x 25 mm = 15 mL: by grey values within 0.1 %, as a mask within 2 %, its centroid in 0.02 mm."""
    scan = Geometry((24, 90, 80), (2.5, 0.8, 0.8), (-30.0, -36.0, -30.0))
    shift = np.array([2.5 * np.tan(np.radians(15)), 0.0])
    points = places(scan.shape, scan.origin_mm, tilted_steps(scan, shift))
    low, high = np.array([-10.4, -6.2, -11.25]), np.array([9.6, 23.8, 13.75])
    half = np.array([0.4, 0.4, 1.25])  # share of a voxel that the box fills, edges rounded as a scanner does
    share = np.prod(np.clip((np.minimum(points + half, high) - np.maximum(points - half, low)) / (2 * half), 0, 1), -1)
    found = untilted((1000 * share - 1000).astype(np.int16), scan, shift)
    occupied = (found.voxels[0] + 1000) / 1000
    assert occupied.sum() * found.geometry.voxel_ml == pytest.approx(15.0, rel=0.001)
    mask = occupied >= 0.5
    assert mask.sum() * found.geometry.voxel_ml == pytest.approx(15.0, rel=0.02)
    weights = occupied[..., None] * np.moveaxis(voxel_places(found.geometry), 0, -1)
    np.testing.assert_allclose(weights.sum(axis=(0, 1, 2)) / occupied.sum(), (low + high) / 2, atol=0.02)
    # upright: the same rows in every slice that holds the box
    rows = {tuple(np.flatnonzero(plane.any(axis=1))) for plane in mask if plane.any()}
    assert len(rows) == 1
    crooked = {tuple(np.flatnonzero(plane.any(axis=1))) for plane in share >= 0.5 if plane.any()}
    assert len(crooked) > 5


# --- sheared axes


def test_a_shear_by_hand():
    # x and y at right angles, z leaning one pixel of 1 mm per slice of 2 mm to the left: 26.6 degrees
    steps = np.array([[1.0, 0, 1], [0, 1, 0], [2, 0, 0]])
    volume = Volume(np.arange(1, 9, dtype=np.int16).reshape(1, 2, 2, 2), grid(shape=(2, 2, 2), origin_mm=(5, 6, 7)))
    found = straightened(volume, steps)
    assert found.geometry == Geometry((2, 2, 3), (2.0, 1.0, 1.0), (5.0, 6.0, 7.0))
    assert found.voxels[0].tolist() == [[[1, 2, 1], [3, 4, 1]], [[1, 5, 6], [1, 7, 8]]]


@pytest.mark.parametrize("seed", range(40))
def test_a_ramp_on_sheared_axes_is_exact_inside(seed):
    steps, shape, origin = random_steps(seed, 0.2), (7, 9, 8), (10.0, -20.0, 30.0)
    volume = Volume(ramp(places(shape, origin, steps)).astype(np.float32)[None], grid(shape=shape, origin_mm=origin))
    found = straightened(volume, steps)
    inside = covered(found.geometry, shape, origin, steps)
    assert inside.sum() > 100
    expected = ramp(np.moveaxis(voxel_places(found.geometry), 0, -1))
    np.testing.assert_allclose(found.voxels[0][inside], expected[inside], atol=2e-4)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), lean=st.floats(0, 0.3), shape=st.tuples(*[st.integers(1, 30)] * 3))
def test_the_straight_grid_covers_every_old_voxel_and_is_not_much_larger(seed, lean, shape):
    steps, origin = random_steps(seed, lean), np.array([10.0, -20.0, 30.0])
    found = straight_grid(shape, origin, steps)
    axes = np.array(found.direction)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    index = voxel_index(found, places(shape, origin, steps))
    assert index.min() >= -2e-4
    assert (index <= np.array(found.shape) - 1 + 2e-4).all()
    extent = np.ptp(index.reshape(-1, 3), axis=0)
    assert (np.array(found.shape) - 1 <= extent + 2).all(), "at most one voxel more at each end"
    np.testing.assert_allclose(voxel_index(found, origin), np.round(voxel_index(found, origin)), atol=1e-9)
    # every axis still points where it pointed
    assert (np.sum(axes * steps, axis=0) > 0).all()
    assert (np.sign(np.linalg.det(axes)) == np.sign(np.linalg.det(steps))).all()


def test_rows_and_columns_stay_if_they_stand_at_right_angles():
    steps = tilted_steps(SLICES)
    found = straight_grid(SLICES.shape, SLICES.origin_mm, steps)
    assert same_grid(found, untilted_grid(SLICES, TILT_MM), 1e-9)
    np.testing.assert_allclose(found.direction, SLICES.direction, atol=1e-12)
    np.testing.assert_allclose(found.spacing_mm, SLICES.spacing_mm)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_which_axis_is_straightened_does_not_depend_on_where_it_stands(order):
    """One axis leans in both others' directions, so the plane of these two is the only one at right angles."""
    steps, shape = tilted_steps(SLICES), np.array(SLICES.shape)
    voxels = np.random.default_rng(1).integers(0, 1000, SLICES.shape).astype(np.int16)
    plain = straightened(Volume(voxels[None], SLICES), steps)
    moved = Geometry(tuple(shape[list(order)].tolist()), (1.0, 1.0, 1.0), SLICES.origin_mm)
    other = straightened(Volume(voxels.transpose(order)[None], moved), steps[:, list(order)])
    np.testing.assert_allclose(other.voxels[0], plain.voxels[0].transpose(order), atol=2e-3)
    np.testing.assert_allclose(np.array(other.geometry.direction), np.array(plain.geometry.direction)[:, list(order)])


@pytest.mark.parametrize("direction", signed_permutations()[::5])
def test_flipped_axes_are_straightened_alike(direction):
    steps = direction @ np.array([[0.2, 0, 1.0], [0, 1.5, 0], [3.0, 0, 0]])
    shape, origin = (4, 5, 6), (1.0, 2.0, 3.0)
    volume = Volume(ramp(places(shape, origin, steps)).astype(np.float32)[None], grid(shape=shape, origin_mm=origin))
    found = straightened(volume, steps)
    inside = covered(found.geometry, shape, origin, steps)
    expected = ramp(np.moveaxis(voxel_places(found.geometry), 0, -1))
    np.testing.assert_allclose(found.voxels[0][inside], expected[inside], rtol=1e-5)
    assert found.geometry.spacing_mm == pytest.approx((3.0, 1.5, 1.0))


def test_axes_that_are_straight_already_are_copied():
    voxels = np.random.default_rng(2).normal(size=(1, *SLICES.shape)).astype(np.float32)
    found = straightened(Volume(voxels, SLICES), SLICES.matrix[:3, :3])
    np.testing.assert_array_equal(found.voxels, voxels)
    assert same_grid(found.geometry, SLICES, 1e-9)


def test_a_skewed_pair_is_turned_by_the_same_angle_from_both_sides():
    """No pair at right angles: 80, 70 and 75 degrees. The pair of 80 is taken, each axis turned by 5 degrees."""
    z_y, z_x, y_x = np.cos(np.radians([70, 75, 80]))
    gram = np.array([[1, z_y, z_x], [z_y, 1, y_x], [z_x, y_x, 1]])
    steps = np.linalg.cholesky(gram).T  # columns of unit length with these angles
    found = np.array(straight_grid((2, 2, 2), np.zeros(3), steps).direction)
    turned = np.degrees(np.arccos(np.sum(found * steps, axis=0)))
    assert turned[1:] == pytest.approx([5, 5])


def test_voxels_outside_the_source_have_its_minimum():
    steps = np.array([[1.0, 0, 0.5], [0, 1, 0], [2, 0, 0]])[:, [0, 1, 2]]
    volume = Volume(np.full((1, 5, 4, 4), 7, np.int16), grid(shape=(5, 4, 4)))
    volume.voxels[0, 2, 2, 2] = -1000
    found = straightened(volume, steps)
    beyond = ~covered(found.geometry, (5, 4, 4), volume.geometry.origin_mm, steps)
    assert beyond.any()
    assert set(np.unique(found.voxels[0][beyond])) <= {-1000.0, 7.0}, "half a voxel keeps its value, then the minimum"
    assert found.voxels.min() == -1000
    assert found.voxels.max() == 7


def test_a_lean_of_45_degrees_is_the_largest():
    # y and x of 1 and 1.41 mm at 45 degrees, z upright: the plane (z, x) stays, y becomes its normal, 0.71 mm apart
    found = straight_grid((2, 2, 2), np.zeros(3), np.array([[0, 0, 1.0], [0, 1, 1], [1, 0, 0]]))
    assert found.shape == (2, 2, 3)
    assert found.spacing_mm == pytest.approx((1.0, np.sqrt(0.5), np.sqrt(2)))


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([[1.1, 0, 1], [0, 1, 0], [1, 0, 0]], "geometry.not-orthonormal", "47.7"),
        ([[0, 1, 1], [0, 0, 0], [1, 0, 0]], "geometry.not-orthonormal", "90.0"),
        ([[0, 0, 1], [0, 1, 0], [0, 0, 0]], "geometry.spacing", "0."),
        ([[0, 0, 1], [0, 1, 0], [np.nan, 0, 0]], "geometry.spacing", "nan"),
    ],
)
def test_what_cannot_be_straightened_is_refused(steps, code, words):
    steps = np.array(steps, float)
    with pytest.raises(ScanError, match=words) as caught:
        straight_grid((2, 2, 2), np.zeros(3), steps)
    assert caught.value.code == code


def test_a_gantry_of_more_than_45_degrees_is_refused():
    scan = grid(shape=(3, 2, 2))
    untilted_grid(scan, np.array([4.99, 0.0]))
    with pytest.raises(ScanError, match=r"45\.1 degrees") as caught:
        untilted_grid(scan, np.array([5.02, 0.0]))
    assert caught.value.code == "geometry.not-orthonormal"


# --- labels


def test_labels_are_straightened_and_never_averaged():
    steps = tilted_steps(SLICES)
    labels = np.zeros((1, *SLICES.shape), np.uint16)
    labels[0, 1:5, 2:7, 1:4], labels[0, 1:5, 2:7, 4:7] = 300, 7
    found = straightened_labels(Volume(labels, SLICES), steps)
    assert found.voxels.dtype == np.uint16
    assert found.geometry == straight_grid(SLICES.shape, SLICES.origin_mm, steps)
    assert set(np.unique(found.voxels)) == {0, 7, 300}
    for value in (7, 300):
        ours = np.argwhere(found.labels == value)
        theirs = np.argwhere(labels[0] == value) @ steps.T + SLICES.origin_mm
        assert len(ours) == pytest.approx(len(theirs), rel=0.15)
        np.testing.assert_allclose(world_mm(found.geometry, ours).mean(axis=0), theirs.mean(axis=0), atol=0.35)


def test_labels_shifted_by_whole_pixels_are_exact():
    steps = np.array([[1.0, 0, 1], [0, 1, 0], [2, 0, 0]])
    volume = Volume(np.arange(1, 9, dtype=np.uint8).reshape(1, 2, 2, 2), grid(shape=(2, 2, 2)))
    found = straightened_labels(volume, steps)
    assert found.voxels[0].tolist() == [[[1, 2, 0], [3, 4, 0]], [[0, 5, 6], [0, 7, 8]]]


def test_an_empty_label_stays_empty():
    empty = Volume(np.zeros((1, *SLICES.shape), np.uint8), SLICES)
    assert not straightened_labels(empty, tilted_steps(SLICES)).voxels.any()


# --- one channel on the grid of another


def test_a_shift_of_whole_voxels_is_a_copy():
    voxels = np.random.default_rng(3).integers(-1000, 3000, (1, *SLICES.shape)).astype(np.int16)
    target = Geometry(SLICES.shape, SLICES.spacing_mm, tuple(world_mm(SLICES, np.array([1, -2, 3]))), SLICES.direction)
    found = onto(Volume(voxels, SLICES), target)
    np.testing.assert_array_equal(found.voxels[0, :-1, 2:, :-3], voxels[0, 1:, :-2, 3:])
    assert (found.voxels[0, -1] == voxels.min()).all()
    assert (found.voxels[0, :, :2] == voxels.min()).all()
    assert (found.voxels[0, :, :, -3:] == voxels.min()).all()


def test_the_same_grid_within_rounding_is_left_alone():
    volume = Volume(np.arange(432, dtype=np.int32).reshape(1, *SLICES.shape), SLICES)
    rounded = matrix_of(np.asarray(SLICES.direction, np.float32))
    target = Geometry(SLICES.shape, SLICES.spacing_mm, SLICES.origin_mm, rounded)
    found = onto(volume, target)
    assert found.voxels is volume.voxels
    assert found.geometry == target


def test_a_voxel_smaller_than_a_hundredth_of_a_millimetre_is_still_a_voxel():
    fine = Geometry((1, 1, 4), (0.005, 0.005, 0.005), (0.0, 0.0, 0.0))
    moved = Geometry((1, 1, 4), (0.005, 0.005, 0.005), (0.005, 0.0, 0.0))
    assert not same_grid(fine, moved)
    assert same_grid(fine, Geometry((1, 1, 4), (0.005, 0.005, 0.005), (0.0004, 0.0, 0.0)))
    volume = Volume(np.array([1, 2, 3, 4], np.uint8).reshape(1, 1, 1, 4), fine)
    assert onto(volume, moved).voxels.ravel().tolist() == [2, 3, 4, 1]


@pytest.mark.parametrize("seed", range(20))
def test_a_ramp_on_any_other_grid_is_exact_inside(seed):
    rng = np.random.default_rng(seed)
    volume = Volume(ramp(places(SLICES.shape, SLICES.origin_mm, SLICES.matrix[:3, :3])).astype("f4")[None], SLICES)
    turn = Rotation.random(random_state=rng).as_matrix() * rng.choice([-1, 1], 3)
    spacing = tuple(rng.uniform(0.4, 1.4, 3).tolist())
    centre = world_mm(SLICES, (np.array(SLICES.shape) - 1) / 2)
    shape = (15, 14, 13)
    origin = centre - turn @ ((np.array(shape) - 1) / 2 * spacing)
    target = Geometry(shape, spacing, tuple(origin.tolist()), matrix_of(turn))
    found = onto(volume, target)
    assert found.geometry == target
    inside = covered(target, SLICES.shape, SLICES.origin_mm, SLICES.matrix[:3, :3])
    assert inside.sum() > 50
    expected = ramp(np.moveaxis(voxel_places(target), 0, -1))
    np.testing.assert_allclose(found.voxels[0][inside], expected[inside], atol=1e-3)


def test_onto_is_scipy_s_interpolation_and_the_minimum_beyond_half_a_voxel():
    rng = np.random.default_rng(5)
    volume = Volume(rng.normal(size=(2, *SLICES.shape)), SLICES)
    turn = Rotation.from_euler("x", 12, degrees=True).as_matrix() @ TILTED
    target = Geometry((11, 12, 13), (3.0, 1.9, 0.9), (6.0, 18.0, 31.0), matrix_of(turn))
    found = onto(volume, target)
    at = voxel_index(SLICES, np.moveaxis(voxel_places(target), 0, -1))
    beyond = ((at < -0.5) | (at > np.array(SLICES.shape) - 0.5)).any(axis=-1)
    assert beyond.any()
    assert not beyond.all()
    for channel, values in enumerate(volume.voxels):
        expected = ndimage.map_coordinates(values, np.moveaxis(at, -1, 0), order=1, mode="nearest")
        expected[beyond] = values.min()
        np.testing.assert_allclose(found.voxels[channel], expected, atol=1e-5)


def test_much_larger_voxels_are_means_as_between_grids_of_the_same_axes():
    volume = Volume(np.random.default_rng(6).normal(size=(1, 24, 30, 28)).astype("f4"), grid(TILTED, (24, 30, 28)))
    target = resampled(volume.geometry, (15.0, 6.0, 4.0))
    found = onto(volume, target)
    import torch

    at = coordinates(volume.geometry, target)
    expected = averaged(torch.from_numpy(volume.voxels), at, [3.0, 3.0, 4.0]).numpy()
    np.testing.assert_allclose(found.voxels, expected, atol=1e-5)
    np.testing.assert_allclose(found.voxels[0, 1, 1, 1], volume.voxels[0, 3:6, 3:6, 4:8].mean(), atol=1e-5)


def test_no_voxel_is_skipped_on_a_turned_grid_of_large_voxels():
    """White noise of deviation 1: the mean of 64 voxels has 1/8; what is taken from single voxels would keep 0.5."""
    volume = Volume(np.random.default_rng(7).normal(size=(1, 40, 40, 40)).astype("f4"), grid(shape=(40,) * 3))
    source = Volume(volume.voxels, Geometry((40,) * 3, (1.0,) * 3, (0.0, 0.0, 0.0)))
    turn = Rotation.from_euler("zyx", [5, 8, -6], degrees=True).as_matrix() @ np.array(CANONICAL_DIRECTION)
    target = Geometry((6, 6, 6), (4.0,) * 3, (8.0, 8.0, 8.0), matrix_of(turn))
    assert onto(source, target).voxels.std() < 0.17


def test_a_single_voxel_source_and_target():
    source = Volume(np.full((1, 1, 1, 1), 5, np.uint8), Geometry((1, 1, 1), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0)))
    target = Geometry((1, 1, 1), (0.5, 0.5, 0.5), (0.9, -0.9, 0.9))
    assert onto(source, target).voxels.tolist() == [[[[5.0]]]]
    wide = Geometry((1, 1, 3), (9.0, 9.0, 9.0), (-9.0, 0.0, 0.0))
    assert onto(source, wide).voxels.tolist() == [[[[5.0, 5.0, 5.0]]]], "the minimum of one voxel is its value"


def test_grids_that_do_not_meet_are_refused():
    volume = Volume(np.zeros((1, *SLICES.shape), np.uint8), SLICES)
    target = Geometry(SLICES.shape, SLICES.spacing_mm, (500.0, 0.0, 0.0), SLICES.direction)
    with pytest.raises(ScanError) as caught:
        onto(volume, target)
    assert caught.value.code == "geometry.no-overlap"


# --- memory


def test_slabs_give_the_same_as_the_whole(monkeypatch):
    volume = Volume(np.random.default_rng(8).normal(size=(1, *SLICES.shape)).astype("f4"), SLICES)
    steps = tilted_steps(SLICES)
    whole = straightened(volume, steps)
    monkeypatch.setattr(straighten, "SLAB_VOXELS", 1)
    np.testing.assert_allclose(straightened(volume, steps).voxels, whole.voxels, atol=1e-5)


def test_memory_stays_near_the_result(monkeypatch):
    monkeypatch.setattr(straighten, "SLAB_VOXELS", 1 << 16)
    scan = Geometry((60, 128, 128), (2.5, 0.8, 0.8), (0.0, 0.0, 0.0))
    voxels = np.zeros(scan.shape, np.int16)
    tracemalloc.start()
    found = untilted(voxels, scan, np.array([0.6, 0.0]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.voxels.nbytes > 5_000_000
    assert peak < 2.5 * found.voxels.nbytes
