"""Automations on a real server: made once and kept up to date; what they do when a run dies or a night goes wrong."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger

from flows.nights.events import failures_text
from flows.schedules.automations import BLOCK, apply, notification_block, save_block, wanted
from flows.server.process import ORPHANED, ServerProcess
from tests.flows.browser import call_api
from tests.flows.server.test_server import environment, until
from vnet_core.errors import ConfigError
from workers.nights.record import Night
from workers.settings.site import Nightly

LIVER = Nightly(cohort="liver", model="organs", success_by="06:00", most_failures=1)
BRAIN = Nightly(cohort="brain", model="organs")
DEAD = "vnet: close runs whose process died"
LATE = "vnet: liver without a night in time"
MANY = "vnet: liver with too many failures"
LIMIT_S = 120
"""Prefect's services wait their turn on a busy machine."""
EMIT = """
import json, sys
from flows.nights.events import emit_night_events
from workers.nights.record import Night
from workers.settings.site import Nightly
for cohort, night, failed in json.loads(sys.argv[1]):
    rule = Nightly(cohort=cohort, model="organs", most_failures=1)
    states = ["failed"] * failed + ["computed"] * (5 - failed)
    rows = [{"case": str(n), "state": state, "codes": "scan.missing"} for n, state in enumerate(states)]
    emit_night_events(Night(night, cohort, "organs@v1", "", counts={"failed": failed}), rows, rule)
"""
CHECK = """
from flows.checks import check_night
print(check_night("liver", "0 1 * * *", "UTC", return_state=True).name)
"""
RUN = """
import sys
from prefect import tags
from tests.flows.sample_flows import report, stall
with tags(*sys.argv[3:]):
    stall(sys.argv[2]) if sys.argv[1] == "stall" else report("demo", return_state=True)
"""


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what is posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiving)
        self.posted: list[dict[str, str]] = []


