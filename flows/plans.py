"""Where a run's plan comes from: derived from the cohort, with a file's settings on top."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from vnet_core.errors import ConfigError
from vnet_core.fingerprint import total
from vnet_core.networks.memory import predicted_training_bytes
from vnet_core.plan import Plan
from vnet_core.planning import STEP_GMACS_PER_CORE, STEP_GMACS_PER_GPU, Derivation, Machine, derive_plan
from vnet_core.sections import PRESETS
from workers.cohort import Cohort, Entry, check_reading
from workers.engines.clusters import Engines, gpu_memory_gib
from workers.registry.models import load_model
from workers.storage.store import Root

GIB = 2**30


@dataclass(frozen=True, slots=True)
class PlanSource:
    """What was said about the plan."""

    settings: str = "auto"
    """`auto`, or a TOML file whose settings replace those of the plan that it starts from."""
    preset: str | None = None
    """A named network."""
    model: str | None = None
    """A model whose plan it starts from, instead of one derived from the cohort."""


def make_plan(root: Root, cohort: Cohort, entries: Sequence[Entry], source: PlanSource, engines: Engines) -> Plan:
    """The plan of a cohort, kept in the root as ``cohorts/<cohort>/plan.json``.

    With nothing said it is the kept plan, so that cases can be added without a new one, or else one derived from the
    cohort's fingerprint. Raises ConfigError ``plan.missing``, ``plan.toml``, ``plan.no-labels``, ``plan.unknown-key``,
    ``plan.value``, ``plan.memory``, or ``plan.reading`` where files were read otherwise at ingest.
    """
    kept = f"cohorts/{cohort.name}/plan.json"
    if source == PlanSource() and root.exists(kept):
        plan = Plan.from_mapping(root.get_json(kept))
        check_reading(cohort, plan)
        return plan
    base = load_model(root, source.model).plan if source.model else derived(cohort, entries, engines).plan
    plan = settled(base, _settings(source))
    check_reading(cohort, plan)
    check_memory(plan, machine(engines))
    root.put_json(kept, plan.model_dump(mode="json"))
    return plan


def derived(cohort: Cohort, entries: Sequence[Entry], engines: Engines) -> Derivation:
    """The plan that the cohort's fingerprint and the machine give, with its reasons."""
    if not cohort.labels:
        raise ConfigError(
            "plan.no-labels",
            f"cohort {cohort.name} has 0 labels, so there is nothing to train; ingest it with its label folder",
        )
    fingerprint = total(e.fingerprint for e in entries if e.fingerprint and e.verdict.usable)
    found = derive_plan(fingerprint, cohort.channels, cohort.labels, machine(engines))
    return replace(found, plan=found.plan.model_copy(update={"reading": cohort.reading}))


def machine(engines: Engines) -> Machine:
    """What the engines' training workers have, each of them."""
    if engines.gpus_per_worker:
        return Machine(engines.train_workers * engines.gpus_per_worker * STEP_GMACS_PER_GPU, gpu_memory_gib())
    return Machine(engines.cpus * STEP_GMACS_PER_CORE, psutil.virtual_memory().total / GIB / engines.most_train_workers)


def settled(base: Plan, settings: Mapping[str, Any]) -> Plan:
    """``base`` with settings on top, section by section; a network that names its preset starts from that alone."""
    mapping = base.model_dump(mode="json")
    if "preset" in settings.get("network", {}):
        mapping["network"] = {}
    if "terms" in settings.get("training", {}).get("loss", {}):
        mapping["training"]["loss"]["terms"] = {}
    return Plan.from_mapping(_merged(mapping, settings))


def check_memory(plan: Plan, machine: Machine) -> None:
    """ConfigError ``plan.memory``, naming what would fit, when a training step needs more than the machine has."""

    def needed_gib(batch: int) -> float:
        patch = plan.training.patch_size
        taken = predicted_training_bytes(plan.network, len(plan.channels), plan.outputs, patch, batch, 4)
        return taken / GIB

    batch = plan.training.batch_size
    if needed_gib(batch) <= machine.memory_gib:
        return
    fitting = [n for n in range(batch - 1, 0, -1) if needed_gib(n) <= machine.memory_gib]
    remedy = (
        f"use training.batch_size {fitting[0]} and training.accumulate {-(-batch // fitting[0])}"
        if fitting
        else "use a smaller training.patch_size or network.width"
    )
    raise ConfigError(
        "plan.memory",
        f"a training step of {batch} patches of {plan.training.patch_size} needs {needed_gib(batch):.1f} GiB,"
        f" {machine.memory_gib:.1f} GiB are there; {remedy}",
    )


def _settings(source: PlanSource) -> dict[str, Any]:
    settings = read_settings(source.settings) if source.settings != "auto" else {}
    if source.preset:
        if source.preset not in PRESETS:
            raise ConfigError("plan.value", f"preset {source.preset!r} is not known; use one of {', '.join(PRESETS)}")
        settings = _merged(settings, {"network": {"preset": source.preset}})
    return settings


def read_settings(source: str) -> dict[str, Any]:
    """The settings of a TOML file. ConfigError ``plan.missing`` or ``plan.toml``."""
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("plan.missing", f"plan file {source} cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("plan.toml", f"plan file {source} is not TOML: {error}") from None


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, section by section."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if nested else value
    return result
