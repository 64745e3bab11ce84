"""What training makes small. B batch, K class (0 background), Z Y X voxels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTHING = 1e-5
"""Added to the numerator and the denominator of Dice, so that a class absent from both sides has Dice 1."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, K, Z, Y, X) and labels (B, Z, Y, X) to a scalar."""


def loss_function(name: Literal["dice", "dice+cross-entropy"]) -> Loss:
    """The loss that a plan names."""
    match name:
        case "dice":
            return soft_dice_loss
        case "dice+cross-entropy":
            return dice_cross_entropy_loss


def soft_dice_loss(logits_BKZYX: Tensor, target_BZYX: Tensor) -> Tensor:
    """1 - D in [0, 1], the mean over samples and foreground classes; a float32 scalar (float64 for float64 logits).

    D = (2 sum pg + s) / (sum p^2 + sum g^2 + s) over the voxels of one sample, p the softmax, g the truth (0 or 1),
    s = 1e-5 (Milletari, Navab and Ahmadi 2016, smoothed). Each sample has its own D, so the mean over equal shares of
    a batch is that of the whole batch.

    ``logits_BKZYX`` of any floating dtype, K >= 2; ``target_BZYX`` int64 in 0 .. K - 1. A class that is absent from
    the truth costs 0 when it is not predicted either and nearly 1 as soon as it is; its gradient with respect to the
    logits of a sample stays below 1/2 in sum, because the squares in the denominator fade together with p.
    """
    probability = torch.softmax(_at_least_float32(logits_BKZYX), dim=1)
    truth = torch.zeros_like(probability).scatter_(1, target_BZYX.unsqueeze(1), 1.0)
    return _dice_distance(probability[:, 1:], truth[:, 1:]).mean()


def dice_cross_entropy_loss(logits_BKZYX: Tensor, target_BZYX: Tensor) -> Tensor:
    """:func:`soft_dice_loss` plus the mean cross-entropy over all voxels, in nats; a scalar >= 0."""
    cross_entropy = F.cross_entropy(_at_least_float32(logits_BKZYX), target_BZYX)
    return soft_dice_loss(logits_BKZYX, target_BZYX) + cross_entropy


def _dice_distance(p: Tensor, g: Tensor) -> Tensor:
    """1 - D of each sample and class (B, K) from p and g (B, K, Z, Y, X).

    Written as sum (p - g)^2 / (sum p^2 + sum g^2 + s), which is the same number but never negative by rounding and
    exact near 0.
    """
    space = (2, 3, 4)
    return (p - g).square().sum(space) / (p.square().sum(space) + g.square().sum(space) + SMOOTHING)


def _at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: a sum over a volume overflows float16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
