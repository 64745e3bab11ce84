"""The manifests of an overlay, as ``kubectl kustomize`` makes them: the part of it that infra/kubernetes uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
NOT_IN_A_NAMESPACE = {"Namespace", "PersistentVolume", "ClusterRole", "ClusterRoleBinding"}


def build(folder: Path) -> list[Manifest]:
    """Every manifest of a kustomization, patched; a key that this reader does not know is an error."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    assert settings.keys() <= KNOWN, f"{folder}: {settings.keys() - KNOWN}"
    found: list[Manifest] = []
    for name in settings["resources"]:
        path = (folder / name).resolve()
        found += build(path) if path.is_dir() else manifests(path)
    for patch in settings.get("patches", ()):
        target, operations = patch["target"], yaml.safe_load((folder / patch["path"]).read_text("utf-8"))
        (number,) = (n for n, one in enumerate(found) if _is(one, target))
        found[number] = jsonpatch.apply_patch(found[number], operations)
    for manifest in found:
        if (space := settings.get("namespace")) and manifest["kind"] not in NOT_IN_A_NAMESPACE:
            manifest["metadata"]["namespace"] = space
        for container in containers(manifest):
            container["image"] = _image(container["image"], settings.get("images", ()))
    return found


def manifests(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return [one for one in yaml.safe_load_all(path.read_text("utf-8")) if one is not None]


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """The templates of pods of a manifest: metadata and spec."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield spec["template"]
    elif kind == "RayCluster":
        yield spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield group["template"]


def containers(manifest: Manifest) -> Iterator[Manifest]:
    """The containers of a manifest's pods."""
    for pod in pods(manifest):
        yield from pod["spec"]["containers"]


def _is(manifest: Manifest, target: Manifest) -> bool:
    version = "/".join(filter(None, (target.get("group"), target["version"])))
    return (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == (
        version,
        target["kind"],
        target["name"],
    )


def _image(image: str, changes: Any) -> str:
    name, _, tag = image.partition(":")
    for change in changes:
        if change["name"] == name:
            return f"{change.get('newName', name)}:{change.get('newTag', tag)}"
    return image
