"""Plots of a night's report as small PNGs: volumes, nights, seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from vnet_core.colours import COLOURS

LABELS = 12
"""Most labels of one plot."""
MARKED = 3
"""Most outliers of one label that are named; all are marked."""
_WIDTH_INCHES, _DPI = 5.6, 130
"""Narrow, with text that can still be read when a phone shows the plot 340 pixels wide."""
_LEVELS = 48
"""Colours of the PNG; smooth text needs no more, and it is a third of the size."""
_GREY, _INK, _ALARM = "#9aa5ae", "#1d2329", "#c1121f"
_STATES = {
    "computed": "#0072B2",
    "cached": "#56B4E9",
    "carried-over": "#F0E442",
    "refused": "#CC79A7",
    "failed": _ALARM,
}
"""Colour of each state, from the bottom of a bar to its top."""
_ON_WHITE = (6, 0, 4, 3, 5, 1, 2)
"""The order in which lines take the colours of labels, those that stand out from white first."""
_NAME_CHARACTERS = 22


@dataclass(frozen=True, slots=True)
class Mark:
    """A volume that stands out."""

    case: str
    volume_ml: float


def volumes_plot(volumes_ml: Mapping[str, Sequence[float]], outliers: Mapping[str, Sequence[Mark]]) -> bytes:
    """Volumes of each label along one logarithmic axis, with the quartiles and tonight's outliers, as PNG.

    ``volumes_ml`` has all volumes of a label, its outliers included; those of 0, which a logarithm cannot show, are
    counted beside its name. Only the first ``LABELS`` labels are drawn.
    """
    names = list(volumes_ml)[:LABELS]
    figure, axes = _figure(1.45 + 0.55 * max(1, len(names)))
    for place, name in enumerate(names):
        positive = np.sort([volume for volume in volumes_ml[name] if volume > 0])
        if len(positive):
            # points of one value lie above one another; the same points each time
            spread = (np.arange(len(positive)) * 0.618034 % 1 - 0.5) * 0.44
            axes.scatter(positive, place + spread, s=9, color=_GREY, alpha=0.6, linewidths=0, rasterized=True)
            low, middle, high = np.percentile(positive, (25, 50, 75))
            axes.plot([low, high], [place, place], color=COLOURS[6], linewidth=4, alpha=0.55, solid_capstyle="butt")
            axes.plot([middle, middle], [place - 0.26, place + 0.26], color=COLOURS[6], linewidth=2)
        marks = [mark for mark in outliers.get(name, ()) if mark.volume_ml > 0]
        axes.scatter([m.volume_ml for m in marks], [place] * len(marks), s=46, marker="D", color=_ALARM, zorder=3)
        for number, mark in enumerate(marks[:MARKED]):
            above = number % 2 == 0
            axes.annotate(
                _plain(mark.case),
                (mark.volume_ml, place),
                xytext=(0, 9 if above else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=9,
                color=_ALARM,
                annotation_clip=False,
            )
    empty = {name: sum(volume <= 0 for volume in volumes_ml[name]) for name in names}
    ticks = [_plain(name) + (f"\n{empty[name]} empty" if empty[name] else "") for name in names]
    axes.set_yticks(range(len(names)), ticks)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _logarithmic(axes, [volume for name in names for volume in volumes_ml[name] if volume > 0])
    axes.set_xlabel("mL")
    marked = any(outliers.get(name) for name in names)
    _title(axes, f"Volumes{_shown(len(names), len(volumes_ml))}", "outliers of tonight in red" if marked else "")
    return _png(figure)


def counts_plot(nights: Sequence[str], cases: Mapping[str, Sequence[int]]) -> bytes:
    """Cases by state, night by night, as stacked bars, PNG; ``cases`` maps states to one number per night.

    States without a case are left out; unknown ones are grey.
    """
    figure, axes = _figure(2.9)
    bottom = np.zeros(len(nights))
    order = [*(state for state in _STATES if state in cases), *(state for state in cases if state not in _STATES)]
    for state in order:
        numbers = np.asarray(cases[state], float)
        if numbers.any():
            axes.bar(range(len(nights)), numbers, bottom=bottom, color=_STATES.get(state, _GREY), label=_plain(state))
            bottom += numbers
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _nights(axes, nights)
    _title(axes, "Cases by night")
    if bottom.any():
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return _png(figure)


def medians_plot(nights: Sequence[str], median_ml: Mapping[str, Sequence[float | None]]) -> bytes:
    """How the median volume of each label went over the nights, in percent of its first one, as PNG.

    In percent, because a shift of the model of a few percent would not be seen on an axis of mL; the last value in mL
    stands beside the name. None and 0 leave a gap. The first 7 labels are drawn.
    """
    figure, axes = _figure(2.9)
    names = [name for name in median_ml if any(median_ml[name])][: len(COLOURS)]
    largest = 0.0
    for place, name in enumerate(names):
        values = np.array([value or math.nan for value in median_ml[name]])
        there = values[~np.isnan(values)]
        percent = 100 * (values / there[0] - 1)
        largest = max(largest, float(np.nanmax(np.abs(percent))))
        colour, label = COLOURS[_ON_WHITE[place]], f"{_plain(name)}, {there[-1]:.3g} mL"
        axes.plot(range(len(nights)), percent, "o-", color=colour, markersize=4, linewidth=1.8, label=label)
    axes.set_ylim(-1.15 * max(1.0, largest), 1.15 * max(1.0, largest))
    axes.axhline(0, color=_GREY, linewidth=1, zorder=0)
    axes.set_ylabel("%")
    _nights(axes, nights)
    known = sum(any(values) for values in median_ml.values())
    _title(axes, f"Median volume{_shown(len(names), known)}", "change since the first night shown")
    if names:
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return _png(figure)


def seconds_plot(seconds: Sequence[float]) -> bytes:
    """How long the cases took, as a histogram with its median, PNG; ``seconds`` are those of at least one case."""
    figure, axes = _figure(2.5)
    values = np.asarray(seconds, float)
    axes.hist(values, bins=min(30, max(5, round(2 * len(values) ** 0.5))), color=COLOURS[1])
    middle = float(np.median(values))
    axes.axvline(middle, color=COLOURS[6], linewidth=2)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("cases")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _title(axes, "Seconds per case", f"median {middle:.3g} s, longest {values.max():.3g} s")
    return _png(figure)


def _figure(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#e3e7ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, colors=_INK)
    return figure, axes


def _title(axes: Axes, text: str, note: str = "") -> None:
    axes.set_title(text, loc="left", fontsize=12, color=_INK)
    if note:
        axes.set_title(note, loc="right", fontsize=9, color=_GREY if "outliers" not in note else _ALARM)


def _shown(shown: int, known: int) -> str:
    return f", {shown} of {known} labels" if shown < known else ""


def _nights(axes: Axes, nights: Sequence[str]) -> None:
    """At most six nights are named, the last one always."""
    step = max(1, math.ceil(len(nights) / 6))
    places = list(range(len(nights) - 1, -1, -step))
    axes.set_xticks(places, [_plain(nights[place]) for place in places])
    axes.set_xlim(-0.6, max(4.6, len(nights) - 0.4))
    axes.grid(visible=False, axis="x")


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers and a little room."""
    if not values:
        return
    low, high = min(values), max(values)
    room = max(1.15, (high / low) ** 0.06)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    decades = math.log10(high / low * room**2)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(range(1, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plain(text: str) -> str:
    """Text that is drawn as it is: dollar signs would begin a formula; the end of long names is cut off."""
    if len(text) > _NAME_CHARACTERS:
        text = f"{text[: _NAME_CHARACTERS - 1]}…"
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    out = io.BytesIO()
    picture.quantize(_LEVELS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
