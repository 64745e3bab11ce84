"""What is cleaned away, what stays, and when a cleaning is worth it."""

import numpy as np
import pytest
from scipy import ndimage

from vnet_core.postprocess import candidates, choose, clean, components_ml, in_words, score_candidates
from vnet_core.sections import Cleaning

ML = 0.5
"""Volume of a voxel in these tests."""
LARGEST = Cleaning(label=1, keep="largest")
NOTHING = Cleaning(label=1)
FILL = Cleaning(label=1, holes="fill")


def bar(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(1, 1, -1)


def ring(outer: int, inner: int, label: int = 1) -> np.ndarray:
    """A cube of ``outer`` voxels in a margin of 1, with a hole of ``inner`` voxels in its middle."""
    labels = np.zeros((outer + 2,) * 3, np.uint8)
    labels[1:-1, 1:-1, 1:-1] = label
    start = 1 + (outer - inner) // 2
    labels[(slice(start, start + inner),) * 3] = 0
    return labels


# --- components


def test_only_the_largest_piece_stays():
    labels = np.zeros((3, 4, 8), np.uint8)
    labels[0, 0, :2] = 1
    labels[1:, 2:, 4:7] = 1
    expected = labels.copy()
    expected[0, 0, :2] = 0
    np.testing.assert_array_equal(clean(labels, ML, [LARGEST]), expected)


def test_labels_that_are_not_named_stay_as_they_are():
    labels = np.array([7, 0, 7, 7, 0, 300, 0, 300, 300], np.uint16).reshape(1, 1, -1)
    kept = clean(labels, ML, [Cleaning(label=300, keep="largest", minimum_ml=0.6, holes="fill")])
    np.testing.assert_array_equal(kept[0, 0], [7, 0, 7, 7, 0, 0, 0, 300, 300])
    assert kept.dtype == np.uint16


def test_pieces_that_touch_at_a_corner_are_one():
    labels = np.zeros((2, 2, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[0, 0, 4] = 1
    np.testing.assert_array_equal(np.argwhere(clean(labels, ML, [LARGEST])), [[0, 0, 0], [1, 1, 1]])


def test_a_piece_inside_the_box_of_another_label_is_judged_with_its_own_label():
    labels = ring(5, 3, label=2)
    labels[3, 3, 3] = 1
    np.testing.assert_array_equal(clean(labels, ML, [LARGEST, Cleaning(label=2, keep="largest")]), labels)


@pytest.mark.parametrize("label", [1, 9, 65535])
def test_an_empty_map_stays_empty_whatever_is_done(label):
    """An earlier program made an empty mask a full one, because it took the background for the largest component."""
    everything = Cleaning(label=label, keep="largest", minimum_ml=1, holes="fill")
    assert not clean(np.zeros((8, 8, 8), np.uint8), ML, [everything]).any()


def test_a_map_without_the_named_label_stays_as_it_is():
    labels = bar(1, 0, 1)
    np.testing.assert_array_equal(clean(labels, ML, [Cleaning(label=2, keep="largest", holes="fill")]), labels)


def test_without_cleanings_every_piece_stays():
    labels = (np.random.default_rng(0).random((9, 9, 9)) < 0.1).astype(np.uint8)
    cleaned = clean(labels, ML, [])
    np.testing.assert_array_equal(cleaned, labels)
    assert cleaned is not labels


def test_a_label_everywhere_stays_everywhere():
    assert clean(np.ones((3, 3, 3), np.uint8), ML, [Cleaning(label=1, keep="largest", holes="fill")]).all()


def test_the_input_is_not_changed():
    labels = bar(1, 0, 1, 1)
    clean(labels, ML, [LARGEST])
    np.testing.assert_array_equal(labels, bar(1, 0, 1, 1))


def test_of_two_equal_pieces_the_first_in_c_order_stays():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[3, 0, 0] = labels[0, 3, 3] = 1
    np.testing.assert_array_equal(np.argwhere(clean(labels, ML, [LARGEST])), [[0, 3, 3]])


@pytest.mark.parametrize("seed", range(20))
def test_ties_and_sizes_agree_with_another_implementation(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((6, 7, 8)) < 0.06).astype(np.uint8)
    labels = np.asfortranarray(labels) if seed % 2 else labels
    # scipy numbers pieces in C order, so argmax takes the first of the largest
    pieces, _ = ndimage.label(np.ascontiguousarray(labels), np.ones((3, 3, 3)))
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    np.testing.assert_array_equal(clean(labels, ML, [LARGEST]), pieces == largest)


@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 7, 7), (33, 1, 1), (3, 3, 3), (7, 7, 7)])
def test_as_many_pieces_as_fit_into_a_box(shape):
    labels = np.zeros(shape, np.uint8)
    labels[::2, ::2, ::2] = 1
    np.testing.assert_array_equal(np.argwhere(clean(labels, ML, [LARGEST])), [[0, 0, 0]])


