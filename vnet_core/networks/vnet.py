"""The V-Net of Milletari, Navab and Ahmadi (2016) and the networks that were made of it.

    image -- L1 ---------------------- skip ---------------------- R1 -- head -- logits
             down -- L2 -------------- skip -------------- R2 -- up
                     down -- L3 ------ skip ------ R3 -- up
                             down -- bottom -- up

A stage (L1, L2, ..., bottom, ..., R1) is a row of k^3 convolutions around which what enters is added. What enters a
stage of the way up is [upsampled, skip], concatenated. :class:`vnet_core.sections.NetworkPlan` has the settings:

- `residual`: plain          act(conv(... act(conv(x))) + x)
              activated      act(act(conv(... act(conv(x)))) + x); plain where the image itself is what is added
              projected      act(conv(... act(conv(x)))) + conv1(x)
- where a stage is wider than what enters, that is added tiled; where it is narrower, its first channels are.
- `deep_supervision`: every stage of the way up but R1 has a 1^3 convolution to the outputs.
              auxiliary      in training these are outputs of their own
              aggregate      each is doubled to the next finer grid and added there, at last to the head's convolution:
                             one 1^3 convolution of all features at full resolution, for a share of the memory

B batch, C input channel, K output, Z Y X voxels.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet_core.networks.layers import (
    ChannelDropout,
    Convolved,
    Doubled,
    Maximum,
    Noise,
    RandomLayer,
    Stage,
    activation,
    bfloat16_goes_wrong,
    normalisation,
    tiled,
)
from vnet_core.networks.layout import (
    decoder_widths,
    encoder_widths,
    entering_widths,
    padding,
    rising_widths,
    widths_below,
)
from vnet_core.sections import NetworkPlan

SMALL_HEAD = 0.3
"""Deviation of what gives logits, as a share of what `msra-average` gives it. At 1 the loss of a seed's first step says
how it stands a minute later. At 0.1 what is large is learnt faster still, but of a structure of 0.07 % of the voxels
five trainings in eight found nothing; at 0 even the hippocampus was not found (`benchmarks/results`)."""


class VNet(nn.Module):
    """A network of the V-Net family; made by :func:`build_vnet`."""

    def __init__(self, plan: NetworkPlan, channels: int, outputs: int) -> None:
        super().__init__()
        self.plan = plan
        self.channels = channels
        self.outputs = outputs
        widths, above = encoder_widths(plan), decoder_widths(plan)
        deep = plan.dropout if plan.dropout_at == "deep-and-skips" else 0.0
        self.noise = Noise(plan.noise) if plan.noise else nn.Identity()
        self.expansion = _expansion(plan, channels)
        self.encoder = nn.ModuleList(
            Stage(_stage_plan(plan, level), entering, width, count, deep if _is_deep(plan, level) else 0.0)
            for level, (entering, width, count) in enumerate(
                zip(entering_widths(plan, channels), widths, plan.convolutions, strict=True)
            )
        )
        self.down = nn.ModuleList(_down(plan, fine, coarse) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(
            _up(plan, below, rising) for below, rising in zip(widths_below(plan), rising_widths(plan), strict=True)
        )
        self.decoder = nn.ModuleList(
            Stage(plan, rising + skip, width, count)
            for rising, skip, width, count in zip(
                rising_widths(plan), widths[:-1], above, plan.convolutions_up, strict=True
            )
        )
        self.rising_dropout = nn.ModuleList(
            ChannelDropout(deep) if deep and _is_deep(plan, level + 1) else nn.Identity() for level in range(len(above))
        )
        self.skip_dropout = ChannelDropout(deep) if deep else nn.Identity()
        self.head = Head(plan, above[0], outputs)
        coarse = above[1:] if plan.deep_supervision != "none" else []
        auxiliary = plan.deep_supervision == "auxiliary"
        self.coarse = nn.ModuleList(nn.Conv3d(width, outputs, 1, bias=auxiliary) for width in coarse)
        self.doubled = Doubled("nearest" if plan.upsampling == "nearest" else "linear")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (B, K, Z, Y, X) of an image ``x`` (B, C, Z, Y, X), both of the weights' floating dtype.

        An axis that is not a multiple of ``plan.divisor`` is extended with zeros, as evenly on both sides as possible
        (so are training patches that reach beyond their volume), and the logits are cropped back.

        In training mode with auxiliary deep supervision: a tuple of those and the logits of the coarser stages of the
        way up, ``plan.levels - 1`` in all, each on half the grid of the one before, so of an image whose axes are
        multiples of ``plan.divisor`` (B, K, Z / 2, Y / 2, X / 2) and so on; of others, on the extended grid.
        """
        shape = x.shape[2:]
        before, after = padding(shape, self.plan.divisor)
        if any(after):
            ends = [n for axis in (2, 1, 0) for n in (before[axis], after[axis])]
            x = F.pad(x, ends)
        x = self.expansion(self.noise(x))
        skips: list[Tensor] = []
        for stage, down in zip(self.encoder, self.down, strict=False):
            skips.append(stage(x))
            x = down(skips[-1])
        x = self.encoder[-1](x)
        auxiliary: list[Tensor] = []
        joined: Tensor | None = None
        for level in reversed(range(len(skips))):
            x = self.up[level](self.rising_dropout[level](x))
            skip = self.skip_dropout(skips.pop())
            if torch.is_grad_enabled():
                x = self.decoder[level](x, skip)
            else:
                # without gradients nobody needs the two any more, and they are let go before the stage runs
                x = torch.cat([x, skip], dim=1)
                del skip
                x = self.decoder[level](x)
            if level and self.plan.deep_supervision == "aggregate":
                told = self.coarse[level - 1](x)
                joined = self.doubled(told if joined is None else told + joined)
            elif level and self.plan.deep_supervision == "auxiliary" and self.training:
                auxiliary.insert(0, self.coarse[level - 1](x))
        window = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
        logits: Tensor = self.head(x, joined)[(..., *window)]
        if self.plan.deep_supervision == "auxiliary" and self.training:
            return logits, *auxiliary
        return logits

    def logit_layers(self) -> list[nn.Conv3d]:
        """The convolutions whose values are logits, or are added up to logits."""
        through_activation = self.plan.deep_supervision == "aggregate" and self.plan.head_kernel_size > 1
        return [self.head.last, *([] if through_activation else self.coarse)]

    def reseed(self, seed: int) -> None:
        """What dropout and noise draw from now on depends on ``seed`` alone.

        Without it they go on from where they are, from seed 0 in a new network; the layers draw independently.
        """
        layers = [module for module in self.modules() if isinstance(module, RandomLayer)]
        seeds = torch.randint(2**62, (len(layers),), generator=torch.Generator().manual_seed(seed))
        for layer, own in zip(layers, seeds.tolist(), strict=True):
            layer.chance.reseed(own)


