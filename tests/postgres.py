"""A real PostgreSQL for tests, and a Prefect server on it, started as a deployment starts it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.walkthrough import environment

AUTH = "keeper:a-secret-that-no-log-may-hold"
PASSWORD = "another-secret-that-no-log-may-hold"
START_S = 180.0


@contextmanager
def postgres() -> Iterator[str]:
    """A server on a socket in a temporary folder; its address for Prefect, with a password as a deployment has one."""
    with warnings.catch_warnings():
        # it says that it takes a temporary folder where there is no runtime folder
        warnings.simplefilter("ignore")
        import pgserver

    # not below pytest's folder, which every run of pytest closes to the server's own user
    folder = tempfile.mkdtemp(prefix="vnet-postgres-")
    with pgserver.get_server(Path(folder) / "data", cleanup_mode="delete") as server:
        _, _, host = server.get_uri().partition("?host=")
        yield f"postgresql+asyncpg://postgres:{PASSWORD}@/postgres?host={host}"
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class PrefectServer:
    """A server of a deployment; it can be killed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    @property
    def variables(self) -> Mapping[str, str]:
        """What a process needs to use it."""
        return {"PREFECT_API_URL": self.api_url, "PREFECT_API_AUTH_STRING": AUTH}

    def call(self, path: str, body: Any = None, auth: str | None = AUTH) -> Any:
        """GET, or POST with a JSON body."""
        headers = {"Content-Type": "application/json"}
        if auth is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api_url}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def prefect_server(database: str, folder: Path, address: str = "127.0.0.1") -> Iterator[PrefectServer]:
    """``prefect server start`` at an address of this machine with a login, over a database, its own files in
    ``folder``."""
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    variables = {
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),
        "DO_NOT_TRACK": "1",
        "NO_PROXY": address,
    }
    command = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--host", address]
    log = folder / "prefect.log"
    with log.open("wb") as told:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment() | variables,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    server = PrefectServer(f"http://{address}:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        server.kill()


def _wait(server: PrefectServer) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            if server.call("/health", auth=None) is True:
                return
        except (OSError, ValueError):
            assert server.process.poll() is None, server.log.read_text("utf-8")
            assert time.monotonic() < end, server.log.read_text("utf-8")
            time.sleep(0.1)
