"""Label maps larger than memory: cleaned and measured slab by slab along z, with the results of the whole map.

A slab is read together with the first plane of the next one. So any two voxels that touch lie in one slab together, and
pieces that share a voxel of such a plane are one. Only numbers of pieces are held for the whole map, never voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import cc3d
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vnet_core.geometry import Geometry, Shape
from vnet_core.plan import Label, Region
from vnet_core.report import Box, LabelReport, Part, bounds_mm, label_parts, region_parts, report_of, union
from vnet_core.sections import Cleaning

Read = Callable[[int, int], np.ndarray]
"""Planes ``start <= z < stop`` of a label map, (n, Y, X)."""
Write = Callable[[int, np.ndarray], None]
"""Replaces planes from ``start`` on."""

SLAB_VOXELS = 1 << 25
"""Voxels of a slab, unless a plane has more."""
WORKING_BYTES = 16
"""Per voxel of a slab: labels, mask, numbers of pieces, and these once more as they are counted."""


def planes_of(shape: Shape) -> int:
    """Planes of a slab of a map of this shape."""
    return max(1, SLAB_VOXELS // (shape[1] * shape[2]))


def working_bytes(shape: Shape) -> int:
    """Most memory that cleaning or measuring a map of this shape takes at once, beside a few numbers per piece."""
    return min(shape[0], planes_of(shape) + 1) * shape[1] * shape[2] * WORKING_BYTES


def slabs(first: int, last: int, planes: int) -> Iterator[tuple[int, int, int]]:
    """Start and stop of every slab, and where its reading stops: one plane later, except at the end."""
    for start in range(first, last, planes):
        stop = min(start + planes, last)
        yield start, stop, min(stop + 1, last)


@dataclass(slots=True)
class Joined:
    """Pieces found slab by slab, numbered through, and which of them are one."""

    pieces: int = 0
    pairs: list[np.ndarray] = field(default_factory=list)
    """(n, 2) numbers of pieces that share a voxel."""
    _shared: tuple[Box, np.ndarray] | None = None
    """Of the plane that the last slab has in common with the next: where, and the number of every voxel's piece."""

    def add(self, numbers: np.ndarray, count: int, start: int, stop: int, corner: tuple[int, int]) -> None:
        """A slab's pieces, 1 to ``count``, 0 outside, (n, Y, X): planes from ``start``, its own up to ``stop``.

        ``corner`` is where it begins along (y, x). What is labelled in a shared plane lies within both slabs.
        """
        here = self._window(corner, numbers.shape)
        if self._shared is not None and self._shared[0][0].start == start:
            (_, *theirs), before = self._shared
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(theirs, here, strict=True)]
            if all(part.start < part.stop for part in common):
                old = before[_relative(common, theirs)].astype(np.int64)
                new = numbers[0][_relative(common, here)].astype(np.int64)
                both = (old > 0) & (new > 0)
                if both.any():
                    pairs = np.stack([old[both] - 1, new[both] - 1 + self.pieces], axis=1)
                    self.pairs.append(np.unique(pairs, axis=0))
        self._shared = None
        if numbers.shape[0] > stop - start:
            plane = numbers[-1].astype(np.int64)
            self._shared = (slice(stop, stop + 1), *here), np.where(plane > 0, plane + self.pieces, 0)
        self.pieces += count

    def whole(self) -> tuple[int, np.ndarray]:
        """How many there are when those that are one are joined, and the number of each piece's whole, from 0."""
        if not self.pieces:
            return 0, np.zeros(0, np.int64)
        pairs = np.concatenate(self.pairs) if self.pairs else np.zeros((0, 2), np.int64)
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(self.pieces, self.pieces))
        count, numbers = connected_components(graph, directed=False)
        return int(count), numbers.astype(np.int64)

    @staticmethod
    def _window(corner: tuple[int, int], shape: Sequence[int]) -> tuple[slice, slice]:
        y, x = corner
        return slice(y, y + shape[1]), slice(x, x + shape[2])


def _relative(part: Sequence[slice], within: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, within, strict=True))


def _numbered(mask: np.ndarray, connectivity: Literal[6, 26]) -> tuple[np.ndarray, int]:
    # not as bool: cc3d 4.1 reserves too few numbers for bool arrays, and fails on the comb 1 0 1 of shape (1, 1, 3)
    numbers, count = cc3d.connected_components(mask.view(np.uint8), connectivity=connectivity, return_N=True)
    return numbers, int(count)


# --- measuring


