"""The colours of labels, the same in every picture and in every mask file."""

from __future__ import annotations

COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
"""Okabe and Ito's colours for every kind of colour vision, in the order in which labels take them."""


def rgb(index: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of the label at this place, counted from 0; after the last colour the first."""
    red, green, blue = bytes.fromhex(COLOURS[index % len(COLOURS)][1:])
    return red, green, blue
