"""``vnet fsck``, ``gc``, ``doctor`` and ``metrics`` as they are typed: their words, documents and exit codes."""

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows.cli import main
from flows.commands.care import told
from flows.server.process import ServerProcess
from flows.server.settings import prefect_environment
from tests.files import file_of
from tests.flows.browser import call_api
from tests.walkthrough import REPOSITORY, environment, take_ctrl_c
from tests.workers.small_root import COHORT, PLAN, add_night, age, case_of, small_root
from workers.care.doctor import Check
from workers.cohort import volume_key
from workers.ledger import Outcome
from workers.storage.store import Root

STARTED = datetime.now(UTC).replace(microsecond=0) - timedelta(days=40)
LAST = STARTED + timedelta(days=38)
Vnet = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Nights 40 and 2 days ago, of the same results."""
    root = small_root(tmp_path / "root", STARTED)
    (a,), (b,) = (root.names(f"results/{COHORT}/{case}") for case in "ab")
    keys = {"a": f"results/{COHORT}/a/{a}", "b": f"results/{COHORT}/b/{b}"}
    add_night(root, LAST, [Outcome(case, "segment", "cached", key=key) for case, key in keys.items()])
    age(root, "", STARTED)
    return root


@pytest.fixture
def vnet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Vnet]:
    """Exit code, text and document of a command that is run twice in this process, the second time with --json."""
    variables, log = dict(os.environ), logging.getLogger("vnet")
    handlers, propagate = list(log.handlers), log.propagate
    for name in variables:
        if name.startswith(("VNET_", "PREFECT_")):
            monkeypatch.delenv(name)

    def call(*arguments: str | Path) -> tuple[int, str, dict[str, Any]]:
        words = [str(argument) for argument in arguments]
        code, text = main(words), capsys.readouterr().out
        assert main([*words, "--json"]) in (code, 0)
        return code, text, json.loads(capsys.readouterr().out)

    yield call
    os.environ.clear()
    os.environ.update(variables)
    log.handlers, log.propagate = handlers, propagate


# --- fsck


def test_fsck_of_a_clean_root(vnet: Vnet, root: Root) -> None:
    code, text, document = vnet("fsck", "--root", root.home)
    assert code == 0
    assert text.startswith("5 objects, ")
    assert text.endswith(": nothing is wrong\n")
    assert (document["findings"], document["objects"], document["counts"]) == ([], 5, {"accepted": 1})
    assert document["bytes"] > 0


def test_fsck_names_what_is_wrong_and_repairs_what_it_may(vnet: Vnet, root: Root) -> None:
    key = volume_key(case_of("a"), PLAN)
    root.put(f"{key}/zarr.json", b"{}")
    root.put(f"nights/{COHORT}/2026-01-01_000000.json", b"")
    code, text, document = vnet("fsck", "--root", root.home)
    assert code == 3
    assert (
        f"{key}  fsck.changed: zarr.json has 2 bytes that are not those of the receipt (SHA-256)\n    run vnet" in text
    )
    assert [(f["key"], f["code"]) for f in document["findings"]] == [
        (f"nights/{COHORT}/2026-01-01_000000.json", "fsck.night"),
        (f"reports/{COHORT}/2026-01-01_000000.parquet", "fsck.no-rows"),
        (key, "fsck.changed"),
    ]
    assert document["counts"] == {"accepted": 1, "failed": 3}
    code, text, document = vnet("fsck", "--repair", "--root", root.home)
    assert code == 3
    assert "removed; the next night that needs it makes it again" in text
    assert text.endswith("2 findings, 1 repaired\n")
    assert not file_of(root, key).exists()
    root.delete(f"nights/{COHORT}/2026-01-01_000000.json")
    assert vnet("fsck", "--root", root.home)[0] == 0


def test_fsck_of_a_cohort_that_is_not_there(root: Root, vnet: Vnet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", "--cohort", "other", "--root", str(root.home)]) == 2
    assert "cohort.unknown" in capsys.readouterr().err


# --- gc


def test_gc_says_what_would_go_and_then_lets_it_go(vnet: Vnet, root: Root) -> None:
    root.put(f"logs/{COHORT}/{STARTED:%Y-%m-%d_%H%M%S}.jsonl", bytes(2_000_000))
    before = sorted(root.home.rglob("*"))
    rules = ("gc", "--nights-days", "30", "--root", root.home)
    code, text, document = vnet(*rules, "--dry-run")
    assert sorted(root.home.rglob("*")) == before
    night = f"nights/{COHORT}/{STARTED:%Y-%m-%d_%H%M%S}"
    assert code == 0
    assert text.splitlines()[:2] == ["night: 1, 2.0 MB", f"  {night}  2.0 MB, 40 days old, nights stay 30"]
    assert text.endswith("1 things with 2.0 MB would go, and 0 older versions of artifacts\n")
    (gone,) = document["gone"]
    assert (gone["key"], gone["kind"], document["bytes"]) == (night, "night", gone["bytes"])
    assert document["rules"]["nights_days"] == 30
    code, text, document = vnet(*rules)
    assert text.endswith("1 things with 2.0 MB went, and 0 older versions of artifacts\n")
    assert document["gone"] == []
    assert not file_of(root, f"{night}.json").exists()


def test_gc_without_rules_keeps_everything_and_says_so(vnet: Vnet, root: Root) -> None:
    code, text, document = vnet("gc", "--root", root.home)
    assert (code, document["gone"]) == (0, [])
    assert "no rule was given" in text


@pytest.mark.parametrize("option", ["--nights-days=0", "--results-days=-1", "--grace-hours=nan", "--spares-days=x"])
def test_gc_refuses_a_rule_that_is_none(option: str, root: Root, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gc", option, "--root", str(root.home)])
    assert caught.value.code == 2
    assert "is not 1 or more" in capsys.readouterr().err


# --- metrics


def test_metrics_are_printed(vnet: Vnet, root: Root) -> None:
    code, text, document = vnet("metrics", "--root", root.home)
    assert code == 0
    for shown in (text, document["metrics"]):
        found = {family.name: family for family in text_string_to_metric_families(shown)}
        (cached,) = [s.value for s in found["vnet_cases"].samples if s.labels["state"] == "cached"]
        assert cached == 2


def test_metrics_are_served_on_this_machine_until_the_command_is_stopped(
    vnet: Vnet, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vnet", "metrics", "--port", "0", "--root", str(root.home)]
    pipe = subprocess.PIPE
    streams = {"stderr": pipe, "stdout": pipe, "text": True}
    with subprocess.Popen(command, **streams, env=environment(), preexec_fn=take_ctrl_c) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = line.split()[0]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url) as response:
            assert "vnet_last_success_timestamp_seconds" in response.read().decode()
        port = int(url.rpartition(":")[2].partition("/")[0])
        assert main(["metrics", "--port", str(port), "--root", str(root.home)]) == 2
        assert "metrics.port-busy" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


# --- doctor

SITE = """
timezone = "{zone}"
[[nightly]]
cohort = "liver"
model = "organs"
cron = "{cron}"
"""


def test_doctor_finds_faults_that_stop_every_other_command(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("rooot = 5")
    (tmp_path / "file").write_text("")
    named = ["--site", str(tmp_path / "site.toml"), "--root", str(tmp_path / "file" / "root")]
    done = subprocess.run(["vnet", "doctor", "--json", *named], capture_output=True, text=True, env=environment())
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    state = {check["name"]: check["state"] for check in document["checks"]}
    assert (state["site file"], state["root"], state["python"]) == ("bad", "bad", "ok")
    assert document["counts"]["failed"] == sum(check["state"] == "bad" for check in document["checks"])


def test_what_the_doctor_says() -> None:
    checks = [Check("root", "ok", "it can be written"), Check("site file", "bad", "it is no TOML", "correct it")]
    lines = [
        "ok       root       it can be written",
        "bad      site file  it is no TOML",
        "                    correct it",
        "1 ok, 1 bad",
    ]
    assert told(checks) == "\n".join(lines)


DIAGNOSE = """
import json, os, sys
from datetime import datetime
from pathlib import Path
from flows.commands import doctor
from workers.settings.site import load_site
from workers.storage.store import Root

