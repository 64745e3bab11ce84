"""Voxels together with where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Reorientation, Shape, cropped, to_canonical

SLAB_VOXELS = 1 << 20
"""Voxels of a volume that are looked at together while something is found of all of them."""


class Voxels(Protocol):
    """An array in memory, or in a store of which a part is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along every axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    def __getitem__(self, region: slice | tuple[slice, ...], /) -> np.ndarray:
        """A part."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Voxels (C, Z, Y, X) of any numeric dtype on a :class:`Geometry`; a label map has one channel of integers."""

    voxels: np.ndarray
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.voxels.ndim != 4 or self.voxels.shape[1:] != self.geometry.shape:
            raise ScanError(
                "scan.shape",
                f"voxels of shape {self.voxels.shape} do not fit (channels, *{self.geometry.shape})",
            )

    @property
    def labels(self) -> np.ndarray:
        """The single channel (Z, Y, X) of a label map."""
        assert self.voxels.shape[0] == 1
        return self.voxels[0]


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One channel as it was read, and what there is to know of it."""

    volume: Volume
    """(1, Z, Y, X)"""
    warnings: tuple[str, ...] = ()
    """Codes of what was noted while reading; :mod:`vnet_core.codes` explains them."""
    frame: str = ""
    """Digest of the frame of reference, where the source names one: channels of two frames cannot be laid over one
    another by their coordinates."""
    burnt_in: bool = False
    """Whether text may be burnt into the pixels, so that no picture may be made of them."""


def slabs_of(shape: Sequence[int]) -> Iterator[slice]:
    """Planes along the first of three axes, at most ``SLAB_VOXELS`` at a time where one plane has no more; they follow
    from the shape alone, so that sums over them do too."""
    step = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def canonical(volume: Volume) -> tuple[Volume, Reorientation]:
    """The volume with axes nearest to head, back and left (a view, nothing interpolated), and the way back."""
    reorientation, geometry = to_canonical(volume.geometry)
    return Volume(reorientation.apply(volume.voxels), geometry), reorientation


def crop(volume: Volume, start: tuple[int, int, int], stop: tuple[int, int, int]) -> Volume:
    """The voxels ``start <= (z, y, x) < stop``, a view."""
    window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return Volume(volume.voxels[(slice(None), *window)], cropped(volume.geometry, start, stop))


def foreground_box(voxels: np.ndarray) -> tuple[Shape, Shape]:
    """The smallest box, as (start, stop), outside of which every channel of (C, Z, Y, X) is at its own minimum.

    Raises ScanError ``scan.constant`` when there is no such voxel.
    """
    lowest = [channel.min() for channel in voxels]
    along = [np.zeros(n, bool) for n in voxels.shape[1:]]
    for planes in slabs_of(voxels.shape[1:]):
        foreground = np.zeros((planes.stop - planes.start, *voxels.shape[2:]), bool)
        for channel, low in zip(voxels, lowest, strict=True):
            foreground |= channel[planes] > low
        along[0][planes] = foreground.any(axis=(1, 2))
        along[1] |= foreground.any(axis=(0, 2))
        along[2] |= foreground.any(axis=(0, 1))
    start, stop = [], []
    for found in along:
        rows = np.flatnonzero(found)
        if len(rows) == 0:
            raise ScanError("scan.constant", f"all voxels have the value {voxels.flat[0]}; the scan holds no image")
        start.append(int(rows[0]))
        stop.append(int(rows[-1]) + 1)
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def check_shapes(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> None:
    """Raise ScanError ``metrics.shape`` when two label maps or masks differ in shape."""
    if prediction_ZYX.shape != truth_ZYX.shape:
        raise ScanError(
            "metrics.shape",
            f"the prediction has shape {prediction_ZYX.shape}, the truth {truth_ZYX.shape};"
            " bring both onto one grid first",
        )
