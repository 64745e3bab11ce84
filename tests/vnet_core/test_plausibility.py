"""Plausible volumes and changes, with figures that can be checked with a pencil."""

import math
from dataclasses import replace

import numpy as np
import pytest

from vnet_core.plausibility import (
    FEWEST_CASES,
    MAD_TO_DEVIATION,
    SMALLEST_DEVIATION,
    Change,
    Finding,
    Size,
    change,
    distribution,
    flags,
    is_implausible,
)
from vnet_core.reporting import DEFAULT_REPORTING, FLAGS, Reporting

FINE = Finding("liver", Size(100.0), 1000, 1, False, None, False, None, None)


def flagged(finding: Finding, **settings: object) -> tuple[str, ...]:
    return flags(finding, None, Reporting(**settings))


# --- distribution


def test_the_constant_turns_the_mad_of_normal_values_into_their_deviation():
    values = np.random.default_rng(0).normal(size=200_000)
    mad = np.median(np.abs(values - np.median(values)))
    assert pytest.approx(1.0, abs=0.01) == MAD_TO_DEVIATION * mad


def test_median_and_deviation_of_volumes_in_powers_of_e():
    # ln: ten times 1, ten times 3; the median lies between, at 2, and every value 1 from it
    among = distribution([math.e] * 10 + [math.e**3] * 10)
    assert among is not None
    assert (among.median, among.deviation, among.cases) == (pytest.approx(2), pytest.approx(MAD_TO_DEVIATION), 20)
    assert among.deviations(math.e ** (2 + 3 * MAD_TO_DEVIATION)) == pytest.approx(3)
    assert among.deviations(1.0) == pytest.approx(-2 / MAD_TO_DEVIATION)
    assert among.range_ml(1) == pytest.approx((math.exp(2 - MAD_TO_DEVIATION), math.exp(2 + MAD_TO_DEVIATION)))


def test_too_few_volumes_say_nothing_and_empty_ones_do_not_count():
    assert distribution([]) is None
    assert distribution([10.0] * (FEWEST_CASES - 1) + [0.0] * 5) is None
    among = distribution([10.0] * FEWEST_CASES + [0.0] * 50)
    assert among is not None
    assert among.cases == FEWEST_CASES


def test_near_equal_volumes_keep_a_least_deviation():
    among = distribution([10.0] * 30)
    assert among is not None
    assert among.deviation == SMALLEST_DEVIATION
    assert not is_implausible("liver", 10.9, among, DEFAULT_REPORTING)
    assert is_implausible("liver", 11.1, among, DEFAULT_REPORTING), "ln 1.11 is 5.2 times 0.02"


def test_a_wrong_volume_does_not_hide_itself_among_others():
    volumes = list(np.random.default_rng(1).lognormal(math.log(1500), 0.2, 40))
    wrong = [12.0, 15.0, 20_000.0]
    among = distribution([*volumes, *wrong])
    assert [is_implausible("liver", volume, among, DEFAULT_REPORTING) for volume in wrong] == [True] * 3
    assert not any(is_implausible("liver", volume, among, DEFAULT_REPORTING) for volume in volumes)


def test_a_reference_range_takes_the_place_of_the_distribution():
    settings = Reporting(reference_ml={"liver": (800, 2500)})
    among = distribution([10.0] * 30)
    assert [is_implausible("liver", v, among, settings) for v in (0, 799, 800, 2500, 2501)] == [1, 1, 0, 0, 1]
    assert is_implausible("spleen", 800, among, settings), "another label has the cohort's"
    assert not is_implausible("spleen", 0, among, settings), "that is told as empty"
    assert not is_implausible("spleen", 800, None, settings)


# --- change


def test_the_uncertainty_is_half_of_each_range_in_quadrature():
    # halves of 3 and 4 mL
    found = change(Size(110.0, 107.0, 113.0), Size(100.0, 97.0, 105.0))
    assert found == Change(10.0, 10.0, pytest.approx(5.0))
    assert change(Size(110.0, 107.0, 113.0), Size(100.0)).uncertainty_ml == pytest.approx(3.0)
    assert change(Size(110.0), Size(100.0)) == Change(10.0, 10.0, None)
    assert change(Size(0.0), Size(50.0)) == Change(-50.0, -100.0, None)
    assert change(Size(5.0), Size(0.0)) == Change(5.0, None, None)


@pytest.mark.parametrize(
    ("found", "exceeds"),
    [
        (Change(10.0, 10.0, None), False),
        (Change(10.1, 10.1, None), True),
        (Change(-10.1, -10.1, None), True),
        (Change(50.0, 50.0, 60.0), False),
        (Change(50.0, 50.0, 40.0), True),
        (Change(50.0, None, 1.0), False),
    ],
)
def test_a_change_exceeds_what_is_stated_and_its_uncertainty(found, exceeds):
    assert found.exceeds(10.0) == exceeds


# --- flags


def test_nothing_is_flagged_without_a_reason():
    assert flagged(FINE) == ()


@pytest.mark.parametrize(
    ("found", "flag"),
    [
        ({"voxels": 0, "size": Size(0.0), "components": 0}, "empty"),
        ({"touches_border": True}, "touches-border"),
        ({"components": 11}, "many-components"),
        ({"agreement": 0.79}, "low-agreement"),
        ({"drift": True}, "drift"),
        ({"patient": Change(51.0, 51.0, None)}, "implausible-change"),
        ({"same_scan": Change(11.0, 11.0, None)}, "implausible-change"),
    ],
)
def test_each_flag_has_its_reason_and_can_be_switched_off(found, flag):
    finding = replace(FINE, **found)
    assert flagged(finding) == (flag,)
    assert flagged(finding, flags=[other for other in FLAGS if other != flag]) == ()
    assert flagged(finding, flags=[flag]) == (flag,)


@pytest.mark.parametrize(
    "found",
    [
        {"components": 10},
        {"agreement": 0.8},
        {"patient": Change(50.0, 50.0, None)},
        {"same_scan": Change(10.0, 10.0, None)},
    ],
)
def test_a_limit_itself_is_still_fine(found):
    assert flagged(replace(FINE, **found)) == ()


def test_limits_are_those_of_the_settings():
    finding = replace(FINE, components=5, agreement=0.9, patient=Change(30.0, 30.0, None))
    assert flagged(finding) == ()
    assert flagged(finding, many_components=4) == ("many-components",)
    assert flagged(finding, agreement_below=0.95) == ("low-agreement",)
    assert flagged(finding, implausible_change_percent=25) == ("implausible-change",)


def test_flags_have_one_order():
    everything = Finding("liver", Size(0.0), 0, 99, True, 0.1, True, Change(9.0, 99.0, None), None)
    settings = Reporting(reference_ml={"liver": (1, 2)}, flags=tuple(reversed(FLAGS)))
    assert flags(everything, None, settings) == FLAGS
