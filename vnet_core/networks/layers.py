"""The parts of a network of the V-Net family: activations, normalisations, random layers, stages and what joins them.

B batch, C channel, Z Y X voxels.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet_core.sections import NetworkPlan

PRELU_SLOPE = 0.25
"""Slope of PReLU for negative values before training."""
LEAKY_SLOPE = 0.01
"""Slope of the leaky ReLU for negative values."""
NORMALISATION_GROUPS = 8
"""Most groups of the normalisation `group`; fewer where the channels do not divide by it."""
IN_PLACE_VALUES = 2**20
"""Values that an activation in place works on at a time: few enough to stay in the cache of a processor."""


class Stage(nn.Module):
    """``count`` convolutions to ``width`` channels, around which the ``entering`` channels are added.

    ``dropout`` is the probability with which an entering channel is left out of the convolutions; it is added anyway.
    """

    def __init__(self, plan: NetworkPlan, entering: int, width: int, count: int, dropout: float = 0.0) -> None:
        super().__init__()
        k = plan.kernel_size
        self.kernel_size = k
        self.width = width
        self.dropout = ChannelDropout(dropout) if dropout else nn.Identity()
        self.convolutions = nn.ModuleList(
            nn.Conv3d(entering if i == 0 else width, width, k, padding=k // 2) for i in range(count)
        )
        self.normalisations = nn.ModuleList(normalisation(plan, width) for _ in range(count))
        inside = count - 1 if plan.residual == "plain" else count
        self.activations = nn.ModuleList(
            _activation_and_dropout(plan, width) if i < inside else nn.Identity() for i in range(count)
        )
        projected = plan.residual == "projected"
        self.projection = nn.Conv3d(entering, width, 1) if projected else None
        self.last = nn.Identity() if projected else _activation_and_dropout(plan, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, width, Z, Y, X) from ``x`` (B, entering, Z, Y, X), or from [x, skip], which have as many together."""
        if bfloat16_goes_wrong(x, self.kernel_size):
            with torch.autocast("cpu", enabled=False):
                return self._convolve(x.float(), None if skip is None else skip.float())
        return self._convolve(x, skip)

    def _convolve(self, x: Tensor, skip: Tensor | None) -> Tensor:
        first = x
        entering = x if skip is None else torch.cat([x, skip], dim=1)
        x = self.dropout(entering)
        for convolution, normalise, activation in zip(
            self.convolutions, self.normalisations, self.activations, strict=True
        ):
            x = activation(normalise(convolution(x)))
        if self.projection is not None:
            added = self.projection(entering)
        else:
            # x itself is the same values as a slice of both, whose gradient would be a copy of both
            added = tiled(first if first.shape[1] >= self.width else entering, self.width)
        x = x + added if torch.is_grad_enabled() else x.add_(added)
        return self.last(x)


class Convolved(nn.Module):
    """A convolution with what follows every convolution."""

    def __init__(self, plan: NetworkPlan, convolution: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        self.convolution = convolution
        self.normalisation = normalisation(plan, convolution.out_channels)
        self.activation = activation(plan, convolution.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out, Z', Y', X') from ``x`` (B, in, Z, Y, X)."""
        if self.convolution.padding != (0, 0, 0) and bfloat16_goes_wrong(x, self.convolution.kernel_size[0]):
            with torch.autocast("cpu", enabled=False):
                return self._convolve(x.float())
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        return self.activation(self.normalisation(self.convolution(x)))


class Maximum(nn.Module):
    """Halves the grid: the maximum of every 2^3 voxels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z / 2, Y / 2, X / 2) from (B, C, Z, Y, X), in its dtype under autocast too."""
        # a tensor without values has no autocast of its own to turn off
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):
            return F.max_pool3d(x, 2)


class Doubled(nn.Module):
    """Doubles the grid by interpolation: `nearest`, or `linear` between the centres of voxels."""

    def __init__(self, upsampling: str) -> None:
        super().__init__()
        self.mode = "trilinear" if upsampling == "linear" else "nearest"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2 Z, 2 Y, 2 X) from (B, C, Z, Y, X)."""
        return F.interpolate(x, scale_factor=2, mode=self.mode)


class PReLU(nn.PReLU):
    """PReLU with one slope per channel. Without gradients it may overwrite what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """The values of ``torch.nn.PReLU`` of ``x`` (B, C, Z, Y, X)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        # With channels last a row of voxels lies together with all its channels: seen as a row of X * C channels the
        # kernel runs over long vectors, and piece by piece the result can go where the input was.
        x = x.contiguous(memory_format=torch.channels_last_3d)
        values = x.shape[1] * x.shape[4]
        rows = x.permute(0, 2, 3, 4, 1).view(-1, values)
        slopes = self.weight.repeat(x.shape[4])
        for piece in rows.split(max(1, IN_PLACE_VALUES // values)):
            piece.copy_(F.prelu(piece, slopes))
        return x


class GroupNormalisation(nn.GroupNorm):
    """Group normalisation that also takes a single voxel, where it gives its offset."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) from the same."""
        if self.num_groups == self.num_channels and _goes_back_slowly(x):
            return _ChannelsLastInstance.apply(x, self.weight, self.bias, self.eps)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _goes_back_slowly(x: Tensor) -> bool:
    """Whether torch's gradient of an instance normalisation of ``x`` is the slow one: on processors, channels last."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return last and torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32


class _ChannelsLastInstance(torch.autograd.Function):
    """Instance normalisation with a gradient in whole passes over (B, V voxels, C): half the time of torch's.

    With x' = (x - m) r the normalised values, y = w x' + b and g = d loss / d y,

        d loss / d x = w r (g - mean g - x' mean(g x')), means over the voxels of a sample's channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        samples, channels = x.shape[:2]
        voxels = x[0, 0].numel()
        y, mean, rate = torch.native_group_norm(x, weight, bias, samples, channels, voxels, channels, epsilon)
        ctx.save_for_backward(x, weight, mean, rate)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean_BC, rate_BC = ctx.saved_tensors
        g_BVC, x_BVC = (values.permute(0, 2, 3, 4, 1).flatten(1, 3) for values in (by[0], x))
        by_bias_BC = g_BVC.sum(1)
        by_weight_BC = ((g_BVC * x_BVC).sum(1) - mean_BC * by_bias_BC) * rate_BC
        # the formula above as scale * g + slope * x + offset
        scale_BC = weight * rate_BC
        slope_BC = -scale_BC * rate_BC * by_weight_BC / x_BVC.shape[1]
        offset_BC = -scale_BC * by_bias_BC / x_BVC.shape[1] - slope_BC * mean_BC
        by_x_BVC = torch.addcmul(offset_BC[:, None], g_BVC, scale_BC[:, None]).addcmul_(x_BVC, slope_BC[:, None])
        by_x = by_x_BVC.unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3)
        return by_x, by_weight_BC.sum(0), by_bias_BC.sum(0), None


