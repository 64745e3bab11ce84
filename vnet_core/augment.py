"""Random changes of the intensities of training samples, each with the generator that it is given.

With strength 0 every function gives back what it got. Voxels at exactly 0 stay at 0: that is what surrounds a volume
that is smaller than its patch, and the surround must stay what it is at inference.
"""

from __future__ import annotations

import numpy as np
import torch

from vnet_core.sections import AugmentationPlan

# C channel, Z Y X

QUANTILES = 128
"""Quantiles by which a volume's intensities are told."""
_TABLE = 4096
"""Entries of the table by which intensities are mapped."""


def random_intensities(
    generator: np.random.Generator,
    image: torch.Tensor,
    plan: AugmentationPlan,
    quantiles: tuple[np.ndarray, np.ndarray] | None = None,
) -> torch.Tensor:
    """A sample (C, Z, Y, X), float32, with every change of intensities that the plan has, in a fixed order.

    ``quantiles`` are those of the sample's volume and of one drawn from the training set; they are needed where the
    plan matches histograms.
    """
    if quantiles is not None and generator.random() < plan.histogram_matching:
        image = matched(image, *quantiles)
    drawn = generator.random(6) < plan.probability
    for is_drawn, change, strength in zip(
        drawn,
        (low_resolution, blur, contrast, brightness, gamma, noise),
        (plan.low_resolution, plan.blur_voxels, plan.contrast, plan.brightness, plan.gamma, plan.noise),
        strict=True,
    ):
        if is_drawn:
            image = change(generator, image, strength)
    return image


def contrast(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X) times a factor between ``1 - strength`` and ``1 + strength`` per channel."""
    if strength == 0:
        return image
    return image * _per_channel(image, generator.uniform(1 - strength, 1 + strength, len(image)))


def brightness(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X) plus an offset between ``-strength`` and ``strength`` per channel; zeros stay."""
    if strength == 0:
        return image
    return _keep_zeros(image, image + _per_channel(image, generator.uniform(-strength, strength, len(image))))


def gamma(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X), scaled to 0 .. 1, to a power between 1 / (1 + strength) and 1 + strength per channel.

    Smallest and largest value of a channel stay; zeros stay.
    """
    if strength == 0:
        return image
    limit = np.log1p(strength)
    exponent = _per_channel(image, np.exp(generator.uniform(-limit, limit, len(image))))
    lowest, highest = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    extent = highest - lowest
    share = (image - lowest) / extent.clamp(min=torch.finfo(image.dtype).tiny)
    return _keep_zeros(image, share.pow(exponent) * extent + lowest)


def noise(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X) with Gaussian noise of a deviation between 0 and ``strength`` per channel; zeros stay.

    The noise is drawn on the image's device, by a generator that is seeded from the one given.
    """
    if strength == 0:
        return image
    deviation = _per_channel(image, generator.uniform(0, strength, len(image)))
    source = torch.Generator(image.device).manual_seed(int(generator.integers(2**62)))
    drawn = torch.randn(image.shape, generator=source, device=image.device)
    return _keep_zeros(image, torch.addcmul(image, drawn, deviation))


