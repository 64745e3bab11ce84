"""Curves as PNG bytes, such as those of a training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vnet_core.colours import COLOURS

_ON_WHITE = (6, 0, 4, 3, 5, 1, 2)
"""The order in which curves take the colours, those that stand out from white first."""


def curve_picture(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, title: str) -> bytes:
    """Lines over a common x axis as PNG; ``series`` maps names to (x, y) points, drawn in their order.

    Points that are not finite leave a gap. The same series give the same bytes with one version of matplotlib.
    """
    figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(series.items()):
        xy = np.asarray(points, float).reshape(-1, 2)
        colour = COLOURS[_ON_WHITE[i % len(COLOURS)]]
        marker = "o" if len(xy) <= 30 else ""
        axes.plot(xy[:, 0], xy[:, 1], color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False)
    out = io.BytesIO()
    # matplotlib writes its version into the file unless told not to
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
