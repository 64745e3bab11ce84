"""Where patches are cut, by hand; and gradients where the grid is smaller than the kernel."""

import numpy as np
import pytest
import torch
from torch import nn

from vnet_core.networks.vnet import Stage, build_vnet
from vnet_core.sections import AugmentationPlan, NetworkPlan, TrainingPlan
from vnet_core.training import (
    Placement,
    class_table,
    cut,
    place,
    sample_generator,
)

STILL = AugmentationPlan(flip_axes=(), shift_voxels=0)
PLAIN = TrainingPlan(patch_size=(4, 6, 8), foreground_fraction=0.0, augmentation=STILL)


def plan(**change) -> TrainingPlan:
    moved = {name: change.pop(name) for name in ("flip_axes", "shift_voxels") if name in change}
    augmentation = {**STILL.model_dump(), **moved}
    return TrainingPlan.model_validate({**PLAIN.model_dump(), **change, "augmentation": augmentation})


def placements(shape, of: TrainingPlan, foreground=None, count: int = 300) -> list[Placement]:
    return [place(sample_generator(0, step, 0), shape, foreground or {}, of) for step in range(count)]


# --- where patches are


def test_a_sample_depends_on_seed_step_and_position_alone():
    of = plan(shift_voxels=3, flip_axes=(0, 1, 2), foreground_fraction=0.5)
    foreground = {1: np.array([[20, 20, 20]]), 2: np.array([[9, 9, 9], [31, 22, 43]])}
    drawn = {
        key: [place(sample_generator(*key), (40, 50, 60), foreground, of) for _ in range(2)]
        for key in np.ndindex(3, 3, 3)
    }
    assert all(first == second for first, second in drawn.values())
    assert len({first for first, _ in drawn.values()}) == 27


def test_uniform_patches_reach_every_place_and_none_outside():
    starts = np.array([p.start for p in placements((6, 6, 11), PLAIN)])
    for axis, last in enumerate((2, 0, 3)):
        assert set(starts[:, axis]) == set(range(last + 1))
    counts = np.bincount(starts[:, 2])
    assert counts.min() > 300 / 4 / 2, counts


@pytest.mark.parametrize("shift", [0, 1, 9])
def test_a_patch_stays_inside_whatever_its_centre_and_shift(shift):
    corners = {1: np.array([[0, 0, 0], [9, 11, 19]]), 3: np.array([[9, 0, 10]])}
    for placed in placements((10, 12, 20), plan(shift_voxels=shift, foreground_fraction=0.7), corners):
        for start, size, n in zip(placed.start, (4, 6, 8), (10, 12, 20), strict=True):
            assert 0 <= start <= n - size


def test_a_centred_patch_has_its_voxel_in_the_middle():
    of = plan(foreground_fraction=1.0)
    for placed in placements((40, 40, 40), of, {1: np.array([[20, 21, 22]])}, count=5):
        assert placed.start == (20 - 2, 21 - 3, 22 - 4)


def test_the_shift_moves_a_centred_patch_to_both_sides():
    of = plan(foreground_fraction=1.0, shift_voxels=2)
    starts = np.array([p.start for p in placements((40, 40, 40), of, {1: np.array([[20, 21, 22]])})])
    for axis, middle in enumerate((18, 18, 18)):
        assert set(starts[:, axis]) == set(range(middle - 2, middle + 3))


def test_every_label_is_as_likely_whatever_its_size():
    rare_and_common = {2: np.array([[30, 30, 30]]), 7: np.tile([10, 10, 10], (999, 1))}
    of = plan(foreground_fraction=1.0)
    starts = [p.start[0] for p in placements((40, 40, 40), of, rare_and_common)]
    assert set(starts) == {28, 8}
    assert 110 < starts.count(28) < 190


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.25, 45, 105), (1.0, 300, 300)])
def test_the_share_of_centred_patches(fraction, low, high):
    # a volume so large that no uniform patch lies there by chance
    of = plan(foreground_fraction=fraction)
    starts = [p.start for p in placements((4000, 4000, 4000), of, {1: np.array([[7, 7, 7]])})]
    assert low <= starts.count((5, 4, 3)) <= high


def test_without_labelled_voxels_patches_are_uniform():
    assert len({p.start for p in placements((9, 9, 9), plan(foreground_fraction=1.0))}) > 20


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 6), (1, 1, 1), (3, 60, 7)])
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_a_volume_smaller_than_the_patch_lies_wholly_in_it_and_moves_about(shape, shift):
    volume = np.ones(shape, np.uint8)
    found = set()
    for placed in placements(shape, plan(shift_voxels=shift), count=100):
        patch = cut(volume, placed, (4, 6, 8))
        assert int(patch.sum()) == np.prod(np.minimum(shape, (4, 6, 8))), placed
        found.add(placed.start[0])
    if shift == 0:
        assert len(found) == 1
        assert abs(found.pop() + (4 - shape[0]) / 2) <= 0.5, "not in the middle"
    else:
        assert len(found) > 1


