"""The form that lets cases be tried again which failed in too many nights."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.session import open_session
from flows.ui.fields import CohortName
from workers.cohort import load_cohort
from workers.nights import attempts


@flow(name="release-cases", flow_run_name="release cases of {cohort}", validate_parameters=True)
def release_cases(cohort: CohortName, cases: list[str] | None = None) -> State[Any]:
    """Let cases be tried again that were left alone after failing in too many nights.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        cases: their ids, as in the report; none: all of the cohort
    """
    root = open_session().root
    load_cohort(root, cohort)
    released = attempts.release(root, cohort, cases or [])
    return Completed(message=f"{len(released)} released; the next night tries them again")
