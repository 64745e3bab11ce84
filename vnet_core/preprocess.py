"""From a scan's own grid to the network's, and back.

Forward: axes to the canonical order, crop to the foreground, divide out the bias field, normalise, resample. Back:
everything that is needed is the geometry of the two grids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.bias import log_field
from vnet_core.decide import Decision
from vnet_core.errors import ScanError
from vnet_core.geometry import ANISOTROPIC, Geometry, check_label_grid, to_canonical
from vnet_core.geometry import resampled as resampled_geometry
from vnet_core.resample import averaged, coordinates, decided, labels, nearest, nearest_labels, planes_for
from vnet_core.sections import PreprocessPlan
from vnet_core.volume import Volume, Voxels, canonical, crop, foreground_box, slabs_of

BIAS_MM = 4.0
"""Voxels of the copy on which the bias field is found."""
BIAS_FEWEST = 16
"""But at least so many along each axis, where the scan has them."""
SLAB_COPIES = 8
"""Times that the planes of a slab are held as float32 while they are interpolated along three axes and written."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A case on the network's grid."""

    image: np.ndarray
    """float32 (C, Z, Y, X), normalised."""
    label: np.ndarray | None
    """Label values (Z, Y, X), or None when the case has no label."""
    geometry: Geometry
    """The network's grid: canonical axes, the plan's spacing."""


def prepare(image: Volume, label: Volume | None, plan: PreprocessPlan) -> Prepared:
    """An image (C, Z, Y, X) and perhaps its label (1, Z, Y, X) of the same grid, on the network's grid.

    Errors as :func:`planned`.
    """
    preparation = planned(image, label, plan)
    everything = slice(0, preparation.geometry.shape[0])
    target = None if label is None else preparation.label(everything)
    return Prepared(preparation.image(everything), target, preparation.geometry)


def planned(image: Volume, label: Volume | None, plan: PreprocessPlan) -> Preparation:
    """What must be known of all of an image (C, Z, Y, X), and perhaps its label (1, Z, Y, X) of the same grid, before a
    part of it can be prepared. Without a bias field only slabs are held beside the image.

    Raises ScanError ``label.grid`` when the label lies on another grid and ``scan.constant`` when a channel has one
    value everywhere, so that no intensity scale exists.
    """
    if label is not None:
        check_label_grid(image.geometry, label.geometry)
    scan, _ = canonical(image)
    start, stop = foreground_box(scan.voxels) if plan.crop_foreground else ((0, 0, 0), scan.geometry.shape)
    if plan.bias_field == "n4":
        scan = without_bias(scan)
    scales = tuple(_scale(source, channel, plan) for channel, source in enumerate(scan.voxels))
    scan = crop(scan, start, stop)
    target = None if label is None else crop(canonical(label)[0], start, stop).labels
    return Preparation(scan.voxels, target, scan.geometry, scales, plan)


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """A scan that is brought onto the network's grid, of which any planes along z can be had: each alone has the voxels
    that it has among all, to the last bit. No more of the scan is looked at than it takes."""

    scan: Voxels
    """(C, Z, Y, X), canonical axes, cropped, as stored."""
    labels: Voxels | None
    """(Z, Y, X), on the same grid."""
    scan_grid: Geometry
    scales: tuple[tuple[float, float], ...]
    """Of each channel what is subtracted, and by what it is divided then."""
    plan: PreprocessPlan

    @property
    def geometry(self) -> Geometry:
        """The network's grid."""
        return resampled_geometry(self.scan_grid, self.plan.spacing_mm)

    def image(self, planes: slice) -> np.ndarray:
        """Planes (C, n, Y, X) of the image, float32, normalised."""
        at, step = coordinates(self.scan_grid, self.geometry), self._step()
        if self.plan.interpolation == "anisotropic":
            spacing = self.scan_grid.spacing_mm
            for axis in range(3):
                if spacing[axis] > ANISOTROPIC * min(spacing):
                    at, step[axis] = nearest(at, axis), 1.0
        part = planes_for(at, step, self.scan_grid.shape[0], planes)
        values = torch.from_numpy(_scaled(self.scan[:, part.held], self.scales, self.plan))
        return np.ascontiguousarray(averaged(values, at, step, part).numpy())

    def label(self, planes: slice) -> np.ndarray:
        """Planes (n, Y, X) of the label map."""
        assert self.labels is not None, "a case without a label has none"
        at = coordinates(self.scan_grid, self.geometry)
        if self.plan.label_interpolation == "nearest":
            return nearest_labels(self.labels, at, planes)
        return labels(self.labels, at, planes)

    def planes_within(self, limit_bytes: int) -> int:
        """Planes that can be had at once within a limit of memory, at least one."""
        _, y, x = self.scan_grid.shape
        _, target_y, target_x = self.geometry.shape
        per_plane = SLAB_COPIES * 4 * self.scan.shape[0] * max(y * x, target_y * target_x)
        return max(1, int(limit_bytes / (per_plane * max(1.0, self._step()[0]))))

    def _step(self) -> list[float]:
        """Distance of target voxels along (z, y, x) in source voxels."""
        return [new / old for new, old in zip(self.plan.spacing_mm, self.scan_grid.spacing_mm, strict=True)]


