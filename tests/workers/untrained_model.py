"""A model that nobody trained: weights from a seed. What it finds is noise, which a wrong bit changes at once."""

from __future__ import annotations

import safetensors.torch
import torch

from tests.workers.tiny_cohort import MODEL
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from workers.registry.models import Model, Target, publish
from workers.storage.store import Root


def publish_untrained(root: Root, plan: Plan, seed: int = 7) -> Model:
    """The first version of the model ``known``."""
    torch.manual_seed(seed)
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    weights = safetensors.torch.save(network.state_dict())
    return publish(root, Target(MODEL, "v1", plan), [weights], {"metrics": {"validation_dice": {}}}, {})
