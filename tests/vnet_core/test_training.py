"""Patches, splits, schedules, steps and averages by hand; and gradients where the grid is smaller than the kernel."""

import numpy as np
import pytest
import torch
from torch import nn

from vnet_core.errors import TrainingError
from vnet_core.losses import loss_function
from vnet_core.networks.vnet import Stage, build_vnet
from vnet_core.plan import NetworkPlan, TrainingPlan
from vnet_core.training import (
    Placement,
    StepSettings,
    WeightAverage,
    build_optimiser,
    class_table,
    cut,
    learning_rate_factor,
    place,
    sample_generator,
    split_patients,
    train_step,
)

PLAIN = TrainingPlan(patch_size=(4, 6, 8), foreground_fraction=0.0, flip_axes=(), shift_voxels=0)


def plan(**change) -> TrainingPlan:
    return TrainingPlan.model_validate({**PLAIN.model_dump(), **change})


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


def test_patients_stay_together():
    cases = [(f"{patient}{visit}", patient) for patient in "abcdefgh" for visit in range(3)]
    training, validation = split_patients(cases, 0.25, seed=0)
    assert len(validation) == 6
    assert sorted([*training, *validation]) == sorted(case for case, _ in cases)
    assert {c[0] for c in training}.isdisjoint(c[0] for c in validation)


def test_the_split_is_decided_by_the_seed_not_by_the_order():
    cases = [(f"case{i}", None) for i in range(20)]
    assert split_patients(cases, 0.2, seed=3) == split_patients(cases[::-1], 0.2, seed=3)
    assert len({split_patients(cases, 0.2, seed)[1] for seed in range(10)}) > 5


@pytest.mark.parametrize(
    ("patients", "fraction", "held"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.1, 1), (10, 0.25, 2), (10, 0.0, 0), (0, 0.5, 0)],
)
def test_how_many_are_held_back(patients, fraction, held):
    cases = [(f"case{i}", None) for i in range(patients)]
    training, validation = split_patients(cases, fraction, seed=0)
    assert (len(training), len(validation)) == (patients - held, held)


def test_a_case_without_patient_is_nobodys_relative():
    """Not even of a patient that is called as the case is."""
    cases = [("a", None), ("b", "a"), ("c", ""), ("d", None)]
    parts = {split_patients(cases, 0.25, seed)[1] for seed in range(40)}
    assert parts == {("a",), ("b",), ("c",), ("d",)}


# --- learning rate


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {0.1: 1.0, 0.325: (1 + np.sqrt(0.5)) / 2, 0.55: 0.5, 1.0: 0.0, 1.5: 0.0}),
        ("polynomial", {0.1: 1.0, 0.55: 0.5**0.9, 1.0: 0.0, 1.5: 0.0}),
        ("constant", {0.1: 1.0, 0.55: 1.0, 1.0: 1.0}),
    ],
)
def test_points_of_the_schedule(schedule, points):
    of = plan(schedule=schedule, warmup_fraction=0.1)
    for progress, factor in {0.0: 1e-3, 0.00001: 1e-3, 0.05: 0.5, 0.09: 0.9, **points}.items():
        assert learning_rate_factor(of, progress) == pytest.approx(factor, abs=1e-12), progress


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert learning_rate_factor(plan(warmup_fraction=0.0), 0.0) == 1.0


def test_weight_decay_spares_what_has_one_axis():
    network = build_vnet(NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1), normalisation="instance"), 1, 2)
    optimiser = build_optimiser(network, plan(weight_decay=0.01, learning_rate=0.5))
    decayed, spared = optimiser.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in decayed["params"]} == {5}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))
    assert {group["lr"] for group in optimiser.param_groups} == {0.5}


# --- one step


def weight_of_one() -> nn.Conv3d:
    network = nn.Conv3d(1, 1, 1, bias=False)
    nn.init.ones_(network.weight)
    return network


def settings(loss=lambda logits, classes: logits.mean(), clip: float = 1e9) -> StepSettings:
    return StepSettings(loss, torch.float32, clip)


ONES = torch.ones(1, 1, 1, 1, 1)
NO_CLASSES = torch.zeros(1, 1, 1, 1, dtype=torch.int64)


def test_a_step_of_sgd_by_hand():
    # the gradient of the mean of w * 3 is 3; Nesterov's first step is 1 + 0.99 times it
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser="sgd", learning_rate=0.01, weight_decay=0))
    assert train_step(network, optimiser, 3 * ONES, NO_CLASSES, settings()) == 3.0
    assert network.weight.item() == pytest.approx(1 - 0.01 * 3 * 1.99)


