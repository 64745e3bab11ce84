"""Training over two Ray nodes, one of which is lost or is to be taken away."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.patience import until
from tests.workers.ball_cohort import ball_entries, ball_plan
from workers.engines.clusters import Engines
from workers.storage.store import Root
from workers.training.run import Budget
from workers.training.train import Training, train

pytestmark = pytest.mark.faults

STEPS = 2000
"""A checkpoint of the plan's rhythm at every 200."""
NOTICE_S = 30
"""Between the notice that a machine will be taken away and that."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and a second node, with a core each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def trained(root: Root, name: str, cluster: Cluster, steps: int = STEPS) -> dict[str, Any]:
    """Facts of a training by one or two workers."""
    plan = ball_plan(optimiser="sgd", learning_rate=1e-3)
    engines = Engines(ray_address=cluster.address, cpus=2, train_workers=1, train_workers_max=2)
    training = Training(name, ball_entries(root, plan), plan, Budget(steps=steps))
    return train(root, training, engines).facts["training"]


@contextmanager
def beside(act: Callable[[], None]) -> Iterator[None]:
    """Do something else meanwhile, which must go well too."""
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(act)
        yield
        doing.result()


def checkpoints(root: Root, name: str) -> list[int]:
    prefix = f"training/{name}/v1/checkpoints"
    return [int(step) for step in root.names(prefix) if root.receipt(f"{prefix}/{step}")]


def kill(node: Any) -> None:
    """SIGKILL to the node's raylet; its workers end with it."""
    (raylet,) = node.all_processes["raylet"]
    raylet.process.kill()


@pytest.mark.fault("F28")
def test_a_lost_node_leaves_the_training_to_the_other(cluster, tmp_path):
    root = Root(tmp_path)
    second = cluster.add_node(num_cpus=1)

    def lose() -> None:
        until(lambda: checkpoints(root, "lost"), 240)
        kill(second)

    with beside(lose):
        facts = trained(root, "lost", cluster)
    assert facts["steps"] == STEPS
    first, *_, last = facts["attempts"]
    assert (first["from_step"], first["workers"]) == (0, 2)
    assert 0 < last["from_step"] < STEPS
    assert (last["workers"], facts["workers"]) == (1, 1)
    assert "Error" in last["after"]


def test_a_machine_that_comes_joins_the_training(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.training.train.LOSSES", 0)
    root = Root(tmp_path)
    # by its command: a node of this process is made by its main thread alone, which trains
    ray_start = str(Path(sys.executable).with_name("ray"))
    machine = [ray_start, "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
    with ExitStack() as started:

        def come() -> None:
            until(lambda: checkpoints(root, "joined"), 240)
            process = subprocess.Popen(machine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.callback(process.wait, 60)
            started.callback(process.terminate)

        with beside(come):
            # Ray looks for room once a minute
            facts = trained(root, "joined", cluster, 4 * STEPS)
    assert facts["steps"] == 4 * STEPS
    assert [attempt["workers"] for attempt in facts["attempts"]] == [1, 2]
    assert 0 < facts["attempts"][1]["from_step"] < 4 * STEPS


def test_notice_of_a_preemption_is_answered_with_a_checkpoint(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.training.train.LOSSES", 0)
    root = Root(tmp_path)
    second = cluster.add_node(num_cpus=1)

    def take_away() -> None:
        """As a cloud does: at the moment that the notice named, and not before."""
        until(lambda: checkpoints(root, "taken"), 240)
        deadline_ms = int((time.time() + NOTICE_S) * 1000)
        client = ray._raylet.GcsClient(address=cluster.address)
        # 2: DRAIN_NODE_REASON_PREEMPTION
        accepted, why = client.drain_node(second.node_id, 2, "spot", deadline_ms)
        assert accepted, why
        until(lambda: [step for step in checkpoints(root, "taken") if step % 200], 120)
        until(lambda: time.time() * 1000 > deadline_ms)
        kill(second)

    with beside(take_away):
        facts = trained(root, "taken", cluster, 4 * STEPS)
    assert facts["steps"] == 4 * STEPS
    first, *_, last = facts["attempts"]
    assert (first["from_step"], first["workers"]) == (0, 2)
    assert last["workers"] == 1
    assert last["after"], "the record says what it was lost to"
