"""Training on Ray by groups of workers: shared batches, and workers that are lost, hang or are told to leave."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import psutil
import pytest
import safetensors.torch
import torch

from tests.patience import slowness, until
from tests.workers.ball_cohort import ball_entries, ball_plan
from vnet_core.errors import TrainingError
from workers.engines.clusters import Engines, ray_session
from workers.registry.models import Model
from workers.storage.store import Root
from workers.training.run import Budget, Run
from workers.training.seats import fit_alone
from workers.training.train import UNWATCHED, Training, Watch, resume, train
from workers.training.validations import Validation

ONE, TWO = Engines(cpus=1), Engines(cpus=2, train_workers=2)
STEPS = 200


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(None, 2):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return Root(tmp_path_factory.mktemp("group"))


def trained(
    root: Root, name: str, engines: Engines, watch: Watch = UNWATCHED, steps: int = STEPS, **training: object
) -> Model:
    plan = ball_plan(**({"optimiser": "sgd", "learning_rate": 1e-3} | training))
    return train(root, Training(name, ball_entries(root, plan), plan, Budget(steps=steps)), engines, watch)


def weights(root: Root, model: Model) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(root.get(f"{model.prefix}/weights.safetensors"))


def difference_to_one_process(root: Root, model: Model) -> float:
    """Largest difference of the model's weights to those of the same run in this process, as a share of the largest."""
    run = Run(**root.get_json(f"training/{model.name}/v1/run.json"))
    alone = replace(run, prefix=f"training/{model.name}-alone/v1")
    fit_alone(asdict(alone))
    expected = safetensors.torch.load(root.get(f"{alone.fitted}/weights.safetensors"))
    found = weights(root, model)
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((value - found[name]).abs().max()) for name, value in expected.items()) / largest


def workers(kind: str = "RayTrainWorker") -> list[psutil.Process]:
    """Processes of this session's training workers."""
    family = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in family if kind in " ".join(p.cmdline())]


def has_checkpoint(root: Root, prefix: str) -> bool:
    return any(root.receipt(f"{prefix}/checkpoints/{name}") for name in root.names(f"{prefix}/checkpoints"))


class Beside:
    """Does something to the running training as soon as it has a checkpoint, in a thread beside it."""

    def __init__(self, root: Root, name: str, act: Callable[[], None]) -> None:
        self._root, self._prefix, self._act = root, f"training/{name}", act
        self.acted = False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        until(lambda: has_checkpoint(self._root, self._prefix), 300)
        self._act()
        self.acted = True


@pytest.mark.slow
def test_a_batch_of_three_on_two_workers_trains_as_on_one_and_is_judged_beside(root):
    told: list[Validation] = []
    model = trained(
        root, "two", TWO, Watch(on_validation=lambda run, found: told.append(found)), 20, full_validation_every=8
    )
    assert [found.step for found in told] == [8, 16]
    assert all(found.means and not found.failed for found in told)
    assert model.facts["training"]["workers"] == 2
    assert model.facts["training"]["attempts"] == [{"from_step": 0, "workers": 2, "after": ""}]
    # sums in another order, no more
    assert 0 < difference_to_one_process(root, model) < 1e-5


@pytest.mark.fault("F28")
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(root):
    beside = Beside(root, "killed/v1", lambda: workers()[0].kill())
    model = trained(root, "killed", ONE)
    assert beside.acted
    first, second = model.facts["training"]["attempts"]
    assert first == {"from_step": 0, "workers": 1, "after": ""}
    assert 0 < second["from_step"] < STEPS
    assert (second["workers"], second["after"]) == (1, "worker 0: ActorDiedError")
    assert model.facts["training"]["steps"] == STEPS
    assert difference_to_one_process(root, model) == 0


@pytest.mark.faults
@pytest.mark.fault("F1")
def test_a_killed_fold_goes_on_from_its_checkpoint_and_the_other_is_not_disturbed(root):
    prefixes = [f"training/folds/v1/fold-{fold}" for fold in range(2)]

    def kill_one() -> None:
        until(lambda: has_checkpoint(root, prefixes[1]))
        workers("ray::fit_alone")[0].kill()

    beside = Beside(root, "folds/v1/fold-0", kill_one)
    plan = ball_plan(optimiser="sgd", learning_rate=1e-3)
    model = train(root, Training("folds", ball_entries(root, plan), plan, Budget(steps=2000), folds=2), Engines(cpus=2))
    assert beside.acted
    once, twice = sorted((root.get_json(f"{prefix}/attempts.json") for prefix in prefixes), key=len)
    assert [attempt["from_step"] for attempt in once] == [0]
    first, second = twice
    assert first["from_step"] == 0 < second["from_step"] < 2000
    assert len(model.facts["weights"]) == 2


@pytest.mark.faults
def test_a_worker_that_is_told_to_end_leaves_a_checkpoint_of_that_moment(root):
    told_at: list[int] = []

    def tell() -> None:
        told_at.append(newest(root, "told"))
        os.kill(workers()[0].pid, signal.SIGTERM)

    beside = Beside(root, "told/v1", tell)
    model = trained(root, "told", ONE, steps=2000)
    assert beside.acted
    _, second = model.facts["training"]["attempts"]
    # the checkpoints of the plan's rhythm lie 200 steps apart
    assert told_at[0] < second["from_step"]
    assert second["from_step"] % 200, "one that only the departure wrote"


@pytest.mark.faults
@pytest.mark.fault("F28")
def test_a_worker_that_hangs_is_found_by_the_others(root):
    beside = Beside(root, "hung/v1", lambda: os.kill(workers()[-1].pid, signal.SIGSTOP))
    model = trained(root, "hung", replace(TWO, train_hang_s=15.0), steps=300)
    assert beside.acted
    first, second = model.facts["training"]["attempts"]
    assert (first["workers"], second["workers"]) == (2, 2)
    assert 0 < second["from_step"] < 300
    assert second["after"], "the record says what it was lost to"
    assert not [p for p in workers() if p.status() == psutil.STATUS_STOPPED]


@pytest.mark.faults
def test_a_named_error_is_final(root):
    plan = ball_plan(foreground_fraction=0.0, learning_rate=1e30)
    started = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        train(root, Training("diverged", ball_entries(root, plan), plan, Budget(steps=100)), TWO)
    assert caught.value.code == "train.diverged"
    assert len(root.get_json("training/diverged/v1/attempts.json")) == 1
    assert time.monotonic() - started < 300 * slowness()


@pytest.mark.faults
def test_an_interrupted_command_leaves_a_checkpoint_of_that_moment(root):
    class Interruption(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, interrupt)
    beside = Beside(root, "stopped/v1", lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        with pytest.raises(Interruption):
            trained(root, "stopped", ONE, steps=5000)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert beside.acted
    stopped_at = newest(root, "stopped")
    assert 0 < stopped_at < 5000
    assert stopped_at % 500, "one that only the stop wrote"
    model = resume(root, "stopped", Budget(steps=stopped_at + 10), ONE)
    assert [attempt["from_step"] for attempt in model.facts["training"]["attempts"]] == [0, stopped_at]
    assert model.facts["training"]["attempts"][1]["after"] == ""


def newest(root: Root, name: str) -> int:
    """Step of the newest checkpoint of a training's first version."""
    return int(root.names(f"training/{name}/v1/checkpoints")[-1])
