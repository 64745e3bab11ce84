"""What a training is asked to do and where it stands."""

from __future__ import annotations

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
    """Mean validation Dice over the labels, last measured."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the training workers need to know; kept in the root as ``run.json``."""

    root_url: str
    prefix: str
    plan: dict[str, Any]
    training: dict[str, str]
    """Volume key by case id."""
    validation: dict[str, str]
    budget: dict[str, Any]
    cpus_per_worker: int = field(default=1, compare=False)

    @property
    def name(self) -> str:
        """``name@version`` of the model that will come of it."""
        return "@".join(self.prefix.split("/")[1:])
