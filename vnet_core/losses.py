"""What training makes small: Dice, cross-entropy, focal, generalised Dice and exponential logarithmic losses.

B batch, K class (0 background), R region, Z Y X voxels of a grid, N all of them in a row; H answers of S states: 1 of
K with softmax, R of 2 with sigmoid. So every loss is written once, and one region is exactly a problem of two classes.

All losses are functions of the same few numbers, an :class:`Agreement`, which is computed once for all terms. They are
float32 scalars (float64 for float64 logits) >= 0; those of the Dice family but the logarithmic one are at most 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vnet_core.agreement import Agreement, Sums, class_agreement, region_agreement
from vnet_core.errors import ConfigError
from vnet_core.plan import Plan
from vnet_core.sections import LossPlan

LOGARITHM_FLOOR = 1e-7
"""-ln p and 1 - p are not taken below this before a power, whose slope would be infinite at 0."""

EXPONENT = 0.3
DICE_SHARE, CROSS_SHARE = 0.8, 0.2
PSEUDOCOUNT = 1.0
"""Of the exponential logarithmic loss, as published."""


Rows = tuple[tuple[float, ...], ...]
"""A small table that can be a key."""


class Loss(Protocol):
    """What a training step calls."""

    def __call__(self, logits: Tensor | tuple[Tensor, ...], classes: Tensor, progress: float) -> Tensor:
        """The scalar loss of one batch, see :func:`build_loss`."""


# --- losses of the sums


def soft_dice_loss(sums: Sums, smoothing: float) -> Tensor:
    """1 - D in [0, 1], the mean over all states but the first (background, off): (...) from sums (..., H, S).

    D = (2 sum pg + s) / (sum p^2 + sum g^2 + s) (Milletari, Navab and Ahmadi 2016, smoothed). A structure that is
    absent costs 0 when it is not predicted either, and its gradient fades with p.
    """
    return _dice_distance(sums.overlap, sums.squared, sums.truth, smoothing)[..., 1:].mean((-2, -1))


def linear_dice_loss(sums: Sums, smoothing: float) -> Tensor:
    """As :func:`soft_dice_loss` with D = (2 sum pg + s) / (sum p + sum g + s).

    Its gradient with respect to p is the same for every voxel outside the structure, however sure the network is there.
    """
    return _dice_distance(sums.overlap, sums.predicted, sums.truth, smoothing)[..., 1:].mean((-2, -1))


def generalised_dice_loss(sums: Sums, smoothing: float, absent_classes: Literal["zero", "maximum"] = "zero") -> Tensor:
    """1 - (2 sum w pg + s) / (sum w (p + g) + s) in [0, 1] (Sudre et al. 2017): (...) from sums (..., H, S).

    The sums run over voxels and over all answers and states, background too, before the one division;
    w = (r / r_l)^2 with r_l voxels of state l in these sums and r the smallest of them, so that s keeps its meaning of
    voxels (a common factor of all weights does not change the ratio). A state that does not occur weighs 0, or as much
    as the heaviest.
    """
    occurs = sums.truth > 0
    smallest = torch.where(occurs, sums.truth, torch.inf).amin((-2, -1), keepdim=True)
    absent = 0.0 if absent_classes == "zero" else 1.0
    weight = torch.where(occurs, (smallest / sums.truth.clamp_min(1)).square(), absent)
    overlap, predicted, truth = ((weight * p).sum((-2, -1)) for p in (sums.overlap, sums.predicted, sums.truth))
    return _dice_distance(overlap, predicted, truth, smoothing)


def logarithmic_dice_loss(sums: Sums) -> Tensor:
    """mean (-ln D)^0.3 over all states, background too (Wong et al. 2018): (...) from sums (..., H, S).

    D is that of :func:`linear_dice_loss` with s = 1. At most (ln(2 N + 1))^0.3 for N voxels, since D > 1 / (2 N + 1).
    """
    dice = (2 * sums.overlap + PSEUDOCOUNT) / (sums.predicted + sums.truth + PSEUDOCOUNT)
    return _power(-dice.log(), EXPONENT).mean((-2, -1))


def _dice_distance(overlap: Tensor, predicted: Tensor, truth: Tensor, smoothing: float) -> Tensor:
    """1 - D, kept from falling below 0 by rounding."""
    size = predicted + truth
    return ((size - 2 * overlap) / (size + smoothing)).clamp_min(0)


# --- losses of single voxels


def cross_entropy_loss(
    agreement: Agreement, weights_HS: Tensor | None = None, mean: Literal["weights", "voxels"] = "weights"
) -> Tensor:
    """-sum w ln p / sum w over voxels and answers, p and w those of the true state; nats.

    Weighted log-likelihood is the same thing. ``weights_HS`` None: all 1. ``mean="voxels"`` divides by the number of
    voxels instead, so that a batch with few voxels of a heavy class has a small gradient.
    """
    cost = -agreement.log_true
    if weights_HS is not None:
        cost = cost * voxel_weights(agreement, weights_HS)
    return cost.sum() / divisor(agreement.sums.truth, weights_HS if mean == "weights" else None)


def focal_loss(agreement: Agreement, gamma: float = 2.0, weights_HS: Tensor | None = None) -> Tensor:
    """Mean of -w (1 - p)^gamma ln p over voxels and answers, p that of the true state (Lin et al. 2017).

    With alpha, the weight of the foreground, w = 1 - alpha for state 0 and alpha for the others, see
    :func:`focal_weights`. gamma = 0 is cross-entropy.
    """
    log_true = agreement.log_true
    cost = -log_true
    if gamma:
        cost = cost * _power(-torch.expm1(log_true), gamma)
    if weights_HS is not None:
        cost = cost * voxel_weights(agreement, weights_HS)
    return cost.sum() / divisor(agreement.sums.truth, None)


def exponential_cross_entropy_loss(agreement: Agreement, weights_HS: Tensor) -> Tensor:
    """Mean of w (-ln p)^0.3 over voxels and answers (Wong et al. 2018), w = :func:`wong_weights`.

    ln p comes from a log-softmax and is finite, so a voxel that is surely wrong keeps its gradient; p is not clamped.
    """
    cost = voxel_weights(agreement, weights_HS) * _power(-agreement.log_true, EXPONENT)
    return cost.sum() / divisor(agreement.sums.truth, None)


def voxel_weights(agreement: Agreement, weights_HS: Tensor) -> Tensor:
    """(B, H, N): the weight of every voxel's true state; 0 where ignored."""
    answers, states = weights_HS.shape
    table = torch.nn.functional.pad(weights_HS.to(agreement.log_true), (0, 1)).flatten()
    first = torch.arange(answers, device=table.device).mul_(states + 1).unsqueeze(1)
    return table[agreement.states + first]


