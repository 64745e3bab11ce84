"""Scores that can be checked with a pencil, the cases in which there is nothing to score, and MONAI's overlaps."""

import math
import warnings

import numpy as np
import pytest
import torch

from vnet_core.errors import ConfigError, ScanError
from vnet_core.metrics import FIGURES, Structure, dice, score_labels, structures, surface_dice_name
from vnet_core.plan import Label, Region
from vnet_core.surface import surface_distances

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.metrics import ConfusionMatrixMetric, compute_dice, compute_iou

ORGAN, LESION, FAR = Structure("organ", (1,)), Structure("lesion", (2,)), Structure("far", (300,))
CUBE_MM = (1.0, 1.0, 1.0)
HALF_ML = (5.0, 10.0, 10.0)
"""Spacing with voxels of 0.5 mL."""


def mask(*x: int) -> np.ndarray:
    """Bool (1, 1, 8), true at the given x."""
    result = np.zeros((1, 1, 8), bool)
    result[0, 0, list(x)] = True
    return result


def bar(*values: int) -> np.ndarray:
    """Label map (1, 1, N)."""
    return np.array(values, np.uint16).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (mask(1, 2), mask(1, 2), 1.0),
        (mask(1, 2), mask(2, 3), 0.5),
        (mask(1, 2, 3), mask(3), 0.5),
        (mask(1), mask(5), 0.0),
        (mask(), mask(5), 0.0),
        (mask(5), mask(), 0.0),
    ],
)
def test_dice(prediction, truth, expected):
    assert dice(prediction, truth) == expected


def test_dice_of_two_empty_masks_is_not_a_number():
    assert math.isnan(dice(mask(), mask()))


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ScanError, match=r"\(1, 1, 8\).*\(1, 8, 1\)") as caught:
        dice(mask(1), mask(1).reshape(1, 8, 1))
    assert caught.value.code == "metrics.shape"


def test_every_figure_with_a_pencil():
    # three voxels predicted, two true, both of them found; 10 x 10 x 5 mm are 0.5 mL
    score = score_labels(bar(0, 1, 1, 1, 0), bar(0, 1, 1, 0, 0), [ORGAN], HALF_ML)[0]
    assert score.structure == ORGAN
    assert (score.dice, score.iou) == (2 * 2 / 5, 2 / 3)
    assert (score.precision, score.recall) == (2 / 3, 1.0)
    assert (score.volume_ml, score.truth_volume_ml) == (1.5, 1.0)
    assert (score.volume_error_ml, score.volume_error) == (0.5, 0.5)
    # the third voxel's far side is 10 mm from the truth; all of the truth's surface but its end is the prediction's too
    assert (score.hd_mm, score.hd95_mm) == (10.0, 10.0)
    # corners: four planes predicted, three true; only one plane of the prediction is off
    assert score.abd_mm == 4 * 10 / (4 * 4 + 3 * 4)
    assert 0 < score.assd_mm < score.abd_mm  # the end of a bar has less area than its sides
    assert score.surface_dice == ((1.0, pytest.approx(1 - score.assd_mm / 10)),)


def test_too_little_has_a_negative_volume_error():
    score = score_labels(bar(1, 0, 0, 0), bar(1, 1, 1, 1), [ORGAN], HALF_ML)[0]
    assert (score.volume_error_ml, score.volume_error) == (-1.5, -0.75)
    assert (score.precision, score.recall) == (1.0, 0.25)


def test_every_label_is_scored_on_its_own():
    prediction = np.array([[[1, 1, 1, 0], [2, 0, 0, 0]]], np.uint16)
    truth = np.array([[[1, 1, 0, 0], [2, 2, 2, 300]]], np.uint16)
    organ, lesion, far = score_labels(prediction, truth, [ORGAN, LESION, FAR], HALF_ML)
    assert [score.structure.name for score in (organ, lesion, far)] == ["organ", "lesion", "far"]
    assert organ.dice == pytest.approx(2 * 2 / 5)
    assert lesion.dice == pytest.approx(2 * 1 / 4)
    assert lesion.volume_error == pytest.approx(-2 / 3)
    assert (far.dice, far.volume_ml, far.volume_error) == (0.0, 0.0, -1.0)


def test_labels_together_are_one_structure():
    whole, core = Structure("whole", (1, 2, 4)), Structure("core", (4, 1))
    prediction, truth = bar(1, 2, 4, 4, 0, 9), bar(2, 2, 1, 4, 4, 0)
    found = score_labels(prediction, truth, [whole, core], CUBE_MM)
    assert found[0].dice == 2 * 4 / (4 + 5)
    assert found[1].dice == 2 * 2 / (3 + 3)
    assert found[0].row()["label"] is None


def test_structures_of_labels_and_regions():
    given = [Label(value=3, name="organ"), Region(name="whole", values=(1, 2), paints=1)]
    assert structures(given) == (Structure("organ", (3,)), Structure("whole", (1, 2)))


@pytest.mark.parametrize("values", [(), (0,), (1, -2)])
def test_a_structure_has_values_above_zero(values):
    with pytest.raises(ConfigError) as caught:
        Structure("nothing", values)
    assert caught.value.code == "metrics.structure"


