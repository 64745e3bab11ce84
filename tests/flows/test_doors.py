"""What listens while everything runs, who may speak to it, and for whom the files are that it leaves."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import distributed
import psutil
import pytest
from distributed.security import Security

from flows.server.process import ServerProcess, start_server
from tests.flows.command import Command
from tests.pickles import pickles
from tests.walkthrough import environment

SECRET = "doorkeeper:Kiebitz"
RAY = ("raylet", "gcs_server", "ray::", "/ray/")
"""In the command lines of Ray's own processes."""
DASK = "multiprocessing.spawn"


# --- a whole evening: the server with its schedules, and a night with both engines


@dataclass
class Evening:
    """What was seen while ``vnet serve`` and a night ran under a umask that lets everybody in."""

    root: Path
    ended: int = -1
    listening: set[tuple[str, str]] = field(default_factory=set)
    """(kind of process, address) of every listening socket."""
    looked_at: set[tuple[int | None, tuple[str, int]]] = field(default_factory=set)
    """(process, address) of the same."""
    beyond: set[str] = field(default_factory=set)
    """Command lines of what listens beyond this machine, for messages."""


def kind_of(line: str) -> str:
    if any(word in line for word in RAY):
        return "ray"
    if "flows.server" in line:
        return "prefect"
    return "dask worker" if DASK in line else "vnet" if "bin/vnet" in line else line[:100]


def is_in_ray(process: psutil.Process) -> bool:
    return any(mapped.path.endswith("/_raylet.so") for mapped in process.memory_maps())


def look(evening: Evening, *commands: Command) -> None:
    """Take in the sockets that listen and were not there before: a look at one costs more than to find it."""
    ours = {process.pid: process for command in commands for process in command.left()}
    for connection in psutil.net_connections("inet"):
        socket_of = (connection.pid, connection.laddr)
        if connection.status != psutil.CONN_LISTEN or connection.pid not in ours or socket_of in evening.looked_at:
            continue
        try:
            process = ours[connection.pid]
            line = " ".join(process.cmdline())
            # a night that uses Ray is part of it, and asks for its token
            kind = "ray" if is_in_ray(process) else kind_of(line)
        except psutil.Error:
            continue  # it has ended
        evening.looked_at.add(socket_of)
        evening.listening.add((kind, connection.laddr.ip))
        if not is_local(connection.laddr.ip):
            evening.beyond.add(f"{connection.laddr} {line[:200]}")


def is_local(address: str) -> bool:
    return address == "::1" or address.removeprefix("::ffff:").startswith("127.")


@pytest.fixture(scope="module")
def evening(
    taken_in: Path, prefect_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Evening]:
    folder = tmp_path_factory.mktemp("evening")
    root = folder / "root"
    shutil.copytree(taken_in, root)
    shutil.rmtree(root / "volumes", ignore_errors=True)
    prefect_home(root / "prefect")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    evening, commands = Evening(root), []
    for path in (root, *root.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    before = os.umask(0)
    try:
        commands.append(Command("serve", "--port", str(port), root=root))
        commands[0].until(lambda: "UI:" in commands[0].err)
        commands.append(Command("nightly", "--cohort", "many", "--model", "known", "--json", root=root))
        while commands[1].running:
            look(evening, *commands)
            time.sleep(0.2)
        evening.ended = commands[1].wait()
        yield evening
    finally:
        os.umask(before)
        for command in commands[::-1]:
            if command.running:
                command.interrupt()
            command.end()


def test_only_ray_listens_beyond_this_machine(evening: Evening) -> None:
    assert evening.ended == 0
    assert {kind for kind, _ in evening.listening} >= {"prefect", "dask worker", "ray"}
    beyond = {kind for kind, address in evening.listening if not is_local(address)}
    assert beyond <= {"ray"}, evening.beyond


def test_what_it_leaves_is_for_its_owner_alone(evening: Evening) -> None:
    """Under umask 000; the server's files are there too, since it still runs."""
    paths = [path for path in (evening.root, *evening.root.rglob("*")) if not path.is_symlink()]
    names = {path.relative_to(evening.root).as_posix().partition("/")[0] for path in paths}
    assert {"volumes", "results", "reports", "nights", "logs", "prefect", "private"} <= names
    assert {path.name for path in paths} >= {"prefect.db", "server.log", "mask.nii.gz", "zarr.json"}
    # Prefect's own pages keep the modes of its distribution; the folder around them is for its owner alone
    pages = evening.root / "prefect" / "ui"
    written = [path for path in paths if path != pages and pages not in path.parents]
    assert [path for path in written if path.lstat().st_mode & 0o077] == []


def test_no_pickle_lies_in_the_root(evening: Evening) -> None:
    assert pickles(evening.root) == []


# --- Prefect


@pytest.fixture(scope="module")
def guarded(prefect_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that asks for a name and a password."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PREFECT_SERVER_API_AUTH_STRING", SECRET)
        patched.setenv("PREFECT_API_AUTH_STRING", SECRET)
        with start_server(prefect_home(tmp_path_factory.mktemp("guarded") / "home"), 0) as server:
            yield server


def status_of(server: ServerProcess, method: str, path: str, body: str = "", **headers: str) -> int:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    finally:
        connection.close()


def test_prefect_asks_for_the_auth_string_where_one_is_set(guarded: ServerProcess) -> None:
    right = {"Authorization": f"Basic {base64.b64encode(SECRET.encode()).decode()}"}
    wrong = {"Authorization": f"Basic {base64.b64encode(b'doorkeeper:guess').decode()}"}
    for method, path, body in (
        ("POST", "/api/flow_runs/filter", "{}"),
        ("POST", "/api/deployments/filter", "{}"),
        ("GET", "/api/admin/version", ""),
        ("POST", "/api/block_documents/filter", "{}"),
    ):
        assert status_of(guarded, method, path, body) == 401, path
        assert status_of(guarded, method, path, body, **wrong) == 401, path
        assert status_of(guarded, method, path, body, **right) == 200, path
    # whether it lives may be asked by everybody
    assert status_of(guarded, "GET", "/api/health") == 200


def test_prefect_answers_no_other_host_and_no_other_page_with_the_auth_string_either(guarded: ServerProcess) -> None:
    right = {"Authorization": f"Basic {base64.b64encode(SECRET.encode()).decode()}"}
    path = "/api/flow_runs/filter"
    assert status_of(guarded, "POST", path, "{}", Host="rebound.example.org", **right) == 400
    assert status_of(guarded, "POST", path, "{}", Origin="http://example.org", **right) == 403


def test_the_auth_string_is_in_no_file_of_the_server(guarded: ServerProcess) -> None:
    home = guarded.log_path.parent
    forms = (SECRET.encode(), b"Kiebitz", base64.b64encode(SECRET.encode()))
    holding = [path for path in home.rglob("*") if path.is_file() and any(f in path.read_bytes() for f in forms)]
    assert holding == []
    assert SECRET not in " ".join(psutil.Process(guarded.pid).cmdline())


# --- Dask


def test_dask_refuses_a_plain_connection_where_it_speaks_tls() -> None:
    security = Security.temporary()
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            host="127.0.0.1",
            protocol="tls",
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            security=security,
        ) as cluster,
        distributed.Client(cluster, security=security) as client,
    ):
        assert client.submit(sum, (1, 2)).result() == 3
        address = cluster.scheduler_address
        assert address.startswith("tls://127.0.0.1:")
        for wrong, with_what in (
            (address.replace("tls://", "tcp://"), {}),
            # of another authority
            (address, {"security": Security.temporary()}),
        ):
            with pytest.raises((OSError, TimeoutError)):
                distributed.Client(wrong, timeout=3, **with_what)


