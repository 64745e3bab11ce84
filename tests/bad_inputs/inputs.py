"""What one input of the catalogue is: how it is made, what it holds in truth, and the verdict that it deserves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.spatial.transform import Rotation

from vnet_core.geometry import Geometry, matrix_of
from vnet_core.plan import Label

Kind = Literal["sound", "bad", "unsuitable"]
"""`sound`: every voxel and its place can be known. `bad`: damaged, contradictory or a trap. `unsuitable`: an honest
file that is not one volume of one finite grey value per voxel on a grid with right angles in mm, so that opening it is
no fault of a general reader."""

SEED = 20261122


@dataclass(frozen=True, slots=True)
class Truth:
    """What a reader must give for a case that can be used."""

    voxels: np.ndarray
    """(Z, Y, X)"""
    geometry: Geometry
    tolerance: float = 0.0
    """Largest difference of a voxel: 0, but for lossy compression."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """One row of the catalogue."""

    number: str
    title: str
    what: str
    kind: Kind
    expected: tuple[str, ...]
    """The verdict of every case in the order of the cases' ids: accepted, warned:<codes> or refused:<code>."""
    make: Callable[[Path], tuple[Truth, ...]]
    """Writes the input into an empty folder; the truth of each usable case, in the order of the cases' ids."""
    source: str = "."
    """What is ingested, relative to the folder."""
    opens: str = ""
    """What a stock reader is given, relative to the folder: a file, or a folder of DICOM slices. Empty: nothing."""
    labels: tuple[Label, ...] = ()
    """The labels that the caller of the ingest names."""
    during: Callable[[Path], AbstractContextManager[None]] | None = None
    """What goes on around the folder while it is read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reader made of an input."""

    verdicts: tuple[str, ...]
    """Of ours: of each case, sorted. Of another reader one word: opens, refuses, crashes or hangs."""
    right: bool | None = None
    """Whether values and places are the true ones; None where nothing can be used."""
    note: str = ""
    """What is not right, and our messages."""


def random(shape: tuple[int, ...], low: int = 0, high: int = 2000) -> np.ndarray:
    """Whole numbers from the seed, int16."""
    return np.random.default_rng(SEED).integers(low, high, shape).astype(np.int16)


def smooth(shape: tuple[int, int, int]) -> np.ndarray:
    """0 to 255 without edges, which lossy compression keeps within a few steps, int16."""
    z, y, x = np.indices(shape)
    return np.round(127 + 120 * np.sin(y / 6 + z / 4) * np.cos(x / 7)).astype(np.int16)


AXIAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float)
"""Columns: array axes z, y, x; rows: world x, y, z (LPS)."""
OBLIQUE = Rotation.from_euler("zyx", [12, -7, 20], degrees=True).as_matrix() @ AXIAL


def grid(
    shape: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, float, float] = (-30.5, 12.25, 101.0),
    direction: np.ndarray = AXIAL,
) -> Geometry:
    """A geometry in the program's own terms, from numbers that the generators write by other means."""
    z, y, x = shape
    return Geometry((z, y, x), spacing_mm, origin_mm, matrix_of(direction))
