"""Means of cohorts and their bootstrap intervals."""

import math

import numpy as np
import pytest

from vnet_core import statistics
from vnet_core.errors import ConfigError
from vnet_core.statistics import bootstrap_interval, bootstrap_means, summarise


def test_a_summary_with_a_pencil():
    found = summarise([0.5, 1.0, 0.9], ["a", "b", "c"], best=1.0)
    assert found.mean == pytest.approx(0.8)
    assert (found.median, found.worst, found.worst_case) == (0.9, 0.5, "a")
    assert (found.cases, found.infinite, found.missing) == (3, 0, 0)
    assert found.low is not None
    assert found.high is not None
    assert 0.5 <= found.low < 0.8 < found.high <= 1.0


def test_what_does_not_apply_is_counted_and_left_out():
    found = summarise([2.0, math.inf, math.nan, 4.0, math.inf], list("abcde"), best=0.0)
    assert (found.cases, found.infinite, found.missing) == (2, 2, 1)
    assert (found.mean, found.worst, found.worst_case) == (3.0, 4.0, "d")


def test_the_worst_of_a_signed_error_is_the_farthest_from_zero():
    found = summarise([-3.0, 2.0, 0.5], list("abc"), best=0.0)
    assert (found.worst, found.worst_case) == (-3.0, "a")


def test_a_volume_has_no_worst_case():
    found = summarise([3.0, 2.0], list("ab"), best=None)
    assert (found.worst, found.worst_case, found.mean) == (None, None, 2.5)


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_without_a_figure_there_is_no_mean(values):
    found = summarise(values, [str(n) for n in range(len(values))], best=1.0)
    assert (found.cases, found.mean, found.low, found.median, found.worst_case) == (0, None, None, None, None)


def test_one_case_has_no_interval():
    found = summarise([0.7], ["a"], best=1.0)
    assert (found.mean, found.low, found.high) == (0.7, None, None)


def test_one_patient_has_no_interval_however_many_cases():
    assert bootstrap_interval([0.1, 0.5, 0.9], ["p", "p", "p"]) is None


def test_a_summary_draws_the_cases_of_one_patient_together():
    alone = summarise([0.1, 0.5, 0.9, math.nan], list("abcd"), best=1.0)
    together = summarise([0.1, 0.5, 0.9, math.nan], list("abcd"), best=1.0, groups=["p", "p", "p", "q"])
    assert alone.low is not None
    assert (together.low, together.mean) == (None, alone.mean)


def test_two_cases_are_drawn_as_two_coins():
    # aa, ab or ba, bb: a quarter, a half, a quarter
    means = bootstrap_means([0.0, 1.0])
    assert means is not None
    assert set(means) == {0.0, 0.5, 1.0}
    assert (means == 0.5).mean() == pytest.approx(0.5, abs=0.02)
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=20)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    values = np.random.default_rng(1).normal(size=20)
    whole = bootstrap_means(values)
    monkeypatch.setattr(statistics, "_DRAWN_TOGETHER", 20 * 7)
    np.testing.assert_array_equal(whole, bootstrap_means(values))


def test_the_interval_of_many_cases_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    ends = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert ends == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        low, high = bootstrap_interval(rng.normal(size=40)) or (math.nan, math.nan)
        held += low <= 0 <= high
    assert 52 <= held <= 60


def test_cases_of_one_patient_are_drawn_together():
    # ten patients with ten equal cases each: as uncertain as ten cases, not as a hundred
    of_patient = np.random.default_rng(2).normal(size=10)
    values = np.repeat(of_patient, 10)
    names = [f"p{n}" for n in range(10) for _ in range(10)]
    assert bootstrap_interval(values, names) == pytest.approx(bootstrap_interval(of_patient))
    low, high = bootstrap_interval(values) or (0, 0)
    wide_low, wide_high = bootstrap_interval(values, names) or (0, 0)
    assert wide_high - wide_low > 2 * (high - low)


def test_a_patient_with_more_cases_weighs_more():
    # patients of 1 and 3 cases: the mean of both together is 0.75
    means = bootstrap_means([0.0, 1.0, 1.0, 1.0], ["p", "q", "q", "q"])
    assert means is not None
    assert set(means) == {0.0, 0.75, 1.0}


@pytest.mark.parametrize(("cases", "groups"), [(["a"], []), (["a", "b"], ["p"])])
def test_lists_of_different_length_are_refused(cases, groups):
    with pytest.raises(ConfigError) as caught:
        summarise([1.0, 2.0], cases, 1.0, groups)
    assert caught.value.code == "statistics.length"