def blur(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X) under a Gaussian of a deviation between 0 and ``strength`` voxels; zeros stay.

    Beyond the edge there is nothing, so there the mean is taken over what is inside.
    """
    if strength == 0:
        return image
    deviation = max(float(generator.uniform(0, strength)), 1e-3)
    return _keep_zeros(image, _along_axes(image, [_gaussian(n, deviation) for n in image.shape[1:]]))


def low_resolution(generator: np.random.Generator, image: torch.Tensor, strength: float) -> torch.Tensor:
    """Image (C, Z, Y, X) averaged to between ``1 - strength`` and 1 of its voxels along each axis and brought back.

    Back linearly; zeros stay.
    """
    if strength == 0:
        return image
    shares = generator.uniform(1 - strength, 1, 3)
    counts = [max(1, round(n * share)) for n, share in zip(image.shape[1:], shares, strict=True)]
    matrices = [_there_and_back(n, count) for n, count in zip(image.shape[1:], counts, strict=True)]
    return _keep_zeros(image, _along_axes(image, matrices))


def intensity_quantiles(image: np.ndarray) -> np.ndarray:
    """float32 (C, QUANTILES + 1): each channel's minimum, and quantiles from 0 to 1 of the voxels above it.

    A channel with one value everywhere has it throughout.
    """
    result = np.empty((len(image), QUANTILES + 1), np.float32)
    for channel, row in zip(image, result, strict=True):
        lowest, highest = float(channel.min()), float(channel.max())
        # interpolation may have left values at the minimum a rounding error above it
        inside = channel[channel > lowest + 1e-5 * (highest - lowest)]
        row[0] = lowest
        row[1:] = np.quantile(inside, np.linspace(0, 1, QUANTILES)) if inside.size else lowest
    return result


def matched(image: torch.Tensor, own: np.ndarray, other: np.ndarray) -> torch.Tensor:
    """Image (C, Z, Y, X) with the intensities of another volume: quantile for quantile, linearly between them.

    ``own`` and ``other`` are the :func:`intensity_quantiles` of the image's volume and of the other. Values beyond
    the quantiles go to the outermost; zeros stay. The mapping is read from a table of even steps, which is exact to
    1/4096 of the volume's range. (Milletari et al. 2016 match histograms with another training scan.)
    """
    result = torch.empty_like(image)
    for channel, target, q_own, q_other in zip(image, result, own, other, strict=True):
        lowest, extent = float(q_own[0]), float(q_own[-1] - q_own[0])
        if extent <= 0:
            target.copy_(channel)
            continue
        values = np.interp(np.linspace(lowest, lowest + extent, _TABLE), *_strict(q_own, q_other))
        table = torch.from_numpy(values.astype(np.float32)).to(image.device)
        at = ((channel - lowest) * ((_TABLE - 1) / extent)).clamp_(0, _TABLE - 1)
        below = at.int().clamp_(max=_TABLE - 2)
        low = table.take(below.long())
        step = torch.diff(table).take(below.long())
        torch.addcmul(low, at - below, step, out=target)
    return _keep_zeros(image, result)


def _strict(own: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where several quantiles share one value, the middle of what they map to."""
    values, first, counts = np.unique(own.astype(np.float64), return_index=True, return_counts=True)
    middle = (other.astype(np.float64)[first] + other.astype(np.float64)[first + counts - 1]) / 2
    return values, middle


def _per_channel(image: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, 1, 1, 1).to(image.device)


def _keep_zeros(image: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    return torch.where(image == 0, image, changed)


def _gaussian(n: int, deviation: float) -> np.ndarray:
    """(n, n): row i is a Gaussian around i; rows add up to 1."""
    distance = np.arange(n)[:, None] - np.arange(n)
    weights = np.exp(-0.5 * (distance / deviation) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def _there_and_back(n: int, count: int) -> np.ndarray:
    """(n, n): the mean over ``count`` equal parts of n voxels, and linear interpolation between their centres."""
    edges = np.arange(count + 1) * n / count
    voxels = np.arange(n)
    covered = np.clip(np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels), 0, None)
    there = covered / covered.sum(axis=1, keepdims=True)
    at = np.clip((voxels + 0.5) * count / n - 0.5, 0, count - 1)
    back = np.clip(1 - np.abs(at[:, None] - np.arange(count)), 0, None)
    return back @ there


def _along_axes(image: torch.Tensor, matrices: list[np.ndarray]) -> torch.Tensor:
    """Image (C, Z, Y, X) with one matrix (n, n) applied along each of z, y and x."""
    z, y, x = (torch.from_numpy(matrix.astype(np.float32)).to(image.device) for matrix in matrices)
    c, *shape = image.shape
    rows = torch.matmul(y, image @ x.T)
    return torch.matmul(z, rows.reshape(c, shape[0], -1)).reshape(image.shape)
