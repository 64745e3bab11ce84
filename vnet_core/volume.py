"""Voxels together with where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Reorientation, cropped, to_canonical


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


def canonical(volume: Volume) -> tuple[Volume, Reorientation]:
    """The volume with axes nearest to head, back and left (a view, nothing interpolated), and the way back."""
    reorientation, geometry = to_canonical(volume.geometry)
    return Volume(reorientation.apply(volume.voxels), geometry), reorientation


def crop(volume: Volume, start: tuple[int, int, int], stop: tuple[int, int, int]) -> Volume:
    """The voxels ``start <= (z, y, x) < stop``, a view."""
    window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return Volume(volume.voxels[(slice(None), *window)], cropped(volume.geometry, start, stop))
