"""Previews by pencil: which blocks become which voxels, where they lie, and the file that a viewer is given."""

import nibabel
import numpy as np
import pytest

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, world_mm
from vnet_core.phantoms import PhantomSpec, oblique_direction, phantom
from vnet_core.pictures.previews import GREYS, LARGEST, MOST_LABELS, nifti, preview
from vnet_core.plan import Label

A, B = Label(value=3, name="a"), Label(value=700, name="b")


def grid(shape, spacing_mm=(1.0, 1.0, 1.0)) -> Geometry:
    return Geometry(shape, spacing_mm, (5.0, 6.0, 7.0))


def test_a_small_scan_keeps_its_grid_and_labels():
    image, label = phantom(PhantomSpec(seed=1, shape=(20, 24, 28)))
    small = preview(image.voxels[0], label.labels, image.geometry, [Label(value=1, name="o"), Label(value=2, name="l")])
    assert small.geometry == image.geometry
    assert np.array_equal(small.labels, label.labels)
    assert len(np.unique(small.image)) <= GREYS
    assert (small.image.min(), small.image.max()) == (0, 255)


def test_blocks_hold_their_mean_and_most_frequent_label():
    # blocks of 2 along x: 192 voxels become 96
    image = np.zeros((1, 1, 192))
    image[..., 100:] = 100.0
    labels = np.zeros(image.shape, np.uint16)
    labels[..., 10:20] = 3
    labels[..., 20:23] = 700  # the block 22, 23 is half of it, and half is enough
    small = preview(image, labels, grid(image.shape, (3.0, 2.0, 0.5)), [A, B])
    assert small.labels.shape == (1, 1, LARGEST)
    assert np.flatnonzero(small.labels[0, 0] == 1).tolist() == [5, 6, 7, 8, 9]
    assert np.flatnonzero(small.labels[0, 0] == 2).tolist() == [10, 11]
    assert np.flatnonzero(small.image[0, 0] == 255).tolist() == list(range(50, 96))
    assert small.geometry.spacing_mm == (3.0, 2.0, 1.0)
    # the centre of the first block lies between its two voxels
    assert small.geometry.origin_mm == (5.25, 6.0, 7.0)


def test_nothing_small_vanishes():
    labels = np.zeros((200, 200, 200), np.uint8)
    labels[20:120, 20:120, 20:120] = 3
    labels[151, 77, 33] = 4
    small = preview(None, labels, grid(labels.shape), [A, Label(value=4, name="tiny")])
    assert np.argwhere(small.labels == 2).tolist() == [[151 // 3, 77 // 3, 33 // 3]]
    assert small.image is None


def test_the_last_block_may_be_smaller():
    image = np.full((97, 5, 5), 7.0)
    image[96] = 9.0
    small = preview(image, np.zeros(image.shape, np.uint8), grid(image.shape), [A])
    assert small.labels.shape == (49, 5, 5)
    assert small.image[48, 0, 0] == 255
    assert small.image[47, 0, 0] == 0
    assert small.centre_mm is None


def test_the_centre_is_a_voxel_of_the_largest_label():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[10:30, 10:30, 10:30] = 3
    labels[12:28, 12:28, 12:28] = 0
    small = preview(None, labels, grid(labels.shape), [A])
    index = np.rint(np.array(small.centre_mm)[::-1] - (7, 6, 5)).astype(int)
    assert labels[tuple(index)] == 3


@pytest.mark.parametrize("level", [0.0, np.nan, np.inf, -np.inf])
def test_scans_without_contrast_have_a_preview(level):
    small = preview(np.full((3, 4, 5), level), np.zeros((3, 4, 5), np.uint8), grid((3, 4, 5)), [A])
    assert small.image.dtype == np.uint8


def test_labels_beyond_a_byte_are_left_out():
    labels = np.arange(1, 301, dtype=np.uint16).reshape(3, 10, 10)
    small = preview(None, labels, grid(labels.shape), [Label(value=v, name=str(v)) for v in range(1, 301)])
    assert sorted(set(small.labels.ravel().tolist())) == list(range(MOST_LABELS + 1))


def test_the_largest_scans_stay_small_files():
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (300, 220, 220)).astype(np.int16)
    small = preview(image, np.zeros(image.shape, np.uint8), grid(image.shape), [A])
    assert max(small.labels.shape) <= LARGEST
    assert len(nifti(small.image, small.geometry)) <= LARGEST**3 + 352


def test_the_file_lies_where_the_scan_lay(tmp_path):
    geometry = Geometry((4, 5, 6), (3.0, 2.0, 1.5), (-10.0, 20.0, 30.5), oblique_direction((10.0, -20.0, 5.0)))
    values = np.random.default_rng(0).integers(0, 255, geometry.shape).astype(np.uint8)
    file = tmp_path / "a.nii"
    file.write_bytes(nifti(values, geometry))
    read = nibabel.load(file)
    assert np.array_equal(np.asarray(read.dataobj), values.transpose())
    assert np.allclose(read.header.get_zooms(), (1.5, 2.0, 3.0))
    for index in ((0, 0, 0), (3, 4, 5), (1, 2, 3)):
        x, y, z = world_mm(geometry, np.array(index))
        assert np.allclose(read.affine @ (*index[::-1], 1), (-x, -y, z, 1), atol=1e-4)
    header = file.read_bytes()[:352]
    assert not header[148:228].strip(b"\0"), "a description"
    assert not header[14:32].strip(b"\0")


def test_arrays_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ScanError):
        preview(np.zeros((2, 3, 4)), np.zeros((2, 3, 5), np.uint8), grid((2, 3, 5)), [A])
    with pytest.raises(ScanError):
        preview(None, np.zeros((2, 3, 4), np.uint8), grid((2, 3, 5)), [A])
