"""Judging weights by whole volumes: what they find in each validation case, and the Dice of every structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vnet_core.decide import decision
from vnet_core.inference import predict_logits, prepare
from vnet_core.metrics import dice
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from vnet_core.structures import Structure
from workers.training.patches import TrainingVolume


class Judge:
    """Weights, ready to look at volumes."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], plan: Plan, device: torch.device, precision: torch.dtype
    ) -> None:
        network = build_vnet(plan.network, len(plan.channels), plan.outputs)
        network.load_state_dict(dict(weights))
        self._plan, self._device, self._decide = plan, device, decision(plan)
        self._network = prepare(network, device, precision)

    def classes(self, volume: TrainingVolume) -> np.ndarray:
        """Class indices (Z, Y, X) that the weights find in a whole volume."""
        logits = predict_logits(self._network, torch.from_numpy(volume.image).to(self._device), self._plan)
        return self._decide(logits).cpu().numpy().astype(volume.classes.dtype)


def dice_row(found: np.ndarray, known: np.ndarray, structures: Sequence[Structure]) -> list[float | None]:
    """Dice of each structure in class indices (Z, Y, X); None where it is absent from both."""
    scores = (dice(structure.mask(found), structure.mask(known)) for structure in structures)
    return [None if math.isnan(score) else score for score in scores]