class Chance:
    """The generator of all random layers of a network; the global one is left alone."""

    def __init__(self) -> None:
        self._seed = 0
        self._generator: torch.Generator | None = None

    def reseed(self, seed: int) -> None:
        """What is drawn from now on depends on ``seed`` alone."""
        self._seed, self._generator = seed, None

    def on(self, device: torch.device) -> torch.Generator:
        """The generator, which stays on the device of its first use."""
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


class RandomLayer(nn.Module):
    """A layer that changes values at random in training and does nothing in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = Chance()


class ChannelDropout(RandomLayer):
    """Sets whole channels to 0 with a probability, and scales the others so that the mean stays."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) from the same."""
        if not self.training:
            return x
        return x * self._kept(x, (x.shape[0], x.shape[1], 1, 1, 1))

    def _kept(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        kept = torch.empty(shape, dtype=x.dtype, device=x.device)
        kept.bernoulli_(1 - self.probability, generator=self.chance.on(x.device))
        return kept.div_(1 - self.probability)


class ValueDropout(ChannelDropout):
    """Sets single values to 0 with a probability, and scales the others so that the mean stays."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) from the same."""
        return x * self._kept(x, tuple(x.shape)) if self.training else x


class Noise(RandomLayer):
    """Adds Gaussian noise in training."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) from the same."""
        if not self.training:
            return x
        noise = torch.empty_like(x).normal_(0.0, self.deviation, generator=self.chance.on(x.device))
        return x + noise


def activation(plan: NetworkPlan, width: int) -> nn.Module:
    """The plan's activation for ``width`` channels; all but PReLU overwrite what they are given."""
    match plan.activation:
        case "prelu":
            return PReLU(width, PRELU_SLOPE)
        case "elu":
            return nn.ELU(inplace=True)
        case "relu":
            return nn.ReLU(inplace=True)
        case "leaky-relu":
            return nn.LeakyReLU(LEAKY_SLOPE, inplace=True)


def _activation_and_dropout(plan: NetworkPlan, width: int) -> nn.Module:
    """The activation of a stage, with dropout where the plan has it after every one."""
    chosen = activation(plan, width)
    if plan.dropout and plan.dropout_at == "activations":
        return nn.Sequential(chosen, ValueDropout(plan.dropout))
    return chosen


def normalisation(plan: NetworkPlan, width: int) -> nn.Module:
    """The plan's normalisation of ``width`` channels."""
    match plan.normalisation:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm3d(width)
        case "instance":
            return GroupNormalisation(width, width)
        case "group":
            return GroupNormalisation(gcd(NORMALISATION_GROUPS, width), width)


def tiled(x: Tensor, width: int) -> Tensor:
    """The channels of ``x`` (B, C, Z, Y, X) over and over, in order, until there are ``width``; a view where possible.

    Three channels a b c become a b c a b at a width of five, and a b at a width of two.
    """
    channels = x.shape[1]
    if channels == 1:
        return x.expand(-1, width, -1, -1, -1)
    if channels >= width:
        return x[:, :width]
    return x[:, [i % channels for i in range(width)]]


def bfloat16_goes_wrong(x: Tensor, kernel_size: int) -> bool:
    """Whether to compute in float32: oneDNN's bfloat16 gradient is wrong on a grid smaller than the kernel.

    Seen in torch 2.13. ``x`` is (B, C, Z, Y, X); only under autocast on a processor.
    """
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) < kernel_size
