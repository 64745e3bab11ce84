"""Contours to pixels and back, on figures that a pencil can check."""

import numpy as np
import pytest
from scipy import ndimage

from vnet_core.contours import even_odd, filled, outlines

SHAPE = (20, 24)


def box(y0, x0, y1, x1):
    return np.array([(y0, x0), (y0, x1), (y1, x1), (y1, x0)], float)


def pixels(*slices):
    mask = np.zeros(SHAPE, bool)
    for rows, columns in slices:
        mask[rows, columns] = True
    return mask


@pytest.mark.parametrize("shift", [-0.5, -0.49, -0.01, 0.0])
def test_a_square_of_ten_pixels_holds_a_hundred(shift):
    square = box(3 + shift, 4 + shift, 13 + shift, 14 + shift)
    for contour in (square, square[::-1], np.roll(square, 3, axis=0)):
        np.testing.assert_array_equal(filled([contour], SHAPE).mask, pixels((slice(3, 13), slice(4, 14))))


def test_rounding_errors_do_not_decide_about_centres_on_the_line():
    square = box(3, 4, 13, 14)
    noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, square.shape)
    np.testing.assert_array_equal(filled([square + noise], SHAPE).mask, filled([square], SHAPE).mask)


def test_contours_that_share_a_line_share_no_pixel():
    left, right = box(2, 3, 12, 9), box(2, 9, 12, 15)
    both = filled([left], SHAPE).mask.astype(int) + filled([right], SHAPE).mask
    np.testing.assert_array_equal(both, pixels((slice(2, 12), slice(3, 15))))


def test_a_triangle_by_hand():
    # centres with x <= y below the diagonal of a 4 x 4 square
    triangle = np.array([(-0.5, -0.5), (3.5, 3.5), (3.5, -0.5)])
    expected = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(filled([triangle], (4, 4)).mask, expected)


def test_nested_contours_are_a_hole_and_an_island_in_it():
    contours = [box(7.5, 7.5, 9.5, 9.5), box(0.5, 0.5, 16.5, 16.5), box(4.5, 4.5, 12.5, 12.5)]
    filling = filled(contours, SHAPE)
    expected = pixels((slice(1, 17), slice(1, 17)))
    expected[5:13, 5:13] = False
    expected[8:10, 8:10] = True
    np.testing.assert_array_equal(filling.mask, expected)
    assert filling.crossings == 0
    np.testing.assert_array_equal(even_odd(contours, SHAPE), expected)


def test_a_keyhole_is_a_hole():
    outer, inner = box(0.5, 0.5, 10.5, 10.5), box(3.5, 3.5, 6.5, 6.5)[::-1]
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    expected = pixels((slice(1, 11), slice(1, 11)))
    expected[4:7, 4:7] = False
    np.testing.assert_array_equal(filled([keyhole], SHAPE).mask, expected)


def test_contours_that_overlap_in_part_are_joined_and_counted():
    a, b = box(0.5, 0.5, 6.5, 6.5), box(4.5, 4.5, 9.5, 9.5)
    filling = filled([a, b], SHAPE)
    np.testing.assert_array_equal(filling.mask, pixels((slice(1, 7), slice(1, 7)), (slice(5, 10), slice(5, 10))))
    assert filling.crossings == 1
    assert np.count_nonzero(even_odd([a, b], SHAPE)) == 36 + 25 - 2 * 4


def test_what_lies_outside_is_left_out():
    np.testing.assert_array_equal(filled([box(-5, -5, 2.5, 40)], SHAPE).mask, pixels((slice(0, 3), slice(0, 24))))
    assert not filled([box(30, 30, 40, 40)], SHAPE).mask.any()
    assert not filled([box(-9, -9, -1, -1)], SHAPE).mask.any()
    assert not filled([], SHAPE).mask.any()


@pytest.mark.parametrize("points", [[(3.2, 4.1)], [(3.2, 4.1), (8.0, 9.0)], [(3, 4), (3, 9), (3, 6)]])
def test_points_and_lines_enclose_nothing(points):
    assert not filled([np.array(points, float)], SHAPE).mask.any()


# --- back


def test_the_outline_of_one_pixel():
    mask = pixels((slice(2, 3), slice(5, 6)))
    (contour,) = outlines(mask)
    assert sorted(map(tuple, contour.tolist())) == [(1.5, 4.5), (1.5, 5.5), (2.5, 4.5), (2.5, 5.5)]


def test_the_outline_of_a_square_has_four_points():
    (contour,) = outlines(pixels((slice(3, 13), slice(4, 14))))
    assert len(contour) == 4


def test_pixels_that_touch_by_a_corner_get_contours_of_their_own():
    for mask in (np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1]):
        contours = outlines(mask)
        assert [len(c) for c in contours] == [4, 4]
        np.testing.assert_array_equal(filled(contours, (2, 2)).mask, mask)


def test_a_hole_is_a_contour_of_its_own():
    mask = pixels((slice(3, 13), slice(4, 14)))
    mask[6:8, 6:9] = False
    assert len(outlines(mask)) == 2
    np.testing.assert_array_equal(filled(outlines(mask), SHAPE).mask, mask)


def test_nothing_has_no_outline():
    assert outlines(np.zeros(SHAPE, bool)) == []


@pytest.mark.parametrize("seed", range(12))
def test_any_mask_comes_back_exactly(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, 2))
    field = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0, 2.5))
    mask = field > np.quantile(field, rng.uniform(0.1, 0.9))
    contours = outlines(mask)
    filling = filled(contours, mask.shape)
    np.testing.assert_array_equal(filling.mask, mask)
    np.testing.assert_array_equal(even_odd(contours, mask.shape), mask)
    assert filling.crossings == 0


def test_the_whole_plane_comes_back():
    mask = np.ones(SHAPE, bool)
    np.testing.assert_array_equal(filled(outlines(mask), SHAPE).mask, mask)
