"""Interpolation against tables by hand, scipy and SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vnet_core import resample
from vnet_core.decide import most_probable
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of, resampled
from vnet_core.resample import averaged, coordinates, decided, labels, linear, nearest, nearest_labels

OBLIQUE = matrix_of(Rotation.from_euler("zyx", [20, -35, 50], degrees=True).as_matrix())
SOURCE = Geometry((7, 9, 8), (2.0, 1.0, 1.5), (-3.0, 5.0, 11.0), OBLIQUE)


def argmax_labels(logits, at):
    return decided(logits, at, most_probable(len(logits)))


def along_x(shape_x: int, spacing_x_mm: float, first_mm: float = 0.0) -> Geometry:
    return Geometry((1, 1, shape_x), (1.0, 1.0, spacing_x_mm), (first_mm, 0.0, 0.0))


def row(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)


def at_x(*indices: float):
    return np.zeros(1), np.zeros(1), np.array(indices)


def random_logits(classes: int, shape, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn((classes, *shape), generator=torch.Generator().manual_seed(seed))


# --- coordinates


def test_coordinates_by_hand():
    # four voxels of 2 mm have their centres at 0, 2, 4, 6 mm; eight of 1 mm over the same field begin at -0.5 mm
    finer = resampled(along_x(4, 2.0), (1.0, 1.0, 1.0))
    at = coordinates(along_x(4, 2.0), finer)
    np.testing.assert_allclose(at[2], [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25])
    np.testing.assert_array_equal(at[0], [0])
    back = coordinates(finer, along_x(4, 2.0))
    np.testing.assert_allclose(back[2], [0.5, 2.5, 4.5, 6.5])


def test_coordinates_follow_the_axes_of_an_oblique_grid():
    target = resampled(SOURCE, (1.0, 3.0, 1.0))
    at = coordinates(SOURCE, target)
    inverse = np.linalg.inv(SOURCE.matrix)
    for index in [(0, 0, 0), (3, 1, 7), (13, 2, 11)]:
        expected = (inverse @ target.matrix @ [*index, 1])[:3]
        np.testing.assert_allclose([at[a][index[a]] for a in range(3)], expected, atol=1e-9)


def test_equal_grids_have_whole_coordinates_whatever_the_last_digit():
    moved = Geometry(SOURCE.shape, SOURCE.spacing_mm, (-3.0 + 1e-7, 5.0, 11.0 - 1e-7), OBLIQUE)
    for target in (SOURCE, moved, resampled(SOURCE, SOURCE.spacing_mm)):
        for a, n in enumerate(SOURCE.shape):
            np.testing.assert_array_equal(coordinates(SOURCE, target)[a], np.arange(n))


def test_a_thousandth_of_a_voxel_is_a_real_shift():
    moved = along_x(4, 1.0, first_mm=0.001)
    np.testing.assert_allclose(coordinates(along_x(4, 1.0), moved)[2], np.arange(4) + 0.001)


def test_grids_with_other_axes_are_our_own_mistake():
    with pytest.raises(AssertionError, match="axes"):
        coordinates(SOURCE, Geometry(SOURCE.shape, SOURCE.spacing_mm, SOURCE.origin_mm, CANONICAL_DIRECTION))


# --- linear


def test_linear_by_hand():
    values = row([0, 10, 20, 40])
    at = at_x(-2.0, -0.25, 0.0, 0.5, 1.25, 2.75, 3.0, 3.4)
    np.testing.assert_allclose(linear(values, at)[0, 0], [0, 0, 0, 5, 12.5, 35, 40, 40])


def test_in_the_middle_of_eight_voxels_is_their_mean():
    values = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 20]]], dtype=torch.float32)
    half = np.array([0.5])
    assert linear(values, (half, half, half)).item() == 6.0


@pytest.mark.parametrize("spacing_mm", [(1.0, 2.5, 0.7), (5.0, 0.5, 4.0), (0.9, 0.9, 0.9)])
def test_linear_is_scipy_s(spacing_mm):
    values = np.random.default_rng(0).normal(size=(2, *SOURCE.shape)).astype(np.float32)
    at = coordinates(SOURCE, resampled(SOURCE, spacing_mm))
    places = np.meshgrid(*at, indexing="ij")
    found = linear(torch.from_numpy(values), at).numpy()
    for channel in range(2):
        expected = ndimage.map_coordinates(values[channel], places, order=1, mode="nearest")
        np.testing.assert_allclose(found[channel], expected, atol=1e-5)


def test_equal_grids_are_copied_to_the_last_bit():
    values = torch.tensor(np.random.default_rng(0).normal(size=SOURCE.shape) * 1e30, dtype=torch.float32)
    values[0, 0, 0] = float("inf")  # which any arithmetic with its neighbours would spread
    assert torch.equal(linear(values, coordinates(SOURCE, SOURCE)), values)


def test_whole_coordinates_copy_without_a_neighbour():
    values = row([1.0, float("inf"), 3.0])
    assert linear(values, at_x(0.0, 2.0, 2.0, 0.0))[0, 0].tolist() == [1.0, 3.0, 3.0, 1.0]


def test_a_single_voxel_fills_any_grid():
    at = (np.array([-0.3, 0.0, 0.3]), np.zeros(1), np.array([-0.5, 0.5]))
    assert linear(torch.full((1, 1, 1), 7.5), at).tolist() == [[[7.5, 7.5]]] * 3


# --- averaged


def test_larger_voxels_are_means_by_hand():
    values = row([3, 6, 9, 1, 1, 1, 0, 0, 30])
    assert averaged(values, at_x(1, 4, 7), (1, 1, 3))[0, 0].tolist() == [6, 1, 10]
    # 2.5 voxels about index 1 are 0 .. 2 with weights 0.75, 1, 0.75
    np.testing.assert_allclose(averaged(values, at_x(1), (1, 1, 2.5))[0, 0], [(0.75 * 3 + 6 + 0.75 * 9) / 2.5])
    # beyond the edge there is nothing: only 3 and half of 6 are under three voxels about -0.5
    np.testing.assert_allclose(averaged(values, at_x(-0.5), (1, 1, 3))[0, 0], [(3 + 0.5 * 6) / 1.5])


def test_up_to_one_and_a_half_it_is_linear():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=SOURCE.shape).astype(np.float32))
    at = coordinates(SOURCE, resampled(SOURCE, (2.9, 1.4, 0.8)))
    assert torch.equal(averaged(values, at, (1.45, 1.4, 0.53)), linear(values, at))


def test_a_mean_keeps_the_sum_and_a_constant():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 12, 12, 12)).astype(np.float32))
    source = Geometry((12, 12, 12), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    target = resampled(source, (3.0, 2.0, 4.0))
    found = averaged(values, coordinates(source, target), (3.0, 2.0, 4.0))
    assert found.shape == (2, *target.shape)
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), values.mean(dim=(1, 2, 3)))
    same = averaged(torch.full((12, 12, 12), 0.7), coordinates(source, target), (3.0, 2.0, 4.0))
    torch.testing.assert_close(same, torch.full(target.shape, 0.7))


def test_what_is_finer_than_the_new_grid_does_not_come_back_as_a_coarse_wave():
    """A wave of 2.2 voxels seen every 3 would look like one of 8.25; the mean over 3 voxels leaves a third of it."""
    source, target = along_x(300, 1.0), resampled(along_x(300, 1.0), (1.0, 1.0, 3.0))
    wave = torch.from_numpy(np.cos(2 * np.pi * np.arange(300) / 2.2).astype(np.float32)).reshape(1, 1, -1)
    at = coordinates(source, target)
    assert float(linear(wave, at).std()) > 0.6
    assert float(averaged(wave, at, (1, 1, 3)).std()) < 0.25


@pytest.mark.parametrize("step", [1.6, 2.0, 2.7, 5.0, 40.0])
def test_a_mean_is_the_integral_over_the_target_voxel(step):
    source = along_x(30, 1.0)
    target = resampled(source, (1.0, 1.0, step))
    values = np.random.default_rng(0).normal(size=30)
    found = averaged(row(values), coordinates(source, target), (1, 1, step))[0, 0]
    integral = np.concatenate([[0], np.cumsum(values)])
    at = coordinates(source, target)[2]
    lower, upper = np.clip([at - step / 2 + 0.5, at + step / 2 + 0.5], 0, 30)
    expected = (np.interp(upper, np.arange(31), integral) - np.interp(lower, np.arange(31), integral)) / (upper - lower)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nearest_by_hand():
    at = (np.array([-0.4, 0.5, 1.49]), np.array([0.3]), np.array([0.6]))
    found = nearest(at, 0)
    np.testing.assert_array_equal(found[0], [0, 1, 1])
    assert found[1][0] == 0.3
    values = np.array([5, 1, 7], np.uint16).reshape(1, 1, 3)
    np.testing.assert_array_equal(nearest_labels(values, at_x(-0.6, 0.4, 0.5, 2.9))[0, 0], [5, 5, 1, 7])
    assert nearest_labels(values, at_x(0.0)).dtype == np.uint16


# --- label maps


def test_between_1_and_3_there_is_no_2():
    values = np.array([1, 1, 3, 3], np.uint8).reshape(1, 1, 4)
    found = labels(values, at_x(*np.arange(-0.5, 3.6, 0.125)))
    assert set(np.unique(found)) == {1, 3}
    np.testing.assert_array_equal(labels(values, at_x(1.25, 1.5, 1.75))[0, 0], [1, 1, 3])  # a tie is the smaller


def test_a_label_wins_by_its_own_share_not_against_all_others_together():
    # at 0.4 of the way along y and x the four corners weigh 0.36, 0.24, 0.24 and 0.16
    values = np.array([[[5, 1], [2, 3]]], np.uint16)
    at = (np.zeros(1), np.array([0.4]), np.array([0.4]))
    assert labels(values, at).item() == 5
    # but two corners of one label outweigh it
    assert labels(np.array([[[5, 1], [1, 3]]], np.uint16), at).item() == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_the_argmax_of_scipy_s_indicators(dtype):
    generator = np.random.default_rng(1)
    values = ndimage.zoom(generator.integers(0, 4, (4, 5, 4)), 2, order=0)[:7, :9, :8].astype(dtype) * 60
    at = coordinates(SOURCE, resampled(SOURCE, (1.1, 1.7, 0.8)))
    places = np.meshgrid(*at, indexing="ij")
    shares = [ndimage.map_coordinates((values == v) * 1.0, places, order=1, mode="nearest") for v in (0, 60, 120, 180)]
    ordered = np.sort(shares, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    found = labels(values, at)
    assert found.dtype == dtype
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], (np.argmax(shares, axis=0) * 60)[clear])


def test_labels_on_the_same_grid_are_a_copy():
    values = np.random.default_rng(0).integers(0, 9, SOURCE.shape).astype(np.uint8)
    found = labels(values, coordinates(SOURCE, SOURCE))
    np.testing.assert_array_equal(found, values)
    assert not np.shares_memory(found, values)


def test_an_empty_label_map_stays_empty():
    assert not labels(np.zeros(SOURCE.shape, np.uint8), coordinates(SOURCE, resampled(SOURCE, (1.0, 1.0, 1.0)))).any()


# --- classes from logits


def test_probabilities_are_interpolated_not_logits():
    # class 1 has probability 0.731 and nearly 0: a quarter of the way 0.548, while the mean logit is -1.5
    logits = torch.tensor([[0.0, 0.0], [1.0, -9.0]]).reshape(2, 1, 1, 2)
    np.testing.assert_array_equal(argmax_labels(logits, at_x(0.0, 0.25, 0.35, 1.0))[0, 0], [1, 1, 0, 0])


def test_classes_are_those_of_simpleitk():
    logits = random_logits(4, SOURCE.shape)
    target = resampled(SOURCE, (1.1, 1.7, 0.8))
    reference = itk_image(np.zeros(target.shape, np.float32), target)
    probabilities = torch.softmax(logits, dim=0).numpy()
    shares = np.stack(
        [
            sitk.GetArrayFromImage(sitk.Resample(itk_image(p, SOURCE), reference, sitk.Transform(), sitk.sitkLinear))
            for p in probabilities
        ]
    )
    ordered = np.sort(shares, axis=0)
    clear = (ordered[-1] - ordered[-2] > 1e-4) & (shares.sum(axis=0) > 0.5)
    assert clear.mean() > 0.9
    found = argmax_labels(logits, coordinates(SOURCE, target))
    np.testing.assert_array_equal(found[clear], shares.argmax(axis=0)[clear])


def itk_image(voxels: np.ndarray, geometry: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(np.array(geometry.direction)[:, ::-1].ravel().tolist())
    return image


@pytest.mark.parametrize("spacing_mm", [(0.6, 1.7, 0.8), (4.5, 0.6, 1.5), (2.0, 1.0, 1.5)])
@pytest.mark.parametrize("sharp", [False, True])
def test_the_size_of_a_slab_changes_nothing(monkeypatch, spacing_mm, sharp):
    logits = random_logits(3, SOURCE.shape)
    if sharp:  # many ties, which a change in the order of arithmetic would break
        logits = 20 * torch.nn.functional.one_hot(logits.argmax(0), 3).movedim(-1, 0).float()
    at = coordinates(SOURCE, resampled(SOURCE, spacing_mm))
    whole = argmax_labels(logits, at)
    for values in (1, 1000, 5000):
        monkeypatch.setattr(resample, "SLAB_VALUES", values)
        np.testing.assert_array_equal(argmax_labels(logits, at), whole)


@pytest.mark.parametrize("spacing_mm", [1.0, 0.5, 5.0])
def test_a_slab_holds_no_more_probabilities_than_allowed(monkeypatch, spacing_mm):
    """Also where the scan's slices are thicker than the network's, so that one of them needs many."""
    source = Geometry((60, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    logits = random_logits(2, source.shape)
    held = []
    softmax = torch.softmax

    def counted(values, dim):
        held.append(values.numel())
        return softmax(values, dim)

    monkeypatch.setattr(torch, "softmax", counted)
    monkeypatch.setattr(resample, "SLAB_VALUES", 12 * 2 * 4 * 4)
    argmax_labels(logits, coordinates(source, resampled(source, (spacing_mm, 1.0, 1.0))))
    assert max(held) <= (12 + 1) * 2 * 4 * 4  # one more where a slab begins and ends between two slices
    assert len(held) > 3, "the volume was not cut into slabs"


def test_outside_the_networks_grid_is_background():
    logits = torch.zeros(2, 1, 1, 4)
    logits[1] = 9.0  # all class 1
    # the grid ends half a voxel beyond its outermost centres
    found = argmax_labels(logits, at_x(-0.6, -0.5, 0.0, 3.0, 3.5, 3.6))
    np.testing.assert_array_equal(found[0, 0], [0, 1, 1, 1, 1, 0])


def test_a_scan_wholly_outside_is_background():
    logits = torch.ones(2, 2, 2, 2) * torch.tensor([0.0, 9.0]).reshape(2, 1, 1, 1)
    at = (np.array([5.0, 6.0]), np.array([0.0]), np.array([0.0]))
    found = argmax_labels(logits, at)
    assert found.shape == (2, 1, 1)
    assert not found.any()


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_as_many_bits_as_classes_need(classes, dtype):
    logits = torch.zeros(classes, 1, 1, 1)
    logits[-1] = 1.0
    found = argmax_labels(logits, at_x(0.0))
    assert found.dtype == dtype
    assert found.item() == classes - 1


def test_half_precision_logits_are_enough():
    logits = random_logits(3, SOURCE.shape).bfloat16()
    at = coordinates(SOURCE, resampled(SOURCE, (1.1, 1.7, 0.8)))
    np.testing.assert_array_equal(argmax_labels(logits, at), argmax_labels(logits.float(), at))
