"""Surface elements and distances: with a pencil, and against the reference implementation of their definition."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from vnet_core import surface
from vnet_core.errors import ConfigError, ScanError
from vnet_core.surface import SurfaceDistances, element_areas_mm2, surface_distances, surface_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
    from surface_distance import lookup_tables

pytestmark = pytest.mark.filterwarnings("ignore:.*ndimage.*:DeprecationWarning")

EIGHTH = math.sqrt(3) / 8
"""Area of the triangle that cuts one corner off a unit cell."""


def box(shape: tuple[int, int, int], *spans: tuple[int, int]) -> np.ndarray:
    """Bool, true from start to stop along each axis."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


# --- areas


@pytest.mark.parametrize(
    ("corners", "area"),
    [
        (0b00000000, 0),
        (0b00000001, EIGHTH),
        (0b00000011, math.sqrt(2) / 2),  # an edge: a sloping rectangle
        (0b00001001, 2 * EIGHTH),  # two corners across a face are cut off separately
        (0b10000001, 2 * EIGHTH),  # and across the cell
        (0b00001111, 1),  # a face: the flat middle
        (0b00010111, 3 * math.sqrt(3) / 4),  # a corner and its three neighbours: a regular hexagon
        (0b11111110, EIGHTH),  # inside and outside exchanged
        (0b11111111, 0),
    ],
)
def test_areas_of_a_unit_cell(corners, area):
    assert element_areas_mm2((1, 1, 1))[corners] == pytest.approx(area)


def test_areas_of_a_stretched_cell():
    # a face normal to z is 2 x 4 mm wide; one corner is cut off by the triangle with legs 1.5, 1 and 2 mm
    areas = element_areas_mm2((3, 2, 4))
    assert areas[0b00001111] == pytest.approx(8)
    assert areas[0b01010101] == pytest.approx(6)  # x = 0: y, z
    legs = np.array([1.5, 1, 2])
    expected = np.linalg.norm([legs[1] * legs[2], legs[0] * legs[2], legs[0] * legs[1]]) / 2
    assert areas[0b00000001] == pytest.approx(expected)


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1, 2, 4), (0.7, 3.1, 0.33)])
def test_areas_of_all_cells_are_those_of_the_reference(spacing_mm):
    weights = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel()
    theirs = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    order = [sum(int(weights[bit]) for bit in range(8) if code >> bit & 1) for code in range(256)]
    np.testing.assert_allclose(element_areas_mm2(spacing_mm), theirs[order], rtol=1e-12)


def test_the_surface_of_a_single_voxel():
    # eight corners of a voxel, each with one voxel inside
    found = surface_of(box((1, 1, 1), (0, 1), (0, 1), (0, 1)), (1, 1, 1))
    np.testing.assert_array_equal(found.corners, np.argwhere(np.ones((2, 2, 2))))
    np.testing.assert_allclose(found.areas_mm2, EIGHTH)


def test_a_surface_does_not_depend_on_how_it_is_cut_into_slabs(monkeypatch):
    mask = np.random.default_rng(0).random((7, 5, 6)) < 0.4
    whole = surface_of(mask, (1, 2, 3))
    monkeypatch.setattr(surface, "SLAB_VOXELS", 1)
    sliced = surface_of(mask, (1, 2, 3))
    np.testing.assert_array_equal(whole.corners, sliced.corners)
    np.testing.assert_array_equal(whole.areas_mm2, sliced.areas_mm2)


def test_an_empty_mask_has_no_surface():
    found = surface_of(np.zeros((3, 4, 5), bool), (1, 1, 1))
    assert found.corners.shape == (0, 3)
    assert found.areas_mm2.shape == (0,)


# --- distances


