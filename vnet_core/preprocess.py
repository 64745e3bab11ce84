"""From a scan's own grid to the network's, and back.

Forward: axes to the canonical order, crop to the foreground, divide out the bias field, normalise, resample. Back:
everything that is needed is the geometry of the two grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.bias import log_field
from vnet_core.decide import Decision
from vnet_core.errors import ScanError
from vnet_core.geometry import ANISOTROPIC, Geometry, check_label_grid, to_canonical
from vnet_core.geometry import resampled as resampled_geometry
from vnet_core.resample import (
    Coordinates,
    averaged,
    coordinates,
    decided,
    labels,
    nearest,
    nearest_labels,
)
from vnet_core.sections import PreprocessPlan
from vnet_core.volume import Volume, canonical, crop, foreground_box

BIAS_MM = 4.0
"""Voxels of the copy on which the bias field is found."""
BIAS_FEWEST = 16
"""But at least so many along each axis, where the scan has them."""


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

    Raises ScanError ``label.grid`` when the label lies on another grid and ``scan.constant`` when a channel has one
    value everywhere, so that no intensity scale exists.
    """
    if label is not None:
        check_label_grid(image.geometry, label.geometry)
    scan, _ = canonical(image)
    start, stop = foreground_box(scan.voxels) if plan.crop_foreground else ((0, 0, 0), scan.geometry.shape)
    if plan.bias_field == "n4":
        scan = without_bias(scan)
    scan = crop(Volume(normalise(scan.voxels, plan), scan.geometry), start, stop)
    grid = resampled_geometry(scan.geometry, plan.spacing_mm)
    at = coordinates(scan.geometry, grid)
    voxels = _resampled(scan, at, plan)
    target = None
    if label is not None:
        values = np.ascontiguousarray(crop(canonical(label)[0], start, stop).labels)
        target = nearest_labels(values, at) if plan.label_interpolation == "nearest" else labels(values, at)
    return Prepared(voxels, target, grid)


def _resampled(scan: Volume, at: Coordinates, plan: PreprocessPlan) -> np.ndarray:
    """Voxels (C, Z, Y, X), float32, on the plan's spacing."""
    spacing = scan.geometry.spacing_mm
    step = [new / old for new, old in zip(plan.spacing_mm, spacing, strict=True)]
    if plan.interpolation == "anisotropic":
        for axis in range(3):
            if spacing[axis] > ANISOTROPIC * min(spacing):
                at, step[axis] = nearest(at, axis), 1.0
    values = torch.from_numpy(np.ascontiguousarray(scan.voxels))
    return np.ascontiguousarray(averaged(values, at, step).numpy())


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
    result = np.empty(voxels.shape, np.float32)
    for channel, (source, target) in enumerate(zip(voxels, result, strict=True)):
        offset, scale = _scale(source, channel, plan)
        if plan.intensity in ("window", "percentiles"):
            np.clip(source, *plan.window, out=target, casting="unsafe")
            target -= offset
            target /= scale
        else:
            target[...] = (source.astype(np.float64) - offset) / scale
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
    inside = source[source > source.min()].astype(np.float64)
    # two values only: a mask-like image keeps its step of one
    return float(inside.mean()), float(inside.std()) or 1.0


def restore(logits: torch.Tensor, network_grid: Geometry, scan_grid: Geometry, decide: Decision) -> np.ndarray:
    """Classes (Z, Y, X), uint8 or uint16, on a scan's own grid, from outputs (K, Z, Y, X) on the network's grid.

    Voxels that were cropped away are background.
    """
    reorientation, canonical_grid = to_canonical(scan_grid)
    classes = decided(logits, coordinates(network_grid, canonical_grid), decide)
    return np.ascontiguousarray(reorientation.undo(classes))