class Head(nn.Module):
    """From the features of the last stage to logits: a 1^3 convolution, or a larger one, its activation, and that."""

    def __init__(self, plan: NetworkPlan, width: int, outputs: int) -> None:
        super().__init__()
        k = plan.head_kernel_size
        self.kernel_size = k
        self.convolution = nn.Conv3d(width, outputs, k, padding=k // 2)
        if k == 1:
            self.after: nn.Module = nn.Identity()
        else:
            followers = (normalisation(plan, outputs), activation(plan, outputs), nn.Conv3d(outputs, outputs, 1))
            self.after = nn.Sequential(*followers)

    @property
    def last(self) -> nn.Conv3d:
        """The convolution that gives the logits."""
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv3d)][-1]

    def forward(self, x: Tensor, joined: Tensor | None) -> Tensor:
        """(B, K, Z, Y, X) from ``x`` (B, C, Z, Y, X); ``joined`` (B, K, Z, Y, X) is added to the first convolution."""
        if bfloat16_goes_wrong(x, self.kernel_size):
            with torch.autocast("cpu", enabled=False):
                return self._convolve(x.float(), joined)
        return self._convolve(x, joined)

    def _convolve(self, x: Tensor, joined: Tensor | None) -> Tensor:
        x = self.convolution(x)
        if joined is not None:
            x = x + joined
        return self.after(x)


