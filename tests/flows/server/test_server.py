"""The local server, found, started, stopped, killed; its UI in a browser; runs asked for by form."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.schedules.serving import LOOK_S
from flows.server.api import check_api
from flows.server.process import ORPHANED, ServerProcess, running_server, start_server
from flows.server.settings import prefect_environment
from tests.flows.browser import (
    call_api,
    open_artifact,
    open_browser,
    run_deployment_from_form,
    screenshot,
    wait_for_run,
)
from vnet_core.errors import EngineError

REPOSITORY = Path(__file__).resolve().parents[3]
SERVE = """
import os
from prefect.flows import EntrypointType
from flows.schedules.serving import serve_until_stopped
from tests.flows.engine_flows import engines
from tests.flows.sample_flows import report, stall
flows = (report, stall, engines)
deployments = [flow.to_deployment("local", entrypoint_type=EntrypointType.MODULE_PATH) for flow in flows]
serve_until_stopped(deployments, os.environ["PREFECT_API_URL"], grace_s=4)
print("stopped")
"""
PRIVATE = """
import json, os, sys
from pathlib import Path
from flows.server.settings import prefect_environment
from flows.server.process import local_api
home = Path(sys.argv[1])
os.environ.update(prefect_environment(home))
with local_api(home) as api:
    os.environ["PREFECT_API_URL"] = api.url
    from tests.flows.sample_flows import report, stall
    api.wait_until_ready()
    if sys.argv[2] == "stall":
        stall(sys.argv[3])
    state = report("demo", return_state=True)
print(json.dumps({"state": state.name, "message": state.message, "server": api.server is not None}))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, **prefect_environment(home), "PYTHONPATH": str(REPOSITORY), **more}


def until(condition, timeout_s: float = 30):
    """The first true value of ``condition()``."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return value


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def home(prefect_home: Callable[[Path], Path], tmp_path: Path) -> Path:
    return prefect_home(tmp_path / "home")


@pytest.fixture(scope="module")
def served(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    home = tmp_path_factory.mktemp("runner")
    env = environment(home, PREFECT_API_URL=server.api_url)
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], cwd=home, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        until(lambda: len(call_api(server.url, "/deployments/filter", {})) == 3 or process.poll() is not None)
        yield process
        process.kill()


def test_importing_the_modules_does_not_import_prefect() -> None:
    modules = "flows.server.api, flows.server.settings, flows.server.process, flows.server.app"
    code = f"import {modules}, sys; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(REPOSITORY)).returncode == 0


class Teapot(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


def test_an_api_that_does_not_answer_is_named_in_time(server: ServerProcess) -> None:
    check_api(server.api_url, 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        began = time.monotonic()
        with pytest.raises(EngineError, match=silent_url) as caught:
            check_api(silent_url, 0.5)
        assert time.monotonic() - began < 1.5
        assert caught.value.code == "prefect.unreachable"
    with pytest.raises(EngineError, match="refused"):
        check_api(silent_url, 5)
    with pytest.raises(EngineError, match="404"):
        check_api(server.url, 5)
    with pytest.raises(EngineError, match="unknown url type"):
        check_api("nowhere:4200/api", 5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Teapot) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(EngineError, match="no Prefect API"):
            check_api(f"http://127.0.0.1:{other.server_port}/api", 5)
        other.shutdown()


def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} .*choose another") as caught:
            start_server(tmp_path, port)
    assert caught.value.code == "prefect.port-busy"
    assert not list(tmp_path.rglob("*.json"))


def test_a_number_that_is_no_port_is_refused_likewise(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"port 65536 on .*, up to 65535") as caught:
        start_server(tmp_path, 65536)
    assert caught.value.code == "prefect.port-busy"


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/x.db")
    with pytest.raises(EngineError, match="unable to open database file") as caught:
        start_server(tmp_path / "home", 0)
    assert caught.value.code == "prefect.server-start"
    assert not list(tmp_path.rglob("*.json"))


def test_a_running_server_is_found_and_a_stale_record_is_not(server: ServerProcess, tmp_path: Path) -> None:
    home = server.log_path.parent
    assert running_server(home) == server.api_url
    assert running_server(tmp_path) is None
    (tmp_path / "servers").mkdir()
    (record,) = (home / "servers").glob("*.json")
    reused = json.loads(record.read_text("utf-8")) | {"started": 1.0}
    (tmp_path / "servers" / "1.json").write_text(json.dumps(reused))
    (tmp_path / "servers" / "2.json").write_text("{")
    assert running_server(tmp_path) is None


def test_pages_of_other_sites_cannot_use_the_api(server: ServerProcess) -> None:
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])

    def ask(request: str, *headers: str) -> str:
        with socket.create_connection((host, port)) as connection:
            lines = [f"{request} HTTP/1.1", *headers]
            connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            return connection.recv(4096).decode().partition("\r\n")[0]

    here, stranger = f"Host: {host}:{port}", "Origin: http://example.org"
    assert " 200 " in ask("GET /api/admin/version", here)
    assert " 200 " in ask("GET /api/admin/version", here, f"Origin: http://{host}:{port}")
    assert " 403 " in ask("GET /api/admin/version", here, stranger)
    preflight = "Access-Control-Request-Method: POST"
    assert " 403 " in ask("OPTIONS /api/flow_runs/filter", here, stranger, preflight)
    socket_headers = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert " 101 " in ask("GET /api/events/in", here, *socket_headers)
    assert " 403 " in ask("GET /api/events/in", here, stranger, *socket_headers)
    assert " 400 " in ask("GET /api/admin/version", "Host: rebound.example.org")


def group_of(pid: int) -> int | None:
    """The process group; None of a process that has just ended."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def test_a_stopped_server_leaves_nothing(home: Path) -> None:
    server = start_server(home, 0)
    port = int(server.url.rpartition(":")[2])
    assert running_server(home) == server.api_url
    server.stop()
    assert not server.alive
    assert [pid for pid in psutil.pids() if group_of(pid) == server.pid] == []
    assert running_server(home) is None
    with socket.create_server(("127.0.0.1", port)):
        server.stop()  # harmless


