"""Figures of scans that lie in the receipts of their volumes, and what they say about a model's training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vnet_core.drift import Profile, drift, model_profile
from vnet_core.plan import Plan
from workers.storage.store import Root


def training_profile(root: Root, volumes: Iterable[str], plan: Plan) -> Profile | None:
    """The ranges over the volumes that a model was trained on, by their keys; None where too few have figures.

    Volumes of versions before 0.4 have none.
    """
    receipts = (root.receipt(key) for key in volumes)
    return model_profile([receipt["profile"] for receipt in receipts if receipt and "profile" in receipt], plan)


def drift_of(root: Root, volume: str, model: Mapping[str, Any]) -> tuple[str, ...]:
    """What is unlike the training scans of a model in a finished volume, in words; ``model``: the model's facts.

    Nothing where the volume or the model has no figures.
    """
    receipt = root.receipt(volume)
    ranges = model.get("profile")
    if receipt is None or ranges is None or "profile" not in receipt:
        return ()
    return tuple(drift(receipt["profile"], ranges))