@dataclass(slots=True, eq=False)
class _Tally:
    """What was found so far of one label or region."""

    along: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Voxels at every index of each axis."""
    joined: Joined = field(default_factory=Joined)
    lower_mm: np.ndarray | None = None
    upper_mm: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A label map, measured."""

    labels: list[LabelReport]
    """As :func:`vnet_core.report.measure`."""
    regions: list[LabelReport]
    """As :func:`vnet_core.report.measure_regions`."""
    along: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Of each label its voxels at every index of each axis."""


def measure_slabs(
    read: Read, geometry: Geometry, labels: Sequence[Label], regions: Sequence[Region], planes: int = 0
) -> Measured:
    """What :func:`vnet_core.report.measure` and ``measure_regions`` say of a map that is read slab by slab.

    ``planes`` of a slab: 0 for :func:`planes_of` the map.
    """
    parts = [*label_parts(labels), *region_parts(labels, regions)]
    tallies = [_Tally(_counters(geometry.shape)) for _ in parts]
    highest = max((value for part in parts for value in part.values), default=1)
    for start, stop, until in slabs(0, geometry.shape[0], planes or planes_of(geometry.shape)):
        slab = read(start, until)
        boxes = ndimage.find_objects(slab, max_label=highest)
        for part, tally in zip(parts, tallies, strict=True):
            box = union([boxes[value - 1] for value in part.values])
            if box is not None:
                _add(tally, slab, part, box, (start, stop), geometry)
    reports = [_reported(part, tally, geometry) for part, tally in zip(parts, tallies, strict=True)]
    return Measured(reports[: len(labels)], reports[len(labels) :], [tally.along for tally in tallies[: len(labels)]])


def _counters(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z, y, x = (np.zeros(n, np.int64) for n in shape)
    return z, y, x


def _add(tally: _Tally, slab: np.ndarray, part: Part, box: Box, own: tuple[int, int], geometry: Geometry) -> None:
    """Count the voxels of a part in a slab whose own planes are ``own``; ``box`` is where they lie in it."""
    start, stop = own
    # down to the last plane: what reaches it goes on in the next slab
    box = (slice(box[0].start, len(slab)), box[1], box[2])
    mask = part.mask(slab[box])
    z, y, x = (s.start for s in box)
    numbers, count = _numbered(mask, 26)
    tally.joined.add(numbers, count, start + z, stop, (y, x))
    inner = mask[: max(0, stop - start - z)]
    if not inner.any():
        return
    corner = np.array([start + z, y, x])
    for axis, (counts, first) in enumerate(zip(tally.along, corner, strict=True)):
        counts[first : first + inner.shape[axis]] += np.count_nonzero(inner, axis=tuple({0, 1, 2} - {axis}))
    lower, upper = (np.array(corner_mm) for corner_mm in bounds_mm(inner, corner, geometry))
    tally.lower_mm = lower if tally.lower_mm is None else np.minimum(tally.lower_mm, lower)
    tally.upper_mm = upper if tally.upper_mm is None else np.maximum(tally.upper_mm, upper)


def _reported(part: Part, tally: _Tally, geometry: Geometry) -> LabelReport:
    if tally.lower_mm is None or tally.upper_mm is None:
        return report_of(part, None, geometry)
    z, y, x = (slice(int(n[0]), int(n[-1]) + 1) for n in (np.flatnonzero(counts) for counts in tally.along))
    per_index = [counts[s] for counts, s in zip(tally.along, (z, y, x), strict=True)]
    components, _ = tally.joined.whole()
    return report_of(part, (z, y, x), geometry, per_index, (tally.lower_mm, tally.upper_mm), components)


# --- cleaning


def clean_slabs(
    read: Read, write: Write, shape: Shape, voxel_ml: float, cleanings: Sequence[Cleaning], planes: int = 0
) -> None:
    """Do what :func:`vnet_core.postprocess.clean` does to a map of ``shape`` that is read and written slab by slab."""
    if not cleanings:
        return
    planes = planes or planes_of(shape)
    boxes = _boxes(read, shape, {cleaning.label for cleaning in cleanings}, planes)
    for cleaning in cleanings:
        box = boxes.get(cleaning.label)
        if box is None:
            continue
        if cleaning.keep == "largest" or cleaning.minimum_ml > 0:
            _remove_components(read, write, box, voxel_ml, cleaning, planes)
        if cleaning.holes == "fill":
            _fill_holes(read, write, box, cleaning.label, planes)


def _boxes(read: Read, shape: Shape, labels: set[int], planes: int) -> dict[int, Box]:
    found: dict[int, Box] = {}
    for start, stop, _ in slabs(0, shape[0], planes):
        here = ndimage.find_objects(read(start, stop), max_label=max(labels))
        for label in labels:
            if (box := here[label - 1]) is not None:
                z = slice(start + box[0].start, start + box[0].stop)
                joined = union([found.get(label), (z, box[1], box[2])])
                assert joined is not None
                found[label] = joined
    return found


def _pieces(
    read: Read, box: Box, of: Callable[[np.ndarray], np.ndarray], connectivity: Literal[6, 26], planes: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, int, int]]:
    """Slab by slab of a box: first plane, labels of the own planes, pieces of all planes, their count, own planes."""
    for start, stop, until in slabs(box[0].start, box[0].stop, planes):
        whole = read(start, until)
        numbers, count = _numbered(of(whole[:, box[1], box[2]]), connectivity)
        yield start, whole[: stop - start], numbers, count, stop - start


def _joined(
    read: Read, box: Box, of: Callable[[np.ndarray], np.ndarray], connectivity: Literal[6, 26], planes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every whole its voxels, and whether it reaches the faces of the box; and the whole of every piece."""
    joined, voxels, reaching = Joined(), [], []
    for start, _, numbers, count, own in _pieces(read, box, of, connectivity, planes):
        joined.add(numbers, count, start, start + own, (box[1].start, box[2].start))
        inner = numbers[:own]
        voxels.append(np.bincount(inner.ravel(), minlength=count + 1)[1:])
        at_face = np.zeros(count + 1, bool)
        faces = [inner[:, 0], inner[:, -1], inner[:, :, 0], inner[:, :, -1]]
        faces += [inner[0]] if start == box[0].start else []
        faces += [inner[-1]] if start + own == box[0].stop else []
        for face in faces:
            at_face[np.unique(face)] = True
        reaching.append(at_face[1:])
    count, whole = joined.whole()
    total = np.bincount(whole, np.concatenate(voxels), count).astype(np.int64)
    open_ = np.zeros(count, bool)
    open_[whole[np.concatenate(reaching)]] = True
    return total, open_, whole


