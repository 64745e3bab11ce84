"""The Prefect server of this machine: API and UI on 127.0.0.1, over SQLite or what is named; started, found, stopped.

Prefect reads its settings from the environment when it is imported, so nothing here imports it before it has to run.

A server is a child process of its own session, so that Ctrl-C reaches the flow but not the server that records how
the flow ended. Its standard input is a pipe from its parent: when the parent ends, even by SIGKILL, the pipe closes
and the server stops. A small record in ``home/servers`` says which process serves which address.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil

from vnet_core.errors import EngineError, StorageError
from workers.modes import for_the_owner_alone

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 30.0
UNAUTHORIZED = 401
DATABASE_ELSEWHERE = (
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_HOST",
    "PREFECT_SERVER_DATABASE_HOST",
)
"""Variables of which one is set when a server's database is not the file in its home, such as in PostgreSQL."""
HEARTBEAT_S = 30
"""How often a run tells the server that it lives; Prefect allows no shorter pause."""
UI_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "connect-src 'self' ws://127.0.0.1:* ws://localhost:*",
        "frame-ancestors 'none'",
    )
)
"""Content security policy of every page: the UI talks to its own server only. Without it Prefect's UI asks a
statistics service for its configuration at each start, whatever the settings say."""
ORPHANED = "Its process ended before it could report. Run it again: what it had finished is kept."


def prefect_environment(home: Path) -> dict[str, str]:
    """Variables for a process that imports Prefect, with its database and logs in ``home``.

    What the user has set himself is left out, so that the result can go straight into ``os.environ``. Nothing calls
    home, no server starts by itself, and 127.0.0.1 is reached without the proxy.
    """
    wanted = {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        # a run whose server has died ends within a minute; five, the default, take that long for every call
        "PREFECT_CLIENT_MAX_RETRIES": "2",
        # a run asked for in the UI starts within two seconds, not ten
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        # what became of a case is in the storage root; a result that Prefect kept would be a pickle
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        # progress is the command line's business; the UI still has every line
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if "*" not in hosts:
            missing[name] = ",".join(dict.fromkeys([*hosts, HOST, "localhost"]))
    return missing


@dataclass(frozen=True, slots=True)
class _Record:
    """One file of ``home/servers``."""

    pid: int
    started: float
    """Creation time of the process: the same number under another process is not the server."""
    url: str
    has_ui: bool


class ServerProcess:
    """A server that this process has started; also a context manager that stops it."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes], record: _Record, log_path: Path) -> None:
        self.url = record.url
        self.api_url = f"{record.url}/api"
        self.pid = record.pid
        self.log_path = log_path
        self._process = process
        self._record = record
        self._record_path = home / "servers" / f"{record.pid}.json"
        self._log_start = log_path.stat().st_size
        self._stopped = False

    def write_record(self) -> None:
        """Let other processes find this server."""
        self._record_path.write_text(json.dumps(asdict(self._record)))

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait_until_healthy(self) -> None:
        """Return once the API answers.

        Raises EngineError ``prefect.server-start`` with the end of the log when the process ends first, or after 60 s.
        """
        end = time.monotonic() + START_TIMEOUT_S
        while not _healthy(self.url):
            if not self.alive or time.monotonic() > end:
                why = "took longer than 60 s to start" if self.alive else f"ended with {self._process.returncode}"
                raise EngineError(
                    "prefect.server-start",
                    f"the Prefect server at {self.url} {why}; the end of {self.log_path}:\n{self._log_tail()}",
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask the server to end, wait up to 10 s, kill what is left; harmless when it is stopped."""
        if self._stopped:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        # the group outlives its leader when a child of the server hangs
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()
        self._record_path.unlink(missing_ok=True)
        self._stopped = True

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-15:]) or "(empty)"


def running_server(home: Path) -> str | None:
    """API address of a live server with a UI on this home, asked over HTTP within 2 s; None when there is none."""
    for record in _records(home):
        if record.has_ui and _healthy(record.url):
            return f"{record.url}/api"
    return None


