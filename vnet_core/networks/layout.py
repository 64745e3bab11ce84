"""The arithmetic of a network's plan: channels, grids, receptive field and work, without building anything.

A level is a grid: level 0 that of the image, each further one half as fine.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from vnet_core.geometry import Shape
from vnet_core.sections import NetworkPlan


def padding(shape: tuple[int, ...], divisor: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Voxels to add before and after each axis to reach a multiple of ``divisor``; the odd one comes after."""
    missing = tuple(-n % divisor for n in shape)
    return tuple(m // 2 for m in missing), tuple(m - m // 2 for m in missing)


def padded(shape: Shape, divisor: int) -> Shape:
    """The grid that ``shape`` is computed on: every axis up to the next multiple of ``divisor``."""
    z, y, x = (-(-n // divisor) * divisor for n in shape)
    return z, y, x


def encoder_widths(plan: NetworkPlan) -> list[int]:
    """Channels of the stages of the way down, from full resolution to the bottom."""
    return [plan.width * 2**level for level in range(plan.levels)]


def entering_widths(plan: NetworkPlan, channels: int) -> list[int]:
    """Channels that enter the stages of the way down; a maximum leaves their number as it is, a convolution doubles."""
    widths = encoder_widths(plan)
    first = channels if plan.entry == "tiled" else plan.width
    return [first, *(widths[1:] if plan.downsampling == "convolution" else widths[:-1])]


def decoder_widths(plan: NetworkPlan) -> list[int]:
    """Channels of the stages of the way up, from full resolution to the one above the bottom."""
    widths = encoder_widths(plan)
    if plan.decoder == "narrow":
        return widths[:-1]
    return [rising + skip for rising, skip in zip(rising_widths(plan), widths, strict=False)]


def rising_widths(plan: NetworkPlan) -> list[int]:
    """Channels that come up to each stage of the way up, in the same order.

    A transposed convolution makes them as many as in the skip; interpolation leaves those of the stage below.
    """
    widths = encoder_widths(plan)
    if plan.upsampling == "transposed":
        return widths[:-1]
    below = widths[-1]
    rising = []
    for width in reversed(widths[:-1]):
        rising.append(below)
        below = width if plan.decoder == "narrow" else below + width
    return rising[::-1]


def widths_below(plan: NetworkPlan) -> list[int]:
    """Channels of the stage from which each stage of the way up is reached, in the same order."""
    return [*decoder_widths(plan)[1:], encoder_widths(plan)[-1]]


def convolutions(plan: NetworkPlan, channels: int, outputs: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every convolution: the level on whose grid it steps, channels in, channels out, voxels of its kernel."""
    widths, k3 = encoder_widths(plan), plan.kernel_size**3
    entering, above = entering_widths(plan, channels), decoder_widths(plan)
    rising, below = rising_widths(plan), widths_below(plan)

    def stage(level: int, inside: int, width: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        yield level, inside, width, k3
        yield from [(level, width, width, k3)] * (count - 1)
        if plan.residual == "projected":
            yield level, inside, width, 1

    if plan.entry == "expanded" and channels > 1:
        yield 0, channels, plan.width, k3
    for level, (width, count) in enumerate(zip(widths, plan.convolutions, strict=True)):
        if level and plan.downsampling == "convolution":
            yield level, widths[level - 1], width, 8
        yield from stage(level, entering[level], width, count)
    for level, count in enumerate(plan.convolutions_up):
        if plan.upsampling == "transposed":
            yield level + 1, below[level], rising[level], 8
        yield from stage(level, rising[level] + widths[level], above[level], count)
        if level and plan.deep_supervision != "none":
            yield level, above[level], outputs, 1
    yield 0, above[0], outputs, plan.head_kernel_size**3
    if plan.head_kernel_size > 1:
        yield 0, outputs, outputs, 1


def count_macs(plan: NetworkPlan, channels: int, outputs: int, shape: Shape) -> int:
    """Multiply-accumulates of one volume (z, y, x) through the network, on the padded grid; convolutions only.

    With auxiliary outputs, which only training has, as in training.
    """
    voxels = prod(padded(shape, plan.divisor))
    total = 0
    for level, entering, leaving, taps in convolutions(plan, channels, outputs):
        total += voxels // 8**level * entering * leaving * taps
    return total


def receptive_field(plan: NetworkPlan, channels: int = 1) -> list[int]:
    """Voxels along an axis that reach one value after each stage: L1 to the bottom, then R to R1, then the logits.

    By the rule of the published table: a convolution adds (k - 1) steps of its grid; halving adds one step, after
    which steps are twice as long; doubling halves the step and adds one, or three where it interpolates linearly.
    Few voxels less are reached in fact, since doubled voxels share what they come from; and an instance or group
    normalisation sees the whole image.
    """
    k = plan.kernel_size
    field, step = 1, 1
    if plan.entry == "expanded" and channels > 1:
        field += k - 1
    fields = []
    for level, count in enumerate(plan.convolutions):
        if level:
            field += step
            step *= 2
        field += count * (k - 1) * step
        fields.append(field)
    doubling = 3 if plan.upsampling == "linear" else 1
    for count in reversed(plan.convolutions_up):
        step //= 2
        field += doubling * step + count * (k - 1) * step
        fields.append(field)
    return [*fields, field + plan.head_kernel_size - 1]
