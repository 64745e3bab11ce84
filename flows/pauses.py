"""Forms that let the nights of a cohort wait and go on."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.session import open_session
from flows.ui.fields import CohortName
from workers.nights import pauses

Person = Annotated[str, Field(min_length=1)]


@flow(name="pause-night", flow_run_name="pause {cohort}", validate_parameters=True)
def pause_night(cohort: CohortName, by: Person) -> State[Any]:
    """Let the nights of a cohort wait: cases under way are finished, then GPUs and workers are let go.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        by: your name
    """
    pauses.pause(open_session().root, cohort, by)
    return Completed(message=f"nights of cohort {cohort} wait until resume-night")


@flow(name="resume-night", flow_run_name="resume {cohort}", validate_parameters=True)
def resume_night(cohort: CohortName) -> State[Any]:
    """Let the nights of a cohort go on.

    Args:
        cohort: name that was given at vnet ingest, such as liver
    """
    pauses.resume(open_session().root, cohort)
    return Completed(message=f"nights of cohort {cohort} go on")
