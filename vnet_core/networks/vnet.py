"""The V-Net of Milletari, Navab and Ahmadi (2016), and its arithmetic.

    image -- L1 ---------------------- skip ---------------------- R1 -- head -- logits
             down -- L2 -------------- skip -------------- R2 -- up
                     down -- L3 ------ skip ------ R3 -- up
                             down -- bottom -- up

A stage (L1, L2, ..., bottom, ..., R1) is a row of k^3 convolutions: what enters it is added after its last
convolution, then comes the last activation. What enters a decoder stage is [upsampled, skip], concatenated.

B batch, C input channel, K class, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import gcd, prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet_core.geometry import Shape
from vnet_core.plan import NetworkPlan

PRELU_SLOPE = 0.25
"""Slope of PReLU for negative values before training."""
NORMALISATION_GROUPS = 8
"""Most groups of the normalisation `group`; fewer where the channels do not divide by it."""
IN_PLACE_VALUES = 2**20
"""Values that an activation in place works on at a time: few enough to stay in the cache of a processor."""


class VNet(nn.Module):
    """A V-Net; made by :func:`build_vnet`."""

    def __init__(self, plan: NetworkPlan, channels: int, classes: int) -> None:
        super().__init__()
        self.plan = plan
        self.channels = channels
        self.classes = classes
        widths = encoder_widths(plan)
        counts = plan.convolutions
        self.encoder = nn.ModuleList(
            Stage(plan, channels if level == 0 else width, width, counts[level]) for level, width in enumerate(widths)
        )
        self.down = nn.ModuleList(
            Resize(plan, nn.Conv3d(above, below, 2, stride=2)) for above, below in pairwise(widths)
        )
        # What comes up is as wide as the skip beside it; what it comes from is twice as wide as the encoder there,
        # except at the bottom, which has no skip.
        self.up = nn.ModuleList(
            Resize(plan, nn.ConvTranspose3d(below, width, 2, stride=2))
            for width, below in zip(widths, [*(2 * w for w in widths[1:-1]), widths[-1]], strict=False)
        )
        self.decoder = nn.ModuleList(
            Stage(plan, 2 * width, 2 * width, count) for width, count in zip(widths[:-1], counts[:-1], strict=True)
        )
        self.head = nn.Conv3d(2 * plan.width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, Z, Y, X) of an image ``x`` (B, C, Z, Y, X), both of the weights' floating dtype.

        An axis that is not a multiple of ``plan.divisor`` is extended with zeros, as evenly on both sides as possible
        (so are training patches that reach beyond their volume), and the logits are cropped back.
        """
        shape = x.shape[2:]
        before, after = padding(shape, self.plan.divisor)
        if any(after):
            ends = [n for axis in (2, 1, 0) for n in (before[axis], after[axis])]
            x = F.pad(x, ends)
        skips: list[Tensor] = []
        for stage, down in zip(self.encoder, self.down, strict=False):
            skips.append(stage(x))
            x = down(skips[-1])
        x = self.encoder[-1](x)
        for stage, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = up(x)
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x)
        window = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
        return self.head(x)[(..., *window)]


