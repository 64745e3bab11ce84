"""What is kept of one image plane of a DICOM file.

A frame is small, and what it has in common with its neighbours is one shared object, so that a tree of many thousand
slices fits in little memory. None of these tells itself by ``repr``: they hold names and numbers of patients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vnet_core.errors import ScanError
from workers.dicom.elements import PixelBlock

UID = re.compile(r"[0-9.]{1,64}\Z")


def usual_uid(text: str) -> str:
    """The UID where it is one of digits and points, else a digest of it: what a header says may be anything."""
    return text if UID.match(text) else "x" + sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, repr=False)
class SliceKind:
    """What the slices of one series have in common; equal ones are one object."""

    patient: str
    study: str
    series: str
    frame_of_reference: str
    modality: str
    description: str
    kernel: str
    secondary_capture: bool
    colour: bool
    localiser: bool
    mosaic: bool
    burnt_in: bool
    inverted: bool
    """MONOCHROME1: of the display alone, values stay as they are stored."""
    shape: tuple[int, int]
    axes: tuple[float, ...]
    """Unit vectors along a row (growing x) and along a column (growing y); () where there are none."""
    pixel_mm: tuple[float, ...]
    """(y, x); () where there are none."""
    bits: tuple[int, int, int, bool]
    """Allocated, stored, high bit; whether values are signed."""
    syntax: str


@dataclass(frozen=True, slots=True)
class Marks:
    """What may tell slices at one place apart."""

    stack: str = ""
    component: str = ""
    echo: float | None = None
    b_value: float | None = None
    gradient: tuple[float, ...] = ()
    inversion_ms: float | None = None
    time_point: float | None = None
    phase: float | None = None
    trigger_ms: float | None = None
    frame_ms: float | None = None
    acquisition: float | None = None
    acquired: str = ""
    """ISO date and time."""


@dataclass(frozen=True, slots=True, repr=False)
class Frame:
    """One image plane."""

    path: Path
    index: int
    """Among the frames of its file."""
    sop_uid: str
    kind: SliceKind
    marks: Marks
    position_mm: tuple[float, ...]
    """World (x, y, z) of the centre of the first pixel; () where there is none."""
    slope: float
    intercept: float
    rescaled: bool
    """Whether the header gives slope or intercept; else they are 1 and 0."""
    frames: int
    """In its file."""
    pixels: PixelBlock | None
    problem: ScanError | None

    @property
    def key(self) -> tuple[str, str, str]:
        """Patient, study and series."""
        return self.kind.patient, self.kind.study, self.kind.series