def diagnose(root, site, now, url):
    root, site, now = Root(root), load_site(site), datetime.fromisoformat(now)
    os.environ.pop("PREFECT_API_URL", None)
    os.environ |= {"PREFECT_API_URL": url} if url else {}
    found = doctor.examined("schedules", lambda: doctor.schedules(site))
    found += doctor.examined("prefect", lambda: doctor.prefect(root, site))
    found += doctor.examined("night liver", lambda: doctor.last_night(root, site, "liver", now))
    return {check.name: [check.state, check.found, check.remedy] for check in found}

print(json.dumps([diagnose(*asked) for asked in json.load(sys.stdin)]))
"""


def run(program: str, asked: object, home: Path) -> Any:
    """What a program, which may import Prefect, prints as JSON when it is asked in JSON."""
    command = [sys.executable, "-c", program]
    env = {**environment(), **prefect_environment(home), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_doctor_of_schedules_their_nights_and_the_server(root: Root, server: ServerProcess, tmp_path: Path) -> None:
    def asked(cron: str, now: datetime, url: str = "", zone: str = "Europe/Berlin") -> list[str]:
        site = tmp_path / f"site-{len(list(tmp_path.iterdir()))}.toml"
        site.write_text(SITE.format(cron=cron, zone=zone))
        return [str(root.home), str(site), now.isoformat(), url]

    now = datetime.now(UTC)
    alone, gone, served, well = run(
        DIAGNOSE,
        [
            asked("0 1 * * *", now),
            asked("0 25 * * *", now, "http://127.0.0.1:9/api"),
            asked("0 1 * * *", now, server.api_url),
            # three hours after the second night was due and began
            asked(f"{LAST:%M} {LAST:%H} * * *", LAST + timedelta(hours=3), zone="UTC"),
        ],
        tmp_path / "prefect",
    )
    assert alone["schedules"] == ["ok", "1 cohorts in Europe/Berlin time", ""]
    assert alone["prefect"][0] == "warning"
    assert "vnet serve" in alone["prefect"][2]
    state, found, _ = alone["night liver"]
    assert state == "warning"
    assert found.startswith(f"{LAST:%Y-%m-%d_%H%M%S}, 48 h ago: 2 cached; the night of cohort liver that was due at")
    assert found.endswith("has not begun")
    assert gone["schedules"][0] == "bad"
    assert "'0 25 * * *'" in gone["schedules"][1]
    assert gone["prefect"][0] == "bad"
    assert "does not answer" in gone["prefect"][1]
    assert served["prefect"][0] == "ok"
    assert served["deployments"][:2] == [
        "warning",
        "1 of 1 are missing or paused in the server: nightly/liver",
    ]
    assert served["automations"][0] == "warning"
    assert well["night liver"] == ["ok", f"{LAST:%Y-%m-%d_%H%M%S}, 3 h ago: 2 cached", ""]


# --- older versions of artifacts

PRUNE = """
import json, sys
from datetime import datetime
from flows.server.pruning import old_versions, prune
url, times = json.load(sys.stdin)
nows = map(datetime.fromisoformat, times)
print(json.dumps([[old_versions(url, 30, now), prune(url, 30, now), old_versions(url, 30, now)] for now in nows]))
"""
KEYS = ("night-liver", "volumes-liver", "query-reports", "model-midnight-ct")


def versions(url: str) -> dict[str, list[str]]:
    """Data of every version by key, newest first."""
    found = {}
    for key in KEYS:
        asked = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
        found[key] = [artifact["data"] for artifact in call_api(url, "/artifacts/filter", asked)]
    return found


def test_older_versions_of_artifacts_go_and_the_newest_stays(server: ServerProcess, tmp_path: Path) -> None:
    """More of them than are read at once; the server itself looks for keys anywhere in a text."""
    flow = call_api(server.url, "/flows/", {"name": "nightly"})["id"]
    running = {"type": "RUNNING"}
    for number in range(12):
        run_id = call_api(server.url, "/flow_runs/", {"flow_id": flow, "state": {"type": "PENDING"}})["id"]
        call_api(server.url, f"/flow_runs/{run_id}/set_state", {"state": running, "force": True})
        for key in KEYS if number > 9 else KEYS[:1]:
            body = {"key": key, "type": "markdown", "data": f"{key} {number}", "flow_run_id": run_id}
            call_api(server.url, "/artifacts/", body)
    before, now = versions(server.url), datetime.now(UTC)
    assert [len(found) for found in before.values()] == [12, 2, 2, 2]
    later = now + timedelta(days=31)
    found = run(PRUNE, [server.api_url, [now.isoformat(), later.isoformat()]], tmp_path)
    assert found == [[0, 0, 0], [13, 13, 0]]
    after = versions(server.url)
    assert after.pop("model-midnight-ct") == before["model-midnight-ct"]
    assert after == {key: [f"{key} 11"] for key in KEYS[:3]}


def test_gc_asks_the_server_that_is_named(root: Root, server: ServerProcess) -> None:
    command = ["vnet", "gc", "--artifacts-days", "1", "--json", "--root", str(root.home)]
    env = {**environment(), "PREFECT_API_URL": server.api_url}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifact_versions"] == 0
    assert not (root.home / "prefect" / "prefect.db").exists(), "no server of its own was started"