def divisor(truth: Tensor, weights_HS: Tensor | None) -> Tensor:
    """Sum of the weights of all voxels and answers from their counts (..., H, S), by default their number; above 0."""
    total = truth if weights_HS is None else truth * weights_HS.to(truth)
    return total.sum().clamp_min(torch.finfo(truth.dtype).tiny)


def _power(value: Tensor, exponent: float) -> Tensor:
    return value.clamp_min(LOGARITHM_FLOOR).pow(exponent)


# --- weights


def class_weights(plan: LossPlan, class_voxels: Sequence[int]) -> Tensor:
    """Weights of cross-entropy and focal loss, float64 with mean 1, from the voxels of each class in the training set.

    With f the share of a class: 1 / f, 1 - f, sqrt(1 / f), or 1. A class without voxels counts as having one.
    """
    voxels = torch.tensor(class_voxels, dtype=torch.float64).clamp_min(1)
    frequency = voxels / voxels.sum()
    match plan.class_weights:
        case "none":
            weights = torch.ones_like(frequency)
        case "inverse-frequency":
            weights = 1 / frequency
        case "balance":
            weights = 1 - frequency
        case "square-root":
            weights = (1 / frequency).sqrt()
    return weights / weights.mean()


def wong_weights(class_voxels: Sequence[int]) -> Tensor:
    """sqrt(sum f / f_l), float64, from the voxels of each class in the training set; at least one each."""
    voxels = torch.tensor(class_voxels, dtype=torch.float64).clamp_min(1)
    return (voxels.sum() / voxels).sqrt()


