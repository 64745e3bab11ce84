"""Model bundles in the storage root: weights in safetensors, everything else in JSON, never pickle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnet_core.errors import StorageError
from vnet_core.plan import Plan, digest_of
from workers.registry.aliases import check_files, resolve
from workers.registry.aliases import next_version as next_version
from workers.registry.aliases import versions as versions
from workers.registry.cards import model_card
from workers.storage.store import Root

if TYPE_CHECKING:
    from vnet_core.networks.vnet import VNet

DISTRIBUTION = "vnet-cohort"
CARD = "card.md"
"""Name of the model card in a bundle."""


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
    ``facts`` goes into model.json, with where the model comes from, ``files`` beside it, by name. The model card is
    made of the facts.
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
        "provenance": _provenance(root, plan, weights, facts.get("training", {})),
        **facts,
    }
    root.put_json(f"{prefix}/model.json", described)
    root.put(f"{prefix}/{CARD}", model_card(described).encode())
    root.seal(prefix, {"stage": "train", "plan_digest": plan.digest})
    return load_model(root, f"{target.name}@{target.version}")


def _provenance(root: Root, plan: Plan, weights: Sequence[bytes], training: dict[str, Any]) -> dict[str, Any]:
    """What the model was made from and by."""
    receipts = [receipt for key in training.get("volumes", ()) if (receipt := root.receipt(key))]
    data = sorted((receipt["case_digest"], receipt["label_digest"] or "") for receipt in receipts)
    return {
        "digest": _digest(weights, plan),
        "data_digest": digest_of(data) if data else "",
        "data": [{"scan": scan, "label": label} for scan, label in data],
        "started_from": training.get("started_from"),
        "version": importlib.metadata.version(DISTRIBUTION),
        "commit": _commit(),
        "torch": training.get("torch", importlib.metadata.version("torch")),
    }


def _commit() -> str:
    """The git commit of the program's sources, with ``+changes`` where they differ from it; empty where unknown."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an environment may lie inside a repository that is not the program's
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def load_model(root: Root, reference: str) -> Model:
    """The model that a reference stands for: ``name`` is the champion, or the newest version where there is none;
    ``name@champion``, ``name@challenger``, ``name@latest`` or ``name@v3`` is that one.

    Raises ConfigError ``model.unknown``, ``model.version`` or ``model.alias`` naming what exists, StorageError
    ``model.damaged`` when a file is not what its receipt says.
    """
    name, version = resolve(root, reference)
    check_files(root, name, version)
    prefix = f"models/{name}/{version}"
    facts = root.get_json(f"{prefix}/model.json")
    receipt = root.receipt(prefix)
    assert receipt is not None
    plan = Plan.from_mapping(facts["plan"])
    unsealed = [file for file in facts["weights"] if file not in receipt["files"]]
    if unsealed:
        raise _damaged(f"{name}@{version}", f"{len(unsealed)} of its weights are not in its receipt")
    digests = [receipt["files"][file] for file in facts["weights"]]
    return Model(name, version, plan, digest_of([*digests, plan.digest]), facts)


def card_of(root: Root, model: Model) -> str:
    """The model's card, in Markdown; of a model from before there were cards it is made of its facts."""
    key = f"{model.prefix}/{CARD}"
    return root.get(key).decode() if root.exists(key) else model_card(model.facts)


def load_networks(root: Root, model: Model) -> list[VNet]:
    """The model's networks with their weights, on the CPU in float32.

    StorageError ``model.damaged`` when the weights are not those of the model's digest, or no safetensors.
    """
    # they bring torch in, which a night's own process does without
    import safetensors
    import safetensors.torch

    from vnet_core.networks.vnet import build_vnet

    # the very bytes that are loaded, once more: what lies there may have changed since the model was looked up
    weights = [root.get(f"{model.prefix}/{file}") for file in model.facts["weights"]]
    if _digest(weights, model.plan) != model.digest:
        raise _damaged(model.reference, "its weights are not those of its digest")
    networks = []
    for content in weights:
        network = build_vnet(model.plan.network, len(model.plan.channels), model.plan.outputs)
        try:
            network.load_state_dict(safetensors.torch.load(content))
        except (safetensors.SafetensorError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise _damaged(model.reference, f"its weights are no safetensors of its network ({why})") from None
        networks.append(network.eval())
    return networks


def _digest(weights: Sequence[bytes], plan: Plan) -> str:
    return digest_of([*(hashlib.sha256(content).hexdigest() for content in weights), plan.digest])


def _damaged(reference: str, found: str) -> StorageError:
    return StorageError("model.damaged", f"model {reference}: {found}; restore it from a copy, or use another version")
