"""Closed contours in a plane of pixels, and the pixels that they enclose.

Points are (y, x) in pixels: pixel (row, column) is the unit square around the point (row, column). A pixel belongs to
a contour when its centre lies inside it; of centres on the line itself, those on a left or upper side belong to it, so
that a square of 10 pixels holds 100, and contours that share a line never share a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DECIMALS = 6
"""Points are rounded to this many decimals of a pixel, so that rounding errors of millimetres do not decide about
centres on a line."""


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """What the contours of one structure in one plane enclose."""

    mask: np.ndarray
    """bool (Y, X)"""
    crossings: int
    """Contours that overlap another one in part, neither inside nor outside of it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """The pixels of one contour: ``inside`` (bool) with its first pixel at ``corner``."""

    corner: tuple[int, int]
    inside: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        (y, x), (height, width) = self.corner, self.inside.shape
        return slice(y, y + height), slice(x, x + width)

    def common(self, other: _Patch) -> int:
        """Number of pixels that are in both."""
        parts = []
        for patch, mate in ((self, other), (other, self)):
            start = [max(0, b - a) for a, b in zip(patch.corner, mate.corner, strict=True)]
            stop = [max(0, b + n - a) for a, b, n in zip(patch.corner, mate.corner, mate.inside.shape, strict=True)]
            parts.append(patch.inside[start[0] : stop[0], start[1] : stop[1]])
        return int(np.count_nonzero(parts[0] & parts[1]))


def filled(contours: Sequence[np.ndarray], shape: tuple[int, int]) -> Filling:
    """The pixels of a plane of ``shape`` that closed contours, each float (N, 2) of (y, x), enclose together.

    A contour within another one is a hole in it, one within that hole is filled again, and so on (even-odd). Contours
    that overlap in part are joined. One contour that touches or crosses itself, such as a keyhole, is filled by the
    even-odd rule. What lies outside of the plane is left out.
    """
    mask = np.zeros(shape, bool)
    patches = sorted((_patch(c, shape) for c in contours), key=lambda p: -int(np.count_nonzero(p.inside)))
    lower = np.array([p.corner for p in patches]).reshape(-1, 2)
    upper = lower + np.array([p.inside.shape for p in patches], int).reshape(-1, 2)
    crossings = 0
    for number, patch in enumerate(patches):
        size = int(np.count_nonzero(patch.inside))
        near = ((lower[:number] < upper[number]) & (upper[:number] > lower[number])).all(axis=1)
        if any(0 < patch.common(patches[larger]) < size for larger in np.flatnonzero(near)):
            crossings += 1
            mask[patch.window] |= patch.inside
        else:
            mask[patch.window] ^= patch.inside
    return Filling(mask, crossings)


def even_odd(contours: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """bool (Y, X): the pixels that lie inside an odd number of the contours, each float (N, 2) of (y, x)."""
    mask = np.zeros(shape, bool)
    for contour in contours:
        patch = _patch(contour, shape)
        mask[patch.window] ^= patch.inside
    return mask


def _patch(contour: np.ndarray, shape: tuple[int, int]) -> _Patch:
    points = np.round(np.asarray(contour, float), _DECIMALS)
    lower = np.clip(np.ceil(points.min(axis=0)).astype(int), 0, shape)
    upper = np.clip(np.floor(points.max(axis=0)).astype(int) + 1, lower, shape)
    height, width = (int(n) for n in upper - lower)
    start, stop = points, np.roll(points, -1, axis=0)
    rows = np.arange(lower[0], upper[0])[:, None]
    row, edge = np.nonzero((start[:, 0] <= rows) != (stop[:, 0] <= rows))
    share = (rows[row, 0] - start[edge, 0]) / (stop[edge, 0] - start[edge, 0])
    crossing = start[edge, 1] + share * (stop[edge, 1] - start[edge, 1])
    # every pixel centre from a crossing on changes sides
    first = np.clip(np.ceil(np.round(crossing, _DECIMALS)).astype(int) - lower[1], 0, width)
    changes = np.zeros((height, width + 1), np.int32)
    np.add.at(changes, (row, first), 1)
    inside = (np.cumsum(changes[:, :width], axis=1) & 1).astype(bool)
    return _Patch((int(lower[0]), int(lower[1])), inside)


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed contours, float (N, 2) of (y, x), along the edges of the pixels of a bool (Y, X) mask.

    :func:`filled` turns them back into the mask exactly. Points are the corners at which a contour turns; the first is
    not repeated. Pixels that touch only by a corner get contours of their own, and a hole is a contour of its own.
    """
    height, width = mask.shape
    padded = np.pad(mask.astype(bool), 1)
    core = padded[1:-1, 1:-1]
    # clockwise on a picture with y downwards: east along the top of a pixel, south along its right side, and so on
    sides = (
        (core & ~padded[:-2, 1:-1], (0, 0)),
        (core & ~padded[1:-1, 2:], (0, 1)),
        (core & ~padded[2:, 1:-1], (1, 1)),
        (core & ~padded[1:-1, :-2], (1, 0)),
    )
    steps = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
    corners = [np.argwhere(edges) + offset for edges, offset in sides]
    headings = [np.full(len(places), side) for side, places in enumerate(corners)]
    start, heading = np.concatenate(corners), np.concatenate(headings)
    if not len(start):
        return []
    number = np.full((height + 1, width + 1, 4), -1)
    number[start[:, 0], start[:, 1], heading] = np.arange(len(start))
    end = start + steps[heading]
    following = np.full(len(start), -1)
    for turn in (3, 0, 1):  # to the right is tried last and so wins: it stays on the same pixel
        candidate = number[end[:, 0], end[:, 1], (heading + turn) % 4]
        following = np.where(candidate >= 0, candidate, following)
    turns = (heading[following] != heading).tolist()
    return [np.asarray(end[loop], float) - 0.5 for loop in _loops(following.tolist(), turns)]


def _loops(following: list[int], turns: list[bool]) -> list[list[int]]:
    """Every cycle of edges, as those of its edges at whose end it turns."""
    seen = [False] * len(following)
    loops = []
    for first in range(len(following)):
        edge, loop = first, []
        while not seen[edge]:
            seen[edge] = True
            if turns[edge]:
                loop.append(edge)
            edge = following[edge]
        if loop:
            loops.append(loop)
    return loops