def _remove_components(read: Read, write: Write, box: Box, voxel_ml: float, cleaning: Cleaning, planes: int) -> None:
    def of(part: np.ndarray) -> np.ndarray:
        return part == cleaning.label

    voxels, _, whole = _joined(read, box, of, 26, planes)
    keep = voxels * voxel_ml >= cleaning.minimum_ml
    if cleaning.keep == "largest":
        largest = voxels == voxels.max()
        keep &= np.arange(len(voxels)) == _first(read, box, of, largest[whole], whole, planes)
    if keep.all():
        return
    before = 0
    for start, labels, numbers, count, own in _pieces(read, box, of, 26, planes):
        gone = np.concatenate([[False], ~keep[whole[before : before + count]]])[numbers[:own]]
        before += count
        if gone.any():
            labels = labels.copy()
            labels[:, box[1], box[2]][gone] = 0
            write(start, labels)


def _first(
    read: Read, box: Box, of: Callable[[np.ndarray], np.ndarray], chosen: np.ndarray, whole: np.ndarray, planes: int
) -> int:
    """The whole of the first voxel, in C order, whose piece is among the chosen."""
    wholes = np.unique(whole[chosen])
    if len(wholes) == 1:
        return int(wholes[0])
    before = 0
    for _, _, numbers, count, own in _pieces(read, box, of, 26, planes):
        among = np.concatenate([[False], chosen[before : before + count]])[numbers[:own]]
        if among.any():
            return int(whole[before + int(numbers[:own].flat[among.argmax()]) - 1])
        before += count
    raise AssertionError("a chosen piece has a voxel")


def _fill_holes(read: Read, write: Write, box: Box, label: int, planes: int) -> None:
    def of(part: np.ndarray) -> np.ndarray:
        return part != label

    # 6 neighbours: what is one over corners does not let anything through there
    _, open_, whole = _joined(read, box, of, 6, planes)
    if open_.all():
        return
    before = 0
    for start, labels, numbers, count, own in _pieces(read, box, of, 6, planes):
        closed = np.concatenate([[False], ~open_[whole[before : before + count]]])[numbers[:own]]
        before += count
        filled = closed & (labels[:, box[1], box[2]] == 0)
        if filled.any():
            labels = labels.copy()
            labels[:, box[1], box[2]][filled] = label
            write(start, labels)
