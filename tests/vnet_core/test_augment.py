"""Augmentation by hand: what turns, what stays, and that image and label move together."""

import numpy as np
import pytest

from vnet_core.augment import intensities, rotation_zoom, warped

QUARTER_TURN = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""In the plane of z and y."""


def generator(seed=0):
    return np.random.default_rng(seed)


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_strength_zero_gives_back_the_same():
    image, classes = numbered((1, 3, 4, 5)), numbered((3, 4, 5)).astype(np.uint8)
    matrix = rotation_zoom(generator(), 0.0, 0.0, (3.0, 1.0, 2.0))
    assert np.allclose(matrix, np.eye(3), atol=1e-12)
    moved, named = warped(image, classes, np.eye(3))
    assert moved is image
    assert named is classes
    assert intensities(generator(), image, 0.0) is image


def test_a_quarter_turn_of_image_and_label_by_hand():
    cube = numbered((3, 3, 3))
    moved, named = warped(cube[None], cube.astype(np.uint8), QUARTER_TURN)
    expected = np.rot90(cube, 1, (0, 1))
    assert np.allclose(moved[0], expected, atol=1e-4)
    assert np.array_equal(named, expected)
    assert named.dtype == np.uint8


def test_beyond_the_patch_is_zero_and_background():
    ones = np.ones((5, 5, 5), np.float32)
    moved, named = warped(ones[None], ones.astype(np.uint8), 2 * np.eye(3))
    assert named.sum() == 3**3  # seen through a matrix of 2 the cube is half as wide
    assert moved[0, 0, 0, 0] == 0
    assert moved[0, 2, 2, 2] == 1


@pytest.mark.parametrize("seed", range(5))
def test_anatomy_stays_rigid_on_anisotropic_grids(seed):
    spacing = np.array([3.0, 1.0, 2.0])
    matrix = rotation_zoom(generator(seed), 20.0, 0.2, tuple(spacing))
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    zoom = 1 / np.cbrt(np.linalg.det(in_mm))
    assert 0.8 <= zoom <= 1.2
    turn = in_mm * zoom
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-9)
    angles = np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    assert angles <= np.sqrt(3) * 20 + 1e-6


def test_the_surround_stays_at_zero_and_channels_vary_apart():
    image = np.zeros((2, 4, 4, 4), np.float32)
    image[:, 1:3, 1:3, 1:3] = 1.0
    changed = intensities(generator(), image, 0.3)
    assert changed.dtype == np.float32
    assert (changed[image == 0] == 0).all()
    assert not np.allclose(changed[0], changed[1])
    inside = changed[image == 1]
    assert (np.abs(inside - 1) < 0.3 + 0.15 + 6 * 0.15).all()


def test_one_generator_state_gives_one_result():
    image = numbered((1, 4, 4, 4)) - 30
    assert np.array_equal(intensities(generator(3), image, 0.2), intensities(generator(3), image, 0.2))
    assert np.array_equal(
        rotation_zoom(generator(3), 9, 0.1, (1, 1, 1)), rotation_zoom(generator(3), 9, 0.1, (1, 1, 1))
    )
