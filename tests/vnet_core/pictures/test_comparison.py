"""Champion against challenger: figures by pencil, pictures by what must be in them."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from vnet_core.colours import rgb
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry
from vnet_core.pictures.comparison import MAX_BYTES, Overlap, agreement_picture, bland_altman, overlaps, two_outlines

GRID = Geometry((12, 20, 16), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))


# --- overlaps


def test_overlaps_by_pencil():
    champion = np.array([[[1, 1, 0, 5], [0, 0, 5, 5]]], np.uint8)
    challenger = np.array([[[2, 0, 2, 7], [0, 2, 7, 0]]], np.uint16)
    liver, tumour = overlaps(champion, challenger, [(1, 2), (5, 7)])
    assert liver == Overlap(champion=2, challenger=3, common=1)
    assert liver.dice == pytest.approx(2 / 5)
    assert tumour == Overlap(3, 2, 2)
    assert tumour.dice == pytest.approx(4 / 5)


def test_overlaps_are_those_of_masks_taken_one_by_one():
    generator = np.random.default_rng(3)
    champion, challenger = (generator.choice([0, 3, 4, 900], size=(7, 9, 8)).astype(np.uint16) for _ in range(2))
    values = [(900, 3), (3, 3), (4, 900)]
    for found, (first, second) in zip(overlaps(champion, challenger, values), values, strict=True):
        ours, theirs = champion == first, challenger == second
        assert (found.champion, found.challenger, found.common) == (ours.sum(), theirs.sum(), (ours & theirs).sum())


def test_where_both_are_empty_there_is_nothing_to_agree_on():
    nothing = np.zeros((2, 3, 4), np.uint8)
    (both,) = overlaps(nothing, nothing, [(1, 1)])
    assert both == Overlap(0, 0, 0)
    assert math.isnan(both.dice)
    (one,) = overlaps(nothing, nothing + 1, [(1, 1)])
    assert one.dice == 0
    assert overlaps(nothing, nothing, []) == []


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ScanError) as caught:
        overlaps(np.zeros((2, 3, 4), np.uint8), np.zeros((2, 4, 3), np.uint8), [(1, 1)])
    assert caught.value.code == "metrics.shape"


# --- volumes


def test_bland_altman_by_pencil():
    # differences 1, 2, 3: mean 2, deviation 1; t of 2 degrees of freedom at 97.5 % is 4.3027
    found = bland_altman([10, 20, 30], [11, 22, 33])
    assert (found.cases, found.bias_ml) == (3, 2)
    assert (found.low_ml, found.high_ml) == (pytest.approx(0.04), pytest.approx(3.96))
    half = 4.302653 / math.sqrt(3)
    assert (found.bias_low_ml, found.bias_high_ml) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_a_bias_below_zero_is_a_smaller_challenger():
    assert bland_altman([10, 10], [8, 8]).bias_ml == -2


def test_one_case_has_a_difference_and_no_spread():
    one = bland_altman([10], [11.5])
    assert (one.cases, one.bias_ml, one.low_ml, one.high_ml, one.bias_low_ml) == (1, 1.5, None, None, None)
    none = bland_altman([], [])
    assert (none.cases, none.bias_ml) == (0, None)


# --- pictures


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


@pytest.mark.parametrize("labels", [0, 1, 2, 9])
def test_a_plot_of_volumes_is_a_small_png_whatever_the_names(labels):
    volumes = {f"$x_{n}$ <b>|": [(10.0 + n, 11.0), (20.0, 19.0), (0.0, 0.0)] for n in range(labels)}
    png = agreement_picture(volumes, "liver@v2 against $\\frac$")
    assert opened(png).format == "PNG"
    assert len(png) < 120_000
    assert png == agreement_picture(volumes, "liver@v2 against $\\frac$")


def test_a_plot_shows_the_structures_that_differ_most():
    same = {f"same {n}": [(10.0, 10.0), (20.0, 20.0)] for n in range(6)}
    drawn = agreement_picture({**same, "other": [(10.0, 15.0), (20.0, 27.0)]}, "t")
    assert drawn != agreement_picture(same, "t")


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
