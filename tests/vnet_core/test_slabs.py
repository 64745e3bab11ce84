"""Slab by slab a map is cleaned and measured as it is whole, however thick the slabs are."""

import numpy as np
import pytest
from scipy import ndimage

from vnet_core.geometry import Geometry, matrix_of
from vnet_core.plan import Label, Region
from vnet_core.postprocess import clean
from vnet_core.report import measure, measure_regions
from vnet_core.sections import Cleaning
from vnet_core.slabs import clean_slabs, measure_slabs

LABELS = [Label(value=1, name="one"), Label(value=2, name="two"), Label(value=9, name="absent")]
REGIONS = [Region(name="both", values=(1, 2), paints=1), Region(name="none", values=(9,), paints=9)]
OBLIQUE = matrix_of([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])


def some_map(seed: int, shape=(17, 12, 13), share: float = 0.3, sigma: float = 0.6) -> np.ndarray:
    """Blobs and crumbs of two labels that touch over corners, edges and faces."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(2, *shape)), (0, sigma, sigma, sigma))
    labels = np.zeros(shape, np.uint8)
    for value, field in enumerate(noise, 1):
        labels[field > np.quantile(field, 1 - share)] = value
    return labels


def of(labels: np.ndarray):
    return lambda start, stop: labels[start:stop]


def cleaned(labels: np.ndarray, cleanings, planes: int) -> np.ndarray:
    copy = labels.copy()

    def write(start: int, part: np.ndarray) -> None:
        copy[start : start + len(part)] = part

    # what is read must not change with what is written later
    clean_slabs(lambda start, stop: copy[start:stop].copy(), write, copy.shape, 0.5, cleanings, planes)
    return copy


@pytest.mark.parametrize("planes", [1, 2, 5, 17, 40])
@pytest.mark.parametrize("seed", range(6))
def test_measured_as_the_whole(seed, planes):
    labels = some_map(seed, share=(0.05, 0.3, 0.6)[seed % 3])
    geometry = Geometry(labels.shape, (2.0, 0.5, 0.7), (5.0, -6.0, 7.0), OBLIQUE)
    found = measure_slabs(of(labels), geometry, LABELS, REGIONS, planes)
    assert found.labels == measure(labels, geometry, LABELS)
    assert found.regions == measure_regions(labels, geometry, LABELS, REGIONS)
    for label, (z, y, x) in zip(LABELS, found.along, strict=True):
        np.testing.assert_array_equal(z, np.count_nonzero(labels == label.value, axis=(1, 2)))
        np.testing.assert_array_equal(y, np.count_nonzero(labels == label.value, axis=(0, 2)))
        np.testing.assert_array_equal(x, np.count_nonzero(labels == label.value, axis=(0, 1)))


@pytest.mark.parametrize(
    "cleaning",
    [
        {"keep": "largest"},
        {"minimum_ml": 2.0},
        {"keep": "largest", "minimum_ml": 1e6},
        {"holes": "fill"},
        {"keep": "largest", "holes": "fill"},
    ],
    ids=str,
)
@pytest.mark.parametrize("planes", [1, 3, 40])
@pytest.mark.parametrize("seed", range(6))
def test_cleaned_as_the_whole(seed, planes, cleaning):
    labels = some_map(seed, share=(0.1, 0.35, 0.45)[seed % 3], sigma=0.4 + 0.2 * (seed // 3))
    cleanings = [Cleaning(label=2, **cleaning), Cleaning(label=1, **cleaning), Cleaning(label=9, **cleaning)]
    expected = clean(labels, 0.5, cleanings)
    np.testing.assert_array_equal(cleaned(labels, cleanings, planes), expected)


def test_holes_are_there_to_be_filled():
    shell = np.zeros((9, 9, 9), np.uint8)
    shell[1:8, 1:8, 1:8] = 1
    shell[3:6, 3:6, 3:6] = 0
    found = cleaned(shell, [Cleaning(label=1, holes="fill")], 2)
    assert (found == 1).sum() == 7**3
    leaking = shell.copy()
    leaking[4, 4, 5:] = 0
    assert (cleaned(leaking, [Cleaning(label=1, holes="fill")], 2) == leaking).all()


def test_of_two_largest_the_first_stays_wherever_the_slabs_end():
    labels = np.zeros((6, 3, 8), np.uint8)
    labels[1:4, 1, 6] = 1
    labels[2:5, 1, 1] = 1
    for planes in (1, 2, 3, 6):
        found = cleaned(labels, [Cleaning(label=1, keep="largest")], planes)
        assert np.argwhere(found).tolist() == [[1, 1, 6], [2, 1, 6], [3, 1, 6]]


def test_a_snake_through_many_slabs_is_one_piece():
    """It goes up over corners only, and comes down elsewhere."""
    labels = np.zeros((20, 5, 24), np.uint8)
    for z in range(20):
        labels[z, 1 + z % 2, 1 + z % 2] = 1
        labels[z, 1 + z % 2, 20 + z % 2] = 1
    labels[19, 2, :] = 1
    geometry = Geometry(labels.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    for planes in (1, 4, 19):
        assert measure_slabs(of(labels), geometry, LABELS[:1], (), planes).labels[0].components == 1
