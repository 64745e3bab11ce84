"""What one training worker does: load its volumes, step, validate, keep checkpoints, and leave the fitted weights.

Rank 0 decides for all: it alone reads the clock, and sends progress and the decisions of each step to the others.
Any worker can tell that it has to leave; all learn it before the same step, and rank 0 writes a checkpoint.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import nn

from vnet_core.errors import TrainingError
from vnet_core.fitting import StepSettings, WeightAverage, build_optimiser, learning_rate_factor, placed, train_step
from vnet_core.inference import precision
from vnet_core.losses import build_loss
from vnet_core.networks.vnet import build_vnet, count_parameters, initialise
from vnet_core.plan import Plan
from vnet_core.postprocess import score_candidates
from vnet_core.sections import Cleaning
from vnet_core.structures import structures
from workers.registry.models import load_model, load_networks
from workers.storage.store import Root
from workers.training.attempts import attempts, begin_attempt, note_loss
from workers.training.checkpoints import as_safetensors, load_checkpoint, save_checkpoint
from workers.training.judge import Judge, dice_row
from workers.training.patches import BatchLoader, Share, TrainingVolume, load_volume
from workers.training.run import Budget, Run, TrainingProgress
from workers.training.validations import leave_snapshot, means

VALIDATIONS = 10
"""Validations over the whole budget; a checkpoint is written with each."""
VALIDATION_SHARE = 0.05
"""Of a budget in minutes, the most that validations may take before the last one."""
CHECKPOINT_SECONDS = 120.0
"""A checkpoint is written at least this often."""
PROGRESS_SECONDS = 1.0
NOTICE_SECONDS = 5.0
"""How often it is asked whether to stop, or whether a node is to be taken away."""
BAD_STEPS = 10
"""Steps in a row whose gradient is not finite after which a training ends."""


@dataclass(slots=True)
class State:
    """What changes from step to step, beside tensors, and goes into a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    validations: int = 0
    validation_seconds: float = 0.0
    bad_steps: int = 0
    """Steps in a row that were left out because their gradient was not finite."""
    best_dice: float = -1.0
    losses: list[list[float]] = field(default_factory=list)
    """[minutes, mean loss since the last entry], one entry per second at most."""
    dice: list[list[float]] = field(default_factory=list)
    """[minutes, Dice per structure ...], one entry per validation."""


class Departure:
    """Somebody has asked this process to end, and it waits until the training has a checkpoint."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answered = threading.Event()
        """Set once there is a checkpoint that is younger than the question, or the training is over."""

    def answer(self) -> None:
        """There is a checkpoint."""
        self.answered.set()


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place among those that fit one network together."""

    share: Share
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    """Makes the workers' gradients one."""
    departure: Departure = field(default_factory=Departure)
    preempted: Callable[[], bool] = lambda: False
    """Whether a node of the group is about to be taken away; all workers ask together."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What all workers do before the next step."""

    progress: float
    """Share of the budget that is used."""
    validate: bool
    save: bool
    """Write a checkpoint."""
    stop: bool
    """Leave the training where it is, after the checkpoint."""


