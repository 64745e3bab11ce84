"""Where a run's plan comes from: derived from the cohort, with a file's settings on top."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vnet_core.errors import ConfigError
from vnet_core.fingerprint import STEP_GMACS_PER_CORE, STEP_GMACS_PER_GPU, derive_plan, total
from vnet_core.plan import Plan
from workers.clusters import Engines
from workers.cohort import Cohort, Entry
from workers.store import Root


def make_plan(root: Root, cohort: Cohort, entries: Sequence[Entry], source: str, engines: Engines) -> Plan:
    """The plan of a cohort, kept in the root as ``cohorts/<cohort>/plan.json``.

    ``source`` is ``auto``: the kept plan, or else one derived from the cohort's fingerprint; or a TOML file, whose
    settings replace those of the derived plan. Raises ConfigError ``plan.missing``, ``plan.toml``, ``plan.no-labels``,
    ``plan.unknown-key`` or ``plan.value``.
    """
    kept = f"cohorts/{cohort.name}/plan.json"
    if source == "auto" and root.exists(kept):
        return Plan.from_mapping(root.get_json(kept))
    if not cohort.labels:
        raise ConfigError(
            "plan.no-labels",
            f"cohort {cohort.name} has 0 labels, so there is nothing to train; ingest it with its label folder",
        )
    power = engines.cpus * STEP_GMACS_PER_CORE
    if engines.gpus_per_worker:
        power = engines.train_workers * engines.gpus_per_worker * STEP_GMACS_PER_GPU
    fingerprint = total(e.fingerprint for e in entries if e.fingerprint and e.verdict.usable)
    plan = derive_plan(fingerprint, cohort.channels, cohort.labels, power)
    if source != "auto":
        plan = Plan.from_mapping(_merged(plan.model_dump(mode="json"), _read(source)))
    root.put_json(kept, plan.model_dump(mode="json"))
    return plan


def _read(source: str) -> dict[str, Any]:
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