def without_bias(scan: Volume) -> Volume:
    """The scan with the slow intensity field of every channel divided out (N4), float32; the field's mean is 1.

    The field is found on a copy of ``BIAS_MM`` voxels, in the voxels above Otsu's threshold, and evaluated at every
    voxel. Where a channel has negative values the field multiplies what lies above its minimum.
    """
    geometry = scan.geometry
    extents = np.multiply(geometry.shape, geometry.spacing_mm)
    counts = np.minimum(geometry.shape, np.maximum(np.round(extents / BIAS_MM), BIAS_FEWEST))
    spacing = extents / counts
    coarse = resampled_geometry(geometry, (spacing[0], spacing[1], spacing[2]))
    at = coordinates(geometry, coarse)
    step = [new / old for new, old in zip(coarse.spacing_mm, geometry.spacing_mm, strict=True)]
    places = coordinates(coarse, geometry)
    result = np.empty(scan.voxels.shape, np.float32)
    for source, target in zip(scan.voxels, result, strict=True):
        target[...] = source
        floor = min(0.0, float(target.min()))
        target -= floor
        values = torch.from_numpy(target)
        # the mean of what is bright in a voxel: with air in it, the rim would look like a fall of the field
        bright = (values > _otsu(averaged(values, at, step).numpy())).float()
        share = averaged(bright, at, step)
        small = averaged(values * bright, at, step) / share.clamp(min=0.5)
        target /= np.exp(log_field(small.numpy(), share.numpy() >= 0.5, places))
        target += floor
    return Volume(result, geometry)


def _otsu(values: np.ndarray) -> float:
    """The threshold that parts the histogram with the largest variance between its two sides (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(between[:-1], nan=-1.0).argmax())])


def normalise(voxels: np.ndarray, plan: PreprocessPlan) -> np.ndarray:
    """float32 (C, Z, Y, X) on the plan's intensity scale; statistics in float64, channel by channel.

    `zscore` uses the voxels above the channel's minimum, which leaves out a padded or masked border. Raises ScanError
    ``scan.constant`` where a scale needs two values and a channel has one.
    """
    return _scaled(voxels, [_scale(source, channel, plan) for channel, source in enumerate(voxels)], plan)


def _scaled(voxels: np.ndarray, scales: Sequence[tuple[float, float]], plan: PreprocessPlan) -> np.ndarray:
    result = np.empty(voxels.shape, np.float32)
    for source, target, (offset, scale) in zip(voxels, result, scales, strict=True):
        if plan.intensity in ("window", "percentiles"):
            np.clip(source, *plan.window, out=target, casting="unsafe")
            target -= offset
            target /= scale
        else:
            for planes in slabs_of(source.shape):
                target[planes] = (source[planes].astype(np.float64) - offset) / scale
    return result


def _scale(source: np.ndarray, channel: int, plan: PreprocessPlan) -> tuple[float, float]:
    """What is subtracted from a channel (Z, Y, X), and by what it is divided then."""
    lower, upper = plan.window
    if plan.intensity == "window":
        return (lower + upper) / 2, (upper - lower) / 2
    if plan.intensity == "percentiles":
        return plan.mean, plan.deviation
    lowest, highest = float(source.min()), float(source.max())
    if lowest == highest:
        raise ScanError(
            "scan.constant", f"channel {channel} has the value {source.flat[0]} everywhere; it holds no image"
        )
    if plan.intensity == "range":
        return lowest, highest - lowest
    mean, deviation = _mean_and_deviation(source)
    # two values only: a mask-like image keeps its step of one
    return mean, deviation or 1.0


def _mean_and_deviation(source: np.ndarray) -> tuple[float, float]:
    """Of the voxels (Z, Y, X) above the lowest, slab by slab."""
    lowest = source.min()

    def inside() -> Iterator[np.ndarray]:
        for planes in slabs_of(source.shape):
            slab = source[planes]
            yield slab[slab > lowest].astype(np.float64)

    count, total = 0, 0.0
    for values in inside():
        count, total = count + values.size, total + float(values.sum())
    mean = total / count
    return mean, math.sqrt(sum(float(np.square(values - mean).sum()) for values in inside()) / count)


def restore(logits: torch.Tensor, network_grid: Geometry, scan_grid: Geometry, decide: Decision) -> np.ndarray:
    """Classes (Z, Y, X), uint8 or uint16, on a scan's own grid, from outputs (K, Z, Y, X) on the network's grid.

    Voxels that were cropped away are background.
    """
    reorientation, canonical_grid = to_canonical(scan_grid)
    classes = decided(logits, coordinates(network_grid, canonical_grid), decide)
    return np.ascontiguousarray(reorientation.undo(classes))