def test_two_voxels_apart():
    # voxels 3 and 6 along x at 2 mm: the corners 3, 4 and 6, 7; 4 -> 6 is 4 mm, 3 -> 6 is 6 mm
    prediction, truth = box((1, 1, 9), (0, 1), (0, 1), (3, 4)), box((1, 1, 9), (0, 1), (0, 1), (6, 7))
    found = surface_distances(prediction, truth, (5, 5, 2))
    np.testing.assert_array_equal(found.to_truth_mm, [4] * 4 + [6] * 4)
    np.testing.assert_array_equal(found.to_prediction_mm, [4] * 4 + [6] * 4)
    assert found.hausdorff_mm() == 6
    assert found.hausdorff_mm(50) == 4
    assert found.average_mm() == pytest.approx((5, 5))
    assert (found.assd_mm(), found.abd_mm()) == pytest.approx((5, 5))
    assert found.overlap(4) == pytest.approx((0.5, 0.5))
    assert [found.dice(tolerance) for tolerance in (0, 3.9, 4, 6)] == pytest.approx([0, 0, 0.5, 1])


@pytest.mark.parametrize(("axis", "expected"), [(0, 3.0), (1, 0.5), (2, 0.7)])
def test_a_shift_by_one_voxel_is_the_spacing_of_its_axis(axis, expected):
    mask = box((9, 9, 9), (2, 6), (2, 6), (2, 6))
    found = surface_distances(np.roll(mask, 1, axis), mask, (3.0, 0.5, 0.7))
    assert found.hausdorff_mm() == pytest.approx(expected)


def test_a_longer_box_sticks_out_by_two_voxels():
    truth, prediction = box((12, 6, 6), (1, 5), (1, 5), (1, 5)), box((12, 6, 6), (1, 7), (1, 5), (1, 5))
    found = surface_distances(prediction, truth, (1.5, 1, 1))
    assert found.hausdorff_mm() == 3.0  # the far face
    assert found.to_prediction_mm.max() == 2.0  # the middle of the near face, to the sides of the longer box


def test_a_mask_and_itself():
    mask = box((5, 6, 7), (1, 3), (2, 5), (0, 7))
    found = surface_distances(mask, mask, (2, 1, 0.5))
    assert (found.hausdorff_mm(), found.assd_mm(), found.abd_mm(), found.dice(0)) == (0, 0, 0, 1)


def test_average_surface_distance_weighs_area_and_average_boundary_distance_does_not():
    found = SurfaceDistances(np.array([0.0, 4.0]), np.array([3.0, 1.0]), np.array([2.0]), np.array([4.0]))
    assert found.average_mm() == (1.0, 2.0)
    assert found.assd_mm() == (4 * 1 + 2 * 4) / 8
    assert found.abd_mm() == 2.0


def test_a_spacing_kept_as_float32_does_not_decide_about_a_tolerance():
    prediction, truth = box((1, 1, 9), (0, 1), (0, 1), (0, 1)), box((1, 1, 9), (0, 1), (0, 1), (6, 7))
    spacing = float(np.float32(0.2))
    assert 5 * spacing > 1
    assert surface_distances(prediction, truth, (1, 1, spacing)).dice(1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("empty", ["prediction", "truth"])
def test_one_empty_mask_is_infinitely_far(empty):
    full, none = box((3, 3, 3), (1, 2), (1, 2), (1, 2)), np.zeros((3, 3, 3), bool)
    pair = (none, full) if empty == "prediction" else (full, none)
    found = surface_distances(*pair, (1, 1, 1))
    assert (found.hausdorff_mm(), found.hausdorff_mm(95)) == (math.inf, math.inf)
    assert (found.assd_mm(), found.abd_mm()) == (math.inf, math.inf)
    assert found.average_mm() == (math.inf, math.inf)
    assert found.dice(1000) == 0
    of_prediction, of_truth = found.overlap(1000)
    assert math.isnan(of_prediction) == (empty == "prediction")
    assert math.isnan(of_truth) == (empty == "truth")


def test_two_empty_masks_have_no_distance():
    none = np.zeros((3, 3, 3), bool)
    found = surface_distances(none, none, (1, 1, 1))
    figures = [found.hausdorff_mm(), found.assd_mm(), found.abd_mm(), *found.average_mm(), found.dice(1)]
    assert all(math.isnan(figure) for figure in [*figures, *found.overlap(1)])


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ScanError, match=r"\(1, 2, 3\).*\(1, 3, 2\)") as caught:
        surface_distances(np.zeros((1, 2, 3), bool), np.zeros((1, 3, 2), bool), (1, 1, 1))
    assert caught.value.code == "metrics.shape"


