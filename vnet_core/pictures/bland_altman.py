"""The volumes of two models on the same scans as Bland-Altman plots."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vnet_core.challenge import bland_altman
from vnet_core.colours import COLOURS

PANELS = 6
"""Most structures in a picture of volumes."""


def bland_altman_picture(volumes: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
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
