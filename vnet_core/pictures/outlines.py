"""One structure of a scan in two masks: both outlines on the same three slices, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vnet_core.geometry import Geometry
from vnet_core.pictures.canvas import FAINT, Canvas, outline
from vnet_core.volume import Volume, canonical

MAX_BYTES = 100_000
"""Largest picture; grey levels and then size are given up to stay below it."""

_STYLES = ((230, 40), (230, 16), (170, 16), (120, 12))
"""Pixels along a panel's longer side and number of greys to try, from the best picture to the smallest."""
_MARGIN_PX, _LINE_PX = 12, 22
_PLANES = (("axial", 0, False), ("coronal", 1, True), ("sagittal", 2, True))
"""Name, canonical axis that is cut across, and whether rows are turned so that the head is on top."""


def two_outlines(
    image_ZYX: np.ndarray,
    champion_ZYX: np.ndarray,
    challenger_ZYX: np.ndarray,
    geometry: Geometry,
    name: str,
    whose: tuple[str, str] = ("champion", "challenger"),
) -> bytes:
    """One structure as both models see it: PNG of at most MAX_BYTES, the champion's line thick, the challenger's thin.

    ``image_ZYX``: any real dtype (Z, Y, X); the masks: bool (Z, Y, X), all on ``geometry``. ``whose`` stands in the
    legend; the two may be a truth and what was found as well. Three planes of the grid
    turned to the body's axes, each where most voxels differ (or, where none does, where most lie): the patient's right
    on the left, head or front on top. The captions give the index along the source's array axis. Raises
    ScanError ``scan.shape`` when an array does not fit the grid.
    """
    turned, turn = canonical(Volume(image_ZYX[None], geometry))
    image = turned.voxels[0]
    champion, challenger = (
        canonical(Volume(mask_ZYX.astype(bool)[None], geometry))[0].voxels[0]
        for mask_ZYX in (champion_ZYX, challenger_ZYX)
    )
    shown = champion ^ challenger
    if not shown.any():
        shown = champion
    slices = [int(np.count_nonzero(shown, axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    if not shown.any():
        slices = [size // 2 for size in image.shape]
    captions = []
    for plane, axis, _ in _PLANES:
        source = turn.source_axis[axis]
        index = geometry.shape[source] - 1 - slices[axis] if turn.flip[axis] else slices[axis]
        captions.append(f"{plane}  {'zyx'[source]} = {index}")
    spacing_mm = turned.geometry.spacing_mm
    view = _View(image, (champion, challenger), spacing_mm, slices, captions, _window(image), name, whose)
    png = b""
    for limit_px, greys in _STYLES:
        png = _sheet(view, limit_px).png(greys)
        if len(png) <= MAX_BYTES:
            break
    return png


def _window(image_ZYX: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile of at most some million voxels on a regular lattice."""
    step = max(1, round((image_ZYX.size / 2e6) ** (1 / 3)))
    sample = image_ZYX[::step, ::step, ::step].astype(float)
    finite = sample[np.isfinite(sample)]
    low, high = (float(v) for v in np.percentile(finite, (1, 99))) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 1.0, low + 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What a picture of two outlines shows, before its size is decided; arrays are canonical."""

    image_ZYX: np.ndarray
    masks: tuple[np.ndarray, np.ndarray]
    spacing_mm: Sequence[float]
    slices: Sequence[int]
    captions: Sequence[str]
    window: tuple[float, float]
    name: str
    whose: tuple[str, str]


def _sheet(view: _View, limit_px: int) -> Canvas:
    """Three panels in a row with their captions, and whose outline is which above them."""
    shape, (low, high) = view.image_ZYX.shape, view.window
    extent_mm = [n * s for n, s in zip(shape, view.spacing_mm, strict=True)]
    scale = limit_px / max(extent_mm)
    sizes = []
    for _, axis, _ in _PLANES:
        height, width = (max(1, round(extent_mm[a] * scale)) for a in range(3) if a != axis)
        sizes.append((height, width))
    top = _MARGIN_PX + 2 * _LINE_PX
    tallest = max(height for height, _ in sizes)
    cells = [max(width, 110) for _, width in sizes]
    canvas = Canvas(top + tallest + _LINE_PX + _MARGIN_PX, max(420, sum(cells) + 4 * _MARGIN_PX))
    canvas.text(_MARGIN_PX, _MARGIN_PX + _LINE_PX // 2 - 4, canvas.shortened(view.name, 390, size=15), size=15)
    y, x = _MARGIN_PX + _LINE_PX + _LINE_PX // 2 - 4, _MARGIN_PX
    for colour, whose in enumerate(view.whose):
        canvas.swatch(x, y, colour)
        canvas.text(x + 17, y, whose, level=FAINT)
        x += 120
    left = _MARGIN_PX
    for (_, axis, flip), caption, (height, width), cell in zip(_PLANES, view.captions, sizes, cells, strict=True):
        x, y = left + (cell - width) // 2, top + (tallest - height) // 2
        section = np.nan_to_num(
            np.clip((_section(view.image_ZYX, axis, view.slices, flip) - low) / (high - low), 0, 1) * 255
        )
        shown = Image.fromarray(section.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        canvas.grey.paste(Image.fromarray(np.rint(np.clip(np.asarray(shown), 0, 255)).astype(np.uint8)), (x, y))
        for colour, mask in enumerate(view.masks):
            inside = _section(mask, axis, view.slices, flip)
            if inside.any():
                y0, x0, line, _ = outline(inside, (height, width), colour == 0)
                canvas.outline(x + x0, y + y0, np.rint(line * 255).astype(np.uint8), colour)
        canvas.text(left + cell / 2, top + tallest + _LINE_PX // 2, caption, "mm", level=FAINT)
        left += cell + _MARGIN_PX
    return canvas


def _section(array_ZYX: np.ndarray, axis: int, slices: Sequence[int], flip: bool) -> np.ndarray:
    section = array_ZYX.take(slices[axis], axis=axis)
    return section[::-1] if flip else section
