"""The checks of ``vnet doctor``: those of the machine, and whether Prefect has what schedules need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from flows.schedules.automations import all_automations, wanted
from flows.schedules.timetable import check_schedules, without_success
from flows.server.api import check_api
from flows.server.process import running_server
from flows.server.pruning import client_of
from vnet_core.errors import ConfigError
from workers.care.doctor import Check, examine, examined
from workers.nights.record import load_night, records
from workers.settings.site import Site, load_site
from workers.storage.store import Root

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def diagnose(root_url: str | None, site_file: str | None, now: datetime) -> list[Check]:
    """Every check, of the root and the site file that are named or of the defaults; ``now`` is aware.

    Nothing that is wrong raises: a site file or a root that cannot be used is a finding like any other.
    """
    site = Site()
    try:
        site = load_site(site_file)
        found = "none: everything runs on this machine" if site_file is None else f"{site_file} is one"
        checks = [Check("site file", "ok", found)]
    except ConfigError as error:
        checks = [Check("site file", "bad", error.message, "correct it; docs/sites.md has every key")]
    try:
        root = Root(root_url or site.root)
    except ConfigError as error:
        return [*checks, Check("root", "bad", error.message, "name another with --root")]
    checks += examine(root, site, now)
    checks += examined("schedules", lambda: schedules(site))
    checks += examined("prefect", lambda: prefect(root, site))
    cohorts = sorted({*root.names("nights"), *(entry.cohort for entry in site.nightly)})
    return [*checks, *(check for cohort in cohorts for check in _of_cohort(root, site, cohort, now))]


def schedules(site: Site) -> Check:
    """Whether every schedule of the site file is a cron expression in a known time zone."""
    if not site.nightly:
        return Check("schedules", "ok", "the site file has none")
    check_schedules(site.nightly, site.timezone)
    return Check("schedules", "ok", f"{len(site.nightly)} cohorts in {site.timezone} time")


def prefect(root: Root, site: Site) -> Iterator[Check]:
    """The Prefect API: whether it answers, in this version, and has the deployments and automations of the site."""
    import prefect as installed

    url = os.environ.get("PREFECT_API_URL") or running_server(root.home / "prefect")
    if url is None:
        remedy = (
            "start vnet serve, or make it a service of the system: no schedule runs without" if site.nightly else ""
        )
        found = "no server runs on this root; commands start one of their own"
        yield Check("prefect", "warning" if remedy else "ok", found, remedy)
        return
    check_api(url)
    with client_of(url) as client:
        version = client.api_version()
        same = version == installed.__version__
        yield Check(
            "prefect",
            "ok" if same else "bad",
            f"the API at {url} has version {version}, this machine {installed.__version__}",
            "" if same else "install one version on both",
        )
        scheduled = [f"nightly/{entry.cohort}" for entry in site.nightly]
        missing = [name for name in scheduled if not _has(client, name)]
        yield _there("deployments", len(site.nightly), missing)
        names = [automation.name for automation in wanted(site.nightly, None)]
        enabled = {one.name for one in all_automations(client) if one.enabled}
        yield _there("automations", len(names), [name for name in names if name not in enabled])


def _has(client: SyncPrefectClient, deployment: str) -> bool:
    from prefect.exceptions import ObjectNotFound

    try:
        return not client.read_deployment_by_name(deployment).paused
    except ObjectNotFound:
        return False


def _there(name: str, number: int, missing: list[str]) -> Check:
    if not missing:
        return Check(name, "ok", f"all {number} that the site file asks for are in the server")
    found = f"{len(missing)} of {number} are missing or paused in the server: {', '.join(missing)}"
    return Check(name, "warning", found, "start vnet serve again, or run vnet deploy; resume in the UI what was paused")


def _of_cohort(root: Root, site: Site, cohort: str, now: datetime) -> list[Check]:
    return examined(f"night {cohort}", lambda: last_night(root, site, cohort, now))


def last_night(root: Root, site: Site, cohort: str, now: datetime) -> Check:
    """How old the cohort's newest night is, and whether one has ended well since its schedule's last moment."""
    name = f"night {cohort}"
    found = "there has been none"
    if ids := records(root, cohort):
        newest = load_night(root, cohort, ids[-1])
        hours = (now - datetime.fromisoformat(newest.started)).total_seconds() / 3600
        counts = ", ".join(f"{number} {state}" for state, number in newest.counts.items()) or "no counts yet"
        found = f"{newest.id}, {hours:.0f} h ago: {counts}{f', stopped: {newest.stopped}' if newest.stopped else ''}"
    for entry in site.nightly:
        if entry.cohort == cohort:
            why = without_success(root, cohort, entry.cron, site.timezone, now)
            if why:
                return Check(name, "warning", f"{found}; {why}", "look at its run in the UI, or run vnet nightly")
    return Check(name, "ok", found)
