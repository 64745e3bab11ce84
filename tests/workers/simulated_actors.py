"""Many actors that only sleep, as threads of a few processes of Ray: what remains is the cost of handing out."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from workers.engines.clusters import Engines
from workers.ledger import Outcome
from workers.segmentation.actors import Actors
from workers.segmentation.segment import STAGE, Job


class Host:
    """A process in which many actors sleep."""

    def ready(self) -> None:
        """It is there."""

    def sleep(self, case: str, seconds: float) -> Outcome:
        """Be at a case for so long."""
        time.sleep(seconds)
        return Outcome(case, STAGE, "computed", seconds=seconds)


class Simulated(Actors):
    """Handles are hosts; an actor is two threads of one."""

    def __init__(self, engines: Engines, hosts: int, seconds: float) -> None:
        import ray

        super().__init__("", "", engines)
        threads = 2 * -(-engines.segment_workers // hosts)
        self._seconds, self._started = seconds, 0
        self._hosts = [ray.remote(Host).options(num_cpus=0, max_concurrency=threads).remote() for _ in range(hosts)]

    def start(self, memory_bytes: int) -> Any:
        """The next host."""
        self._started += 1
        return self._hosts[self._started % len(self._hosts)]

    def ready(self, handle: Any) -> Future[Any]:
        """When the host is there."""
        return handle.ready.remote().future()

    def ask(self, handle: Any, job: Job) -> Future[Outcome]:
        """Sleep over the case."""
        return handle.sleep.remote(job.case.id, self._seconds).future()

    def end(self, handle: Any) -> None:
        """The host stays for the others."""

    def close(self) -> None:
        """End the hosts."""
        import ray

        for host in self._hosts:
            ray.kill(host)
