"""Fingerprints add up."""

import json
from collections import Counter

import numpy as np
import pytest

from vnet_core.errors import ScanError
from vnet_core.fingerprint import (
    Fingerprint,
    fingerprint,
    from_mapping,
    labelled_intensities,
    to_mapping,
    total,
)
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of
from vnet_core.plan import Label
from vnet_core.volume import Volume

SAGITTAL = ((1, 0, 0), (0, 0, 1), (0, -1, 0))
ONE = (Label(value=1, name="hippocampus"),)


def case(seed: int, direction=CANONICAL_DIRECTION, labelled: bool = True) -> tuple[Volume, Volume | None]:
    """A scan of (5, 6, 7) voxels of which the outer ones are air, and labels 0 to 2."""
    generator = np.random.default_rng(seed)
    geometry = Geometry((5, 6, 7), (3.0, 1.0, 0.5), (0.0, 0.0, 0.0), matrix_of(direction))
    image = np.zeros((1, 5, 6, 7), np.int16)
    image[0, 1:-1, 1:-1, 1 + seed % 2 : -1] = generator.integers(1, 99, (3, 4, 5 - seed % 2))
    label = Volume(generator.integers(0, 3, (1, 5, 6, 7)).astype(np.uint8), geometry)
    return Volume(image, geometry), label if labelled else None


def cohort(*grids) -> Fingerprint:
    return Fingerprint(Counter({(tuple(shape), tuple(map(float, spacing))): n for shape, spacing, n in grids}))


# --- one case


def test_a_case_by_hand():
    image, label = case(0)
    label.voxels[:] = 0
    label.voxels[0, 0, 0, :3] = 2
    found = fingerprint(image, label)
    assert found.grids == {((3, 4, 5), (3.0, 1.0, 0.5)): 1}
    assert found.label_voxels == {0: 207, 2: 3}
    assert found.label_cases == {0: 1, 2: 1}
    assert found.cases == 1


def test_grids_are_told_in_canonical_order():
    image, _ = case(0, SAGITTAL)
    # array z runs left, y back... the canonical z is array y reversed, y is x, x is z
    assert fingerprint(image, None).grids == {((4, 5, 3), (1.0, 0.5, 3.0)): 1}


def test_a_case_without_label_counts_as_a_case_without_label():
    found = fingerprint(*case(0, labelled=False))
    assert (found.cases, found.label_voxels, found.label_cases) == (1, Counter(), Counter())


def test_a_constant_scan_has_no_fingerprint():
    image, _ = case(0)
    image.voxels[:] = 7
    with pytest.raises(ScanError, match="7"):
        fingerprint(image, None)


# --- sums


def test_addition_is_associative_and_commutative_and_empty_is_nothing():
    a, b, c = (fingerprint(*case(seed, labelled=seed != 2)) for seed in range(3))
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Fingerprint() == Fingerprint() + a == a
    assert total([]) == Fingerprint()


def test_adding_a_case_equals_scanning_all_again():
    known = total(fingerprint(*case(seed)) for seed in range(4))
    kept = to_mapping(known)
    grown = from_mapping(json.loads(json.dumps(kept))) + fingerprint(*case(4))
    assert grown == total(fingerprint(*case(seed)) for seed in range(5))
    assert grown.cases == 5
    assert to_mapping(known) == kept, "adding changed what was added to"


def test_json_keeps_everything_and_its_order_is_fixed():
    parts = [fingerprint(*case(seed)) for seed in range(3)]
    forward, backward = total(parts), total(parts[::-1])
    assert json.dumps(to_mapping(forward)) == json.dumps(to_mapping(backward))
    back = from_mapping(json.loads(json.dumps(to_mapping(forward))))
    assert back == forward
    assert all(isinstance(value, int) for value in back.label_voxels)


# --- intensities of labelled voxels


