"""A picture of the rows that answer a question: volumes over nights, or their distribution, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from vnet_core.colours import COLOURS

_ON_WHITE = (6, 0, 4, 3, 5, 1, 2)
"""The order in which series take the colours, those that stand out from white first."""
SERIES = len(COLOURS)
"""Most series in one picture."""
DECADES = 50.0
"""Volumes that differ by more than this factor are drawn on a logarithmic axis."""


def answer_picture(rows: Sequence[Mapping[str, Any]]) -> tuple[bytes, str] | None:
    """PNG and what it shows in words; None when no row has a night, a name and a volume.

    Rows hold ``night`` (``YYYY-MM-DD_HHMMSS``), ``cohort``, ``case``, ``name`` and ``volume_ml``. Of one night: how the
    volumes of each label are distributed. Of several: a line for each case and label where these are few, else the
    median of each label with the range that holds nine cases of ten. At most ``SERIES`` series, the largest.
    """
    kept = [row for row in rows if row.get("volume_ml") is not None and row.get("name") and row.get("night")]
    if not kept:
        return None
    figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_label = _grouped(kept, ("name",))
    if len({row["night"] for row in kept}) == 1:
        words = _distribution(axes, by_label)
    else:
        by_case = _grouped(kept, ("cohort", "case", "name"))
        if len(by_case) <= SERIES:
            words = _lines(axes, {(case, name): found for (_, case, name), found in by_case.items()})
        else:
            words = _medians(axes, by_label)
    shown = min(len(by_label), SERIES)
    if shown < len(by_label):
        words += f"; {shown} of {len(by_label)} labels"
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    out = io.BytesIO()
    # matplotlib writes its version into the file unless told not to
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue(), words


def _grouped(rows: Sequence[Mapping[str, Any]], by: tuple[str, ...]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows by these columns, the largest group first, at most ``SERIES`` of them when drawn."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(name)) for name in by), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _distribution(axes: Axes, by_label: Mapping[tuple[str, ...], Sequence[Mapping[str, Any]]]) -> str:
    volumes = {name: _volumes(rows) for (name, *_), rows in list(by_label.items())[:SERIES]}
    everything = np.concatenate(list(volumes.values()))
    low, high = float(everything.min()), float(everything.max())
    wide = low > 0 and high / low > DECADES
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, 31) if wide else np.linspace(low, high, 31)
    for place, (name, found) in enumerate(volumes.items()):
        axes.hist(found, edges.tolist(), color=_colour(place), alpha=0.6, label=_legend(name))
    axes.set_xscale("log" if wide else "linear")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("volume (mL)")
    axes.set_ylabel("cases")
    return "how many cases have which volume"


def _lines(axes: Axes, series: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    for place, ((case, name), rows) in enumerate(series.items()):
        ordered = sorted(rows, key=lambda row: row["night"])
        marker = "o" if len(ordered) <= 30 else ""
        axes.plot(
            np.array([_moment(row["night"]) for row in ordered]),
            _volumes(ordered),
            color=_colour(place),
            marker=marker,
            markersize=4,
            label=_legend(f"{case} {name}"),
        )
    _over_nights(axes)
    return "the volume of each case over the nights"


def _medians(axes: Axes, by_label: Mapping[tuple[str, ...], Sequence[Mapping[str, Any]]]) -> str:
    for place, ((name, *_), rows) in enumerate(list(by_label.items())[:SERIES]):
        nights = _grouped(rows, ("night",))
        ordered = sorted(nights)
        moments = np.array([_moment(night) for (night,) in ordered])
        low, middle, high = np.array([np.percentile(_volumes(nights[night]), (5, 50, 95)) for night in ordered]).T
        axes.fill_between(moments, low, high, color=_colour(place), alpha=0.15, linewidth=0)
        axes.plot(moments, middle, color=_colour(place), linewidth=1.8, label=_legend(name))
    _over_nights(axes)
    return "the median volume over the nights, and the range that holds nine cases of ten"


def _over_nights(axes: Axes) -> None:
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_ylabel("volume (mL)")
    axes.set_ylim(bottom=0)


def _volumes(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["volume_ml"] for row in rows], float)


def _moment(night: str) -> np.datetime64:
    """The start of a night, to the second."""
    day, _, clock = night.partition("_")
    return np.datetime64(f"{day}T{clock[:2]}:{clock[2:4]}:{clock[4:6]}" if len(clock) == 6 else day, "s")


def _colour(place: int) -> str:
    return COLOURS[_ON_WHITE[place % len(COLOURS)]]


def _legend(name: str) -> str:
    # a legend leaves out what begins with an underscore
    return f" {name[:40]}"