def start_server(home: Path, port: int) -> ServerProcess:
    """Start API, UI and scheduler on 127.0.0.1 at ``port`` (0: any free one) and wait until they answer.

    Raises EngineError ``prefect.port-busy`` or ``prefect.server-start``.
    """
    server = _launch(home, port, with_ui=True)
    try:
        server.wait_until_healthy()
        _close_orphans(server, home)
    except BaseException:
        server.stop()
        raise
    return server


@dataclass(frozen=True, slots=True)
class LocalApi:
    """An API on this machine, perhaps still starting."""

    url: str
    server: ServerProcess | None
    """The private server of this process; None when a running one is used."""
    home: Path

    def wait_until_ready(self) -> None:
        """Return once the API answers; EngineError ``prefect.server-start`` when it cannot."""
        if self.server is not None:
            self.server.wait_until_healthy()
            _close_orphans(self.server, self.home)


@contextmanager
def local_api(home: Path) -> Iterator[LocalApi]:
    """The API of the server that runs on this home, or of a private one without UI for the time of the block.

    Returns at once, while the private server is still starting: set PREFECT_API_URL to ``url``, import what is slow
    to import, then call ``wait_until_ready``. Private servers of several processes share the home's database. On
    leaving, what Prefect still has to report from this process is sent before the server stops.
    """
    url = running_server(home)
    if url is not None:
        yield LocalApi(url, None, home)
        return
    with _launch(home, 0, with_ui=False) as server:
        try:
            yield LocalApi(server.api_url, server, home)
        finally:
            _send_what_is_left()


def check_api(url: str, timeout_s: float) -> None:
    """Return when a Prefect API answers at ``url`` (it ends in ``/api``) within ``timeout_s``, and answers us.

    Raises EngineError ``prefect.unreachable`` naming the address, and ``prefect.refused`` when it wants another
    PREFECT_API_AUTH_STRING.
    """
    answer: Future[bytes] = Future()

    def ask() -> None:
        try:
            health = _read(f"{url.rstrip('/')}/health", timeout_s)
            if health == b"true":
                # the one question that it answers everybody is how it does
                _read(f"{url.rstrip('/')}/admin/version", timeout_s)
            answer.set_result(health)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.set_exception(error)

    # looking up a name has no time limit of its own, so the whole question gets a thread
    threading.Thread(target=ask, daemon=True).start()
    try:
        if answer.result(timeout_s) == b"true":
            return
        reason = "what answers there is no Prefect API"
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except urllib.error.HTTPError as error:
        if error.code == UNAUTHORIZED:
            raise _refused(url) from None
        reason = str(error)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    raise EngineError(
        "prefect.unreachable",
        f"the Prefect API at {url} does not answer ({reason}); start it, correct PREFECT_API_URL or the site file"
        " (the address ends in /api), or leave it out to use this machine",
    )


def _read(url: str, timeout_s: float) -> bytes:
    """The first bytes that a GET is answered with."""
    # whoever runs the program names the address
    request = urllib.request.Request(url, headers=_authorization())  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        return bytes(response.read(64))


def _authorization() -> dict[str, str]:
    """The header that names this process to an API with authentication; none without PREFECT_API_AUTH_STRING."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}


def _refused(url: str) -> EngineError:
    given = "the PREFECT_API_AUTH_STRING of this process" if _authorization() else "requests without a login"
    return EngineError(
        "prefect.refused",
        f"the Prefect API at {url} refuses {given}; set PREFECT_API_AUTH_STRING to what the server has in"
        " PREFECT_SERVER_API_AUTH_STRING",
    )


def _records(home: Path) -> list[_Record]:
    """The servers on this home whose processes live; records of others are removed."""
    live = []
    for path in sorted((home / "servers").glob("*.json")):
        try:
            record = _Record(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        try:
            # creation times shift a little when the clock is set
            same = abs(psutil.Process(record.pid).create_time() - record.started) < 5
        except psutil.NoSuchProcess:
            same = False
        if same:
            live.append(record)
        else:
            path.unlink(missing_ok=True)
    return live


def _healthy(url: str) -> bool:
    """Whether an API answers; asked past any proxy."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().read(64) == b"true"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; connections wait in it until the server takes it over."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise EngineError(
            "prefect.port-busy",
            f"port {port} on {HOST} cannot be used ({error.strerror}); stop what listens there or choose another port",
        ) from error
    return listener


