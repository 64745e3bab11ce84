"""Means over networks and mirror images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vnet_core.ensemble import mirrors, predict_mean
from vnet_core.inference import predict_logits, prepare
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.plan import Plan

PLAN = Plan.from_mapping(
    {
        "labels": [{"value": 1, "name": "a"}],
        "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1]},
        "training": {"patch_size": [8, 8, 8]},
        "inference": {"precision": "float32"},
    }
)


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
    assert torch.equal(predict_mean([alone], IMAGE, PLAN), predict_logits(alone, IMAGE, PLAN))


def test_the_mean_of_two_networks():
    first, second = network(0), network(1)
    expected = (predict_logits(first, IMAGE, PLAN) + predict_logits(second, IMAGE, PLAN)) / 2
    torch.testing.assert_close(predict_mean([first, second], IMAGE, PLAN), expected)
    torch.testing.assert_close(predict_mean([first, first], IMAGE, PLAN), predict_logits(first, IMAGE, PLAN))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_mirroring_the_image_mirrors_the_result(axes):
    alone, plan = network(0), mirrored(*axes)
    dimensions = tuple(axis + 1 for axis in axes)
    seen = predict_mean([alone], IMAGE.flip(dimensions), plan).flip(dimensions)
    torch.testing.assert_close(seen, predict_mean([alone], IMAGE, plan), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(predict_logits(alone, IMAGE.flip(dimensions), PLAN).flip(dimensions), seen, atol=1e-3)
