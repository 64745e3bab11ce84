"""Checkpoints of a training: whole or not at all, the last ones are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from vnet_core.errors import StorageError
from workers.storage.store import Root

CHECKPOINTS_KEPT = 2

Parts = dict[str, dict[str, torch.Tensor]]
"""Tensors by name, in named parts."""


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors, wherever they are, as the bytes of a safetensors file."""
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def save_checkpoint(
    root: Root, prefix: str, parts: Parts, optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write a checkpoint of a run; ``facts`` is plain data and holds the number of its ``step``."""
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    target = f"{prefix}/checkpoints/{facts['step']:09d}"
    root.put(f"{target}/state.safetensors", as_safetensors(tensors))
    root.put_json(f"{target}/state.json", facts)
    root.seal(target, {"stage": "train", "step": facts["step"]})
    for old in root.names(f"{prefix}/checkpoints")[:-CHECKPOINTS_KEPT]:
        root.delete(f"{prefix}/checkpoints/{old}")


def load_checkpoint(
    root: Root, prefix: str, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[Parts, dict[str, Any]] | None:
    """Parts and facts of a run's newest whole checkpoint; the optimiser gets its own part. None without one."""
    for name in reversed(root.names(f"{prefix}/checkpoints")):
        source = f"{prefix}/checkpoints/{name}"
        if root.receipt(source) is None or root.damaged(source):
            continue
        parts: Parts = {"network": {}, "average": {}, "best": {}, "optimiser": {}}
        for key, value in _tensors(root, source).items():
            part, _, rest = key.partition(".")
            parts[part][rest] = value.to(device)
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in parts.pop("optimiser").items():
            index, _, slot = key.partition(".")
            slots.setdefault(int(index), {})[slot] = _laid_out_like(weights[int(index)], value)
        optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
        return parts, root.get_json(f"{source}/state.json")
    return None


def _laid_out_like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A moment of a weight as the optimiser's kernel walks through both: in the order of the weight in memory."""
    return torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value


def _tensors(root: Root, source: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(root.get(f"{source}/state.safetensors"))
    except safetensors.SafetensorError as error:
        raise StorageError(
            "store.corrupt", f"{source} is no checkpoint ({error}); delete it to go on from an older one"
        ) from None