def test_a_step_of_adamw_by_hand():
    # the first step is the learning rate itself, whatever the gradient; decay takes 0.1 of 0.5 of the weight before
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(learning_rate=0.1, weight_decay=0.5))
    train_step(network, optimiser, 3 * ONES, NO_CLASSES, settings())
    assert network.weight.item() == pytest.approx(1 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_the_gradient_is_clipped_to_its_norm():
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser="sgd", learning_rate=0.01, weight_decay=0))
    train_step(network, optimiser, 3 * ONES, NO_CLASSES, settings(clip=0.5))
    assert network.weight.item() == pytest.approx(1 - 0.01 * 0.5 * 1.99, rel=1e-5)


def test_gradients_of_the_last_step_do_not_stay():
    network = weight_of_one()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for expected in (0.7, 0.4, 0.1):
        train_step(network, optimiser, 3 * ONES, NO_CLASSES, settings())
        assert network.weight.item() == pytest.approx(expected, rel=1e-5)


def hopeless_root(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is not: the square root at zero."""
    return (logits - logits.detach()).square().sum().sqrt() + 1.0


@pytest.mark.parametrize(
    ("images", "loss"),
    [
        (float("nan") * ONES, lambda logits, classes: logits.mean()),
        (float("inf") * ONES, lambda logits, classes: logits.mean()),
        (ONES, lambda logits, classes: logits.mean() * float("nan")),
        (ONES, hopeless_root),
        (1e30 * ONES, lambda logits, classes: (logits * 1e20).mean()),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_leaves_no_trace(images, loss, name):
    network, twin = weight_of_one(), weight_of_one()
    runs = [(n, build_optimiser(n, plan(optimiser=name, learning_rate=0.1))) for n in (network, twin)]
    for module, optimiser in runs:
        train_step(module, optimiser, 2 * ONES, NO_CLASSES, settings())
    with pytest.raises(TrainingError) as caught:
        train_step(*runs[0], images, NO_CLASSES, settings(loss))
    assert caught.value.code == "train.diverged"
    assert "nan" in str(caught.value) or "inf" in str(caught.value)
    assert torch.equal(network.weight, twin.weight)
    # the moments and counts of the optimiser too: the next step is as if nothing had been
    for module, optimiser in runs:
        train_step(module, optimiser, 5 * ONES, NO_CLASSES, settings())
    assert torch.equal(network.weight, twin.weight)
    assert torch.isfinite(network.weight).all()


def test_in_bfloat16_the_weights_stay_float32_and_the_loss_is_nearly_the_same():
    results = {}
    for precision in (torch.float32, torch.bfloat16):
        network = build_vnet(NetworkPlan(kernel_size=3, width=4, convolutions=(1, 1)), 1, 2)
        optimiser = build_optimiser(network, PLAIN)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 1, 8, 8, 8, generator=generator)
        classes = (images[:, 0] > 0.5).long()
        step = StepSettings(loss_function("dice+cross-entropy"), precision, 1.0)
        results[precision] = [train_step(network, optimiser, images, classes, step) for _ in range(25)]
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    np.testing.assert_allclose(results[torch.bfloat16][0], results[torch.float32][0], rtol=0.02)
    for losses in results.values():
        assert losses[-1] < 0.6 * losses[0], losses


# --- running average


def test_the_average_by_hand():
    network = weight_of_one()
    average = WeightAverage(network, decay=0.99)
    # decays of 1/10, 2/11 and 3/12: 0.1 * 1 + 0.9 * 2, and so on
    for step, (weight, expected) in enumerate([(2.0, 1.9), (13.0, 1.9 * 2 / 11 + 13 * 9 / 11), (4.0, None)], start=1):
        before = average.state["weight"].item()
        nn.init.constant_(network.weight, weight)
        average.update(network, step)
        expected = before * 3 / 12 + weight * 9 / 12 if expected is None else expected
        assert average.state["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_late_steps_have_the_plans_decay():
    network = weight_of_one()
    average = WeightAverage(network, decay=0.9)
    nn.init.constant_(network.weight, 11.0)
    average.update(network, 10_000)
    assert average.state["weight"].item() == pytest.approx(0.9 * 1 + 0.1 * 11, rel=1e-6)


def test_without_decay_the_average_is_the_network():
    network = weight_of_one()
    average = WeightAverage(network, decay=0.0)
    nn.init.constant_(network.weight, 1 / 3)
    average.update(network, 1)
    assert torch.equal(average.state["weight"], network.weight)


def test_the_average_is_a_copy_and_takes_counts_as_they_are():
    network = nn.BatchNorm3d(1)
    average = WeightAverage(network, decay=0.99)
    network(torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)) + 5)
    assert average.state["running_mean"].item() == 0.0
    average.update(network, 1)
    assert average.state["num_batches_tracked"].item() == 1
    assert average.state["running_mean"].item() == pytest.approx(0.9 * network.running_mean.item())
    assert not any(value.requires_grad for value in average.state.values())
    twin = nn.BatchNorm3d(1)
    twin.load_state_dict(average.state)


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
