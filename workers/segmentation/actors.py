"""The Ray actors of a pool: how one is started, asked and ended, and what the errors of Ray mean for it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, Literal

from workers.engines.clusters import Engines
from workers.ledger import Outcome, State, settle
from workers.segmentation.segment import STAGE, Job, Segmenter, naming_a_lost_gpu
from workers.segmentation.shares import Division

IN_FLIGHT = 2
"""Cases that an actor holds: one is read or written while the other is computed."""

Fate = Literal["gone", "lost", "failed"]


class SegmenterActor:
    """A segmenter that is loaded by its first case: so an actor that has a place says so at once."""

    def __init__(self, root_url: str, model: str, cpus: int) -> None:
        self._arguments = root_url, model, cpus
        self._loading = threading.Lock()
        self._segmenter: Segmenter | None = None

    def segment(self, job: Job) -> Outcome | Division:
        """As :meth:`Segmenter.take`; a model that cannot be loaded fails the case."""
        with self._loading:
            loaded = None if self._segmenter else settle(STAGE, job.case.id, self._load)
        if self._segmenter is None:
            assert loaded is not None
            return loaded
        return self._segmenter.take(job)

    def _load(self) -> tuple[State, None, tuple[str, ...]]:
        with naming_a_lost_gpu():
            self._segmenter = Segmenter(*self._arguments)
        return "computed", None, ()


class Actors:
    """Starts, asks and ends the actors of one model, by handle. Needs a running Ray session."""

    kind: type = SegmenterActor

    def __init__(self, root_url: str, model: str, engines: Engines) -> None:
        self._root_url, self._model, self._engines = root_url, model, engines

    def start(self, memory_bytes: int) -> Any:
        """The handle of an actor that Ray places when it can."""
        import ray

        cpus = self._engines.cpus_per_segment_worker
        actor: Any = ray.remote(self.kind).options(
            num_cpus=cpus,
            num_gpus=self._engines.gpus_per_worker,
            memory=memory_bytes,
            max_concurrency=IN_FLIGHT,
            max_restarts=0,
        )
        return actor.remote(self._root_url, self._model, cpus)

    def ready(self, handle: Any) -> Future[Any]:
        """Done when the actor has its place and its process is there."""
        return handle.__ray_ready__.remote().future()

    def ask(self, handle: Any, job: Job) -> Future[Outcome | Division]:
        """Have a case, or what a job's step says of it, done."""
        return handle.segment.remote(job).future()

    def end(self, handle: Any) -> None:
        """End an actor, whatever it does; its process is killed where it does not react."""
        import ray

        ray.kill(handle)

    def largest_node_bytes(self) -> int:
        """The most memory that any node gives to all that runs on it."""
        return max((int(node.get("memory", 0)) for node in _nodes()), default=0)

    def asked_and_there(self, memory_bytes: int) -> str:
        """What an actor asks for, and what the nodes have and have free."""
        import ray

        asked = {
            "CPU": self._engines.cpus_per_segment_worker,
            "GPU": self._engines.gpus_per_worker,
            "memory": memory_bytes,
        }
        nodes = "; ".join(_told(node) for node in _nodes()) or "none"
        return f"it asks for {_told(asked)}; nodes have: {nodes}; free in all: {_told(ray.available_resources())}"


def _nodes() -> list[dict[str, float]]:
    """Resources of every live node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _told(resources: dict[str, Any]) -> str:
    """``2 CPU, 0.5 GPU, 7.0 GiB``."""
    cpus, gpus = (f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    return f"{cpus}, {gpus}, {resources.get('memory', 0) / 2**30:.1f} GiB"


def fate(error: BaseException) -> Fate:
    """What an error of an actor's answer means: the actor is ``gone``, Ray itself is ``lost``, or the answer failed."""
    from ray.exceptions import (
        LocalRayletDiedError,
        NodeDiedError,
        OutOfMemoryError,
        RayActorError,
        WorkerCrashedError,
    )

    if isinstance(error, LocalRayletDiedError):
        return "lost"
    return (
        "gone" if isinstance(error, RayActorError | NodeDiedError | OutOfMemoryError | WorkerCrashedError) else "failed"
    )
