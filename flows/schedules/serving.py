"""Running deployments on this machine: what schedules and forms ask for, until a signal, with a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows.server.api import HEALTH_TIMEOUT_S, check_api, post
from flows.server.process import ORPHANED
from vnet_core.errors import EngineError

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


RUN_ID = "PREFECT__FLOW_RUN_ID"
"""Variable that a run's process hands down to every process that it starts, whoever adopts them later."""
GRACE_S = 20.0
"""How long a run that is to stop may clean up and report. Prefect allows 30 s, and then only kills the run itself."""
LOOK_S = 2.0
"""Pause between two looks at the runs."""


def serve_until_stopped(deployments: Sequence[RunnerDeployment], api_url: str, grace_s: float = GRACE_S) -> None:
    """Run what schedules and forms ask for until SIGINT or SIGTERM; call it in the main thread.

    A run under way is asked to stop and has ``grace_s`` to clean up and report; then it is killed with all its
    children and marked Crashed. The same holds for one that is cancelled in the UI, which ends as Cancelled. What a
    run's process leaves behind when it ends, in good order or not, is killed. Prefect's own shutdown kills runs at once
    and leaves them ``Running``, so it only comes last.

    Raises EngineError ``prefect.unreachable``, also when the server is lost while serving.
    """
    check_api(api_url, HEALTH_TIMEOUT_S)
    from prefect import aserve

    # a folder named flows where the command was typed must not hide ours in the processes of the runs
    os.environ["PYTHONSAFEPATH"] = "1"
    loops: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def serving() -> None:
        task = asyncio.current_task()
        assert task is not None
        loops.set_result((asyncio.get_running_loop(), task))
        with contextlib.suppress(asyncio.CancelledError):
            await aserve(*deployments, pause_on_shutdown=False, print_starting_message=False)

    with ThreadPoolExecutor(1) as pool, _stop_signals() as stop:
        # in a thread of ours Prefect installs no signal handlers of its own
        served = pool.submit(contextvars.copy_context().run, asyncio.run, serving())
        keeper = _Keeper(api_url, grace_s)
        while not stop.wait(0.2) and not served.done():
            keeper.look()
        run_ids = keeper.stop()
        loop, task = loops.result()
        if not served.done():
            loop.call_soon_threadsafe(task.cancel)
    error = served.exception()
    if error is not None:
        check_api(api_url, HEALTH_TIMEOUT_S)  # a lost server is the usual reason, and says so more clearly
        raise error
    if run_ids:
        _close_runs(run_ids)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set for the time of the block."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Keeper:
    """Looks after the runs while they are served: a cancelled one ends in time, and none leaves processes behind."""

    def __init__(self, api_url: str, grace_s: float) -> None:
        self._api_url, self._grace_s = api_url, grace_s
        self._next = 0.0
        self._runs: dict[UUID, psutil.Process] = {}
        self._families: dict[UUID, set[psutil.Process]] = {}
        """What each run has started, noted while it lives: engines become nobody's children when it dies."""
        self._until: dict[UUID, float] = {}
        """When a run that was cancelled is killed."""

    def look(self) -> None:
        """Look at the runs, unless that was done a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._note()
        for run_id in self._families.keys() - self._runs.keys():
            self._kill(run_id)
        for run_id in self._cancelled():
            self._until.setdefault(run_id, now + self._grace_s)
        for run_id, end in list(self._until.items()):
            if now >= end:
                self._kill(run_id)
        self._next = time.monotonic() + LOOK_S

    def stop(self) -> list[UUID]:
        """End all runs and everything they have started; their ids."""
        self._note()
        runs = list(self._runs.values())
        for run in runs:
            with contextlib.suppress(psutil.NoSuchProcess):
                run.terminate()
        psutil.wait_procs(runs, timeout=self._grace_s)
        ended = list(self._runs)
        for run_id in list(self._families):
            self._kill(run_id)
        return ended

    def _note(self) -> None:
        """Note which runs are there, and what they have started so far."""
        self._runs = {}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                run_id = child.environ().get(RUN_ID)
                if run_id is not None:
                    self._runs[UUID(run_id)] = child
                    family = {one for one in self._families.get(UUID(run_id), ()) if one.is_running()}
                    self._families[UUID(run_id)] = family
                    family.update([child, *child.children(recursive=True)])

    def _kill(self, run_id: UUID) -> None:
        """Kill what a run has left: what was noted, and what still has the run's name in its environment."""
        family = self._families.pop(run_id, set())
        self._until.pop(run_id, None)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process in family or process.environ().get(RUN_ID) == str(run_id):
                    process.kill()

    def _cancelled(self) -> list[UUID]:
        """Runs of ours that somebody wants to end."""
        if not self._runs:
            return []
        asked = {"id": {"any_": [str(run_id) for run_id in self._runs]}, "state": {"type": {"any_": ["CANCELLING"]}}}
        try:
            found = post(f"{self._api_url}/flow_runs/filter", {"flow_runs": asked}, HEALTH_TIMEOUT_S)
        except EngineError:
            return []  # asked again in a moment; Prefect's own limit still holds
        return [UUID(run["id"]) for run in found]


def _close_runs(run_ids: list[UUID]) -> None:
    """Set runs that could not report their end, and their subflows, to Crashed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = filters.FlowRunFilterState(
        type=filters.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    )
    with get_client(sync_client=True) as client:
        for which in (
            filters.FlowRunFilter(state=under_way, id=filters.FlowRunFilterId(any_=run_ids)),
            filters.FlowRunFilter(
                state=under_way, parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=run_ids)
            ),
        ):
            for run in client.read_flow_runs(flow_run_filter=which):
                client.set_flow_run_state(run.id, Crashed(message=ORPHANED), force=True)
