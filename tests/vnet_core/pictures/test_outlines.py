"""Both outlines are there, each where its mask is, on the slices that differ most."""

import io

import numpy as np
import pytest
from PIL import Image

from vnet_core.colours import rgb
from vnet_core.geometry import Geometry
from vnet_core.pictures.outlines import MAX_BYTES, two_outlines

GRID = Geometry((12, 20, 16), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def drawn(champion: np.ndarray, challenger: np.ndarray, geometry: Geometry = GRID, name: str = "liver") -> Image.Image:
    image = np.random.default_rng(1).integers(0, 1000, geometry.shape).astype(np.int16)
    png = two_outlines(image, champion, challenger, geometry, name)
    assert len(png) <= MAX_BYTES
    return opened(png).convert("RGB")


def ball(shift: int = 0) -> np.ndarray:
    z, y, x = np.indices(GRID.shape)
    return (z - 6) ** 2 * 4 + (y - 10) ** 2 + (x - 8 - shift) ** 2 < 25


def pixels(picture: Image.Image, colour: int) -> np.ndarray:
    """Of one line colour, at full opacity over any grey, below the legend."""
    return (np.abs(np.asarray(picture)[56:].astype(int) - rgb(colour)).sum(axis=2) < 12).nonzero()[1]


def test_both_outlines_are_there_each_where_its_mask_is():
    picture = drawn(ball(-2), ball(3))
    champion, challenger = pixels(picture, 0), pixels(picture, 1)
    assert champion.size > 50
    assert challenger.size > 50
    third = picture.width // 3
    # axial: columns are x
    assert champion[champion < third].mean() < challenger[challenger < third].mean() - 10


def test_one_empty_mask_leaves_the_other_outline():
    picture = drawn(ball(), np.zeros(GRID.shape, bool))
    assert pixels(picture, 0).size > 50
    assert pixels(picture, 1).size == 0
    assert pixels(drawn(np.zeros(GRID.shape, bool), ball()), 1).size > 50


def test_the_slices_are_those_where_they_differ():
    challenger = ball()
    # in one slice, which the ball does not reach: columns 2 to 5 of 16
    challenger[9, 2:6, 2:6] = True
    picture = drawn(ball(), challenger)
    champion, other = pixels(picture, 0), pixels(picture, 1)
    axial = picture.width // 3
    assert champion[champion < axial].size == 0
    assert other[other < axial].size > 20
    assert other[other < axial].max() < axial / 2
    same = pixels(drawn(ball(), ball()), 1)
    assert same[same < axial].max() > axial / 2


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "", "<script>", "肝臓"])
def test_pictures_take_any_name_and_any_mask(name):
    nothing = np.zeros(GRID.shape, bool)
    drawn(nothing, nothing, name=name)
    flat = Geometry((1, 64, 48), (5.0, 0.5, 0.5), (0.0, 0.0, 0.0))
    drawn(np.ones(flat.shape, bool), np.zeros(flat.shape, bool), flat, name)


def test_a_scan_of_one_grey_and_one_with_no_number_are_drawn():
    for value in (7.0, np.nan):
        png = two_outlines(np.full(GRID.shape, value, np.float32), ball(), ball(1), GRID, "liver")
        assert opened(png).size[0] >= 420