class Stage(nn.Module):
    """``count`` convolutions to ``width`` channels, around which the ``entering`` channels are added."""

    def __init__(self, plan: NetworkPlan, entering: int, width: int, count: int) -> None:
        super().__init__()
        k = plan.kernel_size
        self.kernel_size = k
        self.width = width
        self.convolutions = nn.ModuleList(
            nn.Conv3d(entering if i == 0 else width, width, k, padding=k // 2) for i in range(count)
        )
        self.normalisations = nn.ModuleList(_normalisation(plan, width) for _ in range(count))
        self.activations = nn.ModuleList(Activation(width, PRELU_SLOPE) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, Z, Y, X) from ``x`` (B, entering, Z, Y, X)."""
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and min(x.shape[2:]) < self.kernel_size:
            # oneDNN's bfloat16 gradient of such a kernel is wrong on a grid smaller than it (seen in torch 2.13)
            with torch.autocast("cpu", enabled=False):
                return self._convolve(x.float())
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        entering = tiled(x, self.width)
        layers = list(zip(self.convolutions, self.normalisations, self.activations, strict=True))
        for convolution, normalisation, activation in layers[:-1]:
            x = activation(normalisation(convolution(x)))
        convolution, normalisation, activation = layers[-1]
        x = normalisation(convolution(x))
        x = x + entering if torch.is_grad_enabled() else x.add_(entering)
        return activation(x)


class Resize(nn.Module):
    """A convolution that halves or doubles the grid, with what follows every convolution."""

    def __init__(self, plan: NetworkPlan, convolution: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        self.convolution = convolution
        self.normalisation = _normalisation(plan, convolution.out_channels)
        self.activation = Activation(convolution.out_channels, PRELU_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out, Z', Y', X') from ``x`` (B, in, Z, Y, X)."""
        return self.activation(self.normalisation(self.convolution(x)))


class Activation(nn.PReLU):
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
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def build_vnet(plan: NetworkPlan, channels: int, classes: int) -> VNet:
    """The network of a plan, float32, with the weights of ``initialise(network, seed=0)``.

    ``channels`` of the image in, ``classes`` out with background. The global random state is neither read nor moved.
    """
    with torch.device("meta"):
        network = VNet(plan, channels, classes)
    network.to_empty(device="cpu")
    initialise(network, seed=0)
    return network


def initialise(network: VNet, seed: int) -> None:
    """Set every weight as before training; one seed gives the same weights on every machine.

    Convolutions, transposed ones too, are normal with variance 2 / ((fan_in + fan_out) / 2), where a fan is the
    channels times the voxels of the kernel; biases are 0, slopes 0.25, normalisations the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            mean_fan = (module.in_channels + module.out_channels) * prod(module.kernel_size) / 2
            with torch.no_grad():
                module.weight.normal_(0.0, sqrt(2 / mean_fan), generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.PReLU | nn.BatchNorm3d | nn.GroupNorm):
            module.reset_parameters()


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


def padding(shape: tuple[int, ...], divisor: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Voxels to add before and after each axis to reach a multiple of ``divisor``; the odd one comes after."""
    missing = tuple(-n % divisor for n in shape)
    return tuple(m // 2 for m in missing), tuple(m - m // 2 for m in missing)


def padded(shape: Shape, divisor: int) -> Shape:
    """The grid that ``shape`` is computed on: every axis up to the next multiple of ``divisor``."""
    z, y, x = (-(-n // divisor) * divisor for n in shape)
    return z, y, x


def encoder_widths(plan: NetworkPlan) -> list[int]:
    """Channels of the encoder's stages, from full resolution to the bottom."""
    return [plan.width * 2**level for level in range(plan.levels)]


def receptive_field(plan: NetworkPlan) -> list[int]:
    """Voxels along an axis that reach one value after each stage: L1 to the bottom, then R to R1, then the head.

    A convolution adds (k - 1) steps of its grid; a down convolution one step, after which steps are twice as long; a
    transposed convolution halves the step and adds one.
    """
    k, field, step = plan.kernel_size, 1, 1
    fields = []
    for level, count in enumerate(plan.convolutions):
        if level:
            field += step
            step *= 2
        field += count * (k - 1) * step
        fields.append(field)
    for count in reversed(plan.convolutions[:-1]):
        step //= 2
        field += step + count * (k - 1) * step
        fields.append(field)
    return [*fields, field]


def count_parameters(network: nn.Module) -> int:
    """Trainable numbers of a network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def count_macs(plan: NetworkPlan, channels: int, classes: int, shape: Shape) -> int:
    """Multiply-accumulates of one volume (z, y, x) through the network, on the padded grid; convolutions only."""
    voxels = prod(padded(shape, plan.divisor))
    total = 0
    for level, entering, leaving, kernel_voxels in convolutions(plan, channels, classes):
        total += voxels // 8**level * entering * leaving * kernel_voxels
    return total


def convolutions(plan: NetworkPlan, channels: int, classes: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every convolution: the level on whose grid it steps, channels in, channels out, voxels of its kernel."""
    widths, k3 = encoder_widths(plan), plan.kernel_size**3
    for level, (width, count) in enumerate(zip(widths, plan.convolutions, strict=True)):
        yield level, channels if level == 0 else width, width, k3
        yield from [(level, width, width, k3)] * (count - 1)
        if level == plan.levels - 1:
            break
        yield level + 1, width, 2 * width, 8
        yield level + 1, (2 if level == plan.levels - 2 else 4) * width, width, 8
        yield from [(level, 2 * width, 2 * width, k3)] * count
    yield 0, 2 * plan.width, classes, 1


def _normalisation(plan: NetworkPlan, width: int) -> nn.Module:
    match plan.normalisation:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm3d(width)
        case "instance":
            return GroupNormalisation(width, width)
        case "group":
            return GroupNormalisation(gcd(NORMALISATION_GROUPS, width), width)