def test_a_label_in_neither_map_has_no_score_but_volumes():
    empty = np.zeros((2, 3, 4), np.uint8)
    row = score_labels(empty, empty, [ORGAN], HALF_ML, (1.0, 2.0))[0].row()
    volumes = {"volume_ml", "truth_volume_ml", "volume_error_ml"}
    assert {row[name] for name in volumes} == {0.0}
    assert all(math.isnan(row[name]) for name in row.keys() - volumes - {"label", "name"})


@pytest.mark.parametrize("empty", ["prediction", "truth"])
def test_one_empty_mask_overlaps_in_nothing_and_is_infinitely_far(empty):
    pair = (bar(0, 0, 0), bar(0, 1, 1)) if empty == "prediction" else (bar(0, 1, 1), bar(0, 0, 0))
    row = score_labels(*pair, [ORGAN], HALF_ML)[0].row()
    assert {row[name] for name in ("dice", "iou", "precision", "recall", "surface_dice_1mm")} == {0.0}
    assert {row[name] for name in ("hd_mm", "hd95_mm", "assd_mm", "abd_mm")} == {math.inf}
    assert row["volume_error_ml"] == (-1.0 if empty == "prediction" else 1.0)
    assert row["volume_error"] == -1.0 if empty == "prediction" else math.isnan(row["volume_error"])


def test_values_that_are_not_among_the_structures_are_background():
    prediction = np.array([[[1, 9, 9, 3]]], np.int16)
    truth = np.array([[[1, -1, 9, 30000]]], np.int16)
    organ, lesion = score_labels(prediction, truth, [ORGAN, LESION], CUBE_MM)
    assert organ.dice == 1.0
    assert math.isnan(lesion.dice)


def test_a_single_voxel():
    one = np.ones((1, 1, 1), np.uint8)
    score = score_labels(one, one, [ORGAN], CUBE_MM)[0]
    assert (score.dice, score.hd_mm, score.surface_dice) == (1.0, 0.0, ((1.0, 1.0),))


def test_scores_in_a_box_are_those_of_whole_masks():
    rng = np.random.default_rng(5)
    prediction, truth = np.zeros((2, 14, 9, 20), np.uint8)
    prediction[4:9, 2:8, 3:15], truth[3:9, 2:7, 5:18] = (
        rng.integers(0, 3, shape) for shape in ((5, 6, 12), (6, 5, 13))
    )
    spacing_mm = (3.0, 0.7, 1.1)
    for score in score_labels(prediction, truth, [ORGAN, LESION], spacing_mm, (2.0,)):
        p, t = (labels == score.structure.values[0] for labels in (prediction, truth))
        whole = surface_distances(p, t, spacing_mm)
        assert score.dice == dice(p, t)
        assert score.hd95_mm == whole.hausdorff_mm(95)
        assert score.assd_mm == pytest.approx(whole.assd_mm(), rel=1e-12)
        assert score.surface_dice == ((2.0, pytest.approx(whole.dice(2.0), rel=1e-12)),)


def test_the_row_has_the_names_of_the_tables():
    row = score_labels(bar(1), bar(1), [ORGAN], CUBE_MM, (1.0, 0.5))[0].row()
    assert set(row) == {"label", "name", *FIGURES, "surface_dice_1mm", "surface_dice_0.5mm"}
    assert (row["label"], row["name"]) == (1, "organ")
    assert surface_dice_name(2.0) == "surface_dice_2mm"


def test_label_maps_of_different_shape_are_refused():
    with pytest.raises(ScanError) as caught:
        score_labels(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), [ORGAN], CUBE_MM)
    assert caught.value.code == "metrics.shape"


def test_no_structures_no_scores():
    assert score_labels(np.ones((1, 1, 1), np.uint8), np.ones((1, 1, 1), np.uint8), (), CUBE_MM) == []


@pytest.mark.parametrize("seed", range(20))
def test_overlaps_are_those_of_monai(seed):
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((2, 6, 7, 8)) < rng.uniform(0.1, 0.9)
    score = score_labels(prediction.astype(np.uint8), truth.astype(np.uint8), [ORGAN], CUBE_MM)[0]
    pair = [torch.from_numpy(m)[None, None].float() for m in (prediction, truth)]
    assert score.dice == pytest.approx(float(compute_dice(*pair)), abs=1e-6)
    assert score.iou == pytest.approx(float(compute_iou(*pair)), abs=1e-6)
    for name in ("precision", "recall"):
        theirs = ConfusionMatrixMetric(metric_name=name)
        theirs(*pair)
        assert getattr(score, name) == pytest.approx(float(theirs.aggregate()[0]), abs=1e-6)


def test_monai_leaves_out_what_is_found_where_nothing_is():
    found, nothing = bar(1, 1, 0), bar(0, 0, 0)
    pair = [torch.from_numpy(m.astype(np.float32))[None, None] for m in (found, nothing)]
    assert math.isnan(float(compute_dice(*pair)))
    assert score_labels(found, nothing, [ORGAN], CUBE_MM)[0].dice == 0.0
