"""Running deployments on this machine: what schedules and forms ask for, until a signal, with a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows.server import HEALTH_TIMEOUT_S, ORPHANED, check_api

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def serve_until_stopped(deployments: Sequence[RunnerDeployment], api_url: str, grace_s: float = 30.0) -> None:
    """Run what schedules and forms ask for until SIGINT or SIGTERM; call it in the main thread.

    A run under way is asked to stop and has ``grace_s`` to clean up and report; then it is killed with all its
    children and marked Crashed. Prefect's own shutdown kills runs at once and leaves them ``Running``, so it only
    comes last. Raises EngineError ``prefect.unreachable``, also when the server is lost while serving.
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
        while not stop.wait(0.2) and not served.done():
            pass
        run_ids = _stop_runs(grace_s)
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


def _stop_runs(grace_s: float) -> list[UUID]:
    """End the flow runs that are children of this process, and everything they started; their ids."""
    runs: dict[psutil.Process, UUID] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            run_id = child.environ().get("PREFECT__FLOW_RUN_ID")
            if run_id is not None:
                runs[child] = UUID(run_id)
    family = [process for run in runs for process in [run, *_descendants(run)]]
    for run in runs:
        with contextlib.suppress(psutil.NoSuchProcess):
            run.terminate()
    psutil.wait_procs(list(runs), timeout=grace_s)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return list(runs.values())


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


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []
