"""Slices of one series to volumes: which lie at one place, what tells them apart, and whether they make an even stack.

Rules, in this order. A series that they do not bring to even stacks is refused, with the code of the first that fails:

1. A slice that cannot be read refuses the series.
2. Identical copies (one SOP instance UID, one header, the same pixel bytes) count once: warning ``dicom.copies``.
3. Frames of an enhanced file that name stacks of their own, and slices of several frames of reference, are stacks of
   their own: ``stack-1`` ... A frame of reference that has no even stack of its own is ``dicom.mixed-frame``.
4. One orientation. Other slices are set aside as localisers, warning ``dicom.localiser``, where the slices of one
   orientation are an even stack, each other orientation has fewer slices and at most 3, and none of them lies
   where the stack would go on. Else ``dicom.mixed-orientation``.
5. One size (``dicom.mixed-size``) and one pixel spacing (``dicom.mixed-spacing``).
6. Where slices share a place, they are told apart by the first of these that differs at one place and has each of its
   values at two places or more: component of a complex or Dixon image (``kind-1``), echo (``echo-2``), b-value
   (``b-1000``), gradient direction (``direction-01``), inversion time (``inversion-1``), time point (``time-03``),
   cardiac phase (``phase-02``), trigger time, frame time, acquisition number (``acquisition-2``), acquisition time.
   Times that differ from slice to slice are ranked at each place. What still shares a place is split again; where
   nothing tells slices apart, they are ``dicom.duplicate-slices``, unless whole stacks lie in folders of their own.
   A part with fewer places than its neighbours (but for acquisitions, which may overlap) lacks slices.
7. Even steps along the normal: ``dicom.missing-slices``, ``dicom.nonuniform-spacing``. Tilt is judged when the plan is
   known: see :mod:`workers.dicom.volumes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import ORTHONORMAL_TOLERANCE
from workers.dicom.pixels import same_pixels
from workers.dicom.slices import Frame, Marks
from workers.formats.headers import MAX_VOXELS

STEP_TOLERANCE = 0.01
"""Relative difference of a slice distance from the median that counts as uniform."""
STEP_TOLERANCE_MM = 0.01
SLICE_OFF_AXIS = 0.1
"""Largest displacement of a slice from its even place: in pixels within the plane, in slice distances across it."""
COPY_PIXELS = 0.01
"""Slices nearer than this many pixels lie at one place."""
LOCALISER_SLICES = 3
"""More slices of another orientation are no localiser."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Frames that make one volume, sorted along the normal (row x column) unless there is a problem."""

    frames: tuple[Frame, ...]
    part: str = ""
    warnings: tuple[str, ...] = ()
    problem: ScanError | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    value: Callable[[Marks], object]
    told: Callable[[object, int], str]
    """Of a value and its number, from 1."""
    ranked: bool = False
    partial: bool = False
    """Whether parts may cover different places."""


def _number(_: object, number: int) -> str:
    return str(number)


def _two_digits(_: object, number: int) -> str:
    return f"{number:02}"


def _whole(value: object, number: int) -> str:
    return f"{value:.0f}" if isinstance(value, float) and value == int(value) and value >= 0 else f"n{number}"


_RULES = (
    _Rule("kind", lambda m: m.component, _number),
    _Rule("echo", lambda m: m.echo, _number),
    _Rule("b", lambda m: m.b_value, _whole),
    _Rule("direction", lambda m: m.gradient, _two_digits),
    _Rule("inversion", lambda m: m.inversion_ms, _number),
    _Rule("time", lambda m: m.time_point, _two_digits),
    _Rule("phase", lambda m: m.phase, _two_digits),
    _Rule("phase", lambda m: m.trigger_ms, _two_digits, ranked=True),
    _Rule("time", lambda m: m.frame_ms, _two_digits, ranked=True),
    _Rule("acquisition", lambda m: m.acquisition, _number, ranked=True, partial=True),
    _Rule("time", lambda m: m.acquired, _two_digits, ranked=True),
)