def focal_weights(plan: LossPlan, class_voxels: Sequence[int]) -> Tensor:
    """:func:`class_weights`, times ``focal_alpha`` for the foreground and 1 - ``focal_alpha`` for background."""
    weights = class_weights(plan, class_voxels)
    if plan.focal_alpha is not None:
        weights[0] *= 1 - plan.focal_alpha
        weights[1:] *= plan.focal_alpha
    return weights


# --- the loss of a plan


def build_loss(plan: Plan, class_voxels: Sequence[int]) -> Loss:
    """The loss of a plan; ``class_voxels`` is the number of voxels of each class (K) in the training set.

    It is called as ``loss(logits, classes, progress)``: logits (B, outputs, Z, Y, X) of any floating dtype, or a tuple
    of them on ever coarser grids, the finest first (deep supervision); classes (B, Z, Y, X) int64 in 0 .. K - 1, or
    ``plan.ignored_class``; progress 0 .. 1, the share of the budget that is used up.

    - Grid i of several has the weight 2^-i, divided by the sum of all. Its truth is the class of the voxel nearest to
      the middle of each coarse one: that keeps every structure's share of the volume in the mean, whereas a majority
      vote would take thin structures away.
    - Up to ``warmup_fraction`` of the budget the loss is (1 - b) cross-entropy + b terms, with b = progress /
      warmup_fraction.
    - With several torch.distributed workers the mean of their losses is the loss of the whole batch, and the mean of
      their gradients its gradient, however unequal the workers' shares of voxels are. All must call it together.

    Raises ConfigError ``loss.class-count``.
    """
    if len(class_voxels) != plan.classes:
        raise ConfigError(
            "loss.class-count",
            f"{len(class_voxels)} voxel counts for {plan.classes} classes; give one per class, background first",
        )
    if plan.head == "softmax":
        return _PlannedLoss(plan, (), [list(class_voxels)])
    values = [0, *(label.value for label in plan.labels)]
    members = [[int(value in region.values) for value in values] for region in plan.told_regions]
    on = [sum(n for n, member in zip(class_voxels, row, strict=True) if member) for row in members]
    states = [[*row, 2] for row in members]
    return _PlannedLoss(plan, _rows(states), [[sum(class_voxels) - n, n] for n in on])


