"""Starting a scheduled cohort's night out of turn, never a second one beside one that is due or under way."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def start_night(client: SyncPrefectClient, cohort: str, why: str, key: str | None = None) -> bool:
    """Ask for a run of a cohort's deployment with its own parameters, tagged ``why``; whether one was asked for.

    False when a run of it is under way or due. ``key`` makes asking again harmless when the answer was lost.
    """
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Scheduled

    deployment = client.read_deployment_by_name(f"nightly/{cohort}")
    of_cohort = filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment.id]))
    active = filters.FlowRunFilterState(
        type=filters.FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    )
    asked_for = filters.FlowRunFilter(
        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    if client.read_flow_runs(deployment_filter=of_cohort, flow_run_filter=filters.FlowRunFilter(state=active), limit=1):
        return False
    waiting = client.read_flow_runs(deployment_filter=of_cohort, flow_run_filter=asked_for)
    # what the schedule has asked for in the past is dropped when the deployment is served again
    if any(not run.auto_scheduled for run in waiting):
        return False
    client.create_flow_run_from_deployment(deployment.id, state=Scheduled(), tags=[why], idempotency_key=key)
    return True
