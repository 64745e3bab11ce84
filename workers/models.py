"""Model bundles in the storage root: weights in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from vnet_core.errors import ConfigError, StorageError
from vnet_core.networks.vnet import VNet, build_vnet
from vnet_core.plan import Plan, digest_of
from workers.cohort import check_name
from workers.store import Root

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Model:
    """A finished model version."""

    name: str
    version: str
    plan: Plan
    digest: str
    """SHA-256 over the weights' bytes and the plan: the same digest gives the same masks."""
    facts: dict[str, Any]
    """``model.json``: metrics and provenance."""

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def prefix(self) -> str:
        """Where its bundle lies."""
        return f"models/{self.name}/{self.version}"


def publish(
    root: Root, name: str, version: str, plan: Plan, state: dict[str, torch.Tensor], extra: dict[str, Any]
) -> Model:
    """Write a bundle and its receipt. ``extra`` holds ``facts`` for model.json and ``files`` (name to bytes)."""
    prefix = f"models/{name}/{version}"
    root.put(f"{prefix}/{WEIGHTS}", safetensors.torch.save({k: v.contiguous().cpu() for k, v in state.items()}))
    facts = {
        "name": name,
        "version": version,
        "channels": list(plan.channels),
        "labels": [label.model_dump() for label in plan.labels],
        "plan": plan.model_dump(mode="json"),
        "plan_digest": plan.digest,
        **extra["facts"],
    }
    root.put_json(f"{prefix}/model.json", facts)
    for file, content in extra["files"].items():
        root.put(f"{prefix}/{file}", content)
    root.seal(prefix, {"stage": "train", "plan_digest": plan.digest})
    return load_model(root, f"{name}@{version}")


def load_model(root: Root, reference: str) -> Model:
    """The model ``name``, ``name@version`` or ``name@latest``.

    Raises ConfigError ``model.unknown`` or ``model.version`` naming what exists, StorageError ``model.damaged`` when a
    file is not what its receipt says.
    """
    name, _, wanted = reference.partition("@")
    check_name(name, "model")
    finished = versions(root, name)
    if not finished:
        known = ", ".join(n for n in root.names("models") if versions(root, n)) or "none"
        raise ConfigError(
            "model.unknown", f"there is no model {name!r} in {root.folder} (known: {known}); train it with vnet train"
        )
    version = wanted if wanted and wanted != "latest" else finished[-1]
    if version not in finished:
        raise ConfigError("model.version", f"model {name} has no version {version!r}; it has {', '.join(finished)}")
    prefix = f"models/{name}/{version}"
    damaged = root.damaged(prefix)
    if damaged:
        raise StorageError("model.damaged", f"{', '.join(damaged)} of model {name}@{version} changed since training")
    facts = root.get_json(f"{prefix}/model.json")
    receipt = root.receipt(prefix)
    assert receipt is not None
    plan = Plan.from_mapping(facts["plan"])
    return Model(name, version, plan, digest_of([receipt["files"][WEIGHTS], plan.digest]), facts)


def versions(root: Root, name: str) -> list[str]:
    """Finished versions of a model, oldest first."""
    found = [v for v in root.names(f"models/{name}") if root.receipt(f"models/{name}/{v}")]
    return sorted(found, key=_number)


def next_version(root: Root, name: str) -> str:
    """The version after the newest that was ever begun."""
    begun = [*root.names(f"models/{name}"), *root.names(f"training/{name}")]
    return f"v{max((_number(v) for v in begun), default=0) + 1}"


def _number(version: str) -> int:
    match = re.fullmatch(r"v(\d+)", version)
    return int(match[1]) if match else 0


def load_network(root: Root, model: Model) -> VNet:
    """The model's network with its weights, on the CPU in float32."""
    network = build_vnet(model.plan.network, len(model.plan.channels), model.plan.classes)
    network.load_state_dict(safetensors.torch.load(root.get(f"{model.prefix}/{WEIGHTS}")))
    return network.eval()
