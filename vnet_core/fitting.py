"""The steps of a training: the learning rate, the optimiser, one step, the running average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vnet_core.sections import TrainingPlan

# B batch, C channel, K class, Z Y X

Network = TypeVar("Network", bound=nn.Module)

STEP_DIVISOR = 10.0
"""What the schedule `step` divides the learning rate by each time (Milletari, Navab and Ahmadi 2016)."""


def learning_rate_factor(plan: TrainingPlan, progress: float) -> float:
    """Share of the peak learning rate at ``progress`` (0 .. 1) of the budget."""
    if progress < plan.warmup_fraction:
        return max(progress / plan.warmup_fraction, 1e-3)
    rest = min((progress - plan.warmup_fraction) / (1 - plan.warmup_fraction), 1.0)
    match plan.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * rest))
        case "polynomial":
            return (1 - rest) ** 0.9
        case "step":
            return STEP_DIVISOR ** -sum(progress >= fraction for fraction in plan.step_fractions)
        case "constant":
            return 1.0


def build_optimiser(network: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """The plan's optimiser; weight decay spares biases, norms and activation slopes."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = plan.learning_rate
    # fused: one kernel updates all weights
    match plan.optimiser:
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=rate, fused=True)
        case "nadam":
            return torch.optim.NAdam(groups, lr=rate, decoupled_weight_decay=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=plan.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=plan.momentum, nesterov=plan.momentum > 0, fused=True)


def placed(network: Network, device: torch.device, precision: torch.dtype) -> Network:
    """The network on ``device``, laid out for steps in ``precision``; what is made of its weights is laid out alike.

    Channels last, which takes a fifth of the time off a float32 step on processors with AVX2 (`benchmarks/step.py`) and
    is what tensor cores compute in. bfloat16 on processors stays as torch lays it out.
    """
    if device.type == "cpu" and precision != torch.float32:
        return network.to(device)
    # the stub of Module.to does not know memory_format
    return network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


Batch = tuple[Tensor, Tensor]
"""Images (B, C, Z, Y, X) and class indices (B, Z, Y, X) int64."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What stays the same from step to step."""

    loss: Callable[[Tensor | tuple[Tensor, ...], Tensor, float], Tensor]
    """From logits (B, K, Z, Y, X), or those of several depths, classes (B, Z, Y, X) and progress to a scalar."""
    precision: torch.dtype
    """bfloat16 runs the forward pass under autocast."""
    gradient_clip: float


def train_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Sequence[Batch],
    progress: float,
    settings: StepSettings,
) -> float:
    """One step on the mean gradient of the batches; returns the mean loss before it.

    When the gradient is not finite, the step is left out and the result is NaN: weights and optimiser are as before,
    but running statistics of the network may not be.
    """
    optimiser.zero_grad(set_to_none=True)
    losses = []
    for number, (images, classes) in enumerate(batches, 1):
        with _alone(network) if number < len(batches) else contextlib.nullcontext():
            with torch.autocast(images.device.type, settings.precision, enabled=settings.precision != torch.float32):
                logits = network(images)
            loss = settings.loss(logits, classes, progress) / len(batches)
            loss.backward()
        losses.append(loss.detach())
    # workers that share a batch have one gradient, so all of them leave the step out or none does
    norm = nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
    if not math.isfinite(norm):
        return math.nan
    optimiser.step()
    return float(torch.stack(losses).sum())


def _alone(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, workers keep their gradients to themselves; the last batch brings the sums together."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


class WeightAverage:
    """Exponential running average of a network's parameters and buffers, in float32."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts at the network's present state; ``decay`` 0 follows it exactly."""
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the state after ``step`` (counted from 1); early steps weigh more, so that the start fades."""
        decay = min(self.decay, step / (step + 9))
        averages, values = [], []
        for name, value in network.state_dict().items():
            average = self.state[name]
            if average.is_floating_point():
                averages.append(average)
                values.append(value.detach())
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def restore_statistics(self, network: nn.Module) -> None:
        """Give the network's running statistics the averaged values, after a step that was not finite."""
        for name, buffer in network.named_buffers():
            buffer.copy_(self.state[name])
