"""Which deployments there are, how they come to a server and are kept up to date, and nights that were missed."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running

from flows.schedules.deployments import catch_up, deploy, deployments, publish
from flows.schedules.starting import start_night
from flows.server.process import ServerProcess
from flows.server.settings import HEARTBEAT_S
from flows.session import Session
from tests.flows.browser import call_api
from tests.flows.sample_flows import report
from tests.flows.server.test_server import environment
from tests.walkthrough import REPOSITORY
from vnet_core.errors import ConfigError
from workers.nights.record import Night, begin
from workers.settings.rules import NightRules
from workers.settings.site import Nightly, Site
from workers.storage.store import Root

LIVER = Nightly(
    cohort="liver", model="organs@v2", cron="30 0 * * *", rules=NightRules(deadline="06:00"), success_by="06:30"
)
BRAIN = Nightly(cohort="brain", model="organs", catch_up="skip")
SITE = Site(timezone="Europe/Berlin")
EMPTY = Session(Root(REPOSITORY / "no-such-root"), SITE)
NOON = datetime(2026, 1, 10, 12, tzinfo=UTC)
FORMS = {
    "nightly",
    "plan-night",
    "segment-cohort",
    "preprocess-cohort",
    "train-model",
    "query-reports",
    "promote-model",
    "rollback-model",
    "withdraw-challenger",
    "retrain-model",
    "review-cases",
    "release-cases",
    "pause-night",
    "resume-night",
    "report-night",
}


def by_name(nightlies: list[Nightly]) -> dict[str, Any]:
    return {one.full_name: one for one in deployments(EMPTY.root, nightlies, SITE.timezone)}


def test_every_flow_has_a_form_and_a_cohort_its_nights_and_its_check() -> None:
    forms = {f"{flow}/{flow}-form" for flow in FORMS}
    assert set(by_name([])) == forms
    found = by_name([LIVER, BRAIN])
    assert set(found) == forms | {"nightly/liver", "check-night/check-liver", "nightly/brain"}
    night, check = found["nightly/liver"], found["check-night/check-liver"]
    assert night.parameters == {
        "cohort": "liver",
        "model": "organs@v2",
        "rules": NightRules(deadline="06:00").model_dump(),
    }
    assert (night.schedules[0].schedule.cron, night.schedules[0].schedule.timezone) == ("30 0 * * *", "Europe/Berlin")
    assert (night.concurrency_limit, night.concurrency_options.collision_strategy) == (1, "CANCEL_NEW")
    assert "liver with model organs@v2, at `30 0 * * *` in Europe/Berlin time" in night.description
    assert (check.schedules[0].schedule.cron, check.schedules[0].schedule.timezone) == ("30 6 * * *", "Europe/Berlin")
    assert check.parameters == {"cohort": "liver", "cron": "30 0 * * *", "timezone": "Europe/Berlin"}
    assert all(one.tags == ["vnet"] for one in found.values())
    # the flow takes what the schedule gives it
    properties = night._parameter_openapi_schema.properties
    assert night.parameters.keys() <= properties.keys()
    assert check.parameters.keys() <= check._parameter_openapi_schema.properties.keys()


def test_the_file_for_work_pools_holds_the_same_deployments() -> None:
    written = yaml.safe_load((REPOSITORY / "infra" / "prefect.yaml").read_text("utf-8"))
    example = Nightly(cohort="liver", model="liver", rules=NightRules(deadline="06:00"), success_by="06:30")
    made = {one.name: one for one in deployments(EMPTY.root, [example], "Europe/Berlin")}
    assert [one["name"] for one in written["deployments"]] == list(made)
    for one in written["deployments"]:
        ours = made[one["name"]]
        assert one["entrypoint"] == ours.entrypoint, one["name"]
        assert one["tags"] == ours.tags
        given = {**one.get("parameters", {})}
        if "rules" in given:
            given["rules"] = NightRules(**given["rules"]).model_dump()
        assert given == ours.parameters
        schedules = [{"cron": s.schedule.cron, "timezone": s.schedule.timezone} for s in ours.schedules or ()]
        assert one.get("schedules", []) == schedules
        limit = one.get("concurrency_limit", {})
        assert limit.get("limit") == ours.concurrency_limit
        options = ours.concurrency_options
        assert limit.get("collision_strategy") == (options.collision_strategy if options else None)
        env = one["work_pool"]["job_variables"]["env"]
        assert env == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}
    assert not {"password", "secret", "token"} & set(json.dumps(written).lower().split('"'))


def test_published_again_nothing_is_touched_and_what_is_no_longer_asked_for_goes(
    client: SyncPrefectClient, server: ServerProcess
) -> None:
    report.to_deployment("somebody-else's").apply()
    first = publish(client, EMPTY, [LIVER, BRAIN])
    assert set(first.values()) == {"created"}
    assert {"nightly/liver", "check-night/check-liver", "vnet: liver without a night in time"} <= set(first)

    before = call_api(server.url, "/deployments/filter", {})
    again = publish(client, EMPTY, [LIVER, BRAIN])
    assert again == dict.fromkeys(first, "left alone")
    assert call_api(server.url, "/deployments/filter", {}) == before

    later = LIVER.model_copy(update={"cron": "0 2 * * *", "success_by": ""})
    changes = publish(client, EMPTY, [later])
    moved = {name: change for name, change in changes.items() if change != "left alone"}
    assert moved == {
        "nightly/liver": "changed",
        "nightly/brain": "removed",
        "check-night/check-liver": "removed",
        "vnet: liver without a night in time": "removed",
    }
    (schedule,) = call_api(server.url, "/deployments/name/nightly/liver")["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert call_api(server.url, "/deployments/name/sample-report/somebody-else's")["paused"] is False


def test_the_command_gives_a_named_server_the_same_and_says_what_it_did(
    client: SyncPrefectClient, server: ServerProcess, tmp_path: Path
) -> None:
    publish(client, EMPTY, [BRAIN])
    call_api(server.url, "/work_pools/", {"name": "pool", "type": "process"})

    command = [sys.executable, "-m", "flows.cli", "deploy", "--root", str(tmp_path / "root"), "--json"]
    env = environment(tmp_path)
    env.pop("PREFECT_API_URL", None)
    options = ["--api", server.api_url, "--work-pool", "pool"]
    done = subprocess.run([*command, *options], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    changes = json.loads(done.stdout)["changes"]
    assert changes.pop("nightly/brain") == "removed"
    assert changes.pop("vnet: close runs whose process died") == "left alone"
    assert set(changes.values()) == {"changed"}
    made = call_api(server.url, "/deployments/name/nightly/nightly-form")
    assert made["work_pool_name"] == "pool"
    assert made["job_variables"]["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}
    assert set(publish(client, EMPTY, [], "pool").values()) == {"left alone"}
    # and back to those who serve
    assert publish(client, EMPTY, [])["nightly/nightly-form"] == "changed"
    assert set(publish(client, EMPTY, []).values()) == {"left alone"}


def test_a_work_pool_that_does_not_exist_is_told(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", server.api_url)
    with temporary_settings({PREFECT_API_URL: server.api_url}), pytest.raises(ConfigError, match="nowhere") as caught:
        deploy(Session(Root(tmp_path), SITE), server.api_url, "nowhere")
    assert caught.value.code == "prefect.no-work-pool"


def test_without_a_server_the_command_says_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="--api") as caught:
        deploy(Session(Root(tmp_path), SITE), None, None)
    assert caught.value.code == "prefect.no-api"


def runs_of(server: ServerProcess, cohort: str) -> list[dict[str, Any]]:
    of_cohort = {"deployments": {"name": {"any_": [cohort]}}}
    return [run for run in call_api(server.url, "/flow_runs/filter", of_cohort) if not run["auto_scheduled"]]


def test_missed_nights_are_caught_up_by_one_run_where_the_rule_says_so(
    client: SyncPrefectClient, server: ServerProcess, tmp_path: Path
) -> None:
    root = Root(tmp_path)
    # three nights ago, as that of the cohort that waits
    for cohort in ("liver", "brain"):
        begin(root, Night("", cohort, "organs@v1", "", run="gone"), datetime(2026, 1, 7, 1, tzinfo=UTC))
    publish(client, EMPTY, [LIVER, BRAIN])
    assert catch_up(client, root, [LIVER, BRAIN], SITE.timezone, NOON) == ["liver"]
    (run,) = runs_of(server, "liver")
    assert {"catch-up", "vnet"} <= set(run["tags"])
    assert run["parameters"]["rules"]["deadline"] == "06:00"
    assert runs_of(server, "brain") == []
    # served again before the run has begun
    assert catch_up(client, root, [LIVER, BRAIN], SITE.timezone, NOON) == []
    # and while it is under way
    client.set_flow_run_state(run["id"], Running(), force=True)
    assert start_night(client, "liver", "arrival") is False
    assert len(runs_of(server, "liver")) == 1
    client.delete_flow_run(run["id"])
    assert start_night(client, "liver", "arrival", "once") is True
    assert start_night(client, "liver", "arrival", "once") is False
    client.delete_flow_run(runs_of(server, "liver")[0]["id"])
    # a night since then
    begin(root, Night("", "liver", "organs@v1", "", run="gone"), datetime(2026, 1, 10, 1, tzinfo=UTC))
    assert catch_up(client, root, [LIVER], SITE.timezone, NOON) == ["liver"]
