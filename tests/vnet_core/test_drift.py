"""Figures of scans, their ranges over a training, and what is said of a scan outside of them."""

import json

import numpy as np
import pytest

from vnet_core import drift as module
from vnet_core.drift import FEWEST_SCANS, PERCENTILES, Sample, drift, model_profile, profile
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of
from vnet_core.plan import Plan
from vnet_core.preprocess import prepare
from vnet_core.volume import Volume

WINDOW = {"intensity": "window", "window": (-100, 300)}


def plan(channels=("CT",), **preprocess: object) -> Plan:
    return Plan.from_mapping(
        {"channels": channels, "labels": [{"value": 1, "name": "organ"}], "preprocess": preprocess or WINDOW}
    )


def scan(values: np.ndarray, spacing_mm=(2.0, 1.0, 1.0), direction=CANONICAL_DIRECTION) -> Volume:
    return Volume(values, Geometry(values.shape[1:], spacing_mm, (0.0, 0.0, 0.0), direction))


def figures(spacing_z=1.0, level=0.0, extent_z=100.0) -> dict:
    """The profile of a scan whose percentiles are level + 5, 25, 50, 75, 95."""
    values = [level + p for p in PERCENTILES]
    return {
        "spacing_mm": [spacing_z, 1.0, 1.0],
        "extent_mm": [extent_z, 200.0, 200.0],
        "intensities": [values],
        "normalised": [[value / 100 for value in values]],
    }


def test_a_profile_of_the_numbers_from_0_to_100():
    # the lowest is background; of 1 .. 100 the 5th percentile is 5.95, the median 50.5
    values = np.concatenate([np.arange(101), np.zeros(19)]).reshape(1, 4, 5, 6).astype(np.int16)
    found = profile(scan(values), Sample.of(values / 100.0))
    assert found["spacing_mm"] == [2.0, 1.0, 1.0]
    assert found["extent_mm"] == [8.0, 5.0, 6.0]
    assert found["intensities"] == [[5.95, 25.75, 50.5, 75.25, 95.05]]
    assert found["normalised"] == [[0.0595, 0.2575, 0.505, 0.7525, 0.9505]]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_axes_are_those_of_the_network():
    # the first axis of the array runs along x
    sagittal = matrix_of(np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]))
    values = np.arange(120).reshape(1, 4, 5, 6)
    found = profile(scan(values, (2.0, 0.5, 1.0), sagittal), Sample.of(values))
    assert sorted(found["spacing_mm"]) == [0.5, 1.0, 2.0]
    assert found["spacing_mm"][2] == 2.0, "x comes last"
    assert found["extent_mm"][2] == 8.0


def test_a_large_channel_is_sampled_and_a_channel_of_one_value_has_it(monkeypatch):
    values = np.random.default_rng(0).normal(100, 10, (1, 40, 40, 40))
    whole = profile(scan(values), Sample.of(values))
    monkeypatch.setattr(module, "SAMPLED", 8_000)
    assert np.allclose(profile(scan(values), Sample.of(values))["intensities"], whole["intensities"], atol=1.0)
    flat = np.full((1, 4, 4, 4), 7.0)
    assert profile(scan(flat), Sample.of(flat))["normalised"] == [[7.0] * 5]


def test_a_few_training_scans_make_no_ranges():
    assert model_profile([figures()] * (FEWEST_SCANS - 1), plan()) is None
    assert model_profile([figures()] * FEWEST_SCANS, plan()) is not None


def test_ranges_and_margins():
    # 101 spacings 1.00 .. 1.50 mm: from the second on either side, 1.005 to 1.495; the margin is half of 0.49
    scans = [figures(1 + n / 200) for n in range(101)]
    ranges = model_profile(scans, plan())
    assert ranges["scans"] == 101
    assert ranges["channels"] == ["CT"]
    assert ranges["spacing_mm"][0] == pytest.approx([1.005, 1.495, 0.245])
    assert ranges["spacing_mm"][1] == [1.0, 1.0, 0.1], "scans all alike: a tenth of the median"
    # the 5th and the 95th percentile lie 90 apart
    assert ranges["intensities"][0][2] == [50.0, 50.0, 9.0]
    assert json.loads(json.dumps(ranges, allow_nan=False)) == ranges


