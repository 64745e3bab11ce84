"""A network as a picture: its stages as a U, with channels, grids, skips and what joins them."""

from __future__ import annotations

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from vnet_core.networks.describe import Description
from vnet_core.networks.layout import decoder_widths, encoder_widths, rising_widths

INK, GREY = "#1f2933", "#7b8794"
DOWN, BOTTOM, UP, END = "#d6e6f5", "#e3dcf2", "#d5ecdf", "#f2f4f6"
HALF_HEIGHT = 0.3
STEP = 1.35
"""From one level to the next."""
ACTIVATIONS = {"prelu": "PReLU", "elu": "ELU", "relu": "ReLU", "leaky-relu": "leaky ReLU"}


def network_picture(description: Description, title: str, form: Literal["png", "svg"]) -> bytes:
    """The network as PNG or SVG; the same description gives the same bytes with one version of matplotlib."""
    plan = description.plan
    bottom = plan.levels - 1
    figure = Figure(figsize=(12.5, 1.85 + 1.2 * plan.levels), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    axes.set_xlim(-8.4, 8.4)
    axes.set_ylim(-STEP * bottom - 0.65, 2.05)
    grids = [tuple(n >> level for n in description.grid) for level in range(plan.levels)]
    widths, above, rising = encoder_widths(plan), decoder_widths(plan), rising_widths(plan)
    halves = [_half_width(level, plan.levels) for level in range(plan.levels)]
    kernel = f"{plan.kernel_size}³"

    def across(level: int) -> float:
        """Distance of a stage from the middle."""
        return 0.0 if level == bottom else 5.0 - 2.9 * level / bottom

    for level, width in enumerate(widths):
        x, y, half = -across(level), -STEP * level, halves[level]
        name = "bottom" if level == bottom else f"L{level + 1}"
        colour = BOTTOM if level == bottom else DOWN
        _stage(axes, (x, y), half, colour, (name, f"{width} ch · {plan.convolutions[level]} x {kernel}"))
        if level == bottom:
            break
        axes.text(x - half - 0.15, y, _times(grids[level]), ha="right", va="center", fontsize=8.5, color=GREY)
        _stage(
            axes, (-x, y), half, UP, (f"R{level + 1}", f"{above[level]} ch · {plan.convolutions_up[level]} x {kernel}")
        )
        _arrow(axes, (x + half, y), (-x - half, y), dashed=True)
        axes.text(0, y + 0.07, f"skip {width} ch", ha="center", va="bottom", fontsize=8.5, color=GREY)
        deeper = across(level + 1)
        _arrow(axes, (x + 0.25, y - HALF_HEIGHT), (-deeper - 0.35, y - STEP + HALF_HEIGHT))
        _arrow(axes, (deeper + 0.35, y - STEP + HALF_HEIGHT), (-x - 0.25, y - HALF_HEIGHT))
        middle = ((deeper + 0.1 - x) / 2 + 0.16, y - STEP / 2 - 0.08)
        axes.text(*middle, f"{rising[level]} ch", ha="left", va="center", fontsize=8.5, color=GREY)
        if level and plan.deep_supervision != "none":
            told = "1³ to the logits" if plan.deep_supervision == "aggregate" else "1³ to logits of its own"
            axes.text(-x + half + 0.15, y, told, ha="left", va="center", fontsize=8.5, color=GREY)
    axes.text(0, -STEP * bottom - HALF_HEIGHT - 0.1, _times(grids[-1]), ha="center", va="top", fontsize=8.5, color=GREY)
    _ends(axes, description, across(0), halves[0])
    _words(axes, description, title)
    out = io.BytesIO()
    # neither the version nor the day of writing goes into the file
    metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    figure.savefig(out, format=form, metadata=metadata)
    return out.getvalue()


def _half_width(level: int, levels: int) -> float:
    """Boxes become narrower as grids become smaller."""
    return 1.15 - 0.12 * min(level, 5) if level < levels - 1 else 1.0


def _times(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))


def _stage(axes: Axes, centre: tuple[float, float], half: float, colour: str, lines: tuple[str, str]) -> None:
    x, y = centre
    box = FancyBboxPatch(
        (x - half, y - HALF_HEIGHT),
        2 * half,
        2 * HALF_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour,
        edgecolor=INK,
        linewidth=0.9,
    )
    axes.add_patch(box)
    axes.text(x, y + 0.12, lines[0], ha="center", va="center", fontsize=10, color=INK, weight="bold")
    axes.text(x, y - 0.12, lines[1], ha="center", va="center", fontsize=8.5, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "color": GREY if dashed else INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "linestyle": (0, (4, 3)) if dashed else "solid"})


def _ends(axes: Axes, description: Description, across: float, half: float) -> None:
    """The image, the logits, and the outputs of coarser stages."""
    plan = description.plan
    k = plan.head_kernel_size
    head = "1³" if k == 1 else f"{k}³, 1³"
    for side, text in (
        (-1, f"image\n{description.channels} ch"),
        (1, f"logits\n{description.outputs} ch"),
    ):
        axes.text(side * across, 1.02, text, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.3)
    _arrow(axes, (-across, 0.78), (-across, HALF_HEIGHT))
    _arrow(axes, (across, HALF_HEIGHT), (across, 0.78))
    axes.text(across + 0.12, 0.53, f"head {head}", ha="left", va="center", fontsize=8.5, color=GREY)


def _words(axes: Axes, description: Description, title: str) -> None:
    """The title, what it costs, and what the arrows are."""
    plan = description.plan
    facts = (
        f"{description.parameters:,} parameters · {description.macs / 1e9:,.4g} GMAC · "
        f"receptive field {description.receptive_field[-1]} voxels · "
        f"grids (z, y, x) of an image of {_times(description.shape)}"
    )
    axes.text(-8.2, 1.98, title, ha="left", va="top", fontsize=14, color=INK, weight="bold")
    down = "2³ convolution, stride 2" if plan.downsampling == "convolution" else "maximum of 2³"
    up = "2³ transposed convolution" if plan.upsampling == "transposed" else f"{plan.upsampling} interpolation"
    layers = [ACTIVATIONS[plan.activation], f"residual {plan.residual}", f"down: {down}", f"up: {up}"]
    if plan.normalisation != "none":
        layers.insert(0, f"{plan.normalisation} normalisation")
    if plan.deep_supervision != "none":
        layers.append(f"deep supervision {plan.deep_supervision}")
    axes.text(-8.2, 1.62, facts, ha="left", va="center", fontsize=9, color=GREY)
    axes.text(-8.2, 1.4, " · ".join(layers), ha="left", va="center", fontsize=9, color=GREY)
