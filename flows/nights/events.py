"""What a night tells the Prefect server beside its state, for automations: a night that is missing, too many failures.

An event carries a sentence for people, made of the cohort's name, counts and codes; nothing of it comes from scans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from workers.nights.attempts import QUARANTINED
from workers.nights.record import Night
from workers.settings.site import Nightly

FAILURES = "vnet.night.failures"
MISSING = "vnet.night.missing"
MOST_CODES = 5
"""Codes named in a sentence."""


def cohort_resource(cohort: str) -> str:
    """Prefect's id of what the events of a cohort are about."""
    return f"vnet.cohort.{cohort}"


def emit_night_events(night: Night, rows: Sequence[Mapping[str, Any]], nightly: Nightly | None) -> None:
    """Tell that more cases of a night failed than its rule ``most_failures`` allows.

    ``rows`` are those of the night's report; a case is counted once, whatever the number of its rows, and one in
    quarantine, which was not tried, is not. Nothing is told of a cohort without a schedule or without the rule.
    """
    if nightly is None or nightly.most_failures is None:
        return
    text = failures_text(night, rows, nightly.most_failures)
    if text is not None:
        _emit(FAILURES, night.cohort, {"night": night.id, "text": text, "counts": dict(night.counts)})


def emit_missing(cohort: str, text: str) -> None:
    """Tell why a cohort has no night that ended well by the time of its rule ``success_by``."""
    _emit(MISSING, cohort, {"text": text})


def failures_text(night: Night, rows: Sequence[Mapping[str, Any]], most: int) -> str | None:
    """A sentence when more than ``most`` cases failed; else None."""
    codes = {row["case"]: row["codes"].split(" ")[0] for row in rows if row["state"] == "failed"}
    failed = {case: code for case, code in codes.items() if code != QUARANTINED}
    if len(failed) <= most:
        return None
    commonest = Counter(failed.values()).most_common(MOST_CODES)
    named = ", ".join(f"{number} {code or 'without a code'}" for code, number in commonest)
    cases = len({row["case"] for row in rows})
    return f"night {night.id} of cohort {night.cohort}: {len(failed)} of {cases} cases failed, {most} allowed ({named})"


def _emit(event: str, cohort: str, payload: dict[str, Any]) -> None:
    from prefect.events import emit_event

    resource = {"prefect.resource.id": cohort_resource(cohort), "prefect.resource.name": cohort}
    emit_event(event, resource, payload=payload)