class _PlannedLoss:
    """``region_states``: of each region the state for every class, and for ignored voxels; empty with softmax.
    ``state_voxels``: of each answer the voxels of every state in the training set.
    """

    def __init__(self, plan: Plan, region_states: Rows, state_voxels: list[list[int]]) -> None:
        self.plan = plan.training.loss
        self.ignored_class = plan.ignored_class
        self.region_states = region_states
        self.class_weights = _unless_all_one([class_weights(self.plan, voxels).tolist() for voxels in state_voxels])
        self.focal_weights = _unless_all_one([focal_weights(self.plan, voxels).tolist() for voxels in state_voxels])
        self.wong_weights = _rows([wong_weights(voxels).tolist() for voxels in state_voxels])

    def __call__(self, logits: Tensor | tuple[Tensor, ...], classes: Tensor, progress: float) -> Tensor:
        grids = logits if isinstance(logits, tuple) else (logits,)
        warmup = self.plan.warmup_fraction
        blend = min(1.0, progress / warmup) if warmup else 1.0
        share = 1 / sum(0.5**i for i in range(len(grids)))
        losses = [
            share * 0.5**i * self._on_one_grid(grid, _sampled(classes, tuple(grid.shape[2:])), blend)
            for i, grid in enumerate(grids)
        ]
        return torch.stack(losses).sum()

    def _on_one_grid(self, logits_BOZYX: Tensor, classes_BZYX: Tensor, blend: float) -> Tensor:
        logits, classes = logits_BOZYX.flatten(2), classes_BZYX.flatten(1)
        if self.region_states:
            states = _placed(self.region_states, torch.int64, classes.device)[:, classes].movedim(0, 1)
            agreement = region_agreement(logits, states, self.ignored_class)
        else:
            agreement = class_agreement(logits, classes, self.ignored_class)
        batch = _Batch(agreement)
        parts = {name: weight * blend for name, weight in self.plan.terms.items()}
        if blend < 1:
            parts["cross-entropy"] = parts.get("cross-entropy", 0.0) + 1 - blend
        return torch.stack([weight * self._term(name, batch) for name, weight in parts.items() if weight]).sum()

    def _term(self, name: str, batch: _Batch) -> Tensor:
        plan, agreement = self.plan, batch.agreement
        sums = batch.pooled if plan.dice_over == "batch" else agreement.sums
        match name:
            case "dice":
                return batch.mean(soft_dice_loss(sums, plan.smoothing))
            case "linear-dice":
                return batch.mean(linear_dice_loss(sums, plan.smoothing))
            case "generalised-dice":
                return batch.mean(generalised_dice_loss(sums, plan.smoothing, plan.absent_classes))
            case "cross-entropy":
                weights = self._weights(self.class_weights, agreement)
                divided_by = weights if plan.weighted_mean == "weights" else None
                return cross_entropy_loss(agreement, weights, plan.weighted_mean) * batch.share(divided_by)
            case "focal":
                weights = self._weights(self.focal_weights, agreement)
                return focal_loss(agreement, plan.focal_gamma, weights) * batch.share(None)
            case _:
                assert name == "exponential-logarithmic", name
                table = _placed(self.wong_weights, agreement.log_true.dtype, agreement.log_true.device)
                cross = exponential_cross_entropy_loss(agreement, table) * batch.share(None)
                return DICE_SHARE * batch.mean(logarithmic_dice_loss(sums)) + CROSS_SHARE * cross

    @staticmethod
    def _weights(table: Rows | None, agreement: Agreement) -> Tensor | None:
        log_true = agreement.log_true
        return None if table is None else _placed(table, log_true.dtype, log_true.device)


class _Batch:
    """One worker's part of a batch, and the sums of the whole."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.own = agreement.sums.over_batch()
        self.samples = len(agreement.log_true)
        self.pooled, self.samples_per_worker = self.own, float(self.samples)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.workers = torch.distributed.get_world_size() if distributed else 1
        if self.workers > 1:
            parts = torch.stack(self.own.parts)
            samples = parts.new_full((1,), self.samples)
            flat = _SumOverWorkers.apply(torch.cat([parts.flatten(), samples]))
            self.pooled = Sums(*flat[:-1].view_as(parts))
            self.samples_per_worker = flat[-1].detach() / self.workers

    def mean(self, losses: Tensor) -> Tensor:
        """Over samples, or the loss of the whole batch as it is."""
        return losses if losses.ndim == 0 else losses.sum() / self.samples_per_worker

    def share(self, weights_HS: Tensor | None) -> Tensor | float:
        """What this worker's voxels weigh beside the mean worker's, so that the mean over workers is over voxels."""
        if self.workers == 1:
            return 1.0
        return divisor(self.own.truth, weights_HS) * self.workers / divisor(self.pooled.truth.detach(), weights_HS)


class _SumOverWorkers(torch.autograd.Function):
    """The sum over all workers, each of which goes on to compute the same from it.

    Gradients are averaged over workers afterwards, so each worker's is theirs times the number of workers; no second
    exchange is needed.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.distributed.get_world_size()


def _sampled(classes_BZYX: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The class of the voxel nearest to the middle of each voxel of a coarser grid of ``shape``."""
    for axis, n in enumerate(shape, start=1):
        size = classes_BZYX.shape[axis]
        if n != size:
            index = (torch.arange(n, device=classes_BZYX.device) * 2 + 1) * size // (2 * n)
            classes_BZYX = classes_BZYX.index_select(axis, index)
    return classes_BZYX


def _rows(table: Sequence[Sequence[float]]) -> Rows:
    return tuple(tuple(row) for row in table)


def _unless_all_one(table: list[list[float]]) -> Rows | None:
    return None if all(weight == 1 for row in table for weight in row) else _rows(table)


@functools.lru_cache(maxsize=64)
def _placed(table: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device, copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=dtype, device=device)
