"""Voxels and their grid stay together."""

import numpy as np
import pytest

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, world_mm
from vnet_core.volume import Volume, canonical, crop

SAGITTAL = Geometry((2, 3, 4), (3.0, 2.0, 1.0), (5.0, 6.0, 7.0), ((1, 0, 0), (0, 0, 1), (0, -1, 0)))


def numbered(channels: int = 1) -> Volume:
    return Volume(np.arange(24 * channels, dtype=np.int16).reshape(channels, 2, 3, 4), SAGITTAL)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (2, 3, 4), (1, 1, 2, 3, 4)])
def test_voxels_that_do_not_fit_their_grid_are_refused_with_both_shapes(shape):
    with pytest.raises(ScanError) as caught:
        Volume(np.zeros(shape), SAGITTAL)
    assert caught.value.code == "scan.shape"
    assert str(shape) in str(caught.value)
    assert "2, 3, 4" in str(caught.value)


def test_canonical_is_a_view_that_can_be_undone():
    volume = numbered(channels=2)
    turned, way = canonical(volume)
    assert turned.voxels.shape == (2, 3, 4, 2)
    assert np.shares_memory(turned.voxels, volume.voxels)
    np.testing.assert_array_equal(way.undo(turned.voxels), volume.voxels)
    # array y ran to the feet: its last row is the canonical first
    assert turned.voxels[0, 0, 1, 1] == volume.voxels[0, 1, 2, 1]


def test_a_voxel_keeps_value_and_place_through_canonical_and_crop():
    volume = numbered()
    part = crop(canonical(volume)[0], (1, 1, 0), (3, 4, 1))
    assert part.voxels.shape == (1, 2, 3, 1)
    assert np.shares_memory(part.voxels, volume.voxels)
    for index in np.ndindex(part.geometry.shape):
        value = part.voxels[(0, *index)]
        source = np.argwhere(volume.labels == value)[0]
        np.testing.assert_allclose(world_mm(part.geometry, np.array(index)), world_mm(SAGITTAL, source), atol=1e-12)


def test_labels_are_the_only_channel():
    np.testing.assert_array_equal(numbered().labels, np.arange(24).reshape(2, 3, 4))
    with pytest.raises(AssertionError):
        _ = numbered(channels=2).labels
