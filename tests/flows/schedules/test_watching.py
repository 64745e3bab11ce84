"""The new-file trigger under a real server: one run for what has arrived, when it is whole."""

import http.server
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.schedules.watching import Watch
from flows.server.process import ServerProcess, start_server
from tests.flows.browser import call_api
from tests.flows.server.test_server import environment, until
from workers.cohort import Cohort, save_cohort
from workers.settings.site import Nightly
from workers.storage.store import Root

QUIET_S = 3.0
LIMIT_S = 120
WATCHED = Nightly(cohort="liver", model="organs", watch=True, watch_quiet_s=QUIET_S)
SERVE = """
import logging, os, sys
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.flows import EntrypointType
from flows.schedules.serving import serve_until_stopped
from flows.schedules.watching import Watch
from tests.flows.engine_flows import night
from workers.settings.site import Nightly
from workers.storage.store import Root
logging.getLogger("vnet").setLevel("INFO")
logging.getLogger("vnet").addHandler(logging.StreamHandler())
watched = Nightly.model_validate_json(sys.argv[2])
made = night.to_deployment(
    "liver",
    parameters={"cohort": "liver", "folder": sys.argv[3], "seconds": 6},
    tags=["vnet"],
    concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    entrypoint_type=EntrypointType.MODULE_PATH,
)
with Watch(Root(sys.argv[1]), [watched]):
    serve_until_stopped([made], os.environ["PREFECT_API_URL"], grace_s=4)
"""


@pytest.fixture
def server(prefect_home: Callable[[Path], Path], tmp_path: Path) -> Iterator[ServerProcess]:
    with start_server(prefect_home(tmp_path / "prefect"), 0) as started:
        yield started


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A cohort whose sources are the folder ``scans``."""
    (tmp_path / "scans").mkdir()
    root = Root(tmp_path / "vnet-data")
    save_cohort(root, Cohort("liver", (str(tmp_path / "scans"),), ("image",), ()))
    return root


def test_files_that_arrive_start_one_run_and_later_ones_the_next(
    server: ServerProcess, root: Root, tmp_path: Path
) -> None:
    def runs() -> list[dict]:
        return call_api(server.url, "/flow_runs/filter", {"sort": "START_TIME_ASC"})

    scan = tmp_path / "scans" / "a.nii"
    env = environment(tmp_path, PREFECT_API_URL=server.api_url)
    command = [sys.executable, "-c", SERVE, str(root.home), WATCHED.model_dump_json(), str(tmp_path)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log) as process,
    ):
        try:
            until(lambda: "watching the sources of cohort liver" in (tmp_path / "log").read_text("utf-8"), LIMIT_S)
            until(lambda: call_api(server.url, "/deployments/filter", {}), LIMIT_S)
            scan.write_bytes(b"half")
            time.sleep(QUIET_S / 2)  # the sender takes its time
            scan.write_bytes(b"half and half")
            whole = time.time()
            until(runs, LIMIT_S)
            assert time.time() - whole >= QUIET_S - 0.2
            until(lambda: runs()[0]["state_type"] == "RUNNING", LIMIT_S)
            # comes while a run is under way, which may have looked already
            (tmp_path / "scans" / "b.nii").write_bytes(b"another")
            until(lambda: len(runs()) > 1, LIMIT_S)
            until(lambda: all(run["state_type"] == "COMPLETED" for run in runs()), LIMIT_S)
            # and nothing more comes of either
            time.sleep(2 * QUIET_S)
        finally:
            process.terminate()
            process.wait(30)
    assert all({"arrival", "vnet"} <= set(run["tags"]) for run in runs())
    told = [line.split() for line in (tmp_path / "runs").read_text("utf-8").splitlines()]
    assert len(told) == len(runs()) == 2
    (_, _, first_end), (_, second_start, _) = told
    assert float(first_end) < float(second_start)


class Troubled(http.server.BaseHTTPRequestHandler):
    """An API in trouble, which counts what it is asked."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the program's log says, heard by a handler of the test's own: other tests may have added theirs."""
    log, heard = logging.getLogger("vnet"), list[str]()
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield heard
    log.removeHandler(handler)
    log.setLevel(level)


def test_an_api_in_trouble_is_asked_again_and_that_is_said_once(root: Root, tmp_path: Path, told: list[str]) -> None:
    quick = WATCHED.model_copy(update={"watch_quiet_s": 0.3})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Troubled) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{api.server_port}/api"
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}), Watch(root, [quick]):
            until(lambda: any("watching the sources" in line for line in told))
            (tmp_path / "scans" / "a.nii").write_bytes(b"scan")
            until(lambda: Troubled.asked >= 5)
        api.shutdown()
    assert sum("trying again" in line for line in told) == 1
    assert "a.nii" not in "".join(told)


def test_without_a_watched_cohort_nothing_runs(root: Root) -> None:
    with Watch(root, []):
        pass
