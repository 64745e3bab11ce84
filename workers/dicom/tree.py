"""A folder tree of DICOM files as series: headers only, any depth, in any arrangement of folders.

Files are grouped by patient, study and series wherever they lie, and brought to volumes by the rules of
:mod:`workers.dicom.stacks`. What is no scan is set aside and counted by its reason; a damaged file refuses the series
that it belongs to, or where its header does not say, every series with a slice in its folder, so that none is silently
short; so does a link beside slices that leads to a file outside. A DICOMDIR is not believed. Texts of headers and paths
stay out of messages and of ``repr``: they may name a patient.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from vnet_core.errors import ScanError
from workers.dicom.elements import PYDICOM_FAULTS, Elements, NotDicom, corrupt, quiet_pydicom
from workers.dicom.folders import SourceFile, Walk, walked
from workers.dicom.frames import frames_of, reason_aside
from workers.dicom.headers import read_elements
from workers.dicom.slices import Frame, usual_uid
from workers.dicom.stacks import Stack, stacks_of, unit_axes

_SLICE_SUFFIXES = (".dcm", ".ima")
_PREAMBLE_BYTES = 132
_CACHED_TREES = 8
_CAPTURED_SLICES = 3
"""Fewer secondary captures with a place in the world are pictures, not a volume."""


@dataclass(frozen=True, slots=True)
class Series:
    """One volume that could be a case: a series, or a part of one."""

    folder: Path = field(repr=False)
    """The deepest folder that holds all its files, which may lie in folders below it."""
    uid: str = field(repr=False)
    """Series instance UID; a digest where it holds more than digits and points."""
    part: str
    """'' for a whole series, else which of its volumes: ``echo-2``, ``b-1000``, ``time-03``."""
    files: tuple[Path, ...] = field(repr=False)
    """Sorted; identical copies are left out."""
    study: str = field(repr=False)
    patient: str = field(repr=False)
    """As in the header, to be neither stored nor shown."""
    frame_of_reference: str = field(repr=False)
    modality: str = field(repr=False)
    description: str = field(repr=False)
    kernel: str = field(repr=False)
    orientation: str
    """``axial``, ``coronal``, ``sagittal``: the plane of the slices to the nearest axis of the body; '' if unknown."""
    slice_spacing_mm: float
    """Mean distance along the normal; 0 if unknown."""
    slices: int
    acquired: str = field(repr=False)
    """ISO date, and time where there is one; '' if unknown."""
    burnt_in: bool
    """Whether text may be burnt into the pixels."""
    problem: ScanError | None = None
    """Why it cannot be read, as far as headers tell; a tilted gantry is judged when the plan is known."""
    warnings: tuple[str, ...] = ()
    """Codes of what was noted on the way: ``dicom.copies``, ``dicom.localiser``."""

    @property
    def source(self) -> str:
        """The text by which a case names it: ``FOLDER#UID`` or ``FOLDER#UID/PART``."""
        return f"{self.folder}#{self.reference}"

    @property
    def reference(self) -> str:
        """``UID`` or ``UID/PART``."""
        return f"{self.uid}/{self.part}" if self.part else self.uid


@dataclass(frozen=True, slots=True)
class Annotation:
    """A file that describes other series."""

    path: Path = field(repr=False)
    kind: str
    """``seg`` or ``rtstruct``."""
    references: tuple[str, ...] = field(repr=False)
    """UIDs of the series that it describes, in the form of :attr:`Series.uid`."""
    sop_uid: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tree:
    """What a folder holds."""

    volumes: tuple[Series, ...]
    """Sorted by source."""
    annotations: tuple[Annotation, ...]
    set_aside: dict[str, int]
    """Number of files by reason: ``localiser``, ``secondary-capture``, ``colour``, ``projection``, ``ultrasound``,
    ``photograph``, ``report``, ``document``, ``presentation-state``, ``waveform``, ``radiotherapy``, ``dicomdir``,
    ``damaged`` (an annotation), ``other``, ``not-dicom``, ``hidden``, ``link``, ``link-outside``, ``not-regular``,
    ``unreadable``."""