def stacks_of(frames: Sequence[Frame]) -> tuple[list[Stack], int]:
    """The volumes that the frames of one series make, and how many frames were set aside as localisers."""
    problem = next((f.problem for f in frames if f.problem), None)
    if problem is not None:
        return [Stack(tuple(frames), problem=problem)], 0
    kept = _without_copies(frames)
    warnings = ("dicom.copies",) if len(kept) < len(frames) else ()
    if len({f.kind.frame_of_reference for f in kept}) > 1:
        stacks, localisers = _by_frame_of_reference(kept)
    else:
        stacks, localisers = [], 0
        named = _grouped(kept, lambda f: f.marks.stack)
        for number, (_, group) in enumerate(named, 1):
            prefix = f"stack-{number}" if len(named) > 1 else ""
            found, aside = _one_orientation(group)
            stacks += [replace(s, part=_joined(prefix, s.part)) for s in found]
            localisers += aside
    return [replace(s, warnings=warnings + s.warnings) for s in stacks], localisers


def _by_frame_of_reference(frames: list[Frame]) -> tuple[list[Stack], int]:
    stacks: list[Stack] = []
    localisers = 0
    groups = _grouped(frames, lambda f: f.kind.frame_of_reference)
    for number, (_, group) in enumerate(groups, 1):
        found, aside = _one_orientation(group)
        stacks += [replace(s, part=_joined(f"stack-{number}", s.part)) for s in found]
        localisers += aside
    if any(s.problem for s in stacks):
        problem = ScanError(
            "dicom.mixed-frame",
            f"the slices of the series lie in {len(groups)} frames of reference, and not each has an even stack;"
            " split the series",
        )
        return [Stack(tuple(frames), problem=problem)], 0
    return stacks, localisers


def _without_copies(frames: Sequence[Frame]) -> list[Frame]:
    seen: dict[tuple[str, int], list[Frame]] = defaultdict(list)
    kept = []
    for frame in frames:
        twins = seen[frame.sop_uid, frame.index] if frame.sop_uid else []
        if any(_same_header(frame, twin) and same_pixels(frame, twin) for twin in twins):
            continue
        twins.append(frame)
        kept.append(frame)
    return kept


def _same_header(a: Frame, b: Frame) -> bool:
    return (a.kind, a.marks, a.position_mm, a.slope, a.intercept) == (
        b.kind,
        b.marks,
        b.position_mm,
        b.slope,
        b.intercept,
    )