class Worker:
    """One worker of a run."""

    def __init__(self, root: Root, run: Run, seat: Seat) -> None:
        self.root, self.run, self.seat = root, run, seat
        self.plan = Plan.from_mapping(run.plan)
        self.budget = Budget(**run.budget)
        self.structures = structures(self.plan)
        if seat.device.type == "cpu":
            torch.set_num_threads(run.cpus_per_worker)
        self.precision = precision(self.plan.training, seat.device)
        self.state = State()
        network = build_vnet(self.plan.network, len(self.plan.channels), self.plan.outputs)
        initialise(network, self.plan.training.seed)
        if run.start:
            start_from(network, root, run.start)
        self.network = placed(network, seat.device, self.precision)
        self.optimiser = build_optimiser(self.network, self.plan.training)
        self.average = WeightAverage(self.network, self.plan.training.average_decay)
        self.best: dict[str, torch.Tensor] = {}
        self._load_checkpoint()
        self.stepper = seat.wrap(self.network)
        self.case_dice: dict[str, list[float | None]] = {}
        self._every = self.plan.training.full_validation_every
        self._asked = -math.inf
        self._preempted = self._warned = False

    @property
    def leads(self) -> bool:
        """Whether this worker decides and writes for all."""
        return self.seat.share.rank == 0

    def fit(self) -> None:
        """Step until the budget is used, then leave the fitted weights; or until somebody asks to stop."""
        if self.leads:
            begin_attempt(self.root, self.run, self.state.step, self.seat.share.world)
        training = self.plan.training
        volumes = [load_volume(self.root, key, self.plan) for _, key in sorted(self.run.training.items())]
        validation = {
            case: load_volume(self.root, key, self.plan) for case, key in self._own(sorted(self.run.validation.items()))
        }
        settings = StepSettings(
            build_loss(self.plan, self.run.class_voxels), self.precision, self.plan.training.gradient_clip
        )
        loader = BatchLoader(
            volumes, self.plan, self.seat.share, self.state.step * training.accumulate, self.seat.device
        )
        clock = Clock(self.state.seconds)
        recent: list[float] = []
        noted = checkpointed = self.state.seconds
        try:
            batches = iter(loader)
            while True:
                turn = self._decide(clock.seconds, checkpointed)
                if turn.validate:
                    self._validate(validation, clock)
                if self.leads and turn.progress < 1 and self._snapshot_due():
                    weights = as_safetensors(self.average.state)
                    leave_snapshot(self.root, self.run, self.state.step, clock.seconds / 60, weights)
                if turn.save:
                    self._save_checkpoint(clock.seconds)
                    checkpointed = clock.seconds
                if turn.stop:
                    return
                if turn.progress >= 1:
                    break
                rate = training.learning_rate * learning_rate_factor(training, turn.progress)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                self.network.reseed(_seed(training.seed, self.state.step, self.seat.share.rank))
                batch = list(islice(batches, training.accumulate))
                loss = train_step(self.stepper, self.optimiser, batch, turn.progress, settings)
                self.state.step += 1
                if self._survives(loss, clock.seconds):
                    recent.append(loss)
                if self.leads and recent and clock.seconds - noted >= PROGRESS_SECONDS:
                    self._note(clock.seconds, clock.seconds - noted, recent)
                    noted, recent = clock.seconds, []
        finally:
            loader.close()
        scores = self._cleaning_scores(validation)
        if self.leads:
            self._leave(clock.seconds, loader.waited_seconds, scores)

    def _own(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.seat.share.rank :: self.seat.share.world]

    def _survives(self, loss: float, seconds: float) -> bool:
        """Take in a step; of one that was not finite only the count stays. Too many in a row end the training."""
        if math.isfinite(loss):
            self.state.bad_steps = 0
            self.average.update(self.network, self.state.step)
            return True
        self.state.bad_steps += 1
        self.average.restore_statistics(self.network)
        if self.state.bad_steps >= BAD_STEPS:
            self.state.bad_steps = 0
            self._save_checkpoint(seconds)
            raise TrainingError(
                "train.diverged",
                f"the gradients of {BAD_STEPS} steps in a row, up to step {self.state.step}, are not finite; the last"
                " good weights are in its newest checkpoint. Lower training.learning_rate or training.gradient_clip and"
                " train again",
            )
        return False

    def _decide(self, seconds: float, checkpointed: float) -> Turn:
        """What to do before the next step; the same on all workers."""
        wishes = self._wishes(seconds, checkpointed) if self.leads else [0.0] * 5
        departing = float(self.seat.departure.asked.is_set())
        decision = torch.tensor([*wishes, departing], dtype=torch.float64, device=self.seat.device)
        if self.seat.share.world > 1:
            torch.distributed.all_reduce(decision, torch.distributed.ReduceOp.MAX)
        progress, validate, save, stop, ask, departing = decision.tolist()
        if self._warned:
            # rank 0 takes part again, so it has written the checkpoint
            self.seat.departure.answer()
        if ask:
            self._preempted = self.seat.preempted()
        warned, self._warned = self._warned, bool(departing) or self._preempted
        noticed = self._warned and not warned
        if noticed and self._preempted and self.leads:
            note_loss(self.root, self.run.prefix, "preemption")
        return Turn(progress, bool(validate), bool(save or stop or noticed), bool(stop))

    def _snapshot_due(self) -> bool:
        """Whether the weights of this step are to be judged beside the training; the last ones judge themselves."""
        return self._every > 0 and self.state.step > 0 and self.state.step % self._every == 0

    def _wishes(self, seconds: float, checkpointed: float) -> list[float]:
        """Progress, and whether to validate, to write a checkpoint, to stop, and to ask for notices of preemption."""
        progress = self.budget.progress(self.state.step, seconds)
        due = progress * VALIDATIONS >= self.state.validations + 1
        if due and self.budget.minutes and self.state.validations:
            # a short budget is for steps: later validations wait until their share of the time is large enough
            spent = self.state.validation_seconds * (1 + 1 / self.state.validations)
            due = spent <= VALIDATION_SHARE * seconds
        # what is judged beside the training need not stop it, but for the last weights
        due = (due and not self._every) or progress >= 1
        save = due or self._snapshot_due() or seconds - checkpointed >= CHECKPOINT_SECONDS
        ask = seconds - self._asked >= NOTICE_SECONDS
        if ask:
            self._asked = seconds
        stop = ask and progress < 1 and self.root.is_object(self.run.stop)
        return [progress, float(due), float(save), float(stop), float(ask)]

    def _validate(self, volumes: dict[str, TrainingVolume], clock: Clock) -> None:
        """Dice per case and structure of the averaged weights, over whole volumes, shared out over the workers."""
        started = time.monotonic()
        cases = sorted(self.run.validation)
        # a structure absent from both has no Dice: NaN
        table = torch.full((len(cases), len(self.structures)), math.nan, dtype=torch.float64)
        own = torch.zeros((len(cases), 1), dtype=torch.float64)
        for case, classes in self._predicted(volumes):
            row = dice_row(classes, volumes[case].classes, self.structures)
            table[cases.index(case)] = torch.tensor([math.nan if score is None else score for score in row])
            own[cases.index(case)] = 1
        table = torch.where(own > 0, table, 0)
        if self.seat.share.world > 1:
            table = table.to(self.seat.device)
            torch.distributed.all_reduce(table)
            table = table.cpu()
        self.case_dice = {
            case: [None if math.isnan(score) else score for score in row]
            for case, row in zip(cases, table.tolist(), strict=True)
        }
        found = means(self.case_dice)
        if found:
            self.state.dice.append([clock.seconds / 60, *found])
            if sum(found) / len(found) > self.state.best_dice:
                self.state.best_dice = sum(found) / len(found)
                self.best = {name: value.clone() for name, value in self.average.state.items()}
        self.state.validations += 1
        self.state.validation_seconds += time.monotonic() - started

    def _predicted(self, volumes: dict[str, TrainingVolume]) -> Iterator[tuple[str, np.ndarray]]:
        """Classes (Z, Y, X) of each volume by the averaged weights."""
        judge = Judge(self.average.state, self.plan, self.seat.device, self.precision)
        return ((case, judge.classes(volume)) for case, volume in volumes.items())

    def _cleaning_scores(self, volumes: dict[str, TrainingVolume]) -> dict[str, list[Any]]:
        """Per validation case, what each candidate for cleaning its mask would score; see `Run.candidates`."""
        candidates = [Cleaning(**mapping) for mapping in self.run.candidates]
        if not candidates:
            return {}
        voxel_ml = math.prod(self.plan.preprocess.spacing_mm) / 1000
        table = np.array([0, *(label.value for label in self.plan.labels)])
        scores: dict[str, list[Any]] = {}
        for case, classes in self._predicted(volumes):
            known = np.where(volumes[case].classes < len(table), volumes[case].classes, 0)
            found = score_candidates(table[classes], table[known], voxel_ml, candidates)
            scores[case] = [found[candidate] for candidate in candidates]
        return scores

    def _note(self, seconds: float, span: float, recent: list[float]) -> None:
        mean = sum(recent) / len(recent)
        self.state.losses.append([seconds / 60, mean])
        share = self.budget.progress(self.state.step, seconds)
        per_step = span / len(recent)
        left = (self.budget.steps - self.state.step) * per_step if self.budget.steps else (1 - share) / share * seconds
        last = self.state.dice[-1][1:] if self.state.dice else None
        progress = TrainingProgress(
            step=self.state.step,
            share=round(share, 4),
            loss=round(mean, 5),
            seconds_per_step=round(per_step, 4),
            seconds_left=round(left, 1),
            dice=round(sum(last) / len(last), 4) if last else None,
            workers=self.seat.share.world,
        )
        self.root.put_json(
            f"{self.run.prefix}/progress.json", {name: getattr(progress, name) for name in progress.__slots__}
        )

    def _save_checkpoint(self, seconds: float) -> None:
        """Everything that the next step depends on, and the best weights so far."""
        if not self.leads:
            return
        self.state.seconds = seconds
        parts = {"network": self.network.state_dict(), "average": self.average.state, "best": self.best}
        facts = {name: getattr(self.state, name) for name in self.state.__slots__}
        save_checkpoint(self.root, self.run.prefix, parts, self.optimiser, facts)

    def _load_checkpoint(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        found = load_checkpoint(self.root, self.run.prefix, self.optimiser, self.seat.device)
        if found is None:
            return
        parts, facts = found
        self.network.load_state_dict(parts["network"])
        self.average.state = parts["average"]
        self.best = parts["best"]
        self.state = State(**facts)

    def _leave(self, seconds: float, waited_seconds: float, scores: dict[str, list[Any]]) -> None:
        """The weights and figures that a model is made of, sealed."""
        best = self.plan.training.publish == "best" and self.best
        weights = as_safetensors(self.best if best else self.average.state)
        self.root.put(f"{self.run.fitted}/weights.safetensors", weights)
        facts = {
            "dice": self.state.dice,
            "best_dice": self.state.best_dice if self.state.dice else None,
            "case_dice": self.case_dice,
            "cleaning_scores": scores,
            "losses": self.state.losses,
            "steps": self.state.step,
            "minutes": round(seconds / 60, 3),
            "loader_wait_share": round(waited_seconds / seconds, 4) if seconds else 0.0,
            "workers": self.seat.share.world,
            "attempts": attempts(self.root, self.run),
            "precision": str(self.precision).removeprefix("torch."),
            "parameters": count_parameters(self.network),
            "torch": torch.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
        }
        self.root.put_json(f"{self.run.fitted}/facts.json", facts)
        self.root.seal(self.run.fitted, {"stage": "train", "step": self.state.step})


def start_from(network: nn.Module, root: Root, reference: str) -> list[str]:
    """Give a network the weights of a model; names of those that have another shape there and stay as they are."""
    weights = load_networks(root, load_model(root, reference))[0].state_dict()
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if len(fitting) < len(own) / 2:
        raise TrainingError(
            "train.start",
            f"{len(fitting)} of {len(own)} weights of the plan's network fit those of model {reference}; use the"
            " network section of its plan",
        )
    network.load_state_dict({**own, **fitting})
    return sorted(own.keys() - fitting.keys())


def _seed(*parts: int) -> int:
    """A seed of its own for every tuple of whole numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Clock:
    """Seconds of training, going on from those of a checkpoint."""

    def __init__(self, already: float) -> None:
        self._start = time.monotonic() - already

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start
