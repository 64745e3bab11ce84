"""From a scan's own grid to the network's, and back.

Forward: axes to the canonical order, crop to the foreground, resample, normalise. Back: everything that is needed is
the geometry of the two grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Shape, same_grid, to_canonical
from vnet_core.geometry import resampled as resampled_geometry
from vnet_core.plan import PreprocessPlan
from vnet_core.resample import argmax_labels, coordinates, labels, linear
from vnet_core.volume import Volume, canonical, crop


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
    scan = crop(Volume(normalise(scan.voxels, plan), scan.geometry), start, stop)
    grid = resampled_geometry(scan.geometry, plan.spacing_mm)
    at = coordinates(scan.geometry, grid)
    normal = np.ascontiguousarray(scan.voxels)
    voxels = linear(torch.from_numpy(normal), at).numpy()
    target = None
    if label is not None:
        target = labels(np.ascontiguousarray(crop(canonical(label)[0], start, stop).labels), at)
    return Prepared(np.ascontiguousarray(voxels), target, grid)


def check_label_grid(image: Geometry, label: Geometry) -> None:
    """Raise ScanError ``label.grid`` unless the label's grid is the image's, naming both."""
    if not same_grid(image, label):
        raise ScanError(
            "label.grid",
            f"the label's grid (shape {label.shape}, spacing {_mm(label.spacing_mm)}, origin {_mm(label.origin_mm)}) "
            f"is not the image's (shape {image.shape}, spacing {_mm(image.spacing_mm)}, origin "
            f"{_mm(image.origin_mm)}); export the label on the image's grid",
        )


def _mm(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ") mm"


def foreground_box(voxels: np.ndarray) -> tuple[Shape, Shape]:
    """The smallest box, as (start, stop), outside of which every channel of (C, Z, Y, X) is at its own minimum.

    Raises ScanError ``scan.constant`` when there is no such voxel.
    """
    foreground = np.zeros(voxels.shape[1:], bool)
    for channel in voxels:
        foreground |= channel > channel.min()
    start, stop = [], []
    for axis in range(3):
        rows = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        if len(rows) == 0:
            raise ScanError("scan.constant", f"all voxels have the value {voxels.flat[0]}; the scan holds no image")
        start.append(int(rows[0]))
        stop.append(int(rows[-1]) + 1)
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def normalise(voxels: np.ndarray, plan: PreprocessPlan) -> np.ndarray:
    """float32 (C, Z, Y, X) on the plan's intensity scale; statistics in float64, channel by channel.

    `zscore` uses the voxels above the channel's minimum, which leaves out a padded or masked border.
    """
    result = np.empty(voxels.shape, np.float32)
    for channel, (source, target) in enumerate(zip(voxels, result, strict=True)):
        if plan.intensity == "window":
            lower, upper = plan.window
            np.clip(source, lower, upper, out=target, casting="unsafe")
            target -= (lower + upper) / 2
            target /= (upper - lower) / 2
            continue
        inside = source[source > source.min()].astype(np.float64)
        if inside.size == 0 or (deviation := float(inside.std())) == 0.0:
            if inside.size == 0:
                raise ScanError(
                    "scan.constant", f"channel {channel} has the value {source.flat[0]} everywhere; it holds no image"
                )
            deviation = 1.0  # two values only: a mask-like image keeps its step of one
        target[...] = (source.astype(np.float64) - inside.mean()) / deviation
    return result


def restore(logits: torch.Tensor, network_grid: Geometry, scan_grid: Geometry) -> np.ndarray:
    """Classes (Z, Y, X), uint8 or uint16, on a scan's own grid, from outputs (K, Z, Y, X) on the network's grid.

    Voxels that were cropped away are background.
    """
    reorientation, canonical_grid = to_canonical(scan_grid)
    classes = argmax_labels(logits, coordinates(network_grid, canonical_grid))
    return np.ascontiguousarray(reorientation.undo(classes))