def test_components_below_the_smallest_volume_go_and_those_of_it_stay():
    labels = bar(1, 0, 1, 1, 0, 1, 1, 1)
    np.testing.assert_array_equal(clean(labels, ML, [Cleaning(label=1, minimum_ml=1.0)]), bar(0, 0, 1, 1, 0, 1, 1, 1))


def test_a_smallest_volume_above_all_leaves_nothing():
    assert not clean(bar(1, 1, 0, 1), ML, [Cleaning(label=1, minimum_ml=5)]).any()


# --- holes


def test_a_hole_is_filled():
    assert clean(ring(5, 1), ML, [FILL]).sum() == 125
    assert clean(ring(5, 3), ML, [FILL]).sum() == 125


def test_only_background_is_filled():
    labels = ring(5, 3)
    labels[3, 3, 3] = 2
    filled = clean(labels, ML, [FILL])
    assert ((filled == 1).sum(), (filled == 2).sum()) == (124, 1)


def test_a_cup_is_not_a_hole_and_a_cup_at_the_edge_of_the_image_neither():
    cup = ring(5, 3)
    cup[1, 3, 3] = 0
    np.testing.assert_array_equal(clean(cup, ML, [FILL]), cup)
    cut = ring(5, 3)[3:]
    np.testing.assert_array_equal(clean(cut, ML, [FILL]), cut)


def test_background_does_not_leak_between_voxels_that_touch_at_a_corner():
    labels = ring(3, 1)
    labels[1, 1, 1] = 0  # a corner of the wall: the hole meets it only over a corner
    filled = clean(labels, ML, [FILL])
    assert filled[2, 2, 2] == 1
    assert filled[1, 1, 1] == 0


@pytest.mark.parametrize("seed", range(10))
def test_holes_agree_with_another_implementation(seed):
    labels = (np.random.default_rng(seed).random((9, 8, 7)) < 0.75).astype(np.uint8)
    np.testing.assert_array_equal(clean(labels, ML, [FILL]), ndimage.binary_fill_holes(labels))


def test_a_speck_in_a_hole_goes_and_the_hole_is_filled():
    labels = ring(7, 5)
    labels[4, 4, 4] = 1
    assert clean(labels, ML, [Cleaning(label=1, keep="largest", holes="fill")]).sum() == 7**3


def test_cleanings_are_done_in_their_order():
    # filled first, label 1 takes the hole in which label 2 would have been filled
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[2:7, 2:7, 2:7] = 2
    labels[4, 4, 4] = 0
    first, second = clean(labels, ML, [FILL]), clean(labels, ML, [Cleaning(label=2, holes="fill"), FILL])
    assert (first[4, 4, 4], second[4, 4, 4]) == (1, 2)


# --- which cleaning helps


def test_volumes_of_components():
    assert components_ml(bar(1, 0, 1, 1, 2), ML, 1) == [0.5, 1.0]
    assert components_ml(bar(0, 0), ML, 1) == []


def test_candidates_begin_with_nothing_and_take_volumes_from_the_truth():
    found = candidates({2: [4.0, 8.0], 1: []})
    assert [c for c in found if c.label == 1] == [
        NOTHING,
        FILL,
        LARGEST,
        Cleaning(label=1, keep="largest", holes="fill"),
    ]
    assert found[4] == Cleaning(label=2)
    assert sorted({c.minimum_ml for c in found if c.label == 2}) == [0.0, 2.0, 2.2, 3.0]