def _grouped(frames: Iterable[Frame], key: Callable[[Frame], object]) -> list[tuple[object, list[Frame]]]:
    groups: dict[object, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[key(frame)].append(frame)
    return sorted(groups.items(), key=lambda item: _sortable(item[0]))


def _sortable(value: object) -> tuple[bool, object]:
    return (value is not None, value if value is not None else 0)


def _joined(*parts: str) -> str:
    return "-".join(part for part in parts if part)


# --- one orientation


def _one_orientation(frames: list[Frame]) -> tuple[list[Stack], int]:
    if len(frames) < 2:
        return [Stack(tuple(frames), problem=_too_few(len(frames)))], 0
    groups = _orientations(frames)
    if len(groups) == 1:
        return _one_plane(frames), 0
    main, *others = groups
    turned = max(float(np.abs(_axes(g[0]) - _axes(main[0])).max()) for g in others)
    stacks = _one_plane(main)
    small = all(len(g) < len(main) and len(g) <= LOCALISER_SLICES for g in others)
    if small and not any(s.problem for s in stacks) and not _goes_on(stacks, others):
        aside = sum(len(g) for g in others)
        return [replace(s, warnings=("dicom.localiser", *s.warnings)) for s in stacks], aside
    problem = ScanError(
        "dicom.mixed-orientation",
        f"orientation cosines differ by up to {turned:.3f} within the series (at most {ORTHONORMAL_TOLERANCE});"
        " take the localiser or the second stack out",
    )
    return [Stack(tuple(frames), problem=problem)], 0


def _orientations(frames: list[Frame]) -> list[list[Frame]]:
    """Frames by their plane, the largest group first."""
    by_axes = _grouped(frames, lambda f: f.kind.axes)
    groups: list[list[Frame]] = []
    for _, same in sorted(by_axes, key=lambda item: -len(item[1])):
        near = (g for g in groups if np.abs(_axes(g[0]) - _axes(same[0])).max() <= ORTHONORMAL_TOLERANCE)
        home = next(near, None)
        if home is None:
            groups.append(list(same))
        else:
            home.extend(same)
    return sorted(groups, key=lambda g: -len(g))


def _goes_on(stacks: list[Stack], others: list[list[Frame]]) -> bool:
    """Whether a slice of another orientation lies where the next slice of a stack would: then it is one, damaged."""
    for stack in stacks:
        first, last = (np.array(stack.frames[i].position_mm) for i in (0, -1))
        step = (last - first) / (len(stack.frames) - 1)
        near = SLICE_OFF_AXIS * float(np.linalg.norm(step))
        for place in (first - step, last + step):
            if any(np.linalg.norm(np.array(f.position_mm) - place) <= near for group in others for f in group):
                return True
    return False


def _axes(frame: Frame) -> np.ndarray:
    return np.reshape(frame.kind.axes, (2, 3))


def unit_axes(frame: Frame) -> np.ndarray:
    """(3, 3): unit vectors along a row, along a column, and their normal."""
    axes = _axes(frame)
    axes = axes / np.linalg.norm(axes, axis=1)[:, None]
    return np.stack([*axes, np.cross(*axes)])


# --- one plane


def _one_plane(frames: list[Frame]) -> list[Stack]:
    """Stacks of frames of one orientation."""
    if len(frames) < 2:
        return [Stack(tuple(frames), problem=_too_few(len(frames)))]
    shapes = {f.kind.shape for f in frames}
    if len(shapes) > 1:
        found = ScanError("dicom.mixed-size", f"the slices have {len(shapes)} sizes {sorted(shapes)}; split the series")
        return [Stack(tuple(frames), problem=found)]
    pixels = np.array(sorted({f.kind.pixel_mm for f in frames}))
    if np.abs(pixels / pixels[0] - 1).max() > ORTHONORMAL_TOLERANCE:
        found = ScanError("dicom.mixed-spacing", "the pixel spacing differs between slices; split the series")
        return [Stack(tuple(frames), problem=found)]
    if 0 < (bare := sum(not f.rescaled for f in frames)) < len(frames):
        found = ScanError(
            "scan.header",
            f"{bare} of {len(frames)} slices lack the rescale slope and intercept that the others have; export the"
            " series again",
        )
        return [Stack(tuple(frames), problem=found)]
    stacks = [_even(part, group) for part, group in _split(frames)]
    if any(s.problem and s.problem.code == "dicom.duplicate-slices" for s in stacks):
        folders = _grouped(frames, lambda f: str(f.path.parent))
        if len(folders) > 1:
            apart = [_even(part, group) for _, own in folders for part, group in _split(own)]
            if not any(s.problem for s in apart):
                return apart
    return stacks


def _along(frames: Sequence[Frame]) -> np.ndarray:
    return np.array([f.position_mm for f in frames]) @ unit_axes(frames[0])[2]


def _places(frames: Sequence[Frame]) -> np.ndarray:
    """(N,) the number of the place along the normal that each frame lies at."""
    along = _along(frames)
    order = np.argsort(along, kind="stable")
    new = np.diff(along[order]) >= COPY_PIXELS * min(frames[0].kind.pixel_mm)
    places = np.empty(len(frames), int)
    places[order] = np.concatenate([[0], np.cumsum(new)])
    return places


def _split(frames: list[Frame]) -> list[tuple[str, list[Frame]]]:
    places = _places(frames)
    if places.max() + 1 == len(frames):
        return [("", frames)]
    for rule in _RULES:
        values = _values(rule, frames, places)
        if values is None:
            continue
        parts = []
        ordered = sorted(set(values), key=_sortable)
        for number, value in enumerate(ordered, 1):
            group = [f for f, own in zip(frames, values, strict=True) if own == value]
            name = f"{rule.name}-{rule.told(value, number)}"
            if not rule.partial:
                group = _marked_short(group, places, [own == value for own in values])
            parts += [(_joined(name, below), inner) for below, inner in _split(group)]
        return parts
    return [("", frames)]


def _values(rule: _Rule, frames: list[Frame], places: np.ndarray) -> list | None:
    """The value of each frame by which the rule tells them apart, or None where it does not."""
    values = [rule.value(f.marks) for f in frames]
    seen: dict[object, set[int]] = defaultdict(set)
    at: dict[int, list] = defaultdict(list)
    for value, place in zip(values, places.tolist(), strict=True):
        seen[value].add(place)
        at[place].append(value)
    if all(len(set(own)) == 1 for own in at.values()):
        return None
    several = min(2, len(at))
    if len(at) > 1 and all(len(own) >= several for own in seen.values()):
        return values
    counts = {len(own) for own in at.values()}
    if not rule.ranked or len(at) < 2 or len(counts) > 1 or any(len(set(own)) < len(own) for own in at.values()):
        return None
    ranks = {place: sorted(own, key=_sortable) for place, own in at.items()}
    return [float(ranks[p].index(v)) for v, p in zip(values, places.tolist(), strict=True)]


def _marked_short(group: list[Frame], places: np.ndarray, own: list[bool]) -> list[Frame]:
    """The frames of a part, marked as a problem where the part lacks places that its neighbours have."""
    lacking = len(set(places.tolist())) - len(set(places[own].tolist()))
    if not lacking:
        return group
    problem = ScanError(
        "dicom.missing-slices",
        f"{lacking} slices of one of the volumes in the series are missing; fetch the whole series",
    )
    return [replace(frame, problem=problem) for frame in group]


# --- even steps


def _too_few(count: int) -> ScanError:
    return ScanError("dicom.too-few-slices", f"the series has {count} slice, at least 2 make a volume")


def _even(part: str, frames: list[Frame]) -> Stack:
    problem = next((f.problem for f in frames if f.problem), None)
    if problem is None and len(frames) < 2:
        problem = _too_few(len(frames))
    if problem is not None:
        return Stack(tuple(frames), part, problem=problem)
    along = _along(frames)
    order = np.argsort(along, kind="stable")
    ordered = tuple(frames[i] for i in order)
    rows, columns = frames[0].kind.shape
    try:
        check_steps(along[order], COPY_PIXELS * min(frames[0].kind.pixel_mm))
        if len(frames) * rows * columns > MAX_VOXELS:
            raise ScanError(
                "scan.too-large", f"{len(frames)} slices of {rows, columns} exceed {MAX_VOXELS} voxels; crop it"
            )
    except ScanError as error:
        return Stack(ordered, part, problem=error)
    return Stack(ordered, part)


def check_steps(along_mm: np.ndarray, copy_mm: float) -> None:
    """Refuse sorted slice positions that are not evenly spaced; nearer than ``copy_mm`` is the same place."""
    steps = np.diff(along_mm)
    smallest, middle, largest = float(steps.min()), float(np.median(steps)), float(steps.max())
    if smallest < copy_mm:
        raise ScanError(
            "dicom.duplicate-slices",
            f"{int(np.count_nonzero(steps < copy_mm))} of {len(along_mm)} slices lie where another one lies, and"
            " nothing in their headers tells them apart; take out copies, or split the series by time point or echo",
        )
    allowed_mm = min(max(STEP_TOLERANCE * middle, STEP_TOLERANCE_MM), SLICE_OFF_AXIS * middle)
    drift_mm = float(np.abs(along_mm - np.linspace(along_mm[0], along_mm[-1], len(along_mm))).max())
    if max(middle - smallest, largest - middle) <= allowed_mm and drift_mm <= SLICE_OFF_AXIS * middle:
        return
    multiples = np.rint(steps / smallest)
    if multiples.max() > 1 and np.abs(steps / multiples - smallest).max() <= allowed_mm:
        raise ScanError(
            "dicom.missing-slices",
            f"{int(multiples.sum()) - len(steps)} slices are missing: distances of {smallest:.3f} mm and of"
            f" {largest:.3f} mm; fetch the whole series",
        )
    raise ScanError(
        "dicom.nonuniform-spacing",
        f"slice distances vary from {smallest:.3f} to {largest:.3f} mm (allowed {allowed_mm:.3f} mm off"
        f" {middle:.3f}), or drift by {drift_mm:.3f} mm; resample the series to even slices first",
    )
