"""The slow intensity field of MR scans, found by N4 (Tustison et al. 2010) and divided out.

N4 alternates between two steps on the logarithm of the intensities: sharpen their histogram (Sled et al. 1998), and
fit a cubic B-spline to what the sharpening moved. On a regular grid the fit of Lee et al. (1997) is a product of one
sum per axis, so it is written that way here; every sum runs in one order, whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from vnet_core.deformation import spline_weights

LEVELS = 4
"""The field has 1, 2, 4, ... cells along each axis, one level after the other."""
ITERATIONS = 50
"""At each level, at most."""
CONVERGED = 1e-3
"""A level ends when the field's change has a coefficient of variation below this."""
BINS = 200
"""Of the histogram."""
BLUR = 0.15
"""Full width at half maximum of the Gaussian that the field is taken to have put on the histogram (log intensity)."""
WIENER_NOISE = 0.01
"""Of the filter that takes it away."""
FEWEST_VOXELS = 64
"""With fewer in the mask there is nothing to fit."""

Weights = tuple[sparse.csr_array, sparse.csr_array, sparse.csr_array]


def log_field(image: np.ndarray, mask: np.ndarray, places: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """The logarithm of the field at ``places``, float32 (len(z), len(y), len(x)), mean 0 over the mask.

    ``image`` (Z, Y, X) is small: it holds all that the field is found from, in the voxels of ``mask`` where it is
    positive. ``places`` are voxel indices of it along (z, y, x); those beyond its edge get the edge's value. All zeros
    where the mask has fewer than 64 voxels, or one intensity.
    """
    mask = mask & (image > 0)
    logs = np.log(np.where(mask, image, 1.0).astype(np.float64))
    inside = logs[mask]
    if inside.size < FEWEST_VOXELS or np.ptp(inside) < 1e-6:
        return np.zeros(tuple(len(at) for at in places), np.float32)
    rows, columns = [], []
    field = np.zeros(image.shape)
    for level in range(LEVELS):
        cells = tuple(min(2**level, max(1, n // 4)) for n in image.shape)
        own = _weights(image.shape, cells, tuple(np.arange(n) for n in image.shape))
        control = np.zeros([n + 3 for n in cells])
        fit = _Fit(own, mask)
        for _ in range(ITERATIONS):
            corrected = (logs - field)[mask]
            step = np.zeros(image.shape)
            step[mask] = corrected - _sharpened(corrected)
            change = fit(step)
            control += change
            moved = _evaluate(change, own)
            field += moved
            ratio = np.exp(moved[mask])
            if ratio.std() / ratio.mean() < CONVERGED:
                break
        z, y, x = _weights(image.shape, cells, places)
        rows.append(_along(y, _along(z, control, 0), 1))
        columns.append(x)
    # the levels add up: their control points along x stand side by side
    result = _along(sparse.hstack(columns).tocsr(), np.concatenate(rows, axis=2), 2)
    return (result - field[mask].mean()).astype(np.float32)


def _weights(shape: tuple[int, ...], cells: tuple[int, ...], places: tuple[np.ndarray, ...]) -> Weights:
    """Per axis the shares (places, control points) of a cubic B-spline of ``cells`` over ``shape`` voxels."""
    z, y, x = (
        sparse.csr_array(spline_weights(np.clip((at + 0.5) * m / n, 0, m), m + 3))
        for n, m, at in zip(shape, cells, places, strict=True)
    )
    return z, y, x


def _along(weights: sparse.csr_array, values: np.ndarray, axis: int) -> np.ndarray:
    """Weights (M, N) applied along an axis of N values."""
    moved = np.moveaxis(values, axis, 0)
    product = weights @ moved.reshape(len(moved), -1)
    return np.moveaxis(product.reshape(-1, *moved.shape[1:]), 0, axis)


def _evaluate(control: np.ndarray, weights: Weights) -> np.ndarray:
    """Control points (A, B, C) as values (Z, Y, X)."""
    for axis, weight in enumerate(weights):
        control = _along(weight, control, axis)
    return control


class _Fit:
    """A cubic B-spline near scattered values: every control point is the mean of what its voxels ask of it."""

    def __init__(self, weights: Weights, mask: np.ndarray) -> None:
        z, y, x = weights
        self._cubes: Weights = (z.power(3).T.tocsr(), y.power(3).T.tocsr(), x.power(3).T.tocsr())
        sums = [np.asarray(weight.power(2).sum(axis=1)) for weight in weights]
        self._share = mask / (sums[0][:, None, None] * sums[1][:, None] * sums[2])
        squares: Weights = (z.power(2).T.tocsr(), y.power(2).T.tocsr(), x.power(2).T.tocsr())
        self._total = _evaluate(mask.astype(np.float64), squares)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        asked = _evaluate(values * self._share, self._cubes)
        return np.divide(asked, self._total, out=np.zeros_like(asked), where=self._total > 0)


def _sharpened(values: np.ndarray) -> np.ndarray:
    """What log intensities (N,) would be without the blur of their histogram, on average."""
    lowest, highest = values.min(), values.max()
    width = (highest - lowest) / (BINS - 1)
    if width <= 0:
        return values
    at = (values - lowest) / width
    below = np.minimum(at.astype(int), BINS - 2)
    part = at - below
    padded = 512
    histogram = np.bincount(below, 1 - part, padded) + np.bincount(below + 1, part, padded)
    distance = np.minimum(np.arange(padded), padded - np.arange(padded)) * width
    # with its full width at half maximum
    gaussian = np.exp(-4 * np.log(2) * (distance / BLUR) ** 2)
    gaussian = np.fft.rfft(gaussian / gaussian.sum())
    wiener = gaussian.conj() / (np.abs(gaussian) ** 2 + WIENER_NOISE)
    shifted = np.roll(histogram, (padded - BINS) // 2)
    sharp = np.clip(np.fft.irfft(np.fft.rfft(shifted) * wiener, padded), 0, None)
    centres = lowest + (np.arange(padded) - (padded - BINS) // 2) * width
    weighted = np.fft.irfft(np.fft.rfft(sharp * centres) * gaussian, padded)
    total = np.fft.irfft(np.fft.rfft(sharp) * gaussian, padded)
    expected = np.divide(weighted, total, out=centres.copy(), where=total > 1e-9 * total.max())
    expected = np.roll(expected, -((padded - BINS) // 2))[:BINS]
    return expected[below] * (1 - part) + expected[below + 1] * part
