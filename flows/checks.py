"""The flow that looks, at the time of the rule ``success_by``, whether a cohort's night has ended well."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.nights.events import emit_missing
from flows.schedules.timetable import without_success
from flows.session import open_session


@flow(name="check-night", flow_run_name="check {cohort}", validate_parameters=True)
def check_night(cohort: str, cron: str, timezone: str) -> State[Any]:
    """Look whether a night of a cohort has ended well since its schedule's last moment; tell it when none has.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        cron: schedule of its nights
        timezone: time zone of the schedule
    """
    session = open_session()
    why = without_success(session.root, cohort, cron, timezone, session.clock())
    if why is None:
        return Completed(message=f"cohort {cohort} has a night that ended well")
    emit_missing(cohort, why)
    return Failed(message=why)
