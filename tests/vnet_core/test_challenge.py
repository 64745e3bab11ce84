"""Champion against challenger: overlaps and Bland-Altman figures by pencil."""

import math

import numpy as np
import pytest

from vnet_core.challenge import Overlap, bland_altman, overlaps
from vnet_core.errors import ScanError

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
