"""The pool on a cluster of two nodes, with actors that do to themselves what happens to actors."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from tests.flows.command import until
from tests.workers.ray_nodes import add_node, ray_nodes
from tests.workers.small_root import add_model, case_of
from vnet_core.errors import EngineError
from workers.engines.clusters import Engines, ray_session
from workers.leases import check, run
from workers.ledger import Outcome, settle
from workers.registry.models import Model, load_model
from workers.segmentation.actors import Actors
from workers.segmentation.pool import ATTEMPTS, SegmentPool
from workers.segmentation.segment import Job, key_of, naming_a_lost_gpu
from workers.storage.store import Root

ENGINES = Engines(segment_workers=2, segment_cpus=1, ray_wait_s=60.0, case_limit_s=60.0)
COHORT = "liver"


class Pretender:
    """Publishes a case at once, unless the first word of its name says what happens: ``die`` and ``hang`` the first
    time, ``poison`` every time, ``gpu`` loses the GPU the first time, ``sealed`` dies after it has published."""

    def __init__(self, root_url: str, model: str, cpus: int) -> None:
        self.root = Root(root_url)
        self.model = load_model(self.root, model)

    def segment(self, job: Job) -> Outcome:
        case = job.case.id
        first = not self.root.names(f"ran/{case}")
        self.root.put(f"ran/{case}/{uuid4().hex}", str(os.getpid()).encode())
        what = case.partition("-")[0]
        if what == "poison" or (what == "die" and first):
            time.sleep(0.3)
            os._exit(1)
        if what == "hang" and first:
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "slow":
            time.sleep(3.0)
        return settle("segment", case, lambda: self._publish(job, what, first))

    def _publish(self, job: Job, what: str, first: bool) -> tuple[Any, str, tuple[str, ...]]:
        if what == "gpu" and first:
            with naming_a_lost_gpu():
                raise RuntimeError("CUDA error: device-side assert triggered")
        if job.claim:
            check(self.root, job.claim)
        key = key_of(job, self.model)
        self.root.put(f"{key}/mask", b"mask")
        self.root.seal(key, {"stage": "segment", "seconds": 0.25, "peak_bytes": 7})
        if what == "sealed":
            os._exit(1)
        return "computed", key, ()


class Pretenders(Actors):
    kind = Pretender


class Stillborns(Actors):
    """Actors that cannot be loaded."""

    class kind:
        def __init__(self, *arguments: object) -> None:
            raise RuntimeError("no such module on this node")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_nodes(2) as found, ray_session(found.address, 1):
        yield found


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@pytest.fixture
def model(root: Root) -> Model:
    return add_model(root)


@pytest.fixture
def pool_of(root: Root, model: Model, cluster: Any) -> Iterator[Callable[..., SegmentPool]]:
    pools = []

    def make(engines: Engines = ENGINES, kind: type[Actors] = Pretenders) -> SegmentPool:
        pools.append(SegmentPool(root, model, engines, kind(root.url, model.reference, engines)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def jobs(*names: str) -> list[Job]:
    return [Job(COHORT, case_of(name), "nifti") for name in names]


def states(outcomes: list[Outcome]) -> dict[str, tuple[str, ...]]:
    return {outcome.case: (outcome.state, *outcome.codes) for outcome in outcomes}


def runs(root: Root, case: str) -> int:
    return len(root.names(f"ran/{case}"))


@pytest.mark.fault("F2", "F29", "F30")
def test_actors_that_die_lose_their_gpu_or_hang_cost_no_case(
    root: Root, pool_of: Callable[..., SegmentPool], cluster: Any
) -> None:
    pool = pool_of(Engines(segment_workers=2, segment_cpus=1, ray_wait_s=60.0, case_limit_s=5.0))
    names = ["die-a", "gpu-a", "hang-a", *(f"plain-{n}" for n in range(12))]
    heard: list[str] = []
    found = pool.run(jobs(*names), lambda outcome: heard.append(outcome.case))
    assert states(found) == dict.fromkeys(names, ("computed",))
    assert sorted(heard) == sorted(names), "each is told once"
    # an actor that ends may take another case along, of those that end one too
    assert all(2 <= runs(root, name) <= 3 for name in ("die-a", "gpu-a", "hang-a"))
    assert 2 <= pool.replaced <= 3
    assert states(pool.run(jobs("sealed-a"))) == {"sealed-a": ("computed",)}
    assert runs(root, "sealed-a") == 1, "what is published is not done again, though its actor died"
    # the stopped process is gone, not left behind
    stopped = [int(root.get(f"ran/hang-a/{name}")) for name in root.names("ran/hang-a")]
    until(lambda: not any(psutil.pid_exists(pid) and _is_stopped(pid) for pid in stopped), 30)
    again = pool.run(jobs(*names))
    assert {outcome.state for outcome in again} == {"cached"}


def _is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@pytest.mark.fault("F6")
def test_a_case_that_kills_its_actor_each_time_fails_alone(
    root: Root, pool_of: Callable[..., SegmentPool], cluster: Any
) -> None:
    found = states(pool_of().run(jobs("poison-a", *(f"plain-{n}" for n in range(6)))))
    assert found.pop("poison-a") == ("failed", "engine.worker-died")
    assert runs(root, "poison-a") == ATTEMPTS
    assert set(found.values()) == {("computed",)}, "those that were beside it are innocent"


def test_the_second_try_of_a_night_fences_the_first(root: Root, pool_of: Callable[..., SegmentPool]) -> None:
    with run(root) as own:
        job = jobs("die-b")[0]
        claim = own.claim(key_of(job, load_model(root, "organs@v1")))
        assert claim is not None
        given: list[Job] = []
        pool = pool_of()
        found = pool.run([Job(COHORT, job.case, "nifti", claim=claim)], may_begin=lambda job: not given.append(job))
        assert states(found) == {"die-b": ("computed",)}
        assert [job.claim.number for job in given if job.claim] == [1, 2]
        with pytest.raises(OSError, match="taken the case over"):
            check(root, claim)
        own.give_back(claim)
        assert root.names("leases") == []


def test_a_pool_that_was_closed_starts_other_actors(root: Root, pool_of: Callable[..., SegmentPool]) -> None:
    pool = pool_of()
    assert states(pool.run(jobs("plain-a"))) == {"plain-a": ("computed",)}
    pool.close()
    assert states(pool.run(jobs("plain-b", "plain-c"))) == dict.fromkeys(("plain-b", "plain-c"), ("computed",))


def test_what_may_not_begin_is_left(root: Root, pool_of: Callable[..., SegmentPool]) -> None:
    found = pool_of().run(jobs("a", "b", "c"), may_begin=lambda job: job.case.id != "b")
    assert states(found) == {"a": ("computed",), "c": ("computed",)}


def test_a_pool_works_with_those_that_have_a_place_and_says_so(
    root: Root, pool_of: Callable[..., SegmentPool], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vnet"), "propagate", True)
    engines = Engines(segment_workers=3, segment_cpus=1, ray_wait_s=10.0)
    names = [f"slow-{n}" for n in range(16)]
    with caplog.at_level(logging.WARNING, logger="vnet"):
        # both nodes together have two processors
        found = pool_of(engines).run(jobs(*names))
    assert states(found) == dict.fromkeys(names, ("computed",))
    assert "2 of 3 segmenting actors have a place" in caplog.text
    assert "it asks for 1 CPU, 0 GPU, 1.2 GiB; nodes have: 1 CPU, 0 GPU, 4.0 GiB" in caplog.text


@pytest.mark.parametrize(
    ("asked", "told"), [({"segment_cpus": 5}, "5 CPU, 0 GPU"), ({"gpus_per_worker": 0.5}, "1 CPU, 0.5 GPU")]
)
def test_no_place_at_all_is_an_error_with_both_numbers(
    pool_of: Callable[..., SegmentPool], asked: dict[str, Any], told: str
) -> None:
    engines = Engines(**{"segment_workers": 1, "segment_cpus": 1, "ray_wait_s": 2.0} | asked)
    began = time.monotonic()
    with pytest.raises(EngineError, match=f"it asks for {told}.*; nodes have: 1 CPU, 0 GPU, 4.0 GiB") as caught:
        pool_of(engines).run(jobs("a"))
    assert caught.value.code == "ray.placement"
    assert time.monotonic() - began < 30


def test_actors_that_end_before_they_begin_are_not_started_for_ever(pool_of: Callable[..., SegmentPool]) -> None:
    with pytest.raises(EngineError, match="ended before they had begun") as caught:
        pool_of(kind=Stillborns).run(jobs("a", "b"))
    assert caught.value.code == "ray.actor-start"


@pytest.mark.fault("F3")
def test_the_death_of_a_node_moves_its_cases_to_the_others(
    root: Root, pool_of: Callable[..., SegmentPool], cluster: Any
) -> None:
    node, names = add_node(cluster), [f"slow-{n}" for n in range(12)]
    killed: list[float] = []

    def kill_node(outcome: Outcome) -> None:
        if not killed:
            killed.append(time.monotonic())
            cluster.remove_node(node, allow_graceful=False)

    engines = Engines(segment_workers=3, segment_cpus=1, ray_wait_s=120.0, case_limit_s=120.0)
    found = pool_of(engines).run(jobs(*names), kill_node)
    assert states(found) == dict.fromkeys(names, ("computed",))
    assert killed
    assert sum(runs(root, name) for name in names) <= len(names) + 2, "at most what the lost actor held"