def test_what_is_unlike_is_said_in_words():
    ranges = model_profile([figures(1 + n / 200) for n in range(101)], plan())
    assert drift(figures(1.2), ranges) == []
    assert drift(figures(1.7), ranges) == [], "within the margin"
    assert drift(figures(5.0), ranges) == ["spacing 5 mm along z, training 1.005 to 1.495 mm"]
    assert drift(figures(1.2, extent_z=50.0), ranges) == ["extent 50 mm along z, training 100 mm"]
    assert drift(figures(1.2, level=300), ranges) == [
        "5th percentile of the intensity of channel CT 305, training 5",
        "5th percentile of the normalised intensity of channel CT 3.05, training 0.05",
    ]


def test_the_percentile_farthest_out_is_told():
    ranges = model_profile([figures()] * 20, plan())
    strange = figures()
    strange["intensities"] = [[5.0, 25.0, 50.0, 95.0, 400.0]]
    assert drift(strange, ranges) == ["95th percentile of the intensity of channel CT 400, training 95"]
    strange["intensities"] = [[5.0, 25.0, 90.0, 91.0, 95.0]]
    assert drift(strange, ranges) == ["median of the intensity of channel CT 90, training 50"]


@pytest.mark.parametrize(("intensity", "told"), [("zscore", False), ("range", False), ("window", True)])
def test_a_scale_that_each_scan_sets_anew_is_no_part_of_the_ranges(intensity, told):
    ranges = model_profile([figures()] * 20, plan(intensity=intensity))
    assert ("intensities" in ranges) == told
    louder = figures() | {"intensities": [[v * 10 for v in (5, 25, 50, 75, 95)]]}
    assert bool(drift(louder, ranges)) == told


def test_what_one_side_lacks_is_passed_over():
    ranges = model_profile([figures()] * 20, plan())
    assert drift({"spacing_mm": [9.0, 1.0, 1.0]}, ranges) == ["spacing 9 mm along z, training 1 mm"]
    assert drift(figures(), {"channels": ["CT"]}) == []


def test_scans_of_one_kind_do_not_drift_and_another_kind_does():
    rng = np.random.default_rng(3)
    settings = plan()

    def made(level: float, spacing_z: float) -> dict:
        voxels = rng.normal(level, 40, (1, 12, 14, 16)).astype(np.float32)
        image = scan(voxels, (spacing_z, 1.0, 1.0))
        return profile(image, Sample.of(prepare(image, None, settings.preprocess).image))

    ranges = model_profile([made(rng.normal(60, 5), rng.uniform(1.0, 1.5)) for _ in range(30)], settings)
    assert sum(bool(drift(made(rng.normal(60, 5), rng.uniform(1.0, 1.5)), ranges)) for _ in range(40)) <= 1
    assert drift(made(60, 5.0), ranges)[0].startswith("spacing 5 mm along z, training 1.")
    assert any("intensity of channel CT" in reason for reason in drift(made(200, 1.2), ranges))


def test_a_sample_is_the_same_however_many_planes_come_at_once(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 100)
    voxels = np.random.default_rng(0).normal(size=(2, 23, 12, 14)).astype(np.float32)
    expected = Sample.of(voxels).percentiles()
    for planes in (1, 4, 5):
        sample = Sample(voxels.shape)
        for start in range(0, 23, planes):
            sample.add(voxels[:, start : start + planes])
        assert sample.percentiles() == expected


def test_samples_of_stretches_of_planes_joined_are_that_of_all(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 100)
    voxels = np.random.default_rng(0).normal(size=(2, 23, 12, 14)).astype(np.float32)
    joined = Sample(voxels.shape)
    for start in range(0, 23, 10):
        stretch = Sample(voxels.shape, start)
        stretch.add(voxels[:, start : start + 10])
        joined.join(*stretch.told())
    assert joined.percentiles() == Sample.of(voxels).percentiles()
