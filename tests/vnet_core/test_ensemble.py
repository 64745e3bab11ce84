"""Means over networks and mirror images, and how far these lie apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vnet_core.ensemble import decide_on_grid, held_bytes, mirrors, number_of_passes, predict
from vnet_core.inference import predict_logits, prepare
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.plan import Plan
from vnet_core.spread import PartSpread, Spread, spread_of

BASE = {
    "labels": [{"value": 1, "name": "a"}],
    "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1]},
    "training": {"patch_size": [8, 8, 8]},
    "inference": {"precision": "float32"},
}
PLAN = Plan.from_mapping(BASE)


def network(seed: int) -> nn.Module:
    built = build_vnet(PLAN.network, 1, 2)
    initialise(built, seed)
    return prepare(built, torch.device("cpu"), torch.float32)


def mirrored(*axes: int) -> Plan:
    return PLAN.model_copy(update={"inference": PLAN.inference.model_copy(update={"mirror_axes": axes})})


IMAGE = torch.randn(1, 9, 10, 11, generator=torch.Generator().manual_seed(0))


def test_every_choice_of_axes_once():
    assert mirrors(()) == [()]
    assert mirrors((2,)) == [(), (3,)]
    assert mirrors((2, 0, 0)) == [(), (1,), (3,), (1, 3)]
    assert len(mirrors((0, 1, 2))) == 8


def test_one_network_without_mirrors_is_itself():
    alone = network(0)
    said = predict([alone], IMAGE, PLAN)
    assert torch.equal(said.logits, predict_logits(alone, IMAGE, PLAN))
    assert said.passes == ()


def test_the_mean_of_two_networks():
    first, second = network(0), network(1)
    one, other = predict_logits(first, IMAGE, PLAN), predict_logits(second, IMAGE, PLAN)
    said = predict([first, second], IMAGE, PLAN)
    assert torch.equal(said.logits, (one + other) / 2)
    for found, logits in zip(said.passes, (one, other), strict=True):
        np.testing.assert_array_equal(found, logits.argmax(0).numpy())
        assert found.dtype == np.uint8
    torch.testing.assert_close(predict([first, first], IMAGE, PLAN).logits, one)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_mirroring_the_image_mirrors_the_result(axes):
    alone, plan = network(0), mirrored(*axes)
    dimensions = tuple(axis + 1 for axis in axes)
    seen = predict([alone], IMAGE.flip(dimensions), plan).logits.flip(dimensions)
    torch.testing.assert_close(seen, predict([alone], IMAGE, plan).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(predict_logits(alone, IMAGE.flip(dimensions), PLAN).flip(dimensions), seen, atol=1e-3)


@pytest.mark.parametrize("axes", [(0,), (0, 1, 2)])
def test_the_mean_is_summed_pass_after_pass(axes):
    """To the last bit: a mask must not change because its passes are looked at."""
    networks, plan = [network(0), network(1)], mirrored(*axes)
    total = torch.zeros(())
    for alone in networks:
        for chosen in mirrors(axes):
            total = total + predict_logits(alone, IMAGE.flip(chosen), plan).flip(chosen)
    said = predict(networks, IMAGE, plan)
    assert torch.equal(said.logits, total / len(said.passes))
    assert len(said.passes) == number_of_passes(2, plan) == 2 * 2 ** len(axes)


# --- how far the passes lie apart


class Above(nn.Module):
    """The first label where an image of one channel is above ``limit``, plus ``tilt`` for every step along x."""

    def __init__(self, limit: float, tilt: float = 0.0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.limit, self.tilt = limit, tilt

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        above = image - self.limit - self.tilt * torch.arange(image.shape[-1])
        return torch.cat([torch.zeros_like(above), above], 1)


def counting() -> torch.Tensor:
    """Voxels (1, 8, 8, 8) with the values 0.5, 1.5, ... 511.5."""
    return (torch.arange(512.0) + 0.5).reshape(1, 8, 8, 8)


def spread(networks: list[nn.Module], plan: Plan = PLAN, voxel_ml: float = 1.0) -> Spread | None:
    said = predict(networks, counting(), plan)
    return spread_of(decide_on_grid(said.logits, plan), said.passes, plan, voxel_ml)


def test_two_networks_that_differ_by_known_voxels():
    # above 500: 12 voxels; above 508: 4; the mean of their logits is 0 at 504: 8 voxels
    found = spread([Above(500), Above(508)])
    assert found is not None
    np.testing.assert_array_equal(found.counts, [[[500, 4], [0, 8]], [[504, 0], [4, 4]]])
    # Dice 2 * 8 / (8 + 12) = 0.8 and 2 * 4 / (8 + 4) = 2/3; the published 16 mL stand for 8 voxels
    assert found.of([1], 16.0) == PartSpread(8.0, 24.0, pytest.approx(2 / 3))


def test_a_mirror_image_is_a_pass():
    # along x the limit rises from 503 to 510, seen in the mirror it falls; the mean is at 506.5 everywhere
    found = spread([Above(503, 1)], mirrored(2))
    assert found is not None
    # the last row holds 504.5 to 511.5, above 503 + x all 8, above 510 - x those with x >= 3; and 503.5 ends the row
    # before, above 510 - 7. The mean holds 507.5 to 511.5
    np.testing.assert_array_equal(found.counts, [[[504, 3], [0, 5]], [[506, 1], [0, 5]]])
    assert found.of([1], 5.0) == PartSpread(5.0, 8.0, pytest.approx(2 * 5 / 13))


def test_one_pass_has_no_spread():
    assert spread([Above(500)]) is None


def test_equal_passes_agree_and_leave_no_range():
    found = spread([Above(500)] * 3)
    assert found is not None
    assert found.of([1], 7.5) == PartSpread(7.5, 7.5, 1.0)


def test_where_mean_and_passes_are_empty_they_agree():
    found = spread([Above(600), Above(700)])
    assert found is not None
    assert found.of([1], 0.0) == PartSpread(0.0, 0.0, 1.0)


def test_where_the_mean_is_empty_voxels_count_with_their_own_volume():
    # above 508: 4 voxels; above 600: none; their mean is at 554
    found = spread([Above(508), Above(600)], voxel_ml=0.25)
    assert found is not None
    assert found.of([1], 0.0) == PartSpread(0.0, 1.0, 0.0)
    # something was published all the same, between two voxels of the network's grid: the range holds it
    assert found.of([1], 3.0) == PartSpread(0.0, 3.0, 0.0)


def test_passes_are_cleaned_as_the_mask_is():
    mean, whole = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    mean[1, 1:3, 1:3] = 1
    whole[1, 1:3, 1:3], whole[1, 6, 6] = 1, 1
    raw = spread_of(mean, [mean, whole], PLAN, 1.0)
    cleaning = {"cleaning": [{"label": 1, "keep": "largest"}]}
    cleaned = spread_of(mean, [mean, whole], Plan.from_mapping({**BASE, "inference": cleaning}), 1.0)
    assert raw is not None
    assert cleaned is not None
    assert raw.of([1], 4.0) == PartSpread(4.0, 5.0, pytest.approx(8 / 9))
    assert cleaned.of([1], 4.0) == PartSpread(4.0, 4.0, 1.0)
    assert whole[1, 6, 6] == 1


def test_regions_are_compared_as_a_whole():
    """Two labels that swap a voxel differ, and what they make up together does not."""
    plan = Plan.from_mapping({"labels": [{"value": 2, "name": "a"}, {"value": 300, "name": "b"}]})
    mean = np.array([1, 1, 1, 2, 2, 0], np.uint8).reshape(1, 1, 6)
    other = np.array([1, 1, 2, 2, 2, 0], np.uint8).reshape(1, 1, 6)
    found = spread_of(mean, [mean, other], plan, 1.0)
    assert found is not None
    assert found.of([2], 3.0) == PartSpread(2.0, 3.0, pytest.approx(4 / 5))
    assert found.of([300], 2.0) == PartSpread(2.0, 3.0, pytest.approx(4 / 5))
    assert found.of([300, 2], 5.0) == PartSpread(5.0, 5.0, 1.0)


def test_a_sigmoid_head_decides_region_by_region():
    plan = Plan.from_mapping({**BASE, "head": "sigmoid"})

    class Yes(Above):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image - self.limit

    said = predict([Yes(500), Yes(508)], counting(), plan)
    assert [int(alone.sum()) for alone in said.passes] == [12, 4]
    found = spread_of(decide_on_grid(said.logits, plan), said.passes, plan, 1.0)
    assert found is not None
    assert found.of([1], 8.0) == PartSpread(4.0, 12.0, pytest.approx(2 / 3))


def test_what_is_held_beside_a_pass():
    # two outputs of 4 bytes and one byte for each of 8 passes
    assert held_bytes(PLAN, (10, 10, 10), 8) == 1000 * (2 * 4 + 8)
    assert held_bytes(PLAN, (10, 10, 10), 1) == 0
    many = PLAN.model_copy(update={"labels": tuple(PLAN.labels[0].model_copy() for _ in range(256))})
    assert held_bytes(many, (1, 1, 1), 2) == 257 * 4 + 2 * 2
