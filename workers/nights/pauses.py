"""Cohorts whose nights wait: work that is under way is finished, nothing new is begun, and the engines are let go."""

from __future__ import annotations

from datetime import UTC, datetime

from vnet_core.errors import ConfigError
from workers.cohort import load_cohort
from workers.storage.store import Root


def pause(root: Root, cohort: str, by: str) -> None:
    """Let the cohort's nights wait until somebody resumes them. ConfigError ``cohort.unknown``."""
    load_cohort(root, cohort)
    root.put_json(_key(cohort), {"by": by, "at": datetime.now(UTC).isoformat(timespec="seconds")})


def resume(root: Root, cohort: str) -> None:
    """Let them go on. ConfigError ``pause.none`` when they do not wait."""
    load_cohort(root, cohort)
    if not is_paused(root, cohort):
        raise ConfigError("pause.none", f"cohort {cohort} is not paused; nothing to resume")
    root.delete(_key(cohort))


def is_paused(root: Root, cohort: str) -> bool:
    """Whether the cohort's nights wait."""
    return root.exists(_key(cohort))


def _key(cohort: str) -> str:
    return f"pauses/{cohort}.json"
