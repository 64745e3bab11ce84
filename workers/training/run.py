"""What a training is asked to do and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vnet_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a number of steps or of minutes, exactly one of them."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("train.budget", "give the budget either in steps or in minutes")
        if (self.steps or self.minutes or 0) <= 0:
            raise ConfigError("train.budget", f"a budget of {self.steps or self.minutes} cannot train; use more than 0")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used, 0 .. 1."""
        used = step / self.steps if self.steps else seconds / (60 * (self.minutes or 1))
        return min(used, 1.0)


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a training stands."""

    step: int
    share: float
    """Of the budget, 0 .. 1."""
    loss: float
    seconds_per_step: float
    seconds_left: float
    dice: float | None
    """Mean validation Dice over the structures, last measured."""
    workers: int = 1
    """That step together now."""


def together(parts: Sequence[TrainingProgress], count: int) -> TrainingProgress:
    """Where ``count`` folds stand together, of which ``parts`` have begun (one at least)."""
    scores = [part.dice for part in parts if part.dice is not None]
    return TrainingProgress(
        step=sum(part.step for part in parts),
        share=round(sum(part.share for part in parts) / count, 4),
        loss=round(sum(part.loss for part in parts) / len(parts), 5),
        seconds_per_step=max(part.seconds_per_step for part in parts),
        seconds_left=max(part.seconds_left for part in parts),
        dice=round(sum(scores) / len(scores), 4) if scores else None,
        workers=sum(part.workers for part in parts),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What the workers that fit one network need to know; kept in the root as ``run.json``."""

    root_url: str
    prefix: str
    plan: dict[str, Any]
    training: dict[str, str]
    """Volume key by case id."""
    validation: dict[str, str]
    budget: dict[str, Any]
    class_voxels: list[int]
    """Voxels of background and of each label over the training cases, on their own grids."""
    start: str | None = None
    """Model whose weights are the first ones."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """Ways to clean masks whose Dice on the validation cases is wanted, as plain Cleaning sections."""
    unshown: list[str] = field(default_factory=list)
    """Validation cases that get no picture, because text may be burnt into their pixels."""
    cpus_per_worker: int = field(default=1, compare=False)

    @property
    def fitted(self) -> str:
        """Where its weights and figures lie once it is done."""
        return f"{self.prefix}/fitted"

    @property
    def error(self) -> str:
        """Where a worker leaves a named error, which ends the training."""
        return f"{self.prefix}/error.json"

    @property
    def stop(self) -> str:
        """An object that asks the workers to write a checkpoint and leave."""
        return f"{self.prefix}/stop.json"