def test_only_the_named_axes_are_mirrored_and_half_the_time():
    flips = np.array([p.flip for p in placements((9, 9, 9), plan(flip_axes=(0, 2)))])
    assert not flips[:, 1].any()
    for axis in (0, 2):
        assert 110 < flips[:, axis].sum() < 190


# --- cutting


def test_a_cut_inside_is_a_slice():
    array = np.arange(2 * 5 * 6 * 7).reshape(2, 5, 6, 7)
    patch = cut(array, Placement((1, 2, 3), (False, False, False)), (2, 3, 4))
    np.testing.assert_array_equal(patch, array[:, 1:3, 2:5, 3:7])


def test_a_cut_beyond_the_edge_has_zeros_there():
    array = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 4)
    patch = cut(array, Placement((0, 0, -2), (False, False, False)), (1, 1, 8))
    np.testing.assert_array_equal(patch[0, 0], [0, 0, 1, 2, 3, 4, 0, 0])
    assert patch.dtype == np.float32


@pytest.mark.parametrize("axis", range(3))
def test_a_mirrored_cut(axis):
    array = np.arange(27).reshape(3, 3, 3)
    flip = tuple(a == axis for a in range(3))
    patch = cut(array, Placement((0, 0, 0), flip), (3, 3, 3))
    np.testing.assert_array_equal(patch, np.flip(array, axis))
    both = np.stack([array, array])
    np.testing.assert_array_equal(cut(both, Placement((0, 0, 0), flip), (3, 3, 3))[1], patch)


def test_cutting_does_not_touch_the_volume():
    array = np.ones((3, 3, 3))
    cut(array, Placement((0, 0, 0), (False, False, False)), (3, 3, 3))[:] = 5
    assert (array == 1).all()


# --- classes and patients


def test_label_values_become_classes():
    table = class_table([2, 5, 9])
    np.testing.assert_array_equal(table, [0, 0, 1, 0, 0, 2, 0, 0, 0, 3])
    assert table.dtype == np.int64


# --- gradients on grids smaller than the kernel


def weight_gradients(module: nn.Module, images: torch.Tensor, bfloat16: bool) -> list[torch.Tensor]:
    module.zero_grad()
    dirt = torch.full((1 << 20,), 1e33)  # what a kernel that reads memory it has not written finds there
    del dirt
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        result = module(images)
    pull = torch.randn(result.shape, generator=torch.Generator().manual_seed(7))
    (result.float() * pull).sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.ndim == 5]


def without_kinks(module: nn.Module) -> None:
    """Slopes of 1: rounding then moves no value to the other side of a kink, and gradients differ by little."""
    for part in module.modules():
        if isinstance(part, nn.PReLU):
            nn.init.ones_(part.weight)


@pytest.mark.parametrize("shape", [(3, 4, 3), (2, 8, 8), (8, 8, 2), (4, 4, 4), (1, 1, 1), (1, 6, 6), (5, 5, 5)])
@pytest.mark.parametrize(("kernel_size", "width"), [(5, 16), (5, 32), (3, 32)])
def test_gradients_in_bfloat16_on_a_grid_smaller_than_the_kernel(shape, kernel_size, width):
    """oneDNN's bfloat16 weight gradient of such a convolution is wrong, or whatever lay in memory before."""
    stage = Stage(NetworkPlan(kernel_size=kernel_size), width, width, 2)
    without_kinks(stage)
    for attempt in range(3):
        generator = torch.Generator().manual_seed(attempt)
        for convolution in stage.convolutions:
            nn.init.normal_(convolution.weight, std=0.05, generator=generator)
        images = torch.randn(2, width, *shape, generator=generator)
        exact = weight_gradients(stage, images, bfloat16=False)
        rounded = weight_gradients(stage, images, bfloat16=True)
        for a, b in zip(exact, rounded, strict=True):
            assert float((a - b).norm() / a.norm()) < 0.02


def test_gradients_in_bfloat16_of_a_whole_network_whose_bottom_has_two_by_three_voxels():
    network = build_vnet(NetworkPlan(width=8, convolutions=(1, 1, 2)), 1, 2)
    without_kinks(network)
    for attempt in range(3):
        images = torch.randn(2, 1, 8, 12, 12, generator=torch.Generator().manual_seed(attempt))
        exact = weight_gradients(network, images, bfloat16=False)
        rounded = weight_gradients(network, images, bfloat16=True)
        for a, b in zip(exact, rounded, strict=True):
            assert float((a - b).norm() / a.norm()) < 0.02