def test_a_private_server_ends_with_its_process_and_the_next_one_closes_its_run(home: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = [sys.executable, "-c", PRIVATE, str(home)]
    env = environment(home)
    with subprocess.Popen([*command, "stall", str(marker)], env=env, stderr=subprocess.DEVNULL) as killed:
        until(lambda: marker.exists() and marker.read_text("utf-8"))
        (record,) = (home / "servers").glob("*.json")
        assert running_server(home) is None  # private
        killed.send_signal(signal.SIGKILL)
    psutil.Process(int(marker.read_text("utf-8"))).kill()
    until(lambda: gone(json.loads(record.read_text("utf-8"))["pid"]))

    again = subprocess.run([*command, "report"], env=env, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == {
        "state": "CompletedWithFailures",
        "message": "1 of 3 cases failed",
        "server": True,
    }
    assert again.stderr == ""
    with start_server(home, 0) as server:
        runs = call_api(server.url, "/flow_runs/filter", {"sort": "START_TIME_ASC"})
        assert [run["state_name"] for run in runs] == ["Crashed", "CompletedWithFailures"]
        tasks = call_api(server.url, "/task_runs/filter", {})
        assert {task["state_name"] for task in tasks} == {"Completed"}
        assert len(tasks) == 3
        assert len(call_api(server.url, "/artifacts/filter", {})) == 2
        logged = call_api(server.url, "/logs/filter", {"logs": {"flow_run_id": {"any_": [runs[1]["id"]]}}})
        assert any("Finished in state CompletedWithFailures" in line["message"] for line in logged)
        shared = subprocess.run([*command, "report"], env=env, capture_output=True, text=True, check=True)
        assert json.loads(shared.stdout)["server"] is False
        assert len(call_api(server.url, "/flow_runs/filter", {})) == 3


@pytest.mark.browser
def test_a_form_runs_a_deployment_and_its_artifacts_show(server: ServerProcess, served: subprocess.Popen[str]) -> None:
    with open_browser() as page:
        sent: list[str] = []
        refused: list[str] = []
        page.on("requestfinished", lambda request: sent.append(request.url))
        page.on("requestfailed", lambda request: sent.append(request.url) if request.failure != "csp" else None)
        page.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
        fields = {"cohort": "liver", "Preset": "vnet", "Labels": ["spleen", "aorta"], "Cases": 4, "Pictures": True}
        run_id = run_deployment_from_form(page, server.url, "sample-report/local", fields)
        run = wait_for_run(server.url, run_id)
        assert run["parameters"] == {
            "cohort": "liver",
            "settings": {"preset": "vnet", "labels": ["spleen", "aorta"], "cases": 4, "pictures": True},
        }
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "CompletedWithFailures")

        page.goto(f"{server.url}/v2/runs/flow-run/{run_id}")
        page.get_by_text("CompletedWithFailures").first.wait_for()

        artifact = open_artifact(page, server.url, "sample-volumes")
        assert artifact["flow_run_id"] == run_id
        headings = page.get_by_role("columnheader").all_inner_texts()
        assert headings == ["case", "label", "model", "volume_ml"]
        assert page.get_by_role("row").nth(3).get_by_role("cell").all_inner_texts() == [
            "liver-1",
            "spleen",
            "vnet",
            "1.5",
        ]

        open_artifact(page, server.url, "sample-report")
        page.get_by_role("heading", name="Night of liver").wait_for()
        assert page.get_by_role("cell", name="1.5").is_visible()
        size = "img => [img.naturalWidth, img.naturalHeight]"
        assert page.get_by_alt_text("overlay").evaluate(size) == [64, 48]
        assert page.get_by_alt_text("outside").evaluate(size) == [0, 0]
        screenshot(page, "sample-report")
        assert [url for url in sent if not url.startswith((server.url, "data:", "blob:"))] == []
        assert all("amplitude" in text or "198.51.100.1" in text for text in refused), refused


def start_run(server: ServerProcess, deployment_name: str, **parameters: object) -> str:
    """Ask for a run of ``flow/deployment`` now; its id."""
    deployment = call_api(server.url, f"/deployments/name/{deployment_name}")
    asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return call_api(server.url, f"/deployments/{deployment['id']}/create_flow_run", asked)["id"]


def state_of(server: ServerProcess, run_id: str) -> dict:
    return call_api(server.url, f"/flow_runs/{run_id}")["state"]


def family_of(served: subprocess.Popen[str], run_id: str) -> tuple[psutil.Process, set[psutil.Process]]:
    """The process of a run, and everything that it has started."""
    for child in psutil.Process(served.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("PREFECT__FLOW_RUN_ID") == run_id:
                return child, {child, *child.children(recursive=True)}
    raise AssertionError("the run has no process")


def alive(family: set[psutil.Process]) -> list[str]:
    return [one.name() for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_cancelled_run_ends_with_its_engines_and_so_does_one_whose_process_is_killed(
    server: ServerProcess, served: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Ray, Dask and a child in a session of its own, within 30 s, and a killed run is Crashed within a minute."""
    for ending, final, limit_s in (("cancelled", "CANCELLED", 30), ("killed", "CRASHED", 30)):
        marker = tmp_path / ending
        run_id = start_run(server, "engines/local", marker=str(marker))
        until(marker.exists, 120)
        run, family = family_of(served, run_id)
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
        assert len(family) > 6
        # one look of the keeper's, by which it knows the engines
        time.sleep(LOOK_S + 1)
        if ending == "cancelled":
            call_api(server.url, f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
        else:
            run.kill()
        until(lambda f=family, i=run_id, t=final: not alive(f) and state_of(server, i)["type"] == t, limit_s)
        left = [p.pid for p in psutil.process_iter() if environ_of(p).get("PREFECT__FLOW_RUN_ID") == run_id]
        assert left == []


def environ_of(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def test_a_cancelled_run_that_will_not_end_is_killed_and_still_cancelled(
    server: ServerProcess, served: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Its grace is 4 s here; Prefect alone would wait for 30 s."""
    run_id = start_run(server, "sample-stall/local", marker=str(tmp_path / "marker"), cleaning_s=300)
    until(lambda: (tmp_path / "marker").exists() and (tmp_path / "marker").read_text("utf-8"), 60)
    _, family = family_of(served, run_id)
    assert len(family) == 2
    call_api(server.url, f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    began = time.monotonic()
    until(lambda: not alive(family), 20)
    assert time.monotonic() - began > 3
    until(lambda: state_of(server, run_id)["type"] == "CANCELLED", 20)
    assert (tmp_path / "marker").read_text("utf-8").count("\n") == 1, "it has cleaned up after all"


def test_serving_stops_runs_in_good_order(server: ServerProcess, served: subprocess.Popen[str], tmp_path: Path) -> None:
    markers = {"willing": tmp_path / "willing", "stubborn": tmp_path / "stubborn"}
    run_ids = {}
    for name, marker in markers.items():
        cleaning_s = 300 if name == "stubborn" else 0
        run_ids[name] = start_run(server, "sample-stall/local", marker=str(marker), cleaning_s=cleaning_s)
    until(lambda: all(marker.exists() and marker.read_text("utf-8") for marker in markers.values()))
    family = psutil.Process(served.pid).children(recursive=True)
    grandchildren = {name: int(marker.read_text("utf-8")) for name, marker in markers.items()}
    assert set(grandchildren.values()) < {process.pid for process in family}

    served.send_signal(signal.SIGTERM)
    out, err = served.communicate(timeout=30)

    assert (served.returncode, out) == (0, "stopped\n"), err
    assert markers["willing"].read_text("utf-8") == f"{grandchildren['willing']}\ncleaned\n"
    assert markers["stubborn"].read_text("utf-8") == f"{grandchildren['stubborn']}\n"
    until(lambda: all(gone(process.pid) for process in family), 5)
    willing, stubborn = (state_of(server, run_ids[name]) for name in markers)
    assert (willing["name"], willing["message"]) == ("Crashed", "Execution was aborted by a termination signal.")
    # either the server finds that it is gone, or the runner is there to see it go
    assert stubborn["name"] == "Crashed"
    assert stubborn["message"] == ORPHANED or "status code: -9" in stubborn["message"]
    assert call_api(server.url, "/deployments/name/sample-stall/local")["paused"] is False