def test_candidates_are_scored_by_the_dice_of_their_label():
    labels, truth = bar(1, 0, 1, 1, 0, 2), bar(0, 0, 1, 1, 0, 2)
    tried = (NOTHING, LARGEST, Cleaning(label=2))
    assert score_candidates(labels, truth, ML, tried) == {NOTHING: 0.8, LARGEST: 1.0, Cleaning(label=2): 1.0}


def test_nothing_left_where_nothing_is_scores_1():
    away = Cleaning(label=1, minimum_ml=1.0)
    assert score_candidates(bar(1, 0), bar(0, 0), ML, (NOTHING, away)) == {NOTHING: 0.0, away: 1.0}
    assert score_candidates(bar(0, 0), bar(0, 0), ML, (NOTHING, away)) == {NOTHING: 1.0, away: 1.0}
    assert score_candidates(bar(0, 0), bar(1, 0), ML, (NOTHING, away)) == {NOTHING: 0.0, away: 0.0}


def cases(raw: list[float], cleaned: list[float]) -> list[dict[Cleaning, float]]:
    return [{NOTHING: a, LARGEST: b} for a, b in zip(raw, cleaned, strict=True)]


def test_a_cleaning_that_helps_is_chosen_and_explained():
    choice = choose(cases([0.80, 0.70, 0.90], [0.85, 0.75, 0.95]))[0]
    assert choice.cleaning == LARGEST
    assert "keep the largest component" in choice.reason
    assert "0.8000 -> 0.8500" in choice.reason


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ([0.8, 0.7], [0.8, 0.7]),  # a tie
        ([0.8, 0.7, 0.9], [0.801, 0.701, 0.901]),  # too little
        ([0.8, 0.7, 0.9, 0.8], [0.9, 0.65, 0.85, 0.8]),  # half the drawn cohorts are worse
        ([0.9] * 9 + [0.1], [0.99] * 9 + [0.0]),  # one case loses all that it had
        ([0.8], [0.9]),  # one case proves nothing
        ([0.9, 0.8], [0.7, 0.6]),
    ],
)
def test_nothing_is_done_where_it_does_not_surely_help(raw, cleaned):
    choice = choose(cases(raw, cleaned))[0]
    assert choice.cleaning is None
    assert "no cleaning" in choice.reason


def test_cases_of_one_patient_prove_no_more_than_one():
    scores = cases([0.8] * 4, [0.9] * 4)
    assert choose(scores, ["p", "p", "q", "q"])[0].cleaning == LARGEST
    assert choose(scores, ["p"] * 4)[0].cleaning is None


def test_each_label_is_decided_on_its_own_and_the_mildest_of_equals_is_taken():
    other, strong = Cleaning(label=2), Cleaning(label=2, keep="largest", holes="fill")
    mild = Cleaning(label=2, keep="largest")
    scores = [{NOTHING: 0.9, LARGEST: 0.9, other: a, mild: a + 0.1, strong: a + 0.1} for a in (0.5, 0.6, 0.7)]
    first, second = choose(scores)
    assert (first.label, first.cleaning) == (1, None)
    assert (second.label, second.cleaning) == (2, mild)


def test_choosing_works_on_what_the_candidates_gave():
    """Specks away from a block: the whole way, for a label that has no hole."""
    rng = np.random.default_rng(0)
    tried = candidates({1: [13.5, 13.5]})
    scores = []
    for _ in range(6):
        truth = np.zeros((9, 9, 9), np.uint8)
        truth[1:4, 1:4, 1:4] = 1
        labels = truth.copy()
        labels[6:, 6:, 6:] = rng.random((3, 3, 3)) < 0.3
        scores.append(score_candidates(labels, truth, ML, tried))
    choice = choose(scores)[0]
    assert choice.cleaning is not None
    assert in_words(choice.cleaning) == "remove components below 6.75 mL"


def test_without_cases_nothing_is_chosen():
    assert choose([]) == ()
