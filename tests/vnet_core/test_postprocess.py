"""Only the largest piece of a label stays."""

import numpy as np
import pytest
from scipy import ndimage

from vnet_core.postprocess import largest_components


def test_only_the_largest_piece_stays():
    labels = np.zeros((3, 4, 8), np.uint8)
    labels[0, 0, :2] = 1
    labels[1:, 2:, 4:7] = 1
    expected = labels.copy()
    expected[0, 0, :2] = 0

    np.testing.assert_array_equal(largest_components(labels, [1]), expected)


def test_labels_that_are_not_named_stay_as_they_are():
    labels = np.zeros((1, 1, 9), np.uint16)
    labels[0, 0] = [7, 0, 7, 7, 0, 300, 0, 300, 300]

    kept = largest_components(labels, [300])

    np.testing.assert_array_equal(kept[0, 0], [7, 0, 7, 7, 0, 0, 0, 300, 300])
    assert kept.dtype == np.uint16


def test_pieces_that_touch_at_a_corner_are_one():
    labels = np.zeros((2, 2, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    labels[0, 0, 4] = 1

    kept = largest_components(labels, [1])

    np.testing.assert_array_equal(np.argwhere(kept), [[0, 0, 0], [1, 1, 1]])


def test_a_piece_inside_the_box_of_another_label_is_judged_with_its_own_label():
    labels = np.full((5, 5, 5), 2, np.uint8)
    labels[1:4, 1:4, 1:4] = 0
    labels[2, 2, 2] = 1

    np.testing.assert_array_equal(largest_components(labels, [1, 2]), labels)


@pytest.mark.parametrize("values", [[], [1], [1, 2, 9]])
def test_an_empty_map_stays_empty(values):
    assert not largest_components(np.zeros((4, 5, 6), np.uint8), values).any()


def test_a_map_without_the_named_label_stays_as_it_is():
    labels = np.zeros((2, 2, 3), np.uint8)
    labels[..., 0] = labels[..., 2] = 1

    np.testing.assert_array_equal(largest_components(labels, [2, 5]), labels)


def test_a_label_everywhere_stays_everywhere():
    assert largest_components(np.ones((3, 3, 3), np.uint8), [1]).all()


def test_the_input_is_not_changed():
    labels = np.array([[[1, 0, 1, 1]]], np.uint8)
    largest_components(labels, [1])
    np.testing.assert_array_equal(labels, [[[1, 0, 1, 1]]])


def test_of_two_equal_pieces_the_first_in_c_order_stays():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[3, 0, 0] = 1
    labels[0, 3, 3] = 1

    np.testing.assert_array_equal(np.argwhere(largest_components(labels, [1])), [[0, 3, 3]])


@pytest.mark.parametrize("seed", range(20))
def test_ties_and_sizes_agree_with_another_implementation(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((6, 7, 8)) < 0.06).astype(np.uint8)
    labels = np.asfortranarray(labels) if seed % 2 else labels
    # scipy numbers pieces in C order, so argmax takes the first of the largest
    pieces, _ = ndimage.label(np.ascontiguousarray(labels), np.ones((3, 3, 3)))
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1

    np.testing.assert_array_equal(largest_components(labels, [1]), pieces == largest)


@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 7, 7), (33, 1, 1), (3, 3, 3), (7, 7, 7)])
def test_as_many_pieces_as_fit_into_a_box(shape):
    labels = np.zeros(shape, np.uint8)
    labels[::2, ::2, ::2] = 1

    np.testing.assert_array_equal(np.argwhere(largest_components(labels, [1])), [[0, 0, 0]])