def labelled(values) -> Fingerprint:
    """The fingerprint of a case whose labelled voxels have these values (C, N)."""
    values = np.atleast_2d(values)
    geometry = Geometry((1, 2, values.shape[1]), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    image = np.stack([np.full(values.shape, -2000.0), values], axis=1)[:, None]
    label = np.zeros((1, 1, 2, values.shape[1]), np.uint8)
    label[0, 0, 1] = 3
    return fingerprint(Volume(image, geometry), Volume(label, geometry))


def test_bins_by_hand():
    found = labelled([[-5000, -1100, -1091, -1090, 0, 3189, 3190, 3199, 3200, 9000]])
    assert found.intensities == {(0, 0): 1, (0, 1): 2, (0, 2): 1, (0, 111): 1, (0, 429): 1, (0, 430): 2, (0, 431): 2}


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(60, 45, 20_000),
        np.random.default_rng(1).normal(-650, 120, 3000),
        np.concatenate(
            [np.random.default_rng(2).normal(100, 20, 9000), np.random.default_rng(3).normal(900, 250, 999)]
        ),
        np.random.default_rng(4).uniform(-900, 3000, 700),
    ],
    ids=["organ", "lung", "bone", "wide"],
)
def test_percentiles_mean_and_deviation_are_within_a_bin(values):
    values = np.round(values)
    found = labelled_intensities(labelled(values), 0)
    window = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values, *window)
    np.testing.assert_allclose(found.window, window, atol=10)
    assert found.mean == pytest.approx(clipped.mean(), abs=5)
    assert found.deviation == pytest.approx(clipped.std(), abs=5)


def test_intensities_of_cases_add_up_exactly():
    values = np.random.default_rng(0).normal(60, 45, (2, 3000))
    parts = [labelled(values[:, i : i + 1000]) for i in (0, 1000, 2000)]
    assert total(parts).intensities == total(parts[::-1]).intensities == labelled(values).intensities
    assert labelled_intensities(total(parts), 1) == labelled_intensities(labelled(values), 1)
    assert labelled_intensities(total(parts), 0) != labelled_intensities(total(parts), 1)


def test_nothing_labelled_or_one_value_gives_no_scale():
    assert labelled_intensities(Fingerprint(), 0) is None
    assert labelled_intensities(labelled([[40, 40, 41]]), 0) is None
    assert labelled_intensities(labelled([[5000] * 999 + [0]]), 0) is None  # both percentiles in the open bin
    assert labelled_intensities(labelled([[10, 20, 30]]), 1) is None


def test_a_fingerprint_of_an_older_version_has_neither_intensities_nor_components():
    known = labelled([[10, 20, 30]])
    old = {name: part for name, part in to_mapping(known).items() if name not in ("intensities", "components")}
    assert from_mapping(old) == Fingerprint(known.grids, known.label_voxels, known.label_cases)


def test_the_json_of_a_case_is_small():
    values = np.random.default_rng(0).uniform(-1200, 3300, (2, 200_000))
    assert len(json.dumps(to_mapping(labelled(values)))) < 10_000


# --- components


def components_of(labels: np.ndarray, spacing_mm=(1.0, 1.0, 1.0)) -> Fingerprint:
    geometry = Geometry(labels.shape, spacing_mm, (0.0, 0.0, 0.0))
    image = np.arange(labels.size, dtype=np.float32).reshape(1, *labels.shape)
    return fingerprint(Volume(image, geometry), Volume(labels[None], geometry))


def test_components_by_hand():
    labels = np.zeros((4, 8, 16), np.uint8)
    labels[:2, :2, :2] = 1  # 8 voxels
    labels[3, 7, 15] = 1
    labels[:2, :2, 2:4] = 5  # touches the first, but is another label
    found = components_of(labels, (5.0, 5.0, 5.0))  # a voxel is 0.125 mL
    assert found.component_ml == {1: [0.125, 1.0], 5: [1.0]}
    assert components_of(np.zeros((2, 2, 2), np.uint8)).component_ml == {}


def test_components_add_up_and_sizes_are_right_to_a_tenth():
    generator = np.random.default_rng(0)
    cases = [components_of((generator.random((9, 9, 9)) < 0.1).astype(np.uint8)) for _ in range(3)]
    whole = total(cases)
    assert whole.component_ml[1] == sorted(ml for case in cases for ml in case.component_ml[1])
    assert from_mapping(json.loads(json.dumps(to_mapping(whole)))) == whole
    for voxels in range(1, 60):
        line = np.zeros((1, 1, 64), np.uint8)
        line[0, 0, :voxels] = 2
        (ml,) = components_of(line).component_ml[2]
        assert ml == pytest.approx(voxels / 1000, rel=0.1)