def build_vnet(plan: NetworkPlan, channels: int, outputs: int) -> VNet:
    """The network of a plan, float32, with the weights of ``initialise(network, seed=0)``.

    ``channels`` of the image in, ``outputs`` out. The global random state is neither read nor moved.
    """
    with torch.device("meta"):
        network = VNet(plan, channels, outputs)
    network.to_empty(device="cpu")
    initialise(network, seed=0)
    return network


def initialise(network: VNet, seed: int) -> None:
    """Set every weight as before training; one seed gives the same weights on every machine.

    Weights of convolutions, transposed ones too, have mean 0. With fan_in and fan_out the channels times the voxels of
    the kernel, their variance is: `msra-average` 2 / ((fan_in + fan_out) / 2), normal; `msra-small-head` the same, with
    the deviation of ``network.logit_layers()`` times SMALL_HEAD; `kaiming` 2 / n, normal, with n the values that reach
    one value (He et al. 2015: fan_in, of a transposed convolution its channels); `xavier-uniform` and `xavier-normal`
    2 / (fan_in + fan_out) (Glorot and Bengio 2010). Biases are 0, slopes of PReLU 0.25, normalisations the identity.
    The random layers are reseeded.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            _draw(module, network.plan, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.PReLU | nn.BatchNorm3d | nn.GroupNorm):
            module.reset_parameters()
    if network.plan.initialisation == "msra-small-head":
        with torch.no_grad():
            for layer in network.logit_layers():
                layer.weight.mul_(SMALL_HEAD)
    network.reseed(seed)


def _draw(module: nn.Conv3d | nn.ConvTranspose3d, plan: NetworkPlan, generator: torch.Generator) -> None:
    """Random weights of one convolution; see :func:`initialise`."""
    taps = prod(module.kernel_size)
    both_fans = (module.in_channels + module.out_channels) * taps
    with torch.no_grad():
        match plan.initialisation:
            case "msra-average" | "msra-small-head":
                module.weight.normal_(0.0, sqrt(2 / (both_fans / 2)), generator=generator)
            case "kaiming":
                reaching = module.in_channels * (1 if isinstance(module, nn.ConvTranspose3d) else taps)
                module.weight.normal_(0.0, sqrt(2 / reaching), generator=generator)
            case "xavier-uniform":
                # a uniform distribution within +-a has the variance a^2 / 3
                bound = sqrt(6 / both_fans)
                module.weight.uniform_(-bound, bound, generator=generator)
            case "xavier-normal":
                module.weight.normal_(0.0, sqrt(2 / both_fans), generator=generator)


def count_parameters(network: nn.Module) -> int:
    """Trainable numbers of a network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _expansion(plan: NetworkPlan, channels: int) -> nn.Module:
    """From the image to what enters the first stage."""
    if plan.entry == "tiled":
        return nn.Identity()
    if channels == 1:
        return Tiling(plan.width)
    k = plan.kernel_size
    return Convolved(plan, nn.Conv3d(channels, plan.width, k, padding=k // 2))


class Tiling(nn.Module):
    """See :func:`vnet_core.networks.layers.tiled`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, Z, Y, X) from (B, C, Z, Y, X)."""
        return tiled(x, self.width)


def _stage_plan(plan: NetworkPlan, level: int) -> NetworkPlan:
    """Settings of a stage of the way down: where the image itself is added, it is before the only activation."""
    if level == 0 and plan.entry == "tiled" and plan.residual == "activated":
        return plan.model_copy(update={"residual": "plain"})
    return plan


def _is_deep(plan: NetworkPlan, level: int) -> bool:
    """Whether a level is one of the two deepest, never that of the image."""
    return level >= max(1, plan.levels - 2)


def _down(plan: NetworkPlan, fine: int, coarse: int) -> nn.Module:
    if plan.downsampling == "maximum":
        return Maximum()
    return Convolved(plan, nn.Conv3d(fine, coarse, 2, stride=2))


def _up(plan: NetworkPlan, below: int, rising: int) -> nn.Module:
    if plan.upsampling == "transposed":
        return Convolved(plan, nn.ConvTranspose3d(below, rising, 2, stride=2))
    return Doubled(plan.upsampling)
