"""Which flows can be started from the UI, and which start by themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flows.server import start_server
from flows.serving import serve_until_stopped
from flows.session import Session
from workers.cohort import load_cohort
from workers.models import load_model
from workers.site import Nightly

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def serve(session: Session, schedules: Sequence[Nightly], port: int | None) -> None:
    """Start the Prefect server and its UI, and run what forms and schedules ask for, until SIGINT or SIGTERM.

    Where PREFECT_API_URL names a server already, that one is used. Raises ConfigError for a schedule whose cohort or
    model does not exist, EngineError ``prefect.port-busy`` or ``prefect.unreachable``.
    """
    nightlies = [*session.site.nightly, *schedules]
    for entry in nightlies:
        load_cohort(session.root, entry.cohort)
        load_model(session.root, entry.model)
    url = os.environ.get("PREFECT_API_URL")
    if url:
        _run(session, nightlies, url)
        return
    home = Path(os.environ["PREFECT_HOME"])
    with start_server(home, port or session.site.ui_port) as server:
        os.environ["PREFECT_API_URL"] = server.api_url
        _run(session, nightlies, server.api_url)


def _run(session: Session, nightlies: Sequence[Nightly], api_url: str) -> None:
    found = deployments(nightlies, session.site.timezone)
    ui = api_url.removesuffix("/api")
    print(f"UI: {ui}  reports: {ui}/v2/artifacts  (Ctrl-C stops)", file=sys.stderr)
    for deployment in found:
        when = f"  {deployment.schedules[0].schedule}" if deployment.schedules else ""
        print(f"  {deployment.flow_name}/{deployment.name}{when}", file=sys.stderr, flush=True)
    serve_until_stopped(found, api_url)


def deployments(nightlies: Sequence[Nightly], timezone: str) -> list[RunnerDeployment]:
    """One deployment per flow for its form, and one per scheduled cohort, whose runs never overlap."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.flows import EntrypointType
    from prefect.schedules import Cron

    from flows.cohorts import nightly, preprocess_cohort, segment_cohort
    from flows.reports import query_reports
    from flows.training import train_model

    # runs import the flow as the installed package, whatever folder they are started in
    module = EntrypointType.MODULE_PATH
    by_form = (nightly, segment_cohort, preprocess_cohort, train_model, query_reports)
    on_demand = [
        cast(
            "RunnerDeployment",
            # without the parameters, which the form itself describes
            flow.to_deployment(
                f"{flow.name}-form",
                description=(flow.description or "").partition("\n\n")[0],
                entrypoint_type=module,
            ),
        )
        for flow in by_form
    ]
    one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    scheduled = [
        cast(
            "RunnerDeployment",
            nightly.to_deployment(
                entry.cohort,
                description=f"Cohort {entry.cohort} with model {entry.model}, at `{entry.cron}` in {timezone} time.",
                parameters={"cohort": entry.cohort, "model": entry.model},
                schedule=Cron(entry.cron, timezone=timezone),
                concurrency_limit=one_at_a_time,
                entrypoint_type=module,
            ),
        )
        for entry in nightlies
    ]
    return [*on_demand, *scheduled]
