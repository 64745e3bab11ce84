"""The steps of a training, checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from vnet_core.fitting import StepSettings, WeightAverage, build_optimiser, learning_rate_factor, placed, train_step
from vnet_core.losses import build_loss
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Label, Plan
from vnet_core.sections import NetworkPlan, TrainingPlan


def plan(**change) -> TrainingPlan:
    return TrainingPlan(patch_size=(8, 8, 8), **change)


# --- learning rate


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {0.1: 1.0, 0.325: (1 + np.sqrt(0.5)) / 2, 0.55: 0.5, 1.0: 0.0, 1.5: 0.0}),
        ("polynomial", {0.1: 1.0, 0.55: 0.5**0.9, 1.0: 0.0, 1.5: 0.0}),
        ("constant", {0.1: 1.0, 0.55: 1.0, 1.0: 1.0}),
        ("step", {0.1: 1.0, 0.83: 1.0, 0.84: 0.1, 1.0: 0.1}),
    ],
)
def test_points_of_the_schedule(schedule, points):
    of = plan(schedule=schedule, warmup_fraction=0.1)
    for progress, factor in {0.0: 1e-3, 0.00001: 1e-3, 0.05: 0.5, 0.09: 0.9, **points}.items():
        assert learning_rate_factor(of, progress) == pytest.approx(factor, abs=1e-12), progress


def test_the_published_schedule_divides_by_ten_after_25000_of_30000_steps():
    of = plan(schedule="step", warmup_fraction=0.0, learning_rate=1e-4)
    assert [learning_rate_factor(of, step / 30_000) for step in (0, 24_999, 25_000, 29_999)] == [1.0, 1.0, 0.1, 0.1]
    twice = plan(schedule="step", warmup_fraction=0.0, step_fractions=(0.5, 0.75))
    assert [learning_rate_factor(twice, p) for p in (0.4, 0.6, 0.8)] == pytest.approx([1.0, 0.1, 0.01])


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


def settings(loss=lambda logits, classes, progress: logits.mean(), clip: float = 1e9) -> StepSettings:
    return StepSettings(loss, torch.float32, clip)


ONES = torch.ones(1, 1, 1, 1, 1)
NO_CLASSES = torch.zeros(1, 1, 1, 1, dtype=torch.int64)


def test_a_step_of_sgd_by_hand():
    # the gradient of the mean of w * 3 is 3; Nesterov's first step is 1 + 0.99 times it
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser="sgd", learning_rate=0.01, weight_decay=0))
    assert train_step(network, optimiser, [(3 * ONES, NO_CLASSES)], 0.5, settings()) == 3.0
    assert network.weight.item() == pytest.approx(1 - 0.01 * 3 * 1.99)


def test_a_step_of_adamw_by_hand():
    # the first step is the learning rate itself, whatever the gradient; decay takes 0.1 of 0.5 of the weight before
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(learning_rate=0.1, weight_decay=0.5))
    train_step(network, optimiser, [(3 * ONES, NO_CLASSES)], 0.5, settings())
    assert network.weight.item() == pytest.approx(1 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        # the first step of both is the learning rate; that of NAdam looks ahead: (0.9 * m2 + (1 - m1)) with the
        # momentum schedule of Dozat 2016, 0.96^0.004 t
        ("adam", 0.1),
        ("rmsprop", 0.1 / math.sqrt(1 - 0.99)),
        ("nadam", None),
    ],
)
def test_the_first_step_of_the_others_by_hand(name, first):
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser=name, learning_rate=0.1, weight_decay=0))
    train_step(network, optimiser, [(3 * ONES, NO_CLASSES)], 0.5, settings())
    if first is None:
        mu = [0.9 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in (1, 2)]
        first = 0.1 * ((1 - mu[0]) / (1 - mu[0]) + mu[1] * 0.1 / (1 - mu[0] * mu[1]))
    assert network.weight.item() == pytest.approx(1 - first, abs=1e-6)


def test_batches_are_averaged_into_one_step():
    # gradients 3 and 5 make 4, losses too
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser="sgd", learning_rate=0.01, weight_decay=0, momentum=0.0))
    batches = [(3 * ONES, NO_CLASSES), (5 * ONES, NO_CLASSES)]
    assert train_step(network, optimiser, batches, 0.5, settings()) == 4.0
    assert network.weight.item() == pytest.approx(1 - 0.01 * 4)


def test_the_gradient_is_clipped_to_its_norm():
    network = weight_of_one()
    optimiser = build_optimiser(network, plan(optimiser="sgd", learning_rate=0.01, weight_decay=0))
    train_step(network, optimiser, [(3 * ONES, NO_CLASSES)], 0.5, settings(clip=0.5))
    assert network.weight.item() == pytest.approx(1 - 0.01 * 0.5 * 1.99, rel=1e-5)


def test_gradients_of_the_last_step_do_not_stay():
    network = weight_of_one()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for expected in (0.7, 0.4, 0.1):
        train_step(network, optimiser, [(3 * ONES, NO_CLASSES)], 0.5, settings())
        assert network.weight.item() == pytest.approx(expected, rel=1e-5)


def hopeless_root(logits: torch.Tensor, classes: torch.Tensor, progress: float) -> torch.Tensor:
    """A finite loss whose gradient is not: the square root at zero."""
    return (logits - logits.detach()).square().sum().sqrt() + 1.0


@pytest.mark.parametrize(
    ("images", "loss"),
    [
        (float("nan") * ONES, lambda logits, classes, progress: logits.mean()),
        (float("inf") * ONES, lambda logits, classes, progress: logits.mean()),
        (ONES, lambda logits, classes, progress: logits.mean() * float("nan")),
        (ONES, hopeless_root),
        (1e30 * ONES, lambda logits, classes, progress: (logits * 1e20).mean()),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "adam", "nadam", "rmsprop", "sgd"])
def test_a_step_that_is_not_finite_leaves_no_trace(images, loss, name):
    network, twin = weight_of_one(), weight_of_one()
    runs = [(n, build_optimiser(n, plan(optimiser=name, learning_rate=0.1))) for n in (network, twin)]
    for module, optimiser in runs:
        train_step(module, optimiser, [(2 * ONES, NO_CLASSES)], 0.5, settings())
    assert math.isnan(train_step(*runs[0], [(images, NO_CLASSES)], 0.5, settings(loss)))
    assert torch.equal(network.weight, twin.weight)
    # the moments and counts of the optimiser too: the next step is as if nothing had been
    for module, optimiser in runs:
        train_step(module, optimiser, [(5 * ONES, NO_CLASSES)], 0.5, settings())
    assert torch.equal(network.weight, twin.weight)
    assert torch.isfinite(network.weight).all()


def test_in_bfloat16_the_weights_stay_float32_and_the_loss_is_nearly_the_same():
    results = {}
    for precision in (torch.float32, torch.bfloat16):
        network = build_vnet(NetworkPlan(kernel_size=3, width=4, convolutions=(1, 1)), 1, 2)
        optimiser = build_optimiser(network, plan())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 1, 8, 8, 8, generator=generator)
        classes = (images[:, 0] > 0.5).long()
        loss = build_loss(Plan(labels=(Label(value=1, name="bright"),)), [3, 1])
        step = StepSettings(loss, precision, 1.0)
        results[precision] = [train_step(network, optimiser, [(images, classes)], 0.5, step) for _ in range(25)]
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    np.testing.assert_allclose(results[torch.bfloat16][0], results[torch.float32][0], rtol=0.02)
    for losses in results.values():
        assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("normalisation", ["none", "batch", "instance", "group"])
def test_a_network_laid_out_for_steps_takes_the_same_ones(normalisation):
    sizes = {"kernel_size": 3, "width": 4, "convolutions": (2, 2, 1), "normalisation": normalisation}
    images = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = (images[:, 0] > 0.5).long()
    step = StepSettings(build_loss(Plan(labels=(Label(value=1, name="bright"),)), [3, 1]), torch.float32, 1.0)

    def fitted(network: nn.Module) -> tuple[list[float], nn.Module]:
        optimiser = build_optimiser(network, plan(learning_rate=1e-3))
        return [train_step(network, optimiser, [(images, classes)], 0.5, step) for _ in range(3)], network

    plain, _ = fitted(build_vnet(NetworkPlan(**sizes), 2, 2))
    found, network = fitted(placed(build_vnet(NetworkPlan(**sizes), 2, 2), torch.device("cpu"), torch.float32))
    np.testing.assert_allclose(found, plain, rtol=1e-4)
    weight = network.encoder[0].convolutions[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()


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


def test_statistics_that_are_not_finite_are_put_back():
    network = nn.BatchNorm3d(1)
    average = WeightAverage(network, decay=0.5)
    network(torch.full((1, 1, 2, 2, 2), math.inf))
    assert not torch.isfinite(network.running_mean).all()
    average.restore_statistics(network)
    assert (network.running_mean.item(), network.running_var.item()) == (0.0, 1.0)
