"""How much memory a network needs: of a pass without gradients and of a training step, from its plan alone.

Both follow :meth:`vnet_core.networks.vnet.VNet.forward` step by step and count values; they are upper bounds that
tests hold against measured peaks.
"""

from __future__ import annotations

from math import prod

from vnet_core.geometry import Shape
from vnet_core.networks.layout import (
    convolutions,
    decoder_widths,
    encoder_widths,
    entering_widths,
    padded,
    rising_widths,
    widths_below,
)
from vnet_core.sections import NetworkPlan

OVERHEAD_BYTES = 176 * 2**20
"""What a pass holds beside its values: scratch memory of the libraries below, and freed blocks that the C allocator
keeps (it gives those above 32 MiB back at once; of those below, up to five were seen)."""
UNFOLDED_VALUES = 20480
"""Torch writes out the input of a float32 convolution once per tap of its kernel, and its output twice, where the
kernel is at most 3 wide and channels * Z * Y at most this."""
TRAINING_OVERHEAD_BYTES = 416 * 2**20
"""The same of a training step, which frees and takes many more blocks."""
INDEX_BYTES = 8
"""Of the place of a maximum, which torch keeps beside its value."""
LOSS_COPIES = 8
"""Copies of the logits in float32 that a loss makes: logits, logarithms, probabilities, truth, and gradients."""
BACKWARD_COPIES = 4
"""Copies of the widest output of a stage at full resolution with which its backward pass begins."""
WEIGHT_COPIES = 5
"""In float32: weights, their running average, gradients, and the two moments of the optimiser."""


def predicted_peak_bytes(plan: NetworkPlan, channels: int, outputs: int, shape: Shape, bytes_per_value: int) -> int:
    """Most memory that a whole pass over one volume holds at once, in bytes.

    For a network that is prepared for inference with weights and activations of ``bytes_per_value``: weights,
    activations on the padded grid of ``shape`` (z, y, x), the logits, which come out as float32, and what the libraries
    below keep. Not counted: the image that the caller holds, and the libraries themselves.
    """
    grid = padded(shape, plan.divisor)
    kernels = [entering * leaving * taps for _, entering, leaving, taps in convolutions(plan, channels, outputs)]
    # A convolution has its weights rearranged for itself while it runs.
    weights_bytes = (sum(kernels) + max(kernels)) * bytes_per_value
    activations_bytes = _Pass(plan, grid, bytes_per_value).peak_values(channels, outputs) * bytes_per_value
    logits_bytes = outputs * prod(grid) * (bytes_per_value + 4)
    return weights_bytes + max(activations_bytes, logits_bytes) + OVERHEAD_BYTES


