"""Stage train: one V-Net fitted by any number of Ray Train workers, from preprocessed volumes to a model bundle."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import psutil

from vnet_core.errors import ConfigError, EngineError, MemoryLimitError, StorageError, TrainingError, VnetError
from vnet_core.plan import Plan
from vnet_core.training import split_patients
from workers import models
from workers.clusters import Engines
from workers.cohort import Entry, check_name, volume_key
from workers.models import Model
from workers.store import Root
from workers.training_run import Budget, Run, TrainingProgress

PROGRESS_SECONDS = 1.0
"""How often progress is looked at."""
MEMORY_SHARE = 0.6
"""Share of the free memory that the training volumes of this machine's workers may take together."""


def train(
    root: Root,
    name: str,
    entries: Sequence[Entry],
    plan: Plan,
    budget: Budget,
    engines: Engines,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Model:
    """Train a new version of the model ``name`` on the labelled, preprocessed cases and publish its bundle.

    Raises TrainingError ``train.no-labels``, ``train.no-foreground`` or ``train.diverged``, ConfigError
    ``train.batch``, MemoryLimitError ``train.memory``, EngineError ``ray.training``. Checkpoints stay in the root and
    :func:`resume` goes on from them.
    """
    version = models.next_version(root, check_name(name, "model"))
    usable = _usable(root, entries, plan)
    training, validation = split_patients(
        [(e.case.id, e.case.patient) for e in usable], plan.training.validation_fraction, plan.training.seed
    )
    keys = {e.case.id: volume_key(e.case, plan) for e in usable}
    run = Run(
        root.url,
        f"training/{name}/{version}",
        plan.model_dump(mode="json"),
        {case: keys[case] for case in training},
        {case: keys[case] for case in validation},
        asdict(budget),
    )
    _check_memory(root, run, engines)
    root.put_json(f"{run.prefix}/run.json", asdict(run))
    return _fit(root, run, plan, engines, on_progress)


def resume(
    root: Root,
    name: str,
    budget: Budget | None,
    engines: Engines,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Model:
    """Go on with the newest unfinished training of ``name`` from its last checkpoint, with its own plan and cases.

    A ``budget`` replaces that of the run. Raises ConfigError ``train.nothing-to-resume``.
    """
    finished = set(models.versions(root, check_name(name, "model")))
    open_runs = [v for v in root.names(f"training/{name}") if v not in finished]
    if not open_runs:
        raise ConfigError(
            "train.nothing-to-resume", f"model {name} has no unfinished training; leave out --resume to start one"
        )
    newest = max(open_runs, key=lambda version: int(version.removeprefix("v")))
    mapping = root.get_json(f"training/{name}/{newest}/run.json")
    if budget:
        mapping["budget"] = asdict(budget)
    run = Run(**{**mapping, "root_url": root.url})
    return _fit(root, run, Plan.from_mapping(run.plan), engines, on_progress)


def _usable(root: Root, entries: Sequence[Entry], plan: Plan) -> list[Entry]:
    """Entries with a label and a finished volume; TrainingError when nothing can be learnt from them."""
    labelled = [e for e in entries if e.verdict.usable and e.case.label_digest]
    usable = [e for e in labelled if root.receipt(volume_key(e.case, plan))]
    if not usable:
        raise TrainingError(
            "train.no-labels",
            f"{len(entries)} cases, {len(labelled)} with a usable label, 0 of them preprocessed; add labels or run"
            " vnet preprocess",
        )
    values = {label.value for label in plan.labels}
    if not any(e.fingerprint and values & e.fingerprint.label_voxels.keys() for e in usable):
        raise TrainingError(
            "train.no-foreground",
            f"none of the labels {sorted(values)} occurs in any of {len(usable)} cases; correct plan.labels",
        )
    return usable


def _check_memory(root: Root, run: Run, engines: Engines) -> None:
    needed = 0
    for key in run.training.values():
        receipt = root.receipt(key)
        assert receipt is not None
        z, y, x = receipt["geometry"]["shape"]
        needed += z * y * x * (4 * len(run.plan["channels"]) + 1)
    if engines.ray_address is None:
        needed *= engines.train_workers
        free = psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            raise MemoryLimitError(
                "train.memory",
                f"the training volumes take {needed / 2**30:.1f} GiB, {MEMORY_SHARE * free / 2**30:.1f} GiB are free"
                " for them; use a coarser spacing_mm, fewer cases or fewer workers",
            )


def _fit(root: Root, run: Run, plan: Plan, engines: Engines, on_progress: Callable[[TrainingProgress], None]) -> Model:
    if plan.training.batch_size % engines.train_workers:
        raise ConfigError(
            "train.batch",
            f"batch_size {plan.training.batch_size} cannot be shared by {engines.train_workers} workers evenly; use"
            f" {engines.train_workers * max(1, plan.training.batch_size // engines.train_workers)}",
        )
    # a message of an earlier attempt must not be taken for this one's
    root.delete(f"{run.prefix}/error.json")
    with _progress_watch(root, run, on_progress):
        _run_ray(root, run, engines)
    return models.load_model(root, run.name)


def _run_ray(root: Root, run: Run, engines: Engines) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from workers.training_loop import train_worker

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config = asdict(run) | {"cpus_per_worker": engines.cpus_per_train_worker}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=engines.train_workers,
            use_gpu=engines.gpus_per_worker > 0,
            resources_per_worker={"CPU": engines.cpus_per_train_worker}
            | ({"GPU": engines.gpus_per_worker} if engines.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(root.path(run.prefix)),
            # a worker that dies is replaced and goes on from the last checkpoint; our own errors are final
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        told = root.get_json(f"{run.prefix}/error.json") if root.exists(f"{run.prefix}/error.json") else None
        if told:
            raise _error_class(told["class"])(told["code"], told["message"]) from error
        raise EngineError(
            "ray.training", f"training on Ray ended early ({error}); go on from the last checkpoint with --resume"
        ) from error


def _error_class(name: str) -> type[VnetError]:
    return {c.__name__: c for c in (TrainingError, MemoryLimitError, StorageError, ConfigError)}.get(name, VnetError)


@contextlib.contextmanager
def _progress_watch(root: Root, run: Run, on_progress: Callable[[TrainingProgress], None]) -> Iterator[None]:
    """Call ``on_progress`` from a thread of its own whenever the workers have written a new state."""
    stop = threading.Event()

    def watch() -> None:
        last = None
        while not stop.wait(PROGRESS_SECONDS):
            if root.exists(f"{run.prefix}/progress.json"):
                state = TrainingProgress(**root.get_json(f"{run.prefix}/progress.json"))
                if state != last:
                    on_progress(state)
                    last = state

    root.delete(f"{run.prefix}/progress.json")
    thread = threading.Thread(target=watch, name="vnet-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