# --- Ray

HEAD = """
import json, os, sys
import ray
ray.init(num_cpus=1, address="local", include_dashboard=sys.argv[1] == "dashboard", dashboard_host="127.0.0.1",
         dashboard_port=int(sys.argv[2]), _node_ip_address="127.0.0.1", object_store_memory=128 << 20,
         log_to_driver=False, _temp_dir=sys.argv[3])
context = ray.get_runtime_context()
print(json.dumps({"gcs": context.gcs_address}), flush=True)
sys.stdin.read()
"""
JOIN = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, _node_ip_address="127.0.0.1")
print(ray.get(ray.remote(lambda: "in").remote()))
"""
HAS_DASHBOARD = all(importlib.util.find_spec(name) for name in ("aiohttp", "aiohttp_cors", "opencensus"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Path]]:
    """Address of the head of a Ray that asks for a token, the port of its dashboard, and the file with the token."""
    from workers.storage.modes import own_temporary_folder

    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("0" * 32 + "1" * 32)
    token.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    wanted = "dashboard" if HAS_DASHBOARD else "none"
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, wanted, str(port), str(own_temporary_folder("ray") / "d")],
        env=environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["gcs"], port, token
        process.communicate("", timeout=60)


def joined(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", JOIN, address]
    hurried = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_raylet_start_wait_time_s": "5"}
    return subprocess.run(command, env=environment() | hurried | variables, capture_output=True, text=True, timeout=120)


def test_ray_takes_nobody_in_without_the_token(head: tuple[str, int, Path], tmp_path: Path) -> None:
    address, _, token = head
    (tmp_path / "guess").write_text("2" * 64)
    assert joined(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)).stdout == "in\n"
    for variables in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "guess")},
    ):
        refused = joined(address, **variables)
        assert (refused.returncode != 0, "in\n" in refused.stdout) == (True, False), refused.stderr[-1000:]


@pytest.mark.skipif(not HAS_DASHBOARD, reason="this Ray has no dashboard and so no jobs API (ray[default] has)")
def test_rays_jobs_api_takes_no_job_without_the_token(head: tuple[str, int, Path]) -> None:
    _, port, token = head
    job = json.dumps({"entrypoint": "id"})

    def status(method: str, path: str, body: str = "", **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body or None, {"Content-Type": "application/json", **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    for method, body in (("POST", job), ("GET", "")):
        assert status(method, "/api/jobs/", body) == 401
    assert status("GET", "/api/jobs/", Authorization=f"Bearer {token.read_text()}") == 200
    browser = {"User-Agent": "Mozilla/5.0", "Origin": "http://example.org"}
    assert status("POST", "/api/jobs/", job, **browser) in (401, 403, 405)


def test_a_ray_without_a_dashboard_has_no_jobs_api(head: tuple[str, int, Path]) -> None:
    """As the locked packages have it: nothing listens where the dashboard would."""
    if HAS_DASHBOARD:
        pytest.skip("this Ray has one")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", head[1]), timeout=5).close()
