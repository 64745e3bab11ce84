"""Plots are read back as pixels: what stands out is there, sizes, names, and the same bytes each time."""

import io

import numpy as np
import pytest
from PIL import Image

from vnet_core.pictures.plots import LABELS, Mark, counts_plot, medians_plot, seconds_plot, volumes_plot

RED, YELLOW, DARK_BLUE = (193, 18, 31), (240, 228, 66), (0, 114, 178)
NIGHTS = [f"{day} Nov" for day in range(1, 31)]
VOLUMES = {"liver": [1400.0, 1500.0, 1600.0, 5400.0], "spleen": [200.0, 210.0, 0.0]}


def pixels(png: bytes) -> np.ndarray:
    """RGB (H, W, 3)."""
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def near(png: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has about this colour."""
    return np.abs(pixels(png) - colour).max(axis=2) < 14


def test_an_outlier_is_marked_in_its_row_and_at_its_volume():
    marked = near(volumes_plot(VOLUMES, {"liver": [Mark("case-7", 5400.0)]}), RED)
    rows, columns = np.nonzero(marked)
    height, width = marked.shape
    # the first row, and the right end of the axis, since it is the largest volume
    inside = rows > 0.15 * height
    assert inside.sum() > 60
    assert rows[inside].max() < 0.55 * height
    assert np.median(columns[inside]) > 0.8 * width
    assert near(volumes_plot(VOLUMES, {}), RED).sum() == 0


def test_what_is_carried_over_is_a_part_of_its_bar():
    cases = {"computed": [10] * 30, "carried-over": [0] * 29 + [10]}
    columns = np.nonzero(near(counts_plot(NIGHTS, cases), YELLOW))[1]
    bar = columns > 0.9 * pixels(counts_plot(NIGHTS, cases)).shape[1]
    assert bar.sum() > 200
    assert np.ptp(columns[bar]) < 30
    assert near(counts_plot(NIGHTS, {"computed": [10] * 30}), YELLOW).sum() == 0


def test_a_median_that_rises_by_a_tenth_rises_in_the_plot():
    drawn = near(medians_plot(NIGHTS, {"liver": [1500.0] * 29 + [1650.0]}), DARK_BLUE)
    line = drawn[: int(0.75 * drawn.shape[0])]
    first, last = (np.nonzero(line[:, part])[0].mean() for part in (slice(80, 300), slice(-40, None)))
    assert last < first - 50


def test_the_longest_case_is_at_the_right_end():
    drawn = near(seconds_plot([1.0] * 20 + [60.0]), (86, 180, 233))
    columns = np.nonzero(drawn.any(axis=0))[0]
    assert columns[0] < 0.3 * drawn.shape[1]
    assert columns[-1] > 0.9 * drawn.shape[1]


PLOTS = {
    "nothing": lambda name: volumes_plot({}, {}),
    "only empty": lambda name: volumes_plot({name: [0.0, 0.0]}, {name: [Mark(name, 0.0)]}),
    "one": lambda name: volumes_plot({name: [3.0]}, {name: [Mark(name, 3.0)]}),
    "equal": lambda name: volumes_plot({name: [3.0] * 500}, {}),
    "many labels": lambda name: volumes_plot({f"{n}{name}": [1.0 + n] for n in range(104)}, {}),
    "far apart": lambda name: volumes_plot({name: [1e-4, 1e5]}, {}),
    "one night": lambda name: counts_plot([name], {"failed": [1], name: [2]}),
    "no case": lambda name: counts_plot([name, name], {}),
    "a gap": lambda name: medians_plot(NIGHTS, {name: [None] * 29 + [2.0], "gone": [None] * 30, "zero": [0.0] * 30}),
    "one second": lambda name: seconds_plot([0.0]),
    "many": lambda name: seconds_plot(list(np.linspace(0, 900, 10_000))),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
@pytest.mark.parametrize("name", ["liver", r"$\frac{1}$ of_^{", "a name that is much too long for its place " * 5])
def test_any_night_and_any_name_has_its_plot(plot, name):
    png = plot(name)
    height, width, _ = pixels(png).shape
    assert width == 728
    assert 250 < height < 1_300
    assert len(png) < 40_000


def test_more_labels_than_fit_are_counted():
    known = {f"label {n}": [1.0] for n in range(LABELS + 5)}
    fewer = {f"label {n}": [1.0] for n in range(LABELS)}
    assert pixels(volumes_plot(known, {})).shape == pixels(volumes_plot(fewer, {})).shape
    assert volumes_plot(known, {}) != volumes_plot(fewer, {})


def test_the_same_night_gives_the_same_bytes():
    assert volumes_plot(VOLUMES, {}) == volumes_plot(VOLUMES, {})
