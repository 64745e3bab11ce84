"""How well a batch's probabilities agree with the truth: all that the losses are computed from, found in one pass.

B batch, K class (0 background), R region, N voxels in a row. A softmax head gives one answer per voxel among K states;
a sigmoid head gives one answer per region, off or on, which is a softmax between the logits 0 and x. So there are H
answers of S states: 1 of K, or R of 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over voxels, one per answer and state: (..., H, S) of floats. p probability, g truth (0 or 1)."""

    overlap: Tensor
    """Of p g."""
    predicted: Tensor
    """Of p."""
    squared: Tensor
    """Of p^2."""
    truth: Tensor
    """Of g, which is also that of g^2; without gradient."""

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in order."""
        return self.overlap, self.predicted, self.squared, self.truth

    def over_batch(self) -> Sums:
        """From (B, H, S) to (H, S)."""
        return Sums(*(part.sum(0) for part in self.parts))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the probabilities of a batch agree with the truth; ignored voxels count nowhere."""

    log_true: Tensor
    """(B, H, N): natural logarithm of the probability of the true state; 0 and without gradient where ignored."""
    states: Tensor
    """(B, H, N) int64: the true state, 0 .. S - 1; S where ignored."""
    sums: Sums
    """Of each sample: (B, H, S)."""


def class_agreement(logits_BKN: Tensor, classes_BN: Tensor, ignored_class: int | None = None) -> Agreement:
    """Of a softmax head. ``logits_BKN`` of any floating dtype; ``classes_BN`` int64 in 0 .. K - 1.

    ``ignored_class`` is K where ignored voxels may occur, else None.
    """
    return _agreement(logits_BKN.unsqueeze(1), classes_BN.unsqueeze(1), ignored_class is not None)


def region_agreement(logits_BRN: Tensor, states_BRN: Tensor, ignored_class: int | None = None) -> Agreement:
    """Of a sigmoid head. ``states_BRN`` int64: 0 off, 1 on, 2 ignored (only with an ``ignored_class``)."""
    return _agreement(torch.stack([torch.zeros_like(logits_BRN), logits_BRN], 2), states_BRN, ignored_class is not None)


def _agreement(logits_BHSN: Tensor, states_BHN: Tensor, ignored: bool) -> Agreement:
    log_true, *parts = _Compare.apply(logits_BHSN.flatten(0, 1), states_BHN.flatten(0, 1), ignored)
    shape = logits_BHSN.shape[:3]
    return Agreement(log_true.view(states_BHN.shape), states_BHN, Sums(*(part.view(shape) for part in parts)))


class _Compare(torch.autograd.Function):
    """Softmax and everything that is summed from it, M = B H: one pass forward and one back, no one-hot truth.

    With a_n = ln p of the true state t, and q_s = d loss / d p_s by way of the sums,

        d loss / d logit_s = p_s (q_s - sum_r p_r q_r) + ([s = t] - p_s) d loss / d a.
    """

    @staticmethod
    def forward(ctx: Any, logits_MSN: Tensor, states_MN: Tensor, ignored: bool) -> tuple[Tensor, ...]:
        # a sum over a volume overflows float16
        dtype = torch.promote_types(logits_MSN.dtype, torch.float32)
        log_p = torch.log_softmax(logits_MSN, 1, dtype=dtype)
        states = logits_MSN.shape[1]
        index = states_MN.clamp_max(states - 1) if ignored else states_MN
        log_true = log_p.gather(1, index.unsqueeze(1)).squeeze(1)
        p = log_p.exp_()
        p_true = log_true.exp()
        if ignored:
            valid = states_MN < states
            log_true, p_true = log_true * valid, p_true * valid
            p *= valid.unsqueeze(1)
        overlap, truth = p.new_empty(p.shape[:2]), p.new_empty(p.shape[:2])
        for state in range(states):
            here = states_MN == state
            overlap[:, state] = (p_true * here).sum(1)
            truth[:, state] = here.sum(1)
        ctx.save_for_backward(p, p_true, index, valid if ignored else None)
        ctx.logits_dtype = logits_MSN.dtype
        ctx.mark_non_differentiable(truth)
        ctx.set_materialize_grads(False)
        return log_true, overlap, p.sum(2), p.square().sum(2), truth

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, None, None]:
        by_log_true, by_overlap, by_predicted, by_squared, _ = by
        p, p_true, index, valid = ctx.saved_tensors
        slope = torch.zeros_like(p) if by_squared is None else p * (2 * by_squared).unsqueeze(2)
        if by_predicted is not None:
            slope += by_predicted.unsqueeze(2)
        slope *= p
        at_truth = torch.zeros_like(p_true) if by_overlap is None else p_true * by_overlap.gather(1, index)
        mean = slope.sum(1) + at_truth
        if by_log_true is not None:
            if valid is not None:
                by_log_true = by_log_true * valid
            mean = mean + by_log_true
            at_truth = at_truth + by_log_true
        slope.addcmul_(p, mean.unsqueeze(1), value=-1).scatter_add_(1, index.unsqueeze(1), at_truth.unsqueeze(1))
        return slope.to(ctx.logits_dtype), None, None