class _Pass:
    """The values that are alive while an image goes through without gradients."""

    def __init__(self, plan: NetworkPlan, grid: Shape, bytes_per_value: int) -> None:
        self.plan = plan
        self.grid = grid
        self.bytes_per_value = bytes_per_value
        self.voxels = [prod(grid) // 8**level for level in range(plan.levels)]
        self.spare = 0 if plan.normalisation == "none" else 1
        """Copies that a normalisation makes beside its input."""
        self.held = 0
        self.peak = 0

    def peak_values(self, channels: int, outputs: int) -> int:
        """Most values at once, following VNet.forward."""
        plan, voxels, k3 = self.plan, self.voxels, self.plan.kernel_size**3
        widths, above = encoder_widths(plan), decoder_widths(plan)
        entering, rising, below = entering_widths(plan, channels), rising_widths(plan), widths_below(plan)
        bottom = plan.levels - 1
        # the image, and once more while it is padded
        self.held = channels * voxels[0]
        self._moment(channels * voxels[0])
        if plan.entry == "expanded" and channels > 1:
            self._moment(self._convolved(0, channels, plan.width, k3))
        for level, width in enumerate(widths):
            # the expanded image stays while the first stage runs; of one channel it is a view
            view = level == 0 and channels == 1
            self._stage(level, channels if view else entering[level], width, plan.convolutions[level])
            if level == bottom:
                break
            self.held += width * voxels[level]
            if plan.downsampling == "maximum":
                places = -(-INDEX_BYTES // self.bytes_per_value)
                self._moment(width * (1 + places) * voxels[level + 1])
            else:
                columns = self._unfolded(level, width, 2 * width, 8)
                self._moment(voxels[level + 1] * (2 * width * (1 + self.spare) + columns))
        joined = 0
        for level in reversed(range(bottom)):
            skip, up = widths[level], rising[level]
            made = voxels[level] * up * (1 + (self.spare if plan.upsampling == "transposed" else 0))
            columns = self._unfolded(level + 1, below[level], up, 8) if plan.upsampling == "transposed" else 0
            made += 2 * up * voxels[level] if columns else 0
            self._moment(voxels[level + 1] * below[level] + made + joined)
            self._moment(voxels[level] * (up + up + skip) + joined)
            self.held -= voxels[level] * skip
            self.held += joined
            self._stage(level, up + skip, above[level], plan.convolutions_up[level])
            self.held -= joined
            if level and plan.deep_supervision == "aggregate":
                told = outputs * voxels[level]
                columns = self._unfolded(level, above[level], outputs, 1) * voxels[level]
                self._moment(voxels[level] * above[level] + joined + 2 * told + columns)
                joined = outputs * voxels[level - 1]
                self._moment(voxels[level] * above[level] + joined + 2 * told)
        head = self._convolved(0, above[0], outputs, plan.head_kernel_size**3)
        self._moment(head + joined + (outputs * voxels[0] if joined else 0))
        return self.peak

    def _moment(self, values: int) -> None:
        self.peak = max(self.peak, self.held + values)

    def _convolved(self, level: int, entering: int, leaving: int, taps: int) -> int:
        """Values of a convolution with its input, its output, and what comes after it."""
        columns = self._unfolded(level, entering, leaving, taps)
        return self.voxels[level] * (entering + leaving * (1 + self.spare) + columns)

    def _stage(self, level: int, entering: int, width: int, count: int) -> None:
        """A stage: what enters stays until it is added, a convolution has its input and its output."""
        taps = self.plan.kernel_size**3
        inputs = {entering} if count == 1 else {entering, width}
        columns = max(self._unfolded(level, n, width, taps) for n in inputs)
        self._moment(self.voxels[level] * (entering + width * (min(count, 2) + self.spare) + columns))
        if self.plan.residual == "projected":
            added = width + self._unfolded(level, entering, width, 1)
        else:
            added = width if 1 < entering < width else 0
        self._moment(self.voxels[level] * (entering + width + added))

    def _unfolded(self, level: int, entering: int, leaving: int, taps: int) -> int:
        """Values per voxel that a convolution on the grid of a level holds besides its input and output."""
        z, y, _ = self.grid
        small = entering * (z >> level) * (y >> level) <= UNFOLDED_VALUES
        return entering * taps + leaving if self.bytes_per_value == 4 and small and taps <= 27 else 0


def predicted_training_bytes(
    plan: NetworkPlan, channels: int, outputs: int, patch: Shape, batch: int, bytes_per_value: int
) -> int:
    """Most memory that one training step holds at once, in bytes: forward, backward and optimiser.

    ``batch`` samples of ``patch`` (z, y, x) on one device; ``bytes_per_value`` is 2 under bfloat16 autocast and 4
    without. Counted are the weights with their copies, the values that the backward pass needs, those with which it
    begins, the loss, and what the libraries below keep. Not counted: the libraries themselves and waiting batches.
    """
    kernels = [entering * leaving * taps for _, entering, leaving, taps in convolutions(plan, channels, outputs)]
    copies_bytes = 4 * WEIGHT_COPIES + (bytes_per_value if bytes_per_value < 4 else 0)
    weights_bytes = sum(kernels) * copies_bytes + 2 * max(kernels) * 4
    voxels = prod(padded(patch, plan.divisor)) * batch
    told = sum(outputs * voxels // 8**level for level in _supervised_levels(plan))
    values = _saved_values(plan, channels, outputs, voxels, bytes_per_value)
    values += BACKWARD_COPIES * max(decoder_widths(plan)[0], rising_widths(plan)[0] + plan.width) * voxels
    values_bytes = values * bytes_per_value + LOSS_COPIES * told * 4
    return weights_bytes + values_bytes + TRAINING_OVERHEAD_BYTES


def _supervised_levels(plan: NetworkPlan) -> range:
    """Levels with outputs that a loss sees."""
    return range(plan.levels - 1 if plan.deep_supervision == "auxiliary" else 1)


def _saved_values(plan: NetworkPlan, channels: int, outputs: int, voxels: int, bytes_per_value: int) -> int:
    """Values of a batch of ``voxels`` at full resolution that wait for the backward pass.

    A normalisation and PReLU keep what enters them; every other activation writes its result where its input was.
    """
    convolved = 1 + (plan.normalisation != "none") + (plan.activation == "prelu")
    after = 2 if plan.dropout and plan.dropout_at == "activations" else 0
    dropped = 1 if plan.dropout and plan.dropout_at == "deep-and-skips" else 0
    widths, rising = encoder_widths(plan), rising_widths(plan)
    last = {"plain": 0, "activated": 1 + (plan.activation == "prelu"), "projected": 1}[plan.residual]

    def stage(width: int, count: int) -> int:
        return width * (count * (convolved + after) + last)

    # the image as float32 and as it is computed with
    values = channels * voxels * (1 + 4 // bytes_per_value)
    if plan.entry == "expanded":
        values += plan.width * voxels * (convolved if channels > 1 else 1)
    for level, (width, count) in enumerate(zip(widths, plan.convolutions, strict=True)):
        grid = voxels // 8**level
        values += grid * stage(width, count)
        if level and plan.downsampling == "convolution":
            values += grid * width * (convolved + dropped)
        elif level:
            values += grid * widths[level - 1] * (1 + INDEX_BYTES // bytes_per_value + dropped)
    for level, count in enumerate(plan.convolutions_up):
        grid = voxels // 8**level
        if plan.upsampling == "transposed":
            values += grid * rising[level] * (1 + (plan.normalisation != "none"))
        values += grid * (rising[level] + widths[level] * (1 + dropped))
        values += grid * stage(decoder_widths(plan)[level], count)
        values += grid * outputs if level and plan.deep_supervision == "auxiliary" else 0
    return values + voxels * outputs * (1 if plan.head_kernel_size == 1 else convolved + 1)
