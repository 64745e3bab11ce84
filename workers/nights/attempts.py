"""What failed, how often, and what is left alone because of it.

``attempts/<cohort>/<case>.json`` holds the failures of a case since it last had a result. They count for one key of the
result, so a case whose bytes, plan or model changed starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from vnet_core.errors import ConfigError
from workers.ledger import Outcome
from workers.storage.store import Root

QUARANTINED = "night.quarantined"


@dataclass(frozen=True, slots=True)
class Failure:
    """One night in which a case failed."""

    key: str
    """Of the result that was to be made."""
    night: str
    at: str
    """ISO 8601."""
    stage: str
    codes: tuple[str, ...]
    message: str


def failures(root: Root, cohort: str) -> dict[str, tuple[Failure, ...]]:
    """Failures by case, oldest first, of the cases of a cohort that have any."""
    names = root.names(f"attempts/{cohort}")
    return {name.removesuffix(".json"): failures_of(root, cohort, name.removesuffix(".json")) for name in names}


def failures_of(root: Root, cohort: str, case: str) -> tuple[Failure, ...]:
    """Failures of one case, oldest first."""
    key = _key(cohort, case)
    found = root.get_json(key) if root.exists(key) else []
    return tuple(Failure(**{**one, "codes": tuple(one["codes"])}) for one in found)


def add_failure(root: Root, cohort: str, case: str, failure: Failure) -> None:
    """Remember that a case failed in a night; a night counts once, with its last failure."""
    before = [one for one in failures_of(root, cohort, case) if one.night != failure.night]
    root.put_json(_key(cohort, case), [asdict(one) for one in (*before, failure)])


def forget(root: Root, cohort: str, case: str) -> None:
    """The case has a result, or somebody released it."""
    root.delete(_key(cohort, case))


def quarantined(found: Sequence[Failure], key: str, after: int) -> Failure | None:
    """The last failure for ``key`` when there are ``after`` or more: the case is left alone; else None."""
    for_key = [one for one in found if one.key == key]
    return for_key[-1] if len(for_key) >= after else None


def quarantine_outcome(cohort: str, case: str, found: Sequence[Failure], last: Failure) -> Outcome:
    """The row of a case that is left alone."""
    nights = sum(one.key == last.key for one in found)
    return Outcome(
        case,
        last.stage,
        "failed",
        (QUARANTINED, *last.codes),
        f"left alone after {nights} nights with a failure, the last one: {last.message}; mend it, then release it with"
        f" vnet quarantine release --cohort {cohort} --case {case}, or with the form release-cases",
    )


def release(root: Root, cohort: str, cases: Sequence[str]) -> list[str]:
    """Let cases be tried again; without any named, all of the cohort's. Returns those that had failures.

    ConfigError ``quarantine.unknown`` names a case without failures.
    """
    known = [name.removesuffix(".json") for name in root.names(f"attempts/{cohort}")]
    unknown = [case for case in cases if case not in known]
    if unknown:
        raise ConfigError(
            "quarantine.unknown",
            f"{', '.join(unknown)} of cohort {cohort} has no failure (those that have: {', '.join(known) or 'none'})",
        )
    released = list(cases) or known
    for case in released:
        forget(root, cohort, case)
    return released


def failure_of(outcome: Outcome, key: str, night: str, now: datetime) -> Failure:
    """The failure that an outcome stands for."""
    return Failure(key, night, now.isoformat(timespec="seconds"), outcome.stage, outcome.codes, outcome.message)


def _key(cohort: str, case: str) -> str:
    return f"attempts/{cohort}/{case}.json"
