"""Two models on the same scans, champion and challenger: how far masks and volumes agree, in figures and pictures.

Volumes are compared as Bland and Altman do (Lancet 1986;327:307): the mean of the differences, and the limits between
which 95 % of them are expected, mean -+ 1.96 standard deviations. That neither is the truth does not matter to them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import stdtrit

from vnet_core.colours import COLOURS
from vnet_core.geometry import Geometry
from vnet_core.pictures.canvas import FAINT, Canvas, outline
from vnet_core.statistics import CONFIDENCE
from vnet_core.surface import check_shapes
from vnet_core.volume import Volume, canonical

LIMIT_DEVIATIONS = 1.96
"""Standard deviations from the mean to a limit of agreement."""
PANELS = 6
"""Most structures in a picture of volumes."""
MAX_BYTES = 100_000
"""Largest picture of outlines; grey levels and then size are given up to stay below it."""


# --- figures


@dataclass(frozen=True, slots=True)
class Overlap:
    """Voxels of one structure in the two masks of a scan."""

    champion: int
    challenger: int
    common: int

    @property
    def dice(self) -> float:
        """2 common / (champion + challenger); NaN where both are empty and there is nothing to agree on."""
        total = self.champion + self.challenger
        return 2 * self.common / total if total else math.nan


def overlaps(champion_ZYX: np.ndarray, challenger_ZYX: np.ndarray, values: Sequence[tuple[int, int]]) -> list[Overlap]:
    """One overlap per structure of two label maps (Z, Y, X) of unsigned integers on one grid.

    ``values``: what the structure has in the champion's map and in the challenger's. One pass over the maps, slice by
    slice. Raises ScanError ``metrics.shape`` when the maps differ in shape.
    """
    check_shapes(champion_ZYX, challenger_ZYX)
    firsts, seconds = (sorted({pair[i] for pair in values}) for i in range(2))
    columns = len(seconds) + 1
    joint = np.zeros((len(firsts) + 1) * columns, np.int64)
    for first_YX, second_YX in zip(champion_ZYX, challenger_ZYX, strict=True):
        place = _places(first_YX, firsts) * columns + _places(second_YX, seconds)
        joint += np.bincount(place.ravel(), minlength=len(joint))
    table = joint.reshape(-1, columns)
    found = []
    for first, second in values:
        row, column = firsts.index(first) + 1, seconds.index(second) + 1
        found.append(Overlap(int(table[row].sum()), int(table[:, column].sum()), int(table[row, column])))
    return found


def _places(section_YX: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """1 + the place of each voxel's value among ``values``, 0 for others; int64."""
    table = np.zeros(int(max([*values, section_YX.max(initial=0)])) + 1, np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table[section_YX]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences of volumes over cases, challenger minus champion, in mL."""

    cases: int
    bias_ml: float | None
    """Their mean; None without a case."""
    bias_low_ml: float | None
    """Lower end of the mean's 95 % interval (Student's t); None below two cases, as is all that follows."""
    bias_high_ml: float | None
    low_ml: float | None
    """Lower limit of agreement."""
    high_ml: float | None


def bland_altman(champion_ml: Sequence[float] | np.ndarray, challenger_ml: Sequence[float] | np.ndarray) -> Agreement:
    """Agreement of two series of volumes in mL, one pair per case."""
    differences = np.asarray(challenger_ml, float) - np.asarray(champion_ml, float)
    cases = len(differences)
    bias = float(differences.mean()) if cases else None
    if bias is None or cases < 2:
        return Agreement(cases, bias, None, None, None, None)
    deviation = float(differences.std(ddof=1))
    half = float(stdtrit(cases - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(cases)
    reach = LIMIT_DEVIATIONS * deviation
    return Agreement(cases, bias, bias - half, bias + half, bias - reach, bias + reach)


# --- pictures


def agreement_picture(volumes: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
    """Bland-Altman plots as PNG: difference against mean of the volumes, one panel per structure.

    ``volumes``: pairs (champion, challenger) in mL by structure. Of more than PANELS structures those are drawn whose
    volumes differ most for their size. The same volumes give the same bytes with one version of matplotlib.
    """
    drawn = sorted(volumes, key=lambda name: -_relative(volumes[name]))[:PANELS]
    names = [name for name in volumes if name in drawn]
    columns = min(2, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(4.2 * columns, 0.5 + 2.9 * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    # text as it is: a name with dollar signs is no formula
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        pairs = np.asarray(volumes[name], float).reshape(-1, 2)
        found = bland_altman(pairs[:, 0], pairs[:, 1])
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        for level, style in ((found.bias_ml, "-"), (found.low_ml, "--"), (found.high_ml, "--")):
            if level is not None:
                axes.axhline(level, color=COLOURS[5], linewidth=1.2, linestyle=style)
                axes.annotate(
                    f"{level:+.3g}",
                    (1.0, level),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color=COLOURS[5],
                )
        axes.plot(pairs.mean(axis=1), pairs[:, 1] - pairs[:, 0], "o", color=COLOURS[6], markersize=4, alpha=0.7)
        axes.set_title(" ".join(name.split())[:40], loc="left", fontsize=10, parse_math=False)
        axes.set_xlabel("mean of the two, mL", fontsize=9)
        axes.set_ylabel("challenger - champion, mL", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(0.08, 0.2)
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    # matplotlib writes its version into the file unless told not to
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean size of the differences as a share of the mean volume."""
    values = np.asarray(pairs, float).reshape(-1, 2)
    mean_ml = float(values.mean()) if values.size else 0.0
    return float(np.abs(values[:, 1] - values[:, 0]).mean()) / mean_ml if mean_ml else 0.0


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
