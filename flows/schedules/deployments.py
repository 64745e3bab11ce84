"""Which flows can be started from the UI, which start by themselves, and how both come to a Prefect server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.schedules.automations import TAG, Change, apply, notification_block, save_block, wanted
from flows.schedules.serving import serve_until_stopped
from flows.schedules.starting import start_night
from flows.schedules.timetable import check_schedules, missed
from flows.schedules.watching import Watch
from flows.server.api import check_api
from flows.server.process import running_server, start_server
from flows.server.settings import HEARTBEAT_S
from flows.session import Session
from vnet_core.errors import ConfigError, EngineError
from workers.cohort import load_cohort
from workers.registry.models import load_model
from workers.settings.site import Nightly
from workers.storage.store import Root

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.deployments.runner import RunnerDeployment

NIGHTLY = "flows.cohorts.nightly"
CHECK = "flows.checks.check_night"
QUERY = "flows.reports.query_reports"
FORMS = (
    NIGHTLY,
    "flows.cohorts.plan_night",
    "flows.cohorts.segment_cohort",
    "flows.cohorts.preprocess_cohort",
    "flows.training.train_model",
    QUERY,
    "flows.models.promote_model",
    "flows.models.rollback_model",
    "flows.models.withdraw_challenger",
    "flows.retraining.retrain_model",
    "flows.review.review_cases",
    "flows.quarantine.release_cases",
    "flows.pauses.pause_night",
    "flows.pauses.resume_night",
    "flows.reporting.report_night_anew",
)
"""Flows that people start from a form, by the names under which runs import them."""


def serve(session: Session, schedules: Sequence[Nightly], port: int | None) -> None:
    """Start the Prefect server and its UI, and run what forms and schedules ask for, until SIGINT or SIGTERM.

    Where PREFECT_API_URL names a server already, that one is used. Raises ConfigError for a schedule that cannot be
    kept or whose cohort or model does not exist, EngineError ``prefect.port-busy`` or ``prefect.unreachable``.
    """
    nightlies = _checked(session, schedules)
    url = os.environ.get("PREFECT_API_URL")
    if url:
        _serve(session, nightlies, url)
        return
    home = Path(os.environ["PREFECT_HOME"])
    with start_server(home, session.site.ui_port if port is None else port) as server:
        _serve(session, nightlies, server.api_url)


def deploy(session: Session, api_url: str | None, work_pool: str | None) -> dict[str, Change]:
    """Give a Prefect server what ``vnet serve`` gives its own, for runs by somebody else: a work pool's workers, or a
    ``vnet serve`` elsewhere. What became of each deployment, automation and block, by its name.

    Without ``api_url``, PREFECT_API_URL names the server, or it is the one that runs on this storage root. Raises
    ConfigError as :func:`serve`, ``prefect.no-api`` and ``prefect.no-work-pool``; EngineError ``prefect.unreachable``
    and ``prefect.refused``.
    """
    import httpx

    nightlies = _checked(session, ())
    url = api_url or os.environ.get("PREFECT_API_URL") or running_server(Path(os.environ["PREFECT_HOME"]))
    if not url:
        raise ConfigError(
            "prefect.no-api", "no Prefect server is named and none runs on this root; give --api or PREFECT_API_URL"
        )
    check_api(url)
    with _client(url) as client:
        from prefect.deployments.runner import DeploymentApplyError
        from prefect.exceptions import ObjectNotFound, PrefectException

        try:
            if work_pool:
                client.read_work_pool(work_pool)
            return publish(client, session, nightlies, work_pool)
        except ObjectNotFound:
            raise ConfigError(
                "prefect.no-work-pool",
                f"the server at {url} has no work pool {work_pool!r}; make it with"
                f" prefect work-pool create --type process {work_pool}",
            ) from None
        except (httpx.HTTPError, PrefectException, DeploymentApplyError) as error:
            raise EngineError(
                "prefect.refused",
                f"the Prefect API at {url} did not take the deployments ({error}); see whether it is of version 3.8"
                " and PREFECT_API_AUTH_STRING is right",
            ) from error


def _checked(session: Session, schedules: Sequence[Nightly]) -> list[Nightly]:
    """All schedules, each of which can be kept; checked before a server starts."""
    nightlies = [*session.site.nightly, *schedules]
    check_schedules(nightlies, session.site.timezone)
    if session.site.notify_url:
        notification_block(session.site.notify_url)
    for entry in nightlies:
        load_cohort(session.root, entry.cohort)
        load_model(session.root, entry.model)
    return nightlies


def _client(api_url: str) -> SyncPrefectClient:
    """A client of this server, which is from now on that of the whole process."""
    os.environ["PREFECT_API_URL"] = api_url
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    # Prefect may have been imported, and has read the environment then
    refresh_global_settings_context()
    return get_client(sync_client=True)


def _serve(session: Session, nightlies: Sequence[Nightly], api_url: str) -> None:
    check_api(api_url)
    with _client(api_url) as client:
        changes = publish(client, session, nightlies)
        caught_up = catch_up(client, session.root, nightlies, session.site.timezone, session.clock())
    found = deployments(session.root, nightlies, session.site.timezone)
    ui = api_url.removesuffix("/api")
    lines = [f"UI: {ui}  reports: {ui}/v2/artifacts  (Ctrl-C stops)"]
    for deployment in found:
        when = f"  {deployment.schedules[0].schedule}" if deployment.schedules else ""
        lines.append(f"  {deployment.flow_name}/{deployment.name}{when}")
    lines += [f"  {change}: {name}" for name, change in changes.items() if change != "left alone"]
    lines += [f"  catching up: {cohort}" for cohort in caught_up]
    print("\n".join(lines), file=sys.stderr, flush=True)
    watch = Watch(session.root, [entry for entry in nightlies if entry.watch])
    with watch:
        serve_until_stopped(found, api_url)


def deployments(root: Root, nightlies: Sequence[Nightly], timezone: str) -> list[RunnerDeployment]:
    """One deployment per flow for its form, one per scheduled cohort, and one for each check of ``success_by``."""
    from flows.reports import offer_choices

    on_demand = []
    for path in FORMS:
        flow = _flow(path)
        # without the parameters, which the form itself describes
        summary = (flow.description or "").partition("\n\n")[0]
        made = _deployment(flow, f"{flow.name}-form", description=summary)
        if path == QUERY:
            offer_choices(made, root)
        on_demand.append(made)
    scheduled = [made for entry in nightlies for made in _of_cohort(entry, timezone)]
    return [*on_demand, *scheduled]


def _of_cohort(entry: Nightly, timezone: str) -> list[RunnerDeployment]:
    """The nights of a cohort, and the look whether one has ended well."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    # a night that waited its turn would run into the day, and the next one finds its cases anyway
    one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    rules = entry.rules.model_dump(mode="json")
    night = _deployment(
        _flow(NIGHTLY),
        entry.cohort,
        description=f"Cohort {entry.cohort} with model {entry.model}, at `{entry.cron}` in {timezone} time.",
        parameters={"cohort": entry.cohort, "model": entry.model, "rules": rules},
        schedule=Cron(entry.cron, timezone=timezone),
        concurrency_limit=one_at_a_time,
    )
    if not entry.success_by:
        return [night]
    hour, minute = map(int, entry.success_by.split(":"))
    check = _deployment(
        _flow(CHECK),
        f"check-{entry.cohort}",
        description=f"Tells when cohort {entry.cohort} has no night that ended well by {entry.success_by}.",
        parameters={"cohort": entry.cohort, "cron": entry.cron, "timezone": timezone},
        schedule=Cron(f"{minute} {hour} * * *", timezone=timezone),
    )
    return [night, check]


