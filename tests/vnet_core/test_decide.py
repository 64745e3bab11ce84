"""From outputs to classes, by pencil."""

from __future__ import annotations

import numpy as np
import torch

from vnet_core.decide import decision
from vnet_core.plan import Plan
from vnet_core.structures import structures

GLIOMA = Plan.from_mapping(
    {
        "labels": [{"value": v, "name": n} for v, n in ((1, "necrosis"), (2, "oedema"), (4, "enhancing"))],
        "head": "sigmoid",
        "regions": [
            {"name": "whole", "values": [1, 2, 4], "paints": 2},
            {"name": "core", "values": [1, 4], "paints": 1},
            {"name": "enhancing", "values": [4], "paints": 4},
        ],
    }
)
TWO = Plan.from_mapping({"labels": [{"value": 3, "name": "a"}, {"value": 7, "name": "b"}]})


def row(*outputs: float) -> torch.Tensor:
    """Logits (K, 1, 1, 1) of one voxel."""
    return torch.tensor(outputs).reshape(-1, 1, 1, 1)


def test_softmax_takes_the_largest_and_of_equal_ones_the_first():
    decide = decision(TWO)
    assert decide(row(0.0, 1.0, 2.0)).item() == 2
    assert decide(row(1.0, 1.0, 1.0)).item() == 0
    assert decide(row(-3.0, -1.0, -2.0)).item() == 1


def test_regions_paint_over_each_other():
    decide = decision(GLIOMA)
    # class indices: necrosis 1, oedema 2, enhancing 3
    assert decide(row(-1, -1, -1)).item() == 0
    assert decide(row(0, 0, 0)).item() == 0, "a probability of one half is not above it"
    assert decide(row(5, -1, -1)).item() == 2
    assert decide(row(5, 2, -1)).item() == 1
    assert decide(row(5, 2, 0.1)).item() == 3
    assert decide(row(-5, -5, 0.1)).item() == 3, "an inner region counts without the outer one"


def test_a_sigmoid_head_without_regions_tells_every_label():
    plan = TWO.model_copy(update={"head": "sigmoid"})
    assert plan.outputs == 2
    assert decision(plan)(row(1.0, -1.0)).item() == 1
    assert decision(plan)(row(1.0, 1.0)).item() == 2


def test_a_region_is_the_union_of_its_labels():
    classes = np.array([0, 1, 2, 3]).reshape(1, 1, 4)
    found = {s.name: s.mask(classes).ravel().tolist() for s in structures(GLIOMA)}
    assert found == {
        "whole": [False, True, True, True],
        "core": [False, True, False, True],
        "enhancing": [False, False, False, True],
    }
    assert [(s.name, s.classes) for s in structures(TWO)] == [("a", (1,)), ("b", (2,))]