def _log_of(home: Path, path: Path) -> BinaryIO:
    """The server's log, opened in a home that is made where there is none. StorageError ``store.unwritable``."""
    try:
        for folder in (home, home / "servers"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise StorageError(
            "store.unwritable",
            f"the folder of Prefect's database, {home}, cannot be written ({error.strerror or error}); mend its"
            " permissions or its disk",
        ) from error


def _launch(home: Path, port: int, with_ui: bool) -> ServerProcess:
    home = home.absolute()
    log_path = home / "server.log"
    with _listen(port) as listener, _log_of(home, log_path) as log:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            # -P: a folder named flows in the working directory must not hide ours
            [sys.executable, "-P", "-m", __name__, str(listener.fileno()), "ui" if with_ui else "api"],
            env=_server_environment(home, url),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )
    record = _Record(process.pid, psutil.Process(process.pid).create_time(), url, with_ui)
    server = ServerProcess(home, process, record, log_path)
    server.write_record()
    return server


def _server_environment(home: Path, url: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("PREFECT_API_URL", None)
    environment |= prefect_environment(home)
    port = url.rpartition(":")[2]
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": port,
        # relative, so that the UI also works as localhost and through a tunnel
        "PREFECT_UI_API_URL": "/api",
        # not into site-packages, which may be read-only
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    return environment


def _close_orphans(server: ServerProcess, home: Path) -> None:
    """Set the runs of processes that were killed to Crashed.

    Prefect leaves such a run ``Running`` for ever, and its concurrency slot then refuses the next scheduled run. Runs
    report to a server of their home, so where this is the only one, no run can be under way. A database elsewhere
    may serve runs of other machines: there the automation for dead runs does it.
    """
    if any(os.environ.get(name) for name in DATABASE_ELSEWHERE):
        return
    if any(record.pid != server.pid for record in _records(home)):
        return
    state = {
        "type": "CRASHED",
        "name": "Crashed",
        "message": ORPHANED,
    }
    under_way = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    closed: set[str] = set()
    while runs := {run["id"] for run in post(f"{server.api_url}/flow_runs/filter", {"flow_runs": under_way})} - closed:
        for run_id in runs:
            post(f"{server.api_url}/flow_runs/{run_id}/set_state", {"state": state, "force": True})
        closed |= runs


def post(url: str, body: dict[str, Any], timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
    """What a Prefect API answers to a request with JSON.

    Raises EngineError ``prefect.unreachable``, and ``prefect.refused`` as :func:`check_api`.
    """
    headers = {"Content-Type": "application/json", **_authorization()}
    # the address is that of check_api
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            return json.load(response)
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == UNAUTHORIZED:
            raise _refused(url) from None
        raise EngineError("prefect.unreachable", f"the Prefect API at {url} does not answer ({error})") from error


def _send_what_is_left() -> None:
    """Send logs and events that Prefect's threads still hold; its own exit hooks run after the server has gone."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        # it warns of what it has still to send, which is the point of draining
        logging.getLogger(worker.__name__).setLevel(logging.ERROR)
        worker.drain_all(timeout=STOP_TIMEOUT_S, at_exit=False)


class _OwnPagesOnly:
    """ASGI layer: pages of other sites get no answer, HTTP or WebSocket; our own pages get ``UI_POLICY``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        headers = dict(scope.get("headers", ()))
        own = b"http://" + headers.get(b"host", b"")
        if headers.get(b"origin", own) != own:
            await PlainTextResponse("request from a page of another site", 403)(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", UI_POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _stop_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open, then end this process in good order."""
    while sys.stdin.buffer.read(1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(listener_fd: int, kind: str) -> None:
    """The child process: Prefect's application on a socket that its parent has opened."""
    for_the_owner_alone()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # around the application, not in it: the actions of automations ask it from within, as a host of another name
    own = _OwnPagesOnly(create_app(final=True, ephemeral=kind == "api"))
    # a name that an attacker points at 127.0.0.1 gets no answer
    app = TrustedHostMiddleware(own, allowed_hosts=[HOST, "localhost"])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[socket.socket(fileno=listener_fd)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
