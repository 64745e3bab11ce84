"""Tiles and their weights, by hand and at random."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnet_core.blocks import SMALLEST_WEIGHT, Region, gaussian_weights, tiles


def along_x(length, edge, overlap):
    return [(r.start[2], r.stop[2]) for r in tiles((1, 1, length), (1, 1, edge), overlap)]


def count(shape, tile_shape, overlap):
    """How many tiles cover each voxel."""
    covered = np.zeros(shape, int)
    for region in tiles(shape, tile_shape, overlap):
        covered[region.slices] += 1
    return covered


def test_region():
    region = Region((1, 0, 2), (4, 1, 6))
    assert region.shape == (3, 1, 4)
    assert np.zeros((5, 5, 7))[region.slices].shape == (3, 1, 4)
    assert region in {Region((1, 0, 2), (4, 1, 6))}
    with pytest.raises(AttributeError):
        region.start = (0, 0, 0)


def test_an_empty_region_is_our_mistake():
    with pytest.raises(AssertionError):
        Region((0, 0, 0), (1, 0, 1))


def test_ten_voxels_in_tiles_of_four():
    assert along_x(10, 4, 0.25) == [(0, 4), (3, 7), (6, 10)]
    assert along_x(10, 4, 0.0) == [(0, 4), (4, 8), (6, 10)]
    assert along_x(10, 4, 0.5) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert along_x(10, 4, 0.99) == [(i, i + 4) for i in range(7)]
    assert along_x(4, 4, 0.5) == [(0, 4)]
    assert along_x(3, 4, 0.5) == [(0, 3)]
    assert along_x(1, 4, 0.5) == [(0, 1)]


def test_order_is_z_then_y_then_x():
    starts = [r.start for r in tiles((4, 4, 4), (2, 4, 2), 0.0)]
    assert starts == [(0, 0, 0), (0, 0, 2), (2, 0, 0), (2, 0, 2)]


def test_cover_of_a_plane():
    assert count((1, 4, 4), (1, 3, 3), 0.0)[0].tolist() == [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]


sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(sizes, sizes, st.floats(0, 0.95))
def test_tiles_cover_and_overlap(shape, tile_shape, overlap):
    regions = tiles(shape, tile_shape, overlap)
    expected = tuple(min(a, b) for a, b in zip(shape, tile_shape, strict=True))
    assert {r.shape for r in regions} == {expected}
    assert count(shape, tile_shape, overlap).min() >= 1
    assert regions == sorted(set(regions))
    for axis in range(3):
        starts = sorted({r.start[axis] for r in regions})
        assert starts[-1] + expected[axis] == shape[axis]
        shared = [expected[axis] - (b - a) for a, b in pairwise(starts)]
        assert all(s >= int(overlap * expected[axis]) or s == expected[axis] - 1 for s in shared)


def test_weights_by_hand():
    weights = gaussian_weights((1, 1, 4))[0, 0]
    # Half a voxel and one and a half from the centre, in standard deviations of 4 / 8 = 0.5 voxels: 1 and 3.
    assert weights.tolist() == pytest.approx([np.exp(-4.5), np.exp(-0.5), np.exp(-0.5), np.exp(-4.5)])
    assert gaussian_weights((1, 1, 1)).tolist() == [[[1.0]]]


@pytest.mark.parametrize("shape", [(5, 5, 5), (16, 3, 40), (1, 64, 64)])
def test_weights(shape):
    weights = gaussian_weights(shape)
    assert weights.dtype == np.float32
    assert weights.shape == shape
    assert weights.min() >= np.float32(SMALLEST_WEIGHT)
    assert weights.max() <= 1
    assert np.array_equal(weights, weights[::-1, ::-1, ::-1])
    centre = tuple(n // 2 for n in shape)
    assert weights[centre] == weights.max()
