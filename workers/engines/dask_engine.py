"""Dask, on this machine or by address: the only place that starts or joins it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from vnet_core.errors import EngineError
from workers.engines.clusters import CONNECT_TIMEOUT_S, answers, unreachable
from workers.engines.dask_address import DEFAULT_PORT, NO_TLS, DaskTls, Tls, checked_address
from workers.engines.dask_versions import ASKED, check_versions
from workers.engines.tries import Worker

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long a scheduler may be without any worker; a cluster that grows on demand takes minutes."""
ANSWER_S = 30.0
"""A scheduler that takes longer over a question has stopped."""
ASK_AGAIN_S = 1.0
"""Before an answer that could not be fetched is asked for once more."""
ASKS = 10
"""How often an answer is asked for."""
ENDED_FOR_MEMORY = "worker-restart-memory"
"""Topic under which Dask's nannies tell whom they end."""


class DaskExecutor(Executor):
    """A Dask cluster as an executor, with what :class:`workers.engines.tries.Supervised` asks."""

    def __init__(self, client: Any, where: str, here: Any = None, patience_s: float = PATIENCE_S) -> None:
        """``here``: this machine's part of ``Client.get_versions``, which every worker must be like; None: all are of
        this machine."""
        self._client, self._where, self._here, self._patience_s = client, where, here, patience_s
        self._submitting = threading.Lock()
        self._is_closed = False
        self._open: set[Future[Any]] = set()
        self._without_workers_since: float | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As of every executor; of one that was closed the future is cancelled.

        Dask's own executor is not used: where the answer cannot be fetched from its worker, its future never ends.
        """
        told: Future[T] = Future()
        with self._submitting:
            if self._is_closed:
                told.cancel()
                return told
            # what is tried again is decided by workers.engines.tries; and a key made from arguments would bring back an
            # old answer
            asked = self._client.submit(fn, *args, retries=0, pure=False, **kwargs)
            self._open.add(told)
        told.add_done_callback(partial(self._ended, asked))
        self._client.loop.add_callback(self._answer, asked, told)
        return told

    def _ended(self, asked: Any, told: Future[Any]) -> None:
        self._open.discard(told)
        if told.cancelled() and not asked.done():
            asked.cancel()

    async def _answer(self, asked: Any, told: Future[Any]) -> None:
        """Pass on the answer when there is one. What brings it may fail: then it is asked for again."""
        failures = 0
        while not told.done():
            try:
                (answer,) = await self._client.gather([asked], asynchronous=True)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  told to who asked
                failures += 1
                if asked.status == "cancelled":
                    told.cancel()
                elif asked.status != "error" and failures < ASKS:
                    await asyncio.sleep(ASK_AGAIN_S)
                elif told.set_running_or_notify_cancel():
                    told.set_exception(error)
            else:
                if told.set_running_or_notify_cancel():
                    told.set_result(answer)

    def close(self) -> None:
        """Take no more and cancel what has not ended, since the client is about to be closed."""
        with self._submitting:
            self._is_closed = True
        for told in tuple(self._open):
            told.cancel()

    @property
    def this_worker(self) -> Callable[[], Worker]:
        """Tells on a worker which one it is; EngineError ``dask.versions`` on one that joined later and is unlike
        the others."""
        return partial(like_worker, self._where, self._here) if self._here else dask_worker

    def loss(self) -> EngineError | None:
        """EngineError ``dask.lost``: why work was dropped; None where this executor was closed."""
        if self._is_closed:
            return None
        return EngineError(
            "dask.lost",
            f"Dask at {self._where} dropped its work: its scheduler has ended, was stopped, or cannot be reached any"
            " more; what was published stays, start it and run the command again",
        )

    def check(self) -> None:
        """EngineError ``dask.no-workers`` when the scheduler has had no worker for ``patience_s``, and
        ``dask.lost``."""
        if self._is_closed:
            return
        try:
            workers = len(self._workers())
        except (OSError, ValueError, AttributeError) as error:  # the last two: its connection is being closed
            if loss := self.loss():
                raise loss from error
            return
        if workers:
            self._without_workers_since = None
            return
        now = time.monotonic()
        since = self._without_workers_since = self._without_workers_since or now
        if now - since >= self._patience_s:
            raise EngineError(
                "dask.no-workers",
                f"Dask at {self._where} has had no worker for {now - since:.0f} s; start some (dask worker"
                f" {self._where}) and run the command again",
            )

    def _workers(self) -> dict[str, int]:
        """Threads of each worker by its address, as Client.nthreads, which waits for ever for a scheduler that was
        stopped."""
        threads: dict[str, int] = self._client.sync(self._client.scheduler.ncores, callback_timeout=ANSWER_S)
        return threads

    def is_death(self, error: BaseException) -> bool:
        """Whether Dask gave a task up because workers died that had it."""
        from distributed.scheduler import KilledWorker

        return isinstance(error, KilledWorker)

    def is_gone(self, worker: Worker) -> bool:
        """Whether the scheduler has no such worker."""
        try:
            return worker.name.partition(" ")[0] not in self._workers()
        except (OSError, ValueError, AttributeError):
            return False

    def memory_at_end(self, worker: Worker) -> int | None:
        """Bytes that a worker held when its nanny ended it for holding too many."""
        try:
            told = [event for _, event in self._client.get_events(ENDED_FOR_MEMORY)]
        except (OSError, ValueError, AttributeError):
            return None
        return next((e["rss"] for e in told if f"{e['worker']} {e['pid']}" == worker.name), None)


def dask_worker() -> Worker:
    """The Dask worker that this is called on."""
    from distributed import get_worker

    worker = get_worker()
    return Worker(f"{worker.address} {os.getpid()}", worker.memory_manager.memory_limit or 0)


def like_worker(where: str, here: Any) -> Worker:
    """The Dask worker that this is called on, if its versions are those of ``here``."""
    from distributed.versions import get_versions

    worker = dask_worker()
    there = {worker.name.partition(" ")[0]: get_versions(packages=ASKED)}
    check_versions(where, {"client": here, "scheduler": here, "workers": there})
    return worker


@contextmanager
def dask_executor(address: str | None, workers: int, tls: DaskTls = NO_TLS) -> Iterator[DaskExecutor]:
    """An executor on Dask: the scheduler at ``address``, or a local cluster of ``workers`` processes on 127.0.0.1.

    Raises ConfigError as :func:`workers.engines.dask_address.checked_address`, EngineError ``dask.unreachable`` naming
    the address when it does not answer, and EngineError ``dask.versions`` where other versions run there.
    """
    # a local cluster is only reachable from this machine
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with _local(workers) if address is None else _joined(address, tls) as executor:
        try:
            yield executor
        finally:
            executor.close()


@contextmanager
def _local(workers: int) -> Iterator[DaskExecutor]:
    import dask
    import distributed

    with tempfile.TemporaryDirectory(prefix="vnet-dask-") as scratch:
        # a death is told at once: who is to blame is found out by workers.engines.tries
        settings = {
            "temporary-directory": scratch,
            "distributed.scheduler.allowed-failures": 0,
            # on a busy machine a new worker is not there within the 15 s after which Dask does without it for good
            "distributed.deploy.lost-worker-timeout": f"{PATIENCE_S} s",
        }
        with (
            dask.config.set(settings),
            distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                worker_dashboard_address=None,
                # its HTTP server runs even so: at a free port, so that several commands run side by side
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                # a worker that is ended while it speaks to its scheduler says so with a traceback
                silence_logs=logging.CRITICAL,
                preload=["workers.engines.dask_start"],
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield DaskExecutor(client, "this machine")


@contextmanager
def _joined(address: str, tls: DaskTls) -> Iterator[DaskExecutor]:
    import distributed

    url, files = checked_address(address, tls)
    # a scheduler speaks first
    answers("dask", url, default_port=DEFAULT_PORT, greeting=b"")
    try:
        client = distributed.Client(url, timeout=CONNECT_TIMEOUT_S, security=_security(files))
    except (OSError, TimeoutError, ValueError) as error:
        raise unreachable("dask", address, str(error)) from error
    with client:
        versions: Any = client.get_versions(packages=list(ASKED))
        check_versions(address, versions)
        yield DaskExecutor(client, address, versions["client"])


def _security(files: Tls | None) -> Any:
    from distributed.security import Security

    if files is None:
        return Security()
    return Security(
        require_encryption=True,
        tls_ca_file=files.ca_file,
        tls_client_cert=files.cert_file,
        tls_client_key=files.key_file,
    )
