"""The slices of DICOM files: one :class:`Frame` per image plane, from the header of a single-frame file or from the
functional groups of an enhanced one (PS3.3 C.7.6.16).

A frame with a ``problem`` cannot be used, and neither can the series that it belongs to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import ORTHONORMAL_TOLERANCE
from workers.dicom.elements import PYDICOM_FAULTS, Elements, corrupt, decimals, quiet_pydicom, shown
from workers.dicom.headers import KEPT
from workers.dicom.slices import UID, Frame, Marks, SliceKind, usual_uid
from workers.formats.headers import MAX_VOXELS

_ROOT = "1.2.840.10008."
_SET_ASIDE = (
    # SOP classes (PS3.4 B.5) and what they are counted as; the first that fits counts
    ("1.3.10", "dicomdir"),
    ("5.1.4.1.1.66.4", "segmentation"), ("5.1.4.1.1.66.7", "segmentation"), ("5.1.4.1.1.481.3", "structure-set"),
    ("5.1.4.1.1.481.", "radiotherapy"), ("5.1.4.1.1.9.", "waveform"), ("5.1.4.1.1.11.", "presentation-state"),
    ("5.1.4.1.1.88.", "report"), ("5.1.4.1.1.104.", "document"), ("5.1.4.1.1.3.", "ultrasound"),
    ("5.1.4.1.1.6.", "ultrasound"), ("5.1.4.1.1.77.", "photograph"), ("5.1.4.1.1.1.", "projection"),
    ("5.1.4.1.1.12.", "projection"), ("5.1.4.1.1.4.2.", "other"), ("5.1.4.1.1.66.", "other"),
    ("5.1.4.1.1.67.", "other"),
)  # fmt: skip
_IMAGES = ("5.1.4.1.1.2.", "5.1.4.1.1.4.", "5.1.4.1.1.128.", "5.1.4.1.1.130.", "5.1.4.1.1.20.", "5.1.4.1.1.13.1.")
"""CT, MR, PET, nuclear medicine, tomography: a file of these without pixels is damaged."""
_SECONDARY_CAPTURE = _ROOT + "5.1.4.1.1.7"
DECODED_SYNTAXES = frozenset(
    _ROOT + "1.2" + end
    for end in (
        "", ".1", ".2", ".1.99", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91",
        ".4.201", ".4.202", ".4.203",
    )
)  # fmt: skip
"""Implicit and explicit little endian, big endian, deflated, RLE; JPEG baseline, extended and lossless, JPEG-LS,
JPEG 2000 and its high-throughput form."""
_COMPONENTS = ("MAGNITUDE", "PHASE", "REAL", "IMAGINARY")
_DATE, _TIME = re.compile(r"\d{8}"), re.compile(r"(\d\d)(\d\d)(\d\d)(\.\d{1,6})?")


@lru_cache(maxsize=4096)
def _shared(value: Any) -> Any:
    return value


def reason_aside(found: Elements) -> str:
    """Why the file holds no slice of a scan, as a word to be counted under; '' for a slice."""
    sop_class = found.text(0x00080016) or found.text(0x00020002)
    if sop_class == _SECONDARY_CAPTURE or sop_class.startswith(_SECONDARY_CAPTURE + "."):
        if 0x00200032 not in found.values:
            return "secondary-capture"
        return "colour" if _colour(found) else ""
    for start, reason in _SET_ASIDE:
        if (sop_class + ".").startswith(_ROOT + start) if sop_class else False:
            return reason
    image = (sop_class + ".").startswith(tuple(_ROOT + start for start in _IMAGES))
    if found.problem is None and found.pixels is None and not image:
        return "other"
    return ""


def _colour(found: Elements) -> bool:
    grey = found.text(0x00280004) in ("MONOCHROME1", "MONOCHROME2", "")
    return found.integer(0x00280002, 1) != 1 or not grey


def frames_of(found: Elements) -> Iterator[Frame]:
    """The image planes of a file that :func:`reason_aside` gives no reason for."""
    values = found.values
    count = int(found.number(0x00280008) or 0) if found.text(0x00280008) else 1
    kind, marks = _kind(found), _marks(found)
    problem = found.problem or _pixel_problem(found, kind, count)
    if 0x52009230 in values and problem is None:
        yield from _functional(found, kind, marks, count)
        return
    if count != 1 and problem is None:
        problem = ScanError(
            "dicom.multiframe",
            f"one file holds {count} frames and does not say where each lies; convert it to NIfTI",
        )
    if 0x00283000 in values and problem is None:
        problem = ScanError(
            "dicom.modality-lut", "the values of a slice go through a table of its own; export it with a plain rescale"
        )
    yield _frame(found, 0, kind, marks, found.numbers(0x00200032), _rescale(found), count, problem)


def _frame(
    found: Elements,
    index: int,
    kind: SliceKind,
    marks: Marks,
    position: tuple[float, ...],
    rescale: tuple[float | None, float | None],
    count: int,
    problem: ScanError | None,
) -> Frame:
    problem = problem or _geometry_problem(kind, position)
    slope = 1.0 if rescale[0] is None else rescale[0]
    intercept = 0.0 if rescale[1] is None else rescale[1]
    if problem is None and not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
        problem = ScanError(
            "scan.header", f"rescale slope {slope} and intercept {intercept} give no values; correct the header"
        )
    if problem is None and not kind.colour and kind.mosaic:
        problem = ScanError(
            "dicom.mosaic", "slices are tiled within one image (Siemens mosaic); convert the series to NIfTI"
        )
    return Frame(
        found.path, index, found.text(0x00080018), kind, marks, position, slope, intercept,
        rescale != (None, None), count, found.pixels, problem
    )  # fmt: skip


def _rescale(found: Elements) -> tuple[float | None, float | None]:
    """Slope and intercept; None for what is not there, NaN for what is there and no number."""
    tags = (0x00281053, 0x00281052)
    slope, intercept = (_or(found.number(tag), math.nan) if found.text(tag) else None for tag in tags)
    return slope, intercept


_KIND_TAGS = tuple(
    tag
    for tag in sorted(KEPT)
    if tag >> 16 in (0x0028, 0x0010)
    or tag in (0x00080005, 0x00080008, 0x00080016, 0x00080060, 0x0008103E, 0x00181210)
    or tag in (0x0020000D, 0x0020000E, 0x00200037, 0x00200052)
)


def _kind(found: Elements) -> SliceKind:
    return _kind_of(found.syntax, tuple(found.values.get(tag) for tag in _KIND_TAGS))


@lru_cache(maxsize=1024)
def _kind_of(syntax: str, raw: tuple[bytes | None, ...]) -> SliceKind:
    values = {tag: value for tag, value in zip(_KIND_TAGS, raw, strict=True) if value is not None}
    found = Elements(Path(), syntax, values)
    sop_class = found.text(0x00080016)
    image_type = found.text(0x00080008).upper().split("\\")
    capture = sop_class.startswith(_SECONDARY_CAPTURE)
    bits = found.integer(0x00280100)
    return SliceKind(
        patient=found.text(0x00100020),
        study=usual_uid(found.text(0x0020000D)) if 0x0020000D in found.values else "",
        series=usual_uid(found.text(0x0020000E)) if found.text(0x0020000E) else "none",
        frame_of_reference=found.text(0x00200052),
        modality=found.text(0x00080060),
        description=_decoded(found.values.get(0x0008103E, b""), found.text(0x00080005)),
        kernel=found.text(0x00181210),
        secondary_capture=capture,
        colour=_colour(found),
        localiser="LOCALIZER" in image_type,
        mosaic="MOSAIC" in image_type,
        burnt_in=capture or found.text(0x00280301).upper() == "YES",
        inverted=found.text(0x00280004) == "MONOCHROME1",
        shape=(found.integer(0x00280010), found.integer(0x00280011)),
        axes=found.numbers(0x00200037),
        pixel_mm=found.numbers(0x00280030),
        bits=(
            bits,
            found.integer(0x00280101, bits),
            found.integer(0x00280102, bits - 1),
            found.integer(0x00280103) == 1,
        ),
        syntax=syntax,
    )


@lru_cache(maxsize=1024)
def _decoded(value: bytes, character_set: str) -> str:
    """Text in the character set of the file (PS3.5 section 6.1)."""
    if value.isascii() and b"\x1b" not in value:
        return shown(value)
    from pydicom.charset import convert_encodings, decode_bytes

    try:
        with quiet_pydicom():
            encodings = convert_encodings(character_set.split("\\"))
            return decode_bytes(value, encodings, {0x5C}).strip("\0 ")
    except (*PYDICOM_FAULTS, LookupError):
        return shown(value)


def _marks(found: Elements) -> Marks:
    image_type = found.text(0x00080008).upper().split("\\")
    component = found.text(0x00089208).upper()
    b_value = next(iter(found.reals(0x00189087)), None)
    if b_value is None and found.text(0x00190010) == "SIEMENS MR HEADER":
        b_value = found.number(0x0019100C)
    if b_value is None and found.text(0x00430010) == "GEMS_PARM_01":
        b_value = found.number(0x00431039)
    echo = found.number(0x00180086)
    return _shared(
        Marks(
            component=component if component in _COMPONENTS else "\\".join(image_type[2:]),
            echo=found.number(0x00180081) if echo is None else echo,
            b_value=b_value,
            gradient=found.reals(0x00189089),
            inversion_ms=found.number(0x00180082),
            time_point=found.number(0x00200100),
            phase=next(iter(found.reals(0x00209241, "f")), None),
            trigger_ms=found.number(0x00181060),
            frame_ms=found.number(0x00541300),
            acquisition=found.number(0x00200012),
            acquired=_acquired(found),
        )
    )


def _acquired(found: Elements) -> str:
    stamp = found.text(0x0008002A)
    if not stamp:
        pairs = ((0x00080022, 0x00080032), (0x00080021, 0x00080031), (0x00080020, 0x00080030))
        stamp = next((found.text(d) + found.text(t) for d, t in pairs if _DATE.match(found.text(d))), "")
    return _iso(stamp)


def _iso(stamp: str) -> str:
    if not _DATE.match(stamp):
        return ""
    iso = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}"
    time = _TIME.match(stamp[8:])
    return iso + ("T{}:{}:{}{}".format(*time.groups(default="")) if time else "")


def _pixel_problem(found: Elements, kind: SliceKind, count: int) -> ScanError | None:
    """What is wrong with the pixels by the header alone: kind, limits and bytes, in this order."""
    rows, columns = kind.shape
    allocated, stored, high, _ = kind.bits
    if kind.colour:
        return ScanError("scan.dtype", "the slices are colour images; one grey value per voxel is read")
    if found.pixels is None:
        return corrupt("a slice has no pixel data")
    if rows < 1 or columns < 1 or not 1 <= count < 1 << 31:
        return ScanError("scan.empty", f"a slice declares {count} frames of {rows} x {columns} pixels; nothing to read")
    if rows * columns * count > MAX_VOXELS:
        return ScanError(
            "scan.too-large", f"{count} frames of {rows} x {columns} pixels exceed {MAX_VOXELS} voxels; crop them"
        )
    widths = {"integer": (8, 16, 32), "float": (32,), "double": (64,)}[found.pixels.kind]
    if allocated not in widths or (found.pixels.kind == "integer" and not 1 <= stored <= high + 1 <= allocated):
        return ScanError(
            "scan.dtype",
            f"{allocated} bits allocated, {stored} stored, high bit {high}: 8, 16 or 32 bits per voxel are read",
        )
    expected = rows * columns * count * allocated // 8
    if not found.pixels.encapsulated and not expected <= found.pixels.length <= expected + 1:
        return corrupt(f"the pixel data of a slice are {found.pixels.length} bytes, its header declares {expected}")
    return _syntax_problem(found.syntax)


def _syntax_problem(syntax: str) -> ScanError | None:
    if syntax in DECODED_SYNTAXES:
        return None
    # a UID that DICOM has not registered may be anything, a number of the patient too
    told = syntax if syntax.startswith(_ROOT) and UID.match(syntax) else "a private one"
    return ScanError(
        "dicom.transfer-syntax",
        f"the transfer syntax {told} is not decoded; export the series uncompressed, or as JPEG 2000 or RLE",
    )


def _geometry_problem(kind: SliceKind, position: tuple[float, ...]) -> ScanError | None:
    axes, pixel = kind.axes, kind.pixel_mm
    numbers = [*position, *axes, *pixel]
    if (len(position), len(axes), len(pixel)) != (3, 6, 2) or not all(map(math.isfinite, numbers)):
        return ScanError(
            "dicom.missing-geometry", "a slice lacks position, orientation or pixel spacing; export the series again"
        )
    if min(pixel) <= 0:
        return ScanError("geometry.spacing", f"pixel spacing {list(pixel)} mm is not positive; export the series again")
    skew = _skew(axes)
    if skew > ORTHONORMAL_TOLERANCE:
        return ScanError(
            "geometry.not-orthonormal",
            f"orientation vectors deviate from orthonormal by {skew:.4f} (at most {ORTHONORMAL_TOLERANCE});"
            " export the series again",
        )
    return None


@lru_cache(maxsize=1024)
def _skew(axes: tuple[float, ...]) -> float:
    directions = np.reshape(axes, (2, 3))
    return float(np.abs(directions @ directions.T - np.eye(2)).max())


# --- enhanced multi-frame files


def _functional(found: Elements, kind: SliceKind, marks: Marks, count: int) -> Iterator[Frame]:
    """One frame per item of the per-frame functional groups; what an item lacks is taken from the shared ones."""
    import pydicom

    tags = [0x52009229, 0x52009230]
    try:
        with quiet_pydicom():
            data = pydicom.dcmread(found.path, stop_before_pixels=True, specific_tags=tags, force=True)
            shared = next(iter(data.get("SharedFunctionalGroupsSequence") or []), pydicom.Dataset())
            groups = [_Groups(item, shared) for item in data.get("PerFrameFunctionalGroupsSequence") or []]
            frames = [_functional_frame(found, i, g, kind, marks, count) for i, g in enumerate(groups)]
        if len(frames) != count:
            problem = corrupt(f"a file declares {count} frames and describes {len(frames)}")
            frames = [_frame(found, 0, kind, marks, (), (1.0, 0.0), count, problem)]
    except PYDICOM_FAULTS:
        frames = [_frame(found, 0, kind, marks, (), (1.0, 0.0), count, corrupt("the frames are described wrongly"))]
    yield from frames


def _or(value: float | None, other: float | None) -> float | None:
    return other if value is None else value


class _Groups:
    """The functional groups of one frame."""

    def __init__(self, own: Any, shared: Any) -> None:
        self._sources = (own, shared)

    def text(self, group: str, element: str) -> bytes:
        """An element of a group as it would stand in a single-frame file."""
        for source in self._sources:
            items = source.get(group)
            value = items[0].get(element) if items else None
            if value is not None:
                many = value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
                return "\\".join(map(str, many)).encode("latin-1", "replace")
        return b""

    def numbers(self, group: str, element: str) -> tuple[float, ...]:
        return decimals(self.text(group, element))

    def number(self, group: str, element: str) -> float | None:
        return next(iter(self.numbers(group, element)), None)

    def gradient(self) -> tuple[float, ...]:
        for source in self._sources:
            for name in ("MRDiffusionSequence", "DiffusionGradientDirectionSequence"):
                items = source.get(name) if source is not None else None
                source = items[0] if items else None
            if source is not None and source.get("DiffusionGradientOrientation") is not None:
                return tuple(map(float, source.DiffusionGradientOrientation))
        return ()


def _functional_frame(found: Elements, index: int, groups: _Groups, kind: SliceKind, marks: Marks, count: int) -> Frame:
    type_groups = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
    image_type = next((t for t in (shown(groups.text(g, "FrameType")) for g in type_groups) if t), "").upper()
    component = shown(groups.text("MRImageFrameTypeSequence", "ComplexImageComponent")).upper()
    own_kind = replace(
        kind,
        axes=groups.numbers("PlaneOrientationSequence", "ImageOrientationPatient") or kind.axes,
        pixel_mm=groups.numbers("PixelMeasuresSequence", "PixelSpacing") or kind.pixel_mm,
        localiser=kind.localiser or "LOCALIZER" in image_type.split("\\"),
    )
    acquired = shown(groups.text("FrameContentSequence", "FrameAcquisitionDateTime"))
    own_marks = replace(
        marks,
        stack=shown(groups.text("FrameContentSequence", "StackID")),
        component=component if component in _COMPONENTS else "\\".join(image_type.split("\\")[2:]),
        echo=_or(groups.number("MREchoSequence", "EffectiveEchoTime"), marks.echo),
        b_value=_or(groups.number("MRDiffusionSequence", "DiffusionBValue"), marks.b_value),
        gradient=groups.gradient() or marks.gradient,
        inversion_ms=_or(groups.number("MRModifierSequence", "InversionTimes"), marks.inversion_ms),
        time_point=_or(groups.number("FrameContentSequence", "TemporalPositionIndex"), marks.time_point),
        phase=_or(groups.number("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"), marks.phase),
        trigger_ms=_or(groups.number("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"), None),
        acquisition=_or(groups.number("FrameContentSequence", "FrameAcquisitionNumber"), marks.acquisition),
        acquired=_iso(acquired) or marks.acquired,
    )
    slope = groups.number("PixelValueTransformationSequence", "RescaleSlope")
    intercept = groups.number("PixelValueTransformationSequence", "RescaleIntercept")
    before = _rescale(found)
    rescale = (_or(slope, before[0]), _or(intercept, before[1]))
    position = groups.numbers("PlanePositionSequence", "ImagePositionPatient")
    return _frame(found, index, _shared(own_kind), _shared(own_marks), position, rescale, count, None)
