"""The Prefect server of this machine: API and UI on 127.0.0.1, over SQLite or what is named; started, found, stopped.

Prefect reads its settings from the environment when it is imported, so nothing here imports it before it has to run.

A server is a child process of its own session, so that Ctrl-C reaches the flow but not the server that records how
the flow ended. Its standard input is a pipe from its parent: when the parent ends, even by SIGKILL, the pipe closes
and the server stops. A small record in ``home/servers`` says which process serves which address.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from flows.server.api import is_healthy, post
from flows.server.settings import DATABASE_ELSEWHERE, HOST, server_environment
from vnet_core.errors import EngineError, StorageError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
ORPHANED = "Its process ended before it could report. Run it again: what it had finished is kept."


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
        while not is_healthy(self.url):
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
        if record.has_ui and is_healthy(record.url):
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


def _listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; connections wait in it until the server takes it over."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise EngineError(
            "prefect.port-busy",
            f"port {port} on {HOST} cannot be used ({getattr(error, 'strerror', error)}); stop what listens there or"
            " choose another port, up to 65535",
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
            [sys.executable, "-P", "-m", "flows.server.app", str(listener.fileno()), "ui" if with_ui else "api"],
            env=server_environment(home, url),
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
