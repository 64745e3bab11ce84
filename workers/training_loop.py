"""What one Ray Train worker does: load its volumes, step, validate, keep checkpoints, and publish the bundle.

Rank 0 decides for all: it alone reads the clock, and sends progress and the decisions of each step to the others.
"""

from __future__ import annotations

import csv
import io
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import nn

from vnet_core.errors import VnetError
from vnet_core.inference import predict_logits, prepare, processor_precision
from vnet_core.losses import loss_function
from vnet_core.metrics import dice
from vnet_core.networks.vnet import build_vnet, count_parameters, initialise
from vnet_core.pictures import curve_picture
from vnet_core.plan import Plan
from vnet_core.training import StepSettings, WeightAverage, build_optimiser, learning_rate_factor, train_step
from workers import models
from workers.patches import BatchLoader, Share, TrainingVolume, load_volume
from workers.store import Root
from workers.training_run import Budget, Run, TrainingProgress

VALIDATIONS = 10
"""Validations over the whole budget; a checkpoint is written with each."""
CHECKPOINT_SECONDS = 120.0
"""A checkpoint is written at least this often."""
CHECKPOINTS_KEPT = 2
PROGRESS_SECONDS = 1.0


@dataclass(slots=True)
class State:
    """What changes from step to step and goes into a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    validations: int = 0
    losses: list[list[float]] = field(default_factory=list)
    """[minutes, mean loss since the last entry], one entry per second at most."""
    dice: list[list[float]] = field(default_factory=list)
    """[minutes, Dice per label ...], one entry per validation."""


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker; ``config`` is a Run as a mapping."""
    run = Run(**config)
    root = Root(run.root_url)
    try:
        _Worker(root, run).fit()
    except VnetError as error:
        message = {"class": type(error).__name__, "code": error.code, "message": error.message}
        root.put_json(f"{run.prefix}/error.json", message)
        raise


