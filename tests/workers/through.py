"""An executor that another one does the work of, with all that the program asks it; to change what is submitted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from vnet_core.errors import EngineError
from workers.engines.dask_engine import DaskExecutor
from workers.engines.tries import Worker


class Through(Executor):
    def __init__(self, executor: DaskExecutor) -> None:
        self.executor = executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.executor.submit(fn, *args, **kwargs)

    @property
    def this_worker(self) -> Callable[[], Worker]:
        return self.executor.this_worker

    def loss(self) -> EngineError | None:
        return self.executor.loss()

    def check(self) -> None:
        self.executor.check()

    def is_gone(self, worker: Worker) -> bool:
        return self.executor.is_gone(worker)

    def is_death(self, error: BaseException) -> bool:
        return self.executor.is_death(error)

    def memory_at_end(self, worker: Worker) -> int | None:
        return self.executor.memory_at_end(worker)
