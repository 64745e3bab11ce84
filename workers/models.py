"""Model bundles in the storage root: weights in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from vnet_core.errors import ConfigError, StorageError
from vnet_core.networks.vnet import VNet, build_vnet
from vnet_core.plan import Plan, digest_of
from workers.cohort import check_name
from workers.store import Root


@dataclass(frozen=True, slots=True)
class Target:
    """What a bundle is to be."""

    name: str
    version: str
    plan: Plan


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
    root: Root, target: Target, weights: Sequence[bytes], facts: dict[str, Any], files: dict[str, bytes]
) -> Model:
    """Write a bundle and its receipt.

    ``weights``: one safetensors file per network; a model of several segments with the mean of their outputs.
    ``facts`` goes into model.json, ``files`` beside it, by name.
    """
    prefix = f"models/{target.name}/{target.version}"
    names = ["weights.safetensors"] if len(weights) == 1 else [f"weights-{n}.safetensors" for n in range(len(weights))]
    for name, content in [*zip(names, weights, strict=True), *files.items()]:
        root.put(f"{prefix}/{name}", content)
    plan = target.plan
    described = {
        "name": target.name,
        "version": target.version,
        "channels": list(plan.channels),
        "labels": [label.model_dump() for label in plan.labels],
        "plan": plan.model_dump(mode="json"),
        "plan_digest": plan.digest,
        "weights": names,
        **facts,
    }
    root.put_json(f"{prefix}/model.json", described)
    root.seal(prefix, {"stage": "train", "plan_digest": plan.digest})
    return load_model(root, f"{target.name}@{target.version}")


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
    digests = [receipt["files"][file] for file in facts["weights"]]
    return Model(name, version, plan, digest_of([*digests, plan.digest]), facts)


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


def load_networks(root: Root, model: Model) -> list[VNet]:
    """The model's networks with their weights, on the CPU in float32."""
    networks = []
    for file in model.facts["weights"]:
        network = build_vnet(model.plan.network, len(model.plan.channels), model.plan.outputs)
        network.load_state_dict(safetensors.torch.load(root.get(f"{model.prefix}/{file}")))
        networks.append(network.eval())
    return networks