class _Worker:
    def __init__(self, root: Root, run: Run) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.root, self.run = root, run
        self.plan = Plan.from_mapping(run.plan)
        self.budget = Budget(**run.budget)
        self.share = Share(context.get_world_rank(), context.get_world_size())
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(run.cpus_per_worker)
        self.precision = processor_precision(self.device)
        self.state = State()
        network = build_vnet(self.plan.network, len(self.plan.channels), self.plan.classes)
        initialise(network, self.plan.training.seed)
        self.network = network.to(self.device)
        self.optimiser = build_optimiser(self.network, self.plan.training)
        self.average = WeightAverage(self.network, self.plan.training.average_decay)
        self._load_checkpoint()
        self.stepper: nn.Module = ray.train.torch.prepare_model(self.network, move_to_device=False)

    @property
    def leads(self) -> bool:
        return self.share.rank == 0

    def fit(self) -> None:
        volumes = [load_volume(self.root, key, self.plan) for _, key in sorted(self.run.training.items())]
        held = sorted(self.run.validation.items())[self.share.rank :: self.share.world]
        validation = [load_volume(self.root, key, self.plan) for _, key in held]
        settings = StepSettings(
            loss_function(self.plan.training.loss), self.precision, self.plan.training.gradient_clip
        )
        loader = BatchLoader(volumes, self.plan, self.share, self.state.step)
        clock = _Clock(self.state.seconds)
        recent: list[float] = []
        noted = checkpointed = self.state.seconds
        try:
            for images, classes in loader:
                progress, validate, save = self._decide(clock.seconds, checkpointed)
                if validate:
                    self._validate(validation, clock)
                if save:
                    self._save_checkpoint(clock.seconds)
                    checkpointed = clock.seconds
                if progress >= 1:
                    break
                rate = self.plan.training.learning_rate * learning_rate_factor(self.plan.training, progress)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                loss = train_step(
                    self.stepper, self.optimiser, images.to(self.device), classes.to(self.device), settings
                )
                self.state.step += 1
                self.average.update(self.network, self.state.step)
                recent.append(loss)
                if self.leads and clock.seconds - noted >= PROGRESS_SECONDS:
                    self._note(clock.seconds, clock.seconds - noted, recent)
                    noted, recent = clock.seconds, []
        finally:
            loader.close()
        if self.leads:
            self._publish(clock.seconds)

    def _decide(self, seconds: float, checkpointed: float) -> tuple[float, bool, bool]:
        """Progress, whether to validate and whether to write a checkpoint before the next step; the same on all."""
        progress = self.budget.progress(self.state.step, seconds)
        due = progress >= 1 or progress * VALIDATIONS >= self.state.validations + 1
        save = due or seconds - checkpointed >= CHECKPOINT_SECONDS
        decision = torch.tensor([progress, float(due), float(save)], dtype=torch.float64, device=self.device)
        if self.share.world > 1:
            torch.distributed.broadcast(decision, 0)
        progress, validate, write = decision.tolist()
        return progress, bool(validate), bool(write)

    def _validate(self, volumes: list[TrainingVolume], clock: _Clock) -> None:
        """Mean Dice per label of the averaged weights, over whole volumes, shared out over the workers."""
        self.state.validations += 1
        network = self._averaged_network()
        labels = len(self.plan.labels)
        sums = torch.zeros(2, labels, dtype=torch.float64)
        for volume in volumes:
            image = torch.from_numpy(volume.image).to(self.device)
            predicted = predict_logits(network, image, self.plan).argmax(0).cpu().numpy()
            for index in range(labels):
                score = dice(predicted == index + 1, volume.classes == index + 1)
                if score == score:  # a label absent from both has no Dice
                    sums[:, index] += torch.tensor([score, 1.0], dtype=torch.float64)
        if self.share.world > 1:
            sums = sums.to(self.device)
            torch.distributed.all_reduce(sums)
        if self.leads and bool((sums[1] > 0).all()):
            self.state.dice.append([clock.seconds / 60, *(sums[0] / sums[1]).tolist()])

    def _averaged_network(self) -> nn.Module:
        network = build_vnet(self.plan.network, len(self.plan.channels), self.plan.classes)
        network.load_state_dict(self.average.state)
        return prepare(network, self.device, self.precision)

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
        )
        self.root.put_json(
            f"{self.run.prefix}/progress.json", {name: getattr(progress, name) for name in progress.__slots__}
        )

    def _save_checkpoint(self, seconds: float) -> None:
        """Everything that the next step depends on; whole or not at all, the last ones are kept."""
        if not self.leads:
            return
        self.state.seconds = seconds
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
        prefix = f"{self.run.prefix}/checkpoints/{self.state.step:09d}"
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.root.put(f"{prefix}/state.safetensors", safetensors.torch.save(contiguous))
        self.root.put_json(f"{prefix}/state.json", {name: getattr(self.state, name) for name in self.state.__slots__})
        self.root.seal(prefix, {"stage": "train", "step": self.state.step})
        for old in self.root.names(f"{self.run.prefix}/checkpoints")[:-CHECKPOINTS_KEPT]:
            self.root.delete(f"{self.run.prefix}/checkpoints/{old}")

    def _load_checkpoint(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        for name in reversed(self.root.names(f"{self.run.prefix}/checkpoints")):
            prefix = f"{self.run.prefix}/checkpoints/{name}"
            if self.root.damaged(prefix):
                continue
            tensors = safetensors.torch.load(self.root.get(f"{prefix}/state.safetensors"))
            parts: dict[str, dict[str, torch.Tensor]] = {"network": {}, "average": {}, "optimiser": {}}
            for key, value in tensors.items():
                part, _, rest = key.partition(".")
                parts[part][rest] = value.to(self.device)
            self.network.load_state_dict(parts["network"])
            self.average.state = parts["average"]
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in parts["optimiser"].items():
                index, _, slot = key.partition(".")
                slots.setdefault(int(index), {})[slot] = value
            self.optimiser.load_state_dict(
                {"state": slots, "param_groups": self.optimiser.state_dict()["param_groups"]}
            )
            self.state = State(**self.root.get_json(f"{prefix}/state.json"))
            return

    def _publish(self, seconds: float) -> None:
        names = [label.name for label in self.plan.labels]
        final = self.state.dice[-1][1:] if self.state.dice else []
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["minutes", *(f"dice_{name}" for name in names)])
        writer.writerows(self.state.dice)
        losses = {"loss": [(m, v) for m, v in self.state.losses]}
        curves = {name: [(row[0], row[i + 1]) for row in self.state.dice] for i, name in enumerate(names)}
        facts = {
            "metrics": {"validation_dice": dict(zip(names, final, strict=False))},
            "training": {
                "steps": self.state.step,
                "minutes": round(seconds / 60, 3),
                "workers": self.share.world,
                "precision": str(self.precision).removeprefix("torch."),
                "parameters": count_parameters(self.network),
                "training_cases": sorted(self.run.training),
                "validation_cases": sorted(self.run.validation),
                "volumes": sorted([*self.run.training.values(), *self.run.validation.values()]),
                "torch": torch.__version__,
                "platform": f"{platform.system()} {platform.machine()}",
            },
            "loss": self.state.losses,
        }
        _, name, version = self.run.prefix.split("/")
        pictures = {"loss.png": curve_picture(losses, "minutes", "loss", f"{name} {version}: training loss")}
        if final:
            pictures["dice.png"] = curve_picture(curves, "minutes", "Dice", f"{name} {version}: validation Dice")
        files = {**pictures, "dice.csv": table.getvalue().encode()}
        models.publish(self.root, name, version, self.plan, self.average.state, {"facts": facts, "files": files})


class _Clock:
    """Seconds of training, going on from those of a checkpoint."""

    def __init__(self, already: float) -> None:
        self._start = time.monotonic() - already

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
