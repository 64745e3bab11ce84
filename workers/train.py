"""Stage train: V-Nets fitted on Ray, from preprocessed volumes to a model bundle.

One network is fitted by any number of Ray Train workers together; the networks of a cross-validation by one Ray task
each, side by side. Each leaves its weights and figures in the root, and the bundle is made of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import psutil

from vnet_core.errors import ConfigError, EngineError, MemoryLimitError, StorageError, TrainingError, VnetError
from vnet_core.plan import Plan
from vnet_core.postprocess import candidates
from vnet_core.splits import split_folds, split_patients
from workers import models
from workers.bundle import publish_fitted
from workers.clusters import Engines
from workers.cohort import Entry, check_name, volume_key
from workers.models import Model
from workers.store import Root
from workers.training_run import Budget, Run, TrainingProgress, together
from workers.validating import OnValidation, validated_beside

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
    ``ray.training``. Checkpoints stay in the root and :func:`resume` goes on from them.
    """
    version = models.next_version(root, check_name(training.name, "model"))
    plan = training.plan
    usable = _usable(root, training.entries, plan)
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
            _class_voxels([e for e in usable if e.case.id in set(fitting)], plan),
            start,
            [c.model_dump(mode="json") for c in candidates(_components(usable, plan))] if training.folds > 1 else [],
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
    cases = _label_cases(usable)
    names = {label.value: label.name for label in plan.labels}
    absent = [value for value in names if not cases.get(value)]
    if len(absent) == len(names):
        raise TrainingError(
            "train.no-foreground",
            f"none of the labels {sorted(names)} occurs in any of {len(usable)} cases; correct plan.labels",
        )
    if absent:
        missing = ", ".join(f"{value} ({names[value]})" for value in absent)
        raise TrainingError(
            "train.absent-label",
            f"label {missing} occurs in 0 of {len(usable)} cases, so it cannot be learnt; take it out of plan.labels or"
            " add cases that have it",
        )
    named = {0, *names, plan.ignore_label}
    if plan.other_labels == "refuse" and (others := [v for v in cases if v not in named]):
        where = ", ".join(f"{value} in {cases[value]}" for value in sorted(others))
        raise TrainingError(
            "train.label-value",
            f"the label maps hold values that the plan does not name ({where} of {len(usable)} cases; it names"
            f' {sorted(names)}); name them in labels, or set other_labels = "background"',
        )
    return usable


def _label_cases(entries: Sequence[Entry]) -> dict[int, int]:
    """In how many cases each label value occurs."""
    counts: dict[int, int] = {}
    for entry in entries:
        for value, number in (entry.fingerprint.label_cases if entry.fingerprint else {}).items():
            counts[value] = counts.get(value, 0) + number
    return counts


def _class_voxels(entries: Sequence[Entry], plan: Plan) -> list[int]:
    """Voxels of background, which takes in values that the plan does not name, and of each label."""
    values = [label.value for label in plan.labels]
    voxels = [0] * (len(values) + 1)
    for entry in entries:
        for value, number in (entry.fingerprint.label_voxels if entry.fingerprint else {}).items():
            if value in values:
                voxels[values.index(value) + 1] += number
            elif value != plan.ignore_label:
                voxels[0] += number
    return voxels


def _components(entries: Sequence[Entry], plan: Plan) -> dict[int, list[float]]:
    """Volumes in mL of the true components of each label."""
    volumes: dict[int, list[float]] = {label.value: [] for label in plan.labels}
    for entry in entries:
        for value, parts_ml in (entry.fingerprint.component_ml if entry.fingerprint else {}).items():
            if value in volumes:
                volumes[value] += parts_ml
    return volumes


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
    """Do ``work`` in a thread of its own; where this one is interrupted, ask to stop and give it time to."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, name="vnet-training", daemon=True).start()
    try:
        done.result()
    except BaseException:
        if not done.done():
            ask_to_stop()
            wait([done], STOP_SECONDS)
        raise


def _fit_together(root: Root, runs: Sequence[Run], engines: Engines) -> None:
    """One network by a group of Ray Train workers, as many as there is room for in the range of the engines."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from workers.training_losses import Losses, NoticedTorchConfig
    from workers.training_seats import train_worker

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
    except ray.train.TrainingFailedError as error:
        raise _told(root, run, error) from error


def _fit_folds(root: Root, runs: Sequence[Run], engines: Engines) -> None:
    """One network per run, each in a Ray task of its own; the first error is raised when all have ended."""
    import ray
    from ray.exceptions import RayError

    from workers.training_seats import fit_alone

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
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return EngineError(
            "ray.training", f"training on Ray ended early ({first}); go on from the last checkpoint with --resume"
        )
    told: dict[str, Any] = root.get_json(run.error)
    known = {c.__name__: c for c in (TrainingError, MemoryLimitError, StorageError, ConfigError)}
    return known.get(told["class"], VnetError)(told["code"], told["message"])


@contextlib.contextmanager
def _progress_watch(root: Root, runs: Sequence[Run], on_progress: OnProgress) -> Iterator[None]:
    """Call ``on_progress`` from a thread of its own whenever the workers have written a new state."""
    stop = threading.Event()

    def watch() -> None:
        last = None
        while not stop.wait(PROGRESS_SECONDS):
            keys = [f"{run.prefix}/progress.json" for run in runs]
            states = [TrainingProgress(**root.get_json(key)) for key in keys if root.exists(key)]
            if states and (state := together(states, len(runs))) != last:
                on_progress(state)
                last = state

    for run in runs:
        if root.receipt(run.fitted) is None:
            root.delete(f"{run.prefix}/progress.json")
    thread = threading.Thread(target=watch, name="vnet-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