@pytest.mark.parametrize("tolerance_mm", [-1.0, math.nan])
def test_a_tolerance_below_zero_is_refused(tolerance_mm):
    mask = np.ones((1, 1, 1), bool)
    with pytest.raises(ConfigError) as caught:
        surface_distances(mask, mask, (1, 1, 1)).dice(tolerance_mm)
    assert caught.value.code == "metrics.tolerance"


# --- against others


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two related masks, from specks to blobs that touch the edge, on an anisotropic grid."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 20, 3))
    field = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0, 2))
    other = field + rng.uniform(0, 1) * ndimage.gaussian_filter(rng.normal(size=shape), 1)
    masks = [f >= np.quantile(f, rng.uniform(0.2, 0.97)) for f in (field, other)]
    z, y, x = rng.uniform(0.3, 4, 3)
    return masks[0], masks[1], (float(z), float(y), float(x))


def test_500_random_anisotropic_masks_agree_with_the_reference_to_a_millionth():
    for seed in range(500):
        prediction, truth, spacing_mm = random_pair(seed)
        assert prediction.any()
        assert truth.any()
        tolerance_mm = 0.5 + seed % 4
        found = surface_distances(prediction, truth, spacing_mm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = surface_distance.compute_surface_distances(truth, prediction, spacing_mm)
        to_prediction, to_truth = surface_distance.compute_average_surface_distance(theirs)
        of_truth, of_prediction = surface_distance.compute_surface_overlap_at_tolerance(theirs, tolerance_mm)
        np.testing.assert_allclose(
            [
                found.hausdorff_mm(),
                found.hausdorff_mm(95),
                *found.average_mm(),
                *found.overlap(tolerance_mm),
                found.dice(tolerance_mm),
            ],
            [
                surface_distance.compute_robust_hausdorff(theirs, 100),
                surface_distance.compute_robust_hausdorff(theirs, 95),
                to_truth,
                to_prediction,
                of_prediction,
                of_truth,
                surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance_mm),
            ],
            rtol=0,
            atol=1e-6,
            err_msg=f"seed {seed}",
        )


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_the_worked_example_of_the_documentation():
    """A 2-voxel prediction of a 4-voxel bar: MONAI measures between voxel centres, we between surfaces."""
    truth, prediction = box((1, 1, 8), (0, 1), (0, 1), (2, 6)), box((1, 1, 8), (0, 1), (0, 1), (2, 4))
    ours = surface_distances(prediction, truth, (1, 1, 1))
    assert (ours.hausdorff_mm(), ours.abd_mm()) == (2.0, 0.375)
    slope, corner = math.sqrt(2) / 2, EIGHTH  # areas along the bar and at its ends
    both = 4 * (3 * slope + 2 * corner) + 4 * (slope + 2 * corner)
    assert ours.assd_mm() == pytest.approx(4 * (1 * slope + 2 * corner) / both)
    assert round(ours.assd_mm(), 3) == 0.309
    pair = [torch.from_numpy(m)[None, None].float() for m in (prediction, truth)]
    theirs = compute_hausdorff_distance(*pair, include_background=True)
    average = compute_average_surface_distance(*pair, include_background=True, symmetric=True)
    assert (float(theirs), float(average)) == (2.0, pytest.approx(0.5))


def test_distances_grow_with_the_shift():
    mask = box((8, 8, 30), (2, 6), (2, 6), (1, 9))
    shifted = [surface_distances(np.roll(mask, n, 2), mask, (1, 1, 1)).assd_mm() for n in range(8)]
    assert all(a < b for a, b in pairwise(shifted))