def _flow(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _deployment(flow: Any, name: str, **settings: Any) -> RunnerDeployment:
    from prefect.flows import EntrypointType

    # runs import the flow as the installed package, whatever folder they are started in
    made = flow.to_deployment(name, tags=[TAG], entrypoint_type=EntrypointType.MODULE_PATH, **settings)
    return cast("RunnerDeployment", made)


# --- to a server


def publish(
    client: SyncPrefectClient, session: Session, nightlies: Sequence[Nightly], work_pool: str | None = None
) -> dict[str, Change]:
    """Make the server's deployments, automations and block of ours these; what is as it should be is not touched.

    By name, what became of each. Runs of a work pool send heartbeats as often as the automation for dead runs expects.
    """
    done: dict[str, Change] = {}
    known = _known(client)
    for deployment in deployments(session.root, nightlies, session.site.timezone):
        name = deployment.full_name
        if work_pool:
            deployment.work_pool_name = work_pool
            deployment.job_variables = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}}
        before = known.pop(name, None) or _read(client, name)
        if before is not None and _facts(before) == _facts(deployment):
            done[name] = "left alone"
            continue
        if before is not None and before.work_pool_name and not work_pool:
            # an update would leave it in the pool
            client.delete_deployment(before.id)
        deployment.apply()
        done[name] = "created" if before is None else "changed"
    for name, one in known.items():
        client.delete_deployment(one.id)
        done[name] = "removed"
    block_id, change = save_block(client, session.site.notify_url)
    if change:
        done["vnet-notify"] = change
    return done | apply(client, wanted(nightlies, block_id))


def _known(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """Deployments of ours in the server, by ``flow/name``."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(deployment_filter=ours, offset=len(found)):
        found += page
    flows = {one.flow_id: client.read_flow(one.flow_id).name for one in found}
    return {f"{flows[one.flow_id]}/{one.name}": one for one in found}


def _read(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """A deployment without our tag that has one of our names."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _facts(deployment: Any) -> dict[str, Any]:
    """What two deployments of one name must share to be the same, of one to be made or of one in the server."""
    if in_server := "global_concurrency_limit" in type(deployment).model_fields:
        limit = deployment.global_concurrency_limit and deployment.global_concurrency_limit.limit
    else:
        limit = deployment.concurrency_limit
    schema = deployment.parameter_openapi_schema if in_server else _schema(deployment)
    options = deployment.concurrency_options
    return {
        "description": deployment.description,
        "tags": sorted(deployment.tags),
        "parameters": deployment.parameters,
        "entrypoint": deployment.entrypoint,
        "pool": deployment.work_pool_name,
        "variables": deployment.job_variables,
        "limit": limit,
        "collision": options.collision_strategy if options else None,
        "schedules": [one.schedule.model_dump() for one in deployment.schedules or ()],
        "form": schema,
    }


def _schema(deployment: RunnerDeployment) -> dict[str, Any]:
    """The form of a deployment to be made, as Prefect sends it."""
    return deployment._parameter_openapi_schema.model_dump(exclude_unset=True)


def catch_up(
    client: SyncPrefectClient, root: Root, nightlies: Sequence[Nightly], timezone: str, now: datetime
) -> list[str]:
    """Start one night at once for each cohort that has missed its last one and whose rule ``catch_up`` is ``run``.

    However many were missed, one finds all cases. Returns the cohorts.
    """
    due = [entry.cohort for entry in nightlies if entry.catch_up == "run" and missed(root, entry, timezone, now)]
    return [cohort for cohort in due if start_night(client, cohort, "catch-up")]
