"""Scores that can be checked with a pencil, and the cases in which there is nothing to score."""

import math

import numpy as np
import pytest

from vnet_core.errors import ScanError
from vnet_core.metrics import dice, score_labels, volume_error_fraction, volume_error_ml
from vnet_core.plan import Label

LABELS = (Label(value=1, name="organ"), Label(value=2, name="lesion"), Label(value=300, name="far"))


def mask(*x: int) -> np.ndarray:
    """Bool (1, 1, 8), true at the given x."""
    result = np.zeros((1, 1, 8), bool)
    result[0, 0, list(x)] = True
    return result


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


def test_volume_error_in_millilitres_has_a_sign():
    # 2 mm voxels are 0.008 mL
    assert volume_error_ml(mask(1, 2, 3), mask(1), 0.008) == pytest.approx(0.016)
    assert volume_error_ml(mask(), mask(1, 2), 0.008) == pytest.approx(-0.016)
    assert volume_error_ml(mask(), mask(), 0.008) == 0.0


def test_volume_error_as_a_share():
    assert volume_error_fraction(mask(1, 2, 3), mask(1, 2)) == 0.5
    assert volume_error_fraction(mask(), mask(1, 2)) == -1.0
    assert math.isnan(volume_error_fraction(mask(1), mask()))
    assert math.isnan(volume_error_fraction(mask(), mask()))


@pytest.mark.parametrize("score", [dice, volume_error_fraction])
def test_masks_of_different_shape_are_refused(score):
    with pytest.raises(ScanError, match=r"\(1, 1, 8\).*\(1, 8, 1\)") as caught:
        score(mask(1), mask(1).reshape(1, 8, 1))
    assert caught.value.code == "metrics.shape"


def test_every_label_is_scored_on_its_own():
    prediction = np.array([[[1, 1, 1, 0], [2, 0, 0, 0]]], np.uint16)
    truth = np.array([[[1, 1, 0, 0], [2, 2, 2, 300]]], np.uint16)

    organ, lesion, far = score_labels(prediction, truth, LABELS, voxel_ml=0.5)

    assert (organ.label, organ.name) == (1, "organ")
    assert organ.dice == pytest.approx(2 * 2 / 5)
    assert (organ.volume_ml, organ.truth_volume_ml) == (1.5, 1.0)
    assert (organ.volume_error_ml, organ.volume_error) == (0.5, 0.5)
    assert lesion.dice == pytest.approx(2 * 1 / 4)
    assert lesion.volume_error == pytest.approx(-2 / 3)
    assert (far.dice, far.volume_ml, far.volume_error) == (0.0, 0.0, -1.0)


def test_a_label_in_neither_map_has_no_score():
    empty = np.zeros((2, 3, 4), np.uint8)
    organ = score_labels(empty, empty, LABELS[:1], voxel_ml=0.5)[0]
    assert math.isnan(organ.dice)
    assert math.isnan(organ.volume_error)
    assert (organ.volume_ml, organ.truth_volume_ml, organ.volume_error_ml) == (0.0, 0.0, 0.0)


def test_values_that_are_not_among_the_labels_are_background():
    prediction = np.array([[[1, 9, 9, 3]]], np.int16)
    truth = np.array([[[1, -1, 9, 30000]]], np.int16)
    organ, lesion, _ = score_labels(prediction, truth, LABELS, voxel_ml=1.0)
    assert organ.dice == 1.0
    assert math.isnan(lesion.dice)


def test_a_single_voxel():
    one = np.ones((1, 1, 1), np.uint8)
    assert score_labels(one, one, LABELS, voxel_ml=1.0)[0].dice == 1.0


def test_label_scores_agree_with_the_scores_of_their_masks():
    rng = np.random.default_rng(5)
    prediction, truth = rng.integers(0, 3, (2, 7, 9, 11), dtype=np.uint8)
    for score in score_labels(prediction, truth, LABELS[:2], voxel_ml=0.003):
        p, t = prediction == score.label, truth == score.label
        assert score.dice == dice(p, t)
        assert score.volume_error_ml == volume_error_ml(p, t, 0.003)
        assert score.volume_error == volume_error_fraction(p, t)


def test_label_maps_of_different_shape_are_refused():
    with pytest.raises(ScanError) as caught:
        score_labels(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), LABELS, 1.0)
    assert caught.value.code == "metrics.shape"


def test_no_labels_no_scores():
    assert score_labels(np.ones((1, 1, 1), np.uint8), np.ones((1, 1, 1), np.uint8), (), 1.0) == []
