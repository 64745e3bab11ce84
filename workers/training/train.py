"""Stage train: V-Nets fitted on Ray, from preprocessed volumes to a model bundle.

One network is fitted by any number of Ray Train workers together; the networks of a cross-validation by one Ray task
each, side by side. Each leaves its weights and figures in the root, and the bundle is made of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from vnet_core.errors import ConfigError, EngineError, MemoryLimitError, StorageError, TrainingError, VnetError
from vnet_core.plan import Plan
from vnet_core.postprocess import candidates
from vnet_core.splits import split_folds, split_patients
from workers.beside import repeating
from workers.cohort import Entry, check_name, volume_key
from workers.engines.clusters import Engines
from workers.engines.ray_watch import lost, watching
from workers.registry import models
from workers.registry.models import Model
from workers.storage.store import Root
from workers.training.attempts import last_loss
from workers.training.bundle import publish_fitted
from workers.training.cases import class_voxels, component_volumes_ml, usable_cases
from workers.training.run import Budget, Run, TrainingProgress, together
from workers.training.validating import OnValidation, validated_beside

PROGRESS_SECONDS = 1.0
"""How often progress is looked at."""
LOSSES = 5
"""Losses of workers after which a training goes on from its last checkpoint; a fault that every attempt meets ends it
after so many. A node that is taken away with notice does not count."""
WAITS = 15
"""Minutes in all that a group waits for the machines it needs."""
STOP_SECONDS = 20.0
"""How long an interrupted command waits for the workers' last checkpoint; Prefect, Kubernetes and Slurm kill a process
30 seconds after they have told it to end."""
MEMORY_SHARE = 0.6
"""Share of the free memory that the training volumes of this machine's workers may take together."""