def scan_tree(folder: Path) -> Tree:
    """The volumes and annotations in a folder and all folders below it. ``ScanError`` ``scan.unreadable``."""
    return _tree_of(walked(folder))


# --- files to series


@dataclass(slots=True, repr=False)
class _Gathered:
    """What the files of a tree hold, before it is brought to volumes."""

    aside: Counter[str]
    groups: dict[tuple[str, str, str], list[Frame]] = field(default_factory=lambda: defaultdict(list))
    annotations: list[Annotation] = field(default_factory=list)
    lost: dict[Path, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """Damaged files of no known series, by their folder."""
    others: list[tuple[str, str, Path]] = field(default_factory=list)
    """Series UID, reason and path of files that are no slice and yet may have been one."""
    suspects: list[Path] = field(default_factory=list)
    """Files that are no DICOM and may have been slices."""

    def add(self, file: SourceFile) -> None:
        try:
            found = read_elements(file.path)
        except NotDicom:
            if file.path.suffix.lower() in _SLICE_SUFFIXES:
                self.lost[file.path.parent].append(file.path)
            elif file.size < _PREAMBLE_BYTES and not _is_text(file.path):
                self.suspects.append(file.path)
            else:
                self.aside["not-dicom"] += 1
            return
        except (ScanError, OSError):
            self.suspects.append(file.path)
            return
        reason = reason_aside(found)
        if reason in ("segmentation", "structure-set"):
            self._annotate(found, reason)
        elif reason == "other" or (reason and 0x00200032 in found.values):
            self.others.append((usual_uid(found.text(0x0020000E)), reason, file.path))
        elif reason:
            self.aside[reason] += 1
        elif not found.text(0x0020000E) and (found.problem is not None or found.pixels is None):
            self.lost[file.path.parent].append(file.path)
        else:
            frames = list(frames_of(found))
            self.groups[frames[0].key] += frames

    def _annotate(self, found: Elements, reason: str) -> None:
        references = None if found.problem else _references(found.path)
        if references is None:
            self.aside["damaged"] += 1
            return
        kind = "seg" if reason == "segmentation" else "rtstruct"
        self.annotations.append(Annotation(found.path, kind, references, found.text(0x00080018)))


def _is_text(path: Path) -> bool:
    data = path.read_bytes()
    return bool(data) and data.isascii() and data.decode("ascii").replace("\n", "").replace("\r", "").isprintable()


def _references(path: Path) -> tuple[str, ...] | None:
    """UIDs of the series that a segmentation or structure set describes, sorted; None where it cannot be read."""
    import pydicom

    tags = ["ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]
    try:
        with quiet_pydicom():
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
            items = list(data.get("ReferencedSeriesSequence") or [])
            for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
                for study in frame.get("RTReferencedStudySequence") or []:
                    items += study.get("RTReferencedSeriesSequence") or []
            return tuple(sorted({usual_uid(str(item.SeriesInstanceUID)) for item in items}))
    except PYDICOM_FAULTS:
        return None


def _tree_of(walk: Walk) -> Tree:
    aside = walk.aside.copy()
    gathered = _Gathered(aside)
    for file in walk.files:
        gathered.add(file)
    suffixes = _suffixes(gathered)
    _judge_suspects(gathered, suffixes)
    volumes: list[Series] = []
    for frames in gathered.groups.values():
        kept, reason = _scans_among(frames)
        aside[reason] += len({f.path for f in frames}) - len({f.path for f in kept})
        if kept:
            volumes += _volumes_of(kept, aside)
    linked = {path.parent for path in walk.links if path.suffix.lower() in suffixes[path.parent]}
    volumes = _with_links(_with_losses(volumes, gathered.lost), linked)
    return Tree(
        tuple(sorted(_told_apart(volumes), key=lambda series: series.source)),
        tuple(gathered.annotations),
        dict(sorted((+aside).items())),
    )


def _suffixes(gathered: _Gathered) -> dict[Path, set[str]]:
    """Suffixes of the slices in each folder."""
    suffixes: dict[Path, set[str]] = defaultdict(set)
    for frames in gathered.groups.values():
        for frame in frames:
            suffixes[frame.path.parent].add(frame.path.suffix.lower())
    return suffixes


def _judge_suspects(gathered: _Gathered, suffixes: dict[Path, set[str]]) -> None:
    """A file that is cut to nothing, or cannot be opened, was a slice if the slices beside it have its suffix, and one
    without an image if there are slices of its series.
    """
    known = {series for _, _, series in gathered.groups}
    for uid, reason, path in gathered.others:
        if uid in known and reason != "colour":  # cut off before its pixels, or its class is damaged
            gathered.lost[path.parent].append(path)
        else:
            gathered.aside[reason] += 1
    for path in gathered.suspects:
        if path.suffix.lower() in suffixes[path.parent]:
            gathered.lost[path.parent].append(path)
        else:
            gathered.aside["not-dicom"] += 1


def _scans_among(frames: list[Frame]) -> tuple[list[Frame], str]:
    """The frames of one series that could be slices of a volume, and what the others are counted as."""
    if all(f.kind.localiser for f in frames):
        return [], "localiser"
    if all(f.kind.colour for f in frames):
        return [], "colour"
    scans = [f for f in frames if not f.kind.secondary_capture]
    if scans or len(frames) < _CAPTURED_SLICES or any(s.problem for s in stacks_of(frames)[0]):
        return scans, "secondary-capture"
    return frames, ""


def _volumes_of(frames: list[Frame], aside: Counter[str]) -> list[Series]:
    stacks, localisers = stacks_of(frames)
    if localisers:
        aside["localiser"] += localisers
    return [_series(stack) for stack in stacks]


def _series(stack: Stack) -> Series:
    frames = stack.frames
    kind = frames[0].kind
    files = sorted({f.path for f in frames})
    normal, spacing_mm = "", 0.0
    placed = all(len(f.position_mm) == 3 and len(f.kind.axes) == 6 for f in frames)
    if placed and np.linalg.norm(np.reshape(kind.axes, (2, 3)), axis=1).min() > 0:
        axes = unit_axes(frames[0])
        normal = ("sagittal", "coronal", "axial")[int(np.abs(axes[2]).argmax())]
        along = np.array([f.position_mm for f in frames]) @ axes[2]
        spacing_mm = float(np.ptp(along)) / max(1, len(frames) - 1)
    return Series(
        folder=Path(os.path.commonpath([str(path.parent) for path in files])),
        uid=kind.series,
        part=stack.part,
        files=tuple(files),
        study=kind.study,
        patient=kind.patient,
        frame_of_reference=kind.frame_of_reference,
        modality=kind.modality,
        description=kind.description,
        kernel=kind.kernel,
        orientation=normal,
        slice_spacing_mm=spacing_mm if np.isfinite(spacing_mm) else 0.0,
        slices=len(frames),
        acquired=min((f.marks.acquired for f in frames if f.marks.acquired), default=""),
        burnt_in=any(f.kind.burnt_in for f in frames),
        problem=stack.problem,
        warnings=stack.warnings,
    )


def _with_losses(volumes: list[Series], lost: dict[Path, list[Path]]) -> list[Series]:
    """Damaged files of unknown series refuse each series beside them; where there is none they are a case."""
    result, told = [], set()
    for series in volumes:
        damaged = [path for parent in {p.parent for p in series.files} for path in lost.get(parent, ())]
        told |= {path.parent for path in damaged}
        result.append(_refused(series, _loss(len(damaged), len(series.files))) if damaged else series)
    for folder, paths in lost.items():
        if folder not in told:
            result.append(
                Series(
                    folder, "none", "", tuple(paths), "", "", "", "", "", "", "", 0.0, 0, "", False,
                    _loss(len(paths), 0),
                )
            )  # fmt: skip
    return result


def _with_links(volumes: list[Series], linked: set[Path]) -> list[Series]:
    """Series with slices in a folder where a link of their suffix leaves the tree: they may be short by one."""
    problem = ScanError(
        "scan.path-escape",
        "a link beside the slices leads to a file outside the folder that was given; put the file itself there",
    )
    return [_refused(s, problem) if s.problem is None and linked & {p.parent for p in s.files} else s for s in volumes]


def _loss(damaged: int, sound: int) -> ScanError:
    return corrupt(
        f"{damaged} of {damaged + sound} DICOM images in the folder cannot be read (cut off, empty or foreign)"
    )


def _refused(series: Series, problem: ScanError) -> Series:
    fields = {name: getattr(series, name) for name in Series.__dataclass_fields__}
    return Series(**fields | {"problem": problem})


def _told_apart(volumes: list[Series]) -> list[Series]:
    """Volumes that one source would name, of two patients or studies under one series UID, are refused."""
    counts = Counter(series.source for series in volumes)
    problem = ScanError(
        "dicom.several-series",
        "slices of several patients or studies carry one series UID in one folder; put them into folders of their own",
    )
    return [_refused(series, problem) if counts[series.source] > 1 else series for series in volumes]


# --- one series by its source


_trees: OrderedDict[str, tuple[tuple[object, ...], Tree]] = OrderedDict()
_trees_lock = Lock()


def find_series(folder: Path, reference: str = "") -> Series:
    """The series that ``reference`` (``UID`` or ``UID/PART``) names in a folder, or its only one for ''.

    A tree is walked again only when a file in it has changed. ``ScanError``: ``scan.unreadable``, ``scan.dtype`` (all
    images are in colour), ``dicom.several-series``, ``dicom.unknown-series``. The series may have a ``problem``.
    """
    tree = _cached_tree(folder)
    if not tree.volumes:
        others = sum(tree.set_aside.values()) + len(tree.annotations)
        if "colour" in tree.set_aside:
            raise ScanError("scan.dtype", "the slices are colour images; one grey value per voxel is read")
        raise ScanError("scan.unreadable", f"the folder holds no DICOM image series ({others} other files)")
    if not reference:
        if len(tree.volumes) > 1:
            raise ScanError(
                "dicom.several-series",
                f"the folder holds {len(tree.volumes)} volumes; name one: FOLDER#SeriesUID or FOLDER#SeriesUID/PART",
            )
        return tree.volumes[0]
    named = [series for series in tree.volumes if series.reference == reference]
    own = [series for series in named if series.folder == folder] or named
    if not own:
        uid = reference.partition("/")[0]
        parts = [series for series in tree.volumes if series.uid == uid]
        if len(parts) > 1:
            raise ScanError(
                "dicom.several-series", f"the series holds {len(parts)} volumes; name one: FOLDER#SeriesUID/PART"
            )
        if not parts or "/" in reference:
            raise ScanError(
                "dicom.unknown-series", f"none of the {len(tree.volumes)} volumes in the folder has that UID and part"
            )
        return parts[0]
    if len(own) > 1:
        raise ScanError("dicom.several-series", f"{len(own)} volumes below the folder have that UID; name their folder")
    return own[0]


def _cached_tree(folder: Path) -> Tree:
    walk = walked(folder)
    stamp = walk.stamp
    key = str(folder)
    with _trees_lock:
        known = _trees.get(key)
        if known is not None and known[0] == stamp:
            _trees.move_to_end(key)
            return known[1]
    tree = _tree_of(walk)
    with _trees_lock:
        _trees[key] = (stamp, tree)
        while len(_trees) > _CACHED_TREES:
            _trees.popitem(last=False)
    return tree
