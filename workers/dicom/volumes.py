"""A series of DICOM slices as a volume: its grid from the headers, its voxels, and a tilted gantry undone by policy.

Files are read again here, so that what is used is what lies there now. Slices come in the order of growing position
along the normal (row x column); the origin is the first one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry
from vnet_core.sections import ReadingPlan
from vnet_core.straighten import untilted, untilted_grid
from vnet_core.volume import Scan, Volume
from workers.dicom.elements import NotDicom, corrupt
from workers.dicom.frames import frames_of
from workers.dicom.headers import read_elements
from workers.dicom.pixels import read_values
from workers.dicom.slices import Frame
from workers.dicom.stacks import SLICE_OFF_AXIS, Stack, stacks_of, unit_axes
from workers.dicom.tree import Series
from workers.formats.headers import MAX_VOXELS, Settled, declared_grid, settled


def series_geometry(series: Series, reading: ReadingPlan) -> Geometry:
    """The grid that :func:`read_series` gives, from headers alone; every check that needs no voxel is made."""
    place, shift_mm = _grid(_stack(series).frames, reading)
    geometry = place.geometry
    return geometry if shift_mm is None else _straight_grid(geometry, shift_mm)


def read_series(series: Series, reading: ReadingPlan) -> Scan:
    """One channel (1, Z, Y, X), rescaled slice by slice: the smallest integer type that holds the values, or float64
    where slope or intercept is no whole number; float32 where a tilted gantry was undone.

    Warnings: ``dicom.copies``, ``dicom.localiser``, ``geometry.repaired``, ``dicom.tilt-corrected``,
    ``dicom.burnt-in``. ``ScanError``: ``series.problem``, ``dicom.gantry-tilt``, ``dicom.corrupt-slice``,
    ``geometry.*``.
    """
    stack = _stack(series)
    place, shift_mm = _grid(stack.frames, reading)
    geometry = place.geometry
    warnings = [*series.warnings, *(w for w in stack.warnings if w not in series.warnings), *place.warnings]
    voxels = read_values(stack.frames)
    if shift_mm is None:
        volume = Volume(voxels[None], geometry)
    else:
        _straight_grid(geometry, shift_mm)
        volume = untilted(voxels, geometry, shift_mm)
        warnings.append("dicom.tilt-corrected")
    if series.burnt_in:
        warnings.append("dicom.burnt-in")
    return Scan(volume, tuple(warnings), frame_digest(stack.frames[0].kind.frame_of_reference), series.burnt_in)


def _straight_grid(geometry: Geometry, shift_mm: np.ndarray) -> Geometry:
    """The grid of a series whose tilt is undone, which is larger than its own; refused before it is allocated."""
    grid = untilted_grid(geometry, shift_mm)
    if math.prod(grid.shape) > MAX_VOXELS:
        raise ScanError(
            "scan.too-large",
            f"undoing the tilt takes {math.prod(grid.shape)} voxels, at most {MAX_VOXELS} are read; crop the series",
        )
    return grid


def frame_digest(frame_of_reference: str) -> str:
    """What stands for a frame of reference UID in :attr:`Scan.frame`; '' for ''."""
    return sha256(frame_of_reference.encode()).hexdigest()[:32] if frame_of_reference else ""


def slice_frames(series: Series) -> tuple[Frame, ...]:
    """The frames of the volume in the order of its slices. ``ScanError`` as :func:`series_geometry`."""
    return _stack(series).frames


def _stack(series: Series) -> Stack:
    if series.problem is not None:
        raise series.problem
    frames: list[Frame] = []
    for path in series.files:
        try:
            frames += frames_of(read_elements(path))
        except NotDicom:
            raise corrupt("a slice is no DICOM file any more") from None
    stacks, _ = stacks_of(frames)
    own = stacks if len(stacks) == 1 else [stack for stack in stacks if stack.part == series.part]
    if len(own) != 1 or len(own[0].frames) != series.slices:
        raise corrupt("the files of the series have changed since they were listed")
    problem = own[0].problem
    if problem is not None:
        raise problem
    return own[0]


def _grid(frames: Sequence[Frame], reading: ReadingPlan) -> tuple[Settled, np.ndarray | None]:
    """The grid with the normal of the slices as its axis z, and the shift (y, x) per slice in mm of a tilted gantry."""
    axes = unit_axes(frames[0])
    pixel_mm = frames[0].kind.pixel_mm
    offsets = np.array([f.position_mm for f in frames]) - np.array(frames[0].position_mm)
    along = offsets @ axes[2]
    step_mm = float(along[-1]) / (len(frames) - 1)
    spacing = np.array([pixel_mm[1], pixel_mm[0], step_mm])
    shape = (len(frames), *frames[0].kind.shape)
    place = settled(declared_grid(shape, np.array(frames[0].position_mm), spacing, axes.T), "refuse")
    sideways = offsets @ axes[:2].T
    largest_mm = float(np.linalg.norm(sideways, axis=1).max())
    if largest_mm <= SLICE_OFF_AXIS * min(pixel_mm):
        return place, None
    shift_mm = sideways[-1] / (len(frames) - 1)
    uneven_mm = float(np.linalg.norm(sideways - np.outer(np.arange(len(frames)), shift_mm), axis=1).max())
    if reading.gantry_tilt == "correct" and uneven_mm <= SLICE_OFF_AXIS * min(pixel_mm):
        return place, shift_mm[::-1]
    degrees = np.degrees(np.arctan2(largest_mm, along[-1]))
    raise ScanError(
        "dicom.gantry-tilt",
        f"slices are displaced in their plane by up to {largest_mm:.2f} mm ({degrees:.1f} degrees of tilt, uneven by"
        f" {uneven_mm:.2f} mm); resample the series onto an orthogonal grid, or set reading.gantry_tilt to correct",
    )