OnProgress = Callable[[TrainingProgress], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how a training gets on, from threads beside that which waits for it."""

    on_progress: OnProgress = lambda progress: None
    on_validation: OnValidation = lambda run, validation: None
    """Told of each validation beside the training."""


UNWATCHED = Watch()


@dataclass(frozen=True, slots=True)
class Training:
    """What is to be trained."""

    name: str
    """Of the model."""
    entries: Sequence[Entry]
    plan: Plan
    budget: Budget
    """Of each network."""
    folds: int = 1
    """Above 1: so many networks, each validated on its share of the cases; together they are the model."""
    start: str | None = None
    """Model whose weights are the first ones."""


def train(root: Root, training: Training, engines: Engines, watch: Watch = UNWATCHED) -> Model:
    """Train a new version of a model on the labelled, preprocessed cases and publish its bundle.

    Raises TrainingError ``train.no-labels``, ``train.no-foreground``, ``train.absent-label``, ``train.label-value``,
    ``train.folds`` or ``train.diverged``, ConfigError ``train.batch``, MemoryLimitError ``train.memory``, EngineError
    ``ray.training`` or ``ray.lost``. Checkpoints stay in the root and :func:`resume` goes on from them.
    """
    version = models.next_version(root, check_name(training.name, "model"))
    plan = training.plan
    usable = usable_cases(root, training.entries, plan)
    cases = [(e.case.id, e.case.patient) for e in usable]
    prefix = f"training/{training.name}/{version}"
    if training.folds > 1:
        splits = split_folds(cases, training.folds, plan.training.seed)
        prefixes = [f"{prefix}/fold-{fold}" for fold in range(training.folds)]
    else:
        splits = [split_patients(cases, plan.training.validation_fraction, plan.training.seed)]
        prefixes = [prefix]
    keys = {e.case.id: volume_key(e.case, plan) for e in usable}
    start = models.load_model(root, training.start).reference if training.start else None
    runs = [
        Run(
            root.url,
            own,
            plan.model_dump(mode="json"),
            {case: keys[case] for case in fitting},
            {case: keys[case] for case in validating},
            asdict(training.budget),
            class_voxels([e for e in usable if e.case.id in set(fitting)], plan),
            start,
            [c.model_dump(mode="json") for c in candidates(component_volumes_ml(usable, plan))]
            if training.folds > 1
            else [],
            [e.case.id for e in usable if "dicom.burnt-in" in e.verdict.codes and e.case.id in set(validating)],
        )
        for own, (fitting, validating) in zip(prefixes, splits, strict=True)
    ]
    _check_memory(root, runs, engines)
    for run in runs:
        root.put_json(f"{run.prefix}/run.json", asdict(run))
    patients = {case: patient for case, patient in cases if patient}
    root.put_json(f"{prefix}/training.json", {"runs": prefixes, "patients": patients})
    return _fit(root, models.Target(training.name, version, plan), runs, engines, watch)


def resume(
    root: Root,
    name: str,
    budget: Budget | None,
    engines: Engines,
    watch: Watch = UNWATCHED,
) -> Model:
    """Go on with the newest unfinished training of ``name`` from its last checkpoints, with its own plan and cases.

    A ``budget`` replaces that of its runs. Raises ConfigError ``train.nothing-to-resume``.
    """
    finished = set(models.versions(root, check_name(name, "model")))
    begun = [v for v in root.names(f"training/{name}") if v not in finished]
    open_runs = [v for v in begun if root.exists(f"training/{name}/{v}/training.json")]
    if not open_runs:
        raise ConfigError(
            "train.nothing-to-resume", f"model {name} has no unfinished training; leave out --resume to start one"
        )
    newest = max(open_runs, key=lambda version: int(version.removeprefix("v")))
    runs = []
    for prefix in root.get_json(f"training/{name}/{newest}/training.json")["runs"]:
        mapping = root.get_json(f"{prefix}/run.json") | {"root_url": root.url}
        runs.append(Run(**(mapping | ({"budget": asdict(budget)} if budget else {}))))
    plan = Plan.from_mapping(runs[0].plan)
    return _fit(root, models.Target(name, newest, plan), runs, engines, watch)


def _check_memory(root: Root, runs: Sequence[Run], engines: Engines) -> None:
    if engines.ray_address is not None:
        return
    needed = 0
    for run in runs[: side_by_side(runs, engines)]:
        for key in (run.training | run.validation).values():
            receipt = root.receipt(key)
            assert receipt is not None
            z, y, x = receipt["geometry"]["shape"]
            needed += z * y * x * (4 * len(run.plan["channels"]) + 1)
    needed *= engines.most_train_workers
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise MemoryLimitError(
            "train.memory",
            f"the training volumes take {needed / 2**30:.1f} GiB, {MEMORY_SHARE * free / 2**30:.1f} GiB are free"
            " for them; use a coarser spacing_mm, fewer cases or fewer workers",
        )


def side_by_side(runs: Sequence[Run], engines: Engines) -> int:
    """How many folds are fitted at once."""
    return min(len(runs), max(1, engines.cpus))


def _fit(root: Root, target: models.Target, runs: Sequence[Run], engines: Engines, watch: Watch) -> Model:
    workers, batch_size = engines.most_train_workers, target.plan.training.batch_size
    if len(runs) > 1 and workers > 1:
        raise ConfigError(
            "train.folds", f"{len(runs)} folds run one worker each, {workers} were asked for; leave out --workers"
        )
    if workers > batch_size:
        raise ConfigError(
            "train.batch",
            f"batch_size {batch_size} leaves some of {workers} workers without a sample; use at most {batch_size}"
            f" workers, or a batch_size of {workers}",
        )
    waiting = [run for run in runs if root.receipt(run.fitted) is None]
    for run in waiting:
        # messages of an earlier attempt must not be taken for this one's
        root.delete(run.error)
        root.delete(run.stop)
    with _progress_watch(root, runs, watch.on_progress):
        if waiting:
            work = partial(_fit_together if len(runs) == 1 else _fit_folds, root, waiting, engines)
            with _validations(root, waiting, target.plan, engines, watch.on_validation):
                _attended(work, partial(_ask_to_stop, root, waiting))
    return publish_fitted(root, target, runs)


def _validations(
    root: Root, runs: Sequence[Run], plan: Plan, engines: Engines, on_validation: OnValidation
) -> contextlib.AbstractContextManager[None]:
    """Within it, snapshots of the runs are judged, where the plan has any."""
    if not plan.training.full_validation_every:
        return contextlib.nullcontext()
    return validated_beside(root, runs, engines, on_validation)


def _ask_to_stop(root: Root, runs: Sequence[Run]) -> None:
    for run in runs:
        root.put_json(run.stop, {})


def _attended(work: Callable[[], None], ask_to_stop: Callable[[], None]) -> None:
    """Do ``work`` in a thread of its own; where this one is interrupted, ask to stop and give it time to.

    EngineError ``ray.lost`` where Ray dies meanwhile, whatever becomes of the thread.
    """
    ends: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
            ends.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            ends.put(error)

    with watching(lambda what: ends.put(_lost(what))) as dead:
        threading.Thread(target=run, name="vnet-training", daemon=True).start()
        try:
            end = ends.get()
        except BaseException:
            ask_to_stop()
            with contextlib.suppress(Empty):
                ends.get(timeout=STOP_SECONDS)
            raise
        if isinstance(end, EngineError) and (what := dead()):
            end = _lost(what)
    if end is not None:
        raise end


def _lost(what: str) -> EngineError:
    return lost(what, "start Ray where it runs by itself, and go on from the last checkpoint with --resume")


def _fit_together(root: Root, runs: Sequence[Run], engines: Engines) -> None:
    """One network by a group of Ray Train workers, as many as there is room for in the range of the engines."""
    import ray.train
    from ray.exceptions import RayError
    from ray.train.torch import TorchTrainer

    from workers.training.losses import Losses, NoticedTorchConfig
    from workers.training.seats import train_worker

    (run,) = runs
    least, most = engines.train_workers, engines.most_train_workers
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # its declared types are those of the version before
    ray_train: Any = ray.train
    config = asdict(run) | {"cpus_per_worker": engines.cpus_per_train_worker}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=NoticedTorchConfig(timeout_s=math.ceil(engines.train_hang_s)),
        scaling_config=ray_train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=engines.gpus_per_worker > 0,
            resources_per_worker={"CPU": engines.cpus_per_train_worker}
            | ({"GPU": engines.gpus_per_worker} if engines.gpus_per_worker else {}),
        ),
        run_config=ray_train.RunConfig(
            name="ray",
            # only Ray's own notes: checkpoints are objects of the root
            storage_path=str(root.home / run.prefix),
            failure_config=ray_train.FailureConfig(max_failures=LOSSES, controller_failure_limit=WAITS),
            callbacks=[Losses(run)],
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, RayError) as error:  # the second: of the process that holds the group
        raise _told(root, run, error) from error


def _fit_folds(root: Root, runs: Sequence[Run], engines: Engines) -> None:
    """One network per run, each in a Ray task of its own; the first error is raised when all have ended."""
    import ray
    from ray.exceptions import RayError

    from workers.training.seats import fit_alone

    cpus = max(1, engines.cpus // side_by_side(runs, engines))
    task = ray.remote(fit_alone).options(num_cpus=cpus, num_gpus=engines.gpus_per_worker, max_retries=LOSSES)
    jobs = [(run, task.remote(asdict(run) | {"cpus_per_worker": cpus})) for run in runs]
    errors: list[VnetError] = []
    for run, job in jobs:
        try:
            ray.get(job)
        except RayError as error:
            errors.append(_told(root, run, error))
    if errors:
        raise errors[0]


def _told(root: Root, run: Run, error: Exception) -> VnetError:
    """The named error that a worker left behind, or else that it ended."""
    if not root.is_object(run.error):
        # not what the error says, which quotes machines and paths
        within = getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error
        why = " after ".join(filter(None, (type(within).__name__, last_loss(root, run.prefix))))
        return EngineError(
            "ray.training", f"training on Ray ended early ({why}); go on from the last checkpoint with --resume"
        )
    told: dict[str, Any] = root.get_json(run.error)
    known = {c.__name__: c for c in (TrainingError, MemoryLimitError, StorageError, ConfigError)}
    return known.get(told["class"], VnetError)(told["code"], told["message"])


def _progress_watch(
    root: Root, runs: Sequence[Run], on_progress: OnProgress
) -> contextlib.AbstractContextManager[None]:
    """Call ``on_progress`` from a thread of its own whenever the workers have written a new state."""
    last: list[TrainingProgress] = []

    def look() -> None:
        keys = [f"{run.prefix}/progress.json" for run in runs]
        states = [TrainingProgress(**root.get_json(key)) for key in keys if root.exists(key)]
        if states and (state := together(states, len(runs))) not in last:
            on_progress(state)
            last[:] = [state]

    for run in runs:
        if root.receipt(run.fitted) is None:
            root.delete(f"{run.prefix}/progress.json")
    return repeating("progress", PROGRESS_SECONDS, look)
