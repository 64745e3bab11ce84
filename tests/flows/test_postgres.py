"""A Prefect server on PostgreSQL with a login: who may ask it, nights that report to it, its work pool, its death."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.server.api import check_api, post
from tests.flows.command import Command, receipts, until
from tests.flows.conftest import TINY_CASES
from tests.flows.test_night_engine import nightly
from tests.patience import slowness
from tests.postgres import AUTH, PASSWORD, PrefectServer, postgres, prefect_server
from tests.walkthrough import environment
from vnet_core.errors import EngineError
from workers.engines.clusters import processors

pytestmark = pytest.mark.slow


Start = Callable[..., Command]
BIN = Path(sys.executable).parent
SECRETS = (AUTH, AUTH.partition(":")[2], PASSWORD)
END_S = 60.0
"""How long a night may go on after the death of its server."""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres() as address:
        yield address


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(database, tmp_path_factory.mktemp("prefect")) as started:
        yield started


@pytest.fixture
def root(taken_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(taken_in, tmp_path / "root"))


def status(server: PrefectServer, auth: str | None) -> int:
    try:
        server.call("/flow_runs/filter", {}, auth)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_only_who_has_the_login_is_answered(server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [status(server, auth) for auth in (None, "keeper:wrong", AUTH)] == [401, 401, 200]
    assert server.call("/health", auth=None) is True, "for those that look whether it lives"
    for auth, words in ((None, "requests without a login"), ("keeper:wrong", "PREFECT_API_AUTH_STRING of this")):
        if auth is None:
            monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
        else:
            monkeypatch.setenv("PREFECT_API_AUTH_STRING", auth)
        for ask in (lambda: check_api(server.api_url, 10), lambda: post(f"{server.api_url}/flow_runs/filter", {})):
            with pytest.raises(EngineError, match=f"{server.api_url}.*refuses.*{words}") as caught:
                ask()
            assert caught.value.code == "prefect.refused"
            assert "wrong" not in caught.value.message.partition("refuses")[0]
            assert "keeper" not in caught.value.message
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", AUTH)
    check_api(server.api_url, 10)
    assert isinstance(post(f"{server.api_url}/flow_runs/filter", {}), list)


def test_a_night_without_the_login_ends_before_any_work(vnet: Start, server: PrefectServer, root: Path) -> None:
    command = vnet(*nightly(), root=root, PREFECT_API_URL=server.api_url)
    assert command.wait(60) == 2
    assert json.loads(command.out)["error"]["code"] == "prefect.refused"
    assert "Traceback" not in command.err
    assert not (root / "results").exists()


# --- a night on clusters whose machines know nothing of Prefect


def engine_environment(folder: Path) -> dict[str, str]:
    """What the machines of Dask and Ray have: no setting of Prefect."""
    token = folder / "ray-token"
    if not token.exists():
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
    return environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[psutil.Process]]]:
    """Addresses of a Dask and a Ray cluster as lines of a site file, and the processes that were there at the start."""
    folder = tmp_path_factory.mktemp("engines")
    # sockets have short names
    ray_folder = Path(tempfile.mkdtemp(prefix="vnet-", dir="/tmp"))
    env = engine_environment(folder)
    dask = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    file = folder / "scheduler.json"
    commands = [
        [str(BIN / "dask"), "scheduler", *dask, "--port", "0", "--scheduler-file", str(file)],
        [str(BIN / "dask"), "worker", *dask, "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny"],
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--port", "0", "--node-ip-address", "127.0.0.1"),
            *("--num-cpus", str(processors()), "--include-dashboard", "false"),
            *("--object-store-memory", str(128 << 20), "--temp-dir", str(ray_folder)),
        ],
    ]
    with contextlib.ExitStack() as running:
        running.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        started = []
        for number, command in enumerate(commands):
            log = running.enter_context((folder / f"log-{number}").open("wb"))
            process = running.enter_context(
                subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            )
            started.append(psutil.Process(process.pid))
            running.callback(kill_family, started[-1])
        scheduler = until(lambda: file.exists() and json.loads(file.read_text("utf-8"))["address"], 60)
        ray = until(lambda: gcs_address(folder / "log-2"), 60)
        site = f'dask_address = "{scheduler}"\nray_address = "{ray}"\n'
        yield site, started


def gcs_address(log: Path) -> str:
    """Where the head listens, as it says itself."""
    text = log.read_text("utf-8")
    return text.partition("ray start --address='")[2].partition("'")[0]


def kill_family(parent: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_night_reports_to_it_and_the_machines_of_dask_and_ray_need_no_word_of_it(
    vnet: Start, server: PrefectServer, engines: tuple[str, list[psutil.Process]], root: Path, tmp_path: Path
) -> None:
    lines, started = engines
    site = tmp_path / "site.toml"
    site.write_text(lines)
    ray_variables = {name: value for name, value in started[0].environ().items() if name.startswith("RAY_AUTH")}
    command = vnet(*nightly(), "--site", site, "--verbose", root=root, **server.variables, **ray_variables)
    of_engines: dict[int, tuple[str, list[str]]] = {}

    def look() -> bool:
        """Note what the engines run meanwhile, and whether the night is over."""
        for parent in started:
            for process in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    told = [name for name in process.environ() if name.startswith("PREFECT")]
                    of_engines[process.pid] = (" ".join(process.cmdline()), told)
        return not command.running

    until(look, 300)
    assert command.wait() == 0, command.err
    assert command.states == {f"case{number}": "computed" for number in range(TINY_CASES)}

    assert any("ray::" in line for line, _ in of_engines.values()), "no actor was seen"
    assert {name for _, names in of_engines.values() for name in names} == set()
    assert not [line for line, _ in of_engines.values() if "prefect" in line or "flows.server" in line]
    assert not (root / "prefect" / "prefect.db").exists(), "a server of this machine has been there"
    assert not list((root / "prefect").glob("servers/*"))

    runs = server.call("/flow_runs/filter", {"flows": {"name": {"any_": ["nightly"]}}})
    assert [(run["state_type"], run["parameters"]["cohort"]) for run in runs] == [("COMPLETED", "many")]
    written = [command.out, command.err, server.log.read_text("utf-8")]
    written += [path.read_bytes().decode("latin-1") for path in root.rglob("*") if path.is_file()]
    assert not [secret for secret in SECRETS for text in written if secret in text]


# --- a work pool


def test_a_worker_of_a_process_pool_does_a_run_that_was_asked_for(
    server: PrefectServer, root: Path, tmp_path: Path
) -> None:
    env = environment() | dict(server.variables) | {"PREFECT_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}

    def prefect(*arguments: str) -> None:
        done = subprocess.run(
            [BIN / "prefect", *arguments], env=env, capture_output=True, text=True, timeout=120 * slowness()
        )
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "--type", "process", "nights")
    deploy = [BIN / "vnet", "deploy", "--root", root, "--work-pool", "nights", "--json"]
    done = subprocess.run(deploy, env=env, capture_output=True, text=True, timeout=120 * slowness())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changes"]["nightly/nightly-form"] == "created"

    form = server.call("/deployments/name/nightly/nightly-form")
    asked = {"parameters": {"cohort": "many", "model": "known"}, "state": {"type": "SCHEDULED"}}
    run_id = server.call(f"/deployments/{form['id']}/create_flow_run", asked)["id"]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(
            [BIN / "prefect", "worker", "start", "--pool", "nights"],
            env=env | {"VNET_ROOT": str(root), "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
        )
    try:
        until(lambda: server.call(f"/flow_runs/{run_id}")["state_type"] in ("COMPLETED", "FAILED", "CRASHED"), 180)
        told = (tmp_path / "log").read_text("utf-8")
        assert server.call(f"/flow_runs/{run_id}")["state_type"] == "COMPLETED", told
        assert len(receipts(root)) == TINY_CASES
        assert not [secret for secret in SECRETS if secret in told]
    finally:
        kill_family(psutil.Process(worker.pid))
        worker.wait(30)


# --- its death


def test_a_night_whose_server_dies_ends_within_a_minute_and_the_next_one_finishes_it(
    vnet: Start, database: str, root: Path, tmp_path: Path
) -> None:
    with prefect_server(database, tmp_path) as server:
        command = vnet(*nightly(), root=root, **server.variables)
        command.until(lambda: receipts(root))
        server.kill()
        died = time.monotonic()
        command.wait(END_S)
        until(command.over, END_S - (time.monotonic() - died) / slowness() + 1)
    done = receipts(root)
    with prefect_server(database, tmp_path) as server:
        again = vnet(*nightly(), root=root, **server.variables)
        assert again.wait() == 0, again.err
    assert again.states.keys() == {f"case{number}" for number in range(TINY_CASES)}
    assert {case: receipts(root)[case] for case in done} == done
    assert len(receipts(root)) == TINY_CASES