class Receiving(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def automations(server: ServerProcess) -> dict[str, dict]:
    return {one["name"]: one for one in call_api(server.url, "/automations/filter", {})}


def test_a_rule_makes_its_automation_and_a_cohort_without_rules_none() -> None:
    assert [one.name for one in wanted([BRAIN], None)] == [DEAD]
    assert [one.name for one in wanted([BRAIN, LIVER], None)] == [DEAD, LATE, MANY]
    assert all(isinstance(one.actions[0], DoNothing) for one in wanted([LIVER], None)[1:])


def test_made_again_they_are_left_alone_and_those_of_others_always(
    client: SyncPrefectClient, server: ServerProcess
) -> None:
    other = AutomationCore(name="vnet: a person's own", trigger=EventTrigger(expect={"x"}), actions=[DoNothing()])
    client.create_automation(other)
    assert apply(client, wanted([LIVER], None)) == dict.fromkeys([DEAD, LATE, MANY], "created")
    before = automations(server)
    assert apply(client, wanted([LIVER], None)) == dict.fromkeys([DEAD, LATE, MANY], "left alone")
    assert automations(server) == before

    # paused in the UI, and the rule has changed: updated, still paused
    client.pause_automation(before[MANY]["id"])
    stricter = LIVER.model_copy(update={"most_failures": 0})
    changes = apply(client, wanted([stricter], None))
    assert changes == {DEAD: "left alone", LATE: "left alone", MANY: "changed"}
    after = automations(server)
    assert after[MANY]["id"] == before[MANY]["id"]
    assert after[MANY]["enabled"] is False
    assert "more failures than 0" in after[MANY]["description"]

    assert apply(client, wanted([BRAIN], None)) == {DEAD: "left alone", LATE: "removed", MANY: "removed"}
    assert set(automations(server)) == {DEAD, other.name}


def test_the_address_is_kept_as_a_secret_and_only_touched_when_it_changes(
    client: SyncPrefectClient, server: ServerProcess
) -> None:
    hook, mail = "http://127.0.0.1:9/secret-word", "json://user:secret-word@127.0.0.1:9/"
    first, change = save_block(client, hook)
    assert change == "created"
    assert save_block(client, hook) == (first, "left alone")
    assert save_block(client, hook.replace(":9", ":10")) == (first, "changed")
    # another kind of block: one is made and the other goes
    second, change = save_block(client, mail)
    assert change == "created"
    assert save_block(client, mail) == (second, "left alone")
    named = {"block_documents": {"name": {"any_": [BLOCK]}}}
    (found,) = call_api(server.url, "/block_documents/filter", named)
    assert "secret-word" not in json.dumps(found)
    assert save_block(client, "") == (None, "removed")
    assert save_block(client, "") == (None, None)
    assert call_api(server.url, "/block_documents/filter", named) == []


@pytest.mark.parametrize(("url", "named"), [("gopher://secret-word", "gopher://"), ("secret-word", "no scheme")])
def test_what_is_no_address_is_refused_without_showing_it(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        notification_block(url)
    assert caught.value.code == "site.notify-url"
    assert "secret-word" not in str(caught.value)


def test_the_sentence_counts_a_case_once_and_names_the_commonest_reasons() -> None:
    night = Night("2026-01-05_010000", "liver", "organs@v1", "")
    rows = [
        *[{"case": "a", "state": "computed", "codes": ""}] * 3,
        *[{"case": case, "state": "failed", "codes": "scan.missing scan.late"} for case in "bc"],
        {"case": "d", "state": "failed", "codes": ""},
        {"case": "e", "state": "refused", "codes": "dicom.x"},
        {"case": "f", "state": "failed", "codes": "night.quarantined scan.missing"},
    ]
    assert failures_text(night, rows, 3) is None
    assert failures_text(night, rows, 2) == (
        "night 2026-01-05_010000 of cohort liver: 3 of 6 cases failed, 2 allowed (2 scan.missing, 1 without a code)"
    )
    assert failures_text(night, [], 0) is None


def test_a_night_with_too_many_failures_is_posted_exactly_once(
    client: SyncPrefectClient, server: ServerProcess, receiver: Receiver, tmp_path: Path
) -> None:
    block, _ = save_block(client, f"http://127.0.0.1:{receiver.server_port}/hook")
    made = wanted([LIVER], block)
    assert isinstance(made[2].actions[0], SendNotification)
    apply(client, made)
    # one within the rule, one of another cohort, and two that are told
    nights = [["liver", "n1", 1], ["brain", "n2", 4], ["liver", "n3", 2], ["liver", "n4", 5]]
    env = environment(tmp_path, PREFECT_API_URL=server.api_url)
    subprocess.run([sys.executable, "-c", EMIT, json.dumps(nights)], env=env, check=True)

    def fired() -> int:
        asked = {"filter": {"event": {"name": ["prefect.automation.triggered"]}}, "limit": 50}
        events = call_api(server.url, "/events/filter", asked)["events"]
        return sum(one["resource"]["prefect.resource.name"] == MANY for one in events)

    until(lambda: len(receiver.posted) >= 2 and fired() >= 2, LIMIT_S)
    assert fired() == 2
    assert sorted(one["text"] for one in receiver.posted) == [
        "Cohort liver has a night with more failures than 1.\n"
        f"night {night} of cohort liver: {failed} of 5 cases failed, 1 allowed ({failed} scan.missing)"
        for night, failed in (("n3", 2), ("n4", 5))
    ]


def test_the_look_for_a_night_that_is_missing_fails_and_is_posted_once(
    client: SyncPrefectClient, server: ServerProcess, receiver: Receiver, tmp_path: Path
) -> None:
    block, _ = save_block(client, f"http://127.0.0.1:{receiver.server_port}/hook")
    apply(client, wanted([LIVER], block))
    env = environment(tmp_path, PREFECT_API_URL=server.api_url, VNET_ROOT=str(tmp_path / "root"))
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "Failed\n"
    until(lambda: receiver.posted, LIMIT_S)
    (posted,) = receiver.posted
    assert posted["subject"] == "Cohort liver has no night that ended well by 06:00."
    assert re.search(
        r"the night of cohort liver that was due at \d{4}-\d\d-\d\d 01:00 UTC has not begun", posted["text"]
    )


def test_a_run_without_heartbeats_is_closed_and_one_that_ended_or_is_not_ours_is_not(
    client: SyncPrefectClient, server: ServerProcess, tmp_path: Path
) -> None:
    apply(client, wanted([], None, silence_s=10))
    env = environment(tmp_path, PREFECT_API_URL=server.api_url)
    assert env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    started = {}
    for name, *what in (("ours", "vnet"), ("theirs",)):
        command = [sys.executable, "-c", RUN, "stall", str(tmp_path / name), *what]
        started[name] = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-c", RUN, "report", "", "vnet"], env=env, check=True, capture_output=True)
    until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text("utf-8") for name in started), LIMIT_S)
    for name, process in started.items():
        os.kill(int((tmp_path / name).read_text("utf-8")), signal.SIGKILL)
        process.kill()
        process.wait()

    def state(tag: list[str], flow: str) -> dict:
        named = {"flow_runs": {}, "flows": {"name": {"any_": [flow]}}}
        (run,) = (run for run in call_api(server.url, "/flow_runs/filter", named) if run["tags"] == tag)
        return run["state"]

    until(lambda: state(["vnet"], "sample-stall")["type"] != "RUNNING", LIMIT_S)
    assert state(["vnet"], "sample-stall")["type"] == "CRASHED"
    assert state(["vnet"], "sample-stall")["message"] == ORPHANED
    assert state([], "sample-stall")["type"] == "RUNNING"
    assert state(["vnet"], "sample-report")["name"] == "CompletedWithFailures"
