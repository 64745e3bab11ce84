"""Curves are read back as pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from vnet_core.colours import COLOURS
from vnet_core.pictures.curves import curve_picture


def pixels(png: bytes) -> np.ndarray:
    """RGB (H, W, 3)."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


def count(png: bytes, colour: str) -> int:
    """Pixels of exactly a colour, given as #RRGGBB."""
    return int(np.all(pixels(png) == list(bytes.fromhex(colour[1:])), axis=2).sum())


def test_curves_are_drawn_in_colours_of_their_own_and_in_the_same_bytes():
    series = {"loss": [(i, 1 / (1 + i)) for i in range(200)], "Dice": [(i, i / 200) for i in range(0, 200, 20)]}
    png = curve_picture(series, "step", "loss, Dice", "a model")
    assert curve_picture(series, "step", "loss, Dice", "a model") == png
    assert count(png, COLOURS[6]) > 100
    assert count(png, COLOURS[0]) > 100
    without = curve_picture({"loss": series["loss"]}, "step", "loss, Dice", "a model")
    assert count(without, COLOURS[0]) == 0


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(0.0, float("nan")), (1.0, 0.5), (2.0, float("inf"))]])
def test_curves_with_little_to_show(points):
    assert pixels(curve_picture({"Dice": points}, "step", "Dice", "a model")).shape == (440, 792, 3)


def test_a_figure_without_curves():
    assert pixels(curve_picture({}, "step", "Dice", "a model")).shape == (440, 792, 3)
