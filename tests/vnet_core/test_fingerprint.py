"""Fingerprints add up, and the plans that come of them by pencil."""

import json
from collections import Counter

import numpy as np
import pytest

from vnet_core.errors import ConfigError, ScanError
from vnet_core.fingerprint import (
    STEP_GMACS_PER_GPU,
    Fingerprint,
    derive_plan,
    fingerprint,
    from_mapping,
    to_mapping,
    total,
)
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, matrix_of
from vnet_core.plan import Label, Plan
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


# --- plans


def test_a_small_cohort_by_pencil():
    # 35 x 50 x 35 voxels: at 16 per bottom voxel 3 x 4 x 3 of them, so all five levels and a patch of 48 x 64 x 48,
    # which is 70.6 GMAC at width 16: four of them are above 110, at width 8 a quarter of that is below
    plan = derive_plan(cohort(((35, 50, 35), (1, 1, 1), 20)), ("T1",), ONE)
    assert plan.preprocess.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.training.patch_size == (48, 64, 48)
    assert plan.network.levels == 5
    assert (plan.training.batch_size, plan.network.width) == (4, 8)
    assert plan.preprocess.intensity == "zscore"
    assert plan.training.flip_axes == (2,)
    assert plan.channels == ("T1",)


def test_a_large_ct_cohort_by_pencil():
    # the patch shrinks to 128 cubed, 1004 GMAC at width 16: only width 4 stays below 110 for two of them
    value = cohort(((300, 512, 512), (1.5, 0.7, 0.7), 30), ((400, 512, 512), (1.5, 0.8, 0.8), 31))
    plan = derive_plan(value, ("CT",), (Label(value=1, name="liver"),))
    assert plan.preprocess.spacing_mm == (1.5, 0.8, 0.8)
    assert plan.training.patch_size == (128, 128, 128)
    assert (plan.training.batch_size, plan.network.width) == (2, 4)
    assert plan.preprocess.intensity == "window"
    assert derive_plan(value, ("CT",), ONE, STEP_GMACS_PER_GPU).network.width == 16


def test_thick_slices_get_fewer_levels():
    # 9 slices: at four levels the bottom would have 2 of them, at three it has 3
    plan = derive_plan(cohort(((9, 160, 160), (8, 1, 1), 3)), ("T2",), ONE)
    assert plan.network.levels == 3
    assert plan.network.convolutions == (1, 2, 3)
    assert plan.training.patch_size == (12, 160, 160)


def test_spacing_is_the_median_case_and_the_patch_nearly_the_largest():
    # extents along x of 40 mm, once 80: the 95th percentile of 41 cases is 40
    value = cohort(((40, 40, 80), (1, 1, 0.5), 40), ((40, 40, 80), (1, 1, 1.0), 1))
    plan = derive_plan(value, ("T1",), ONE)
    assert plan.preprocess.spacing_mm == (1.0, 1.0, 0.5)
    assert plan.training.patch_size == (48, 48, 80)


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (("liver", "spleen"), (2,)),
        (("left kidney", "right kidney"), ()),
        (("kidney_left", "kidney_right"), ()),
        (("liver", "Left lung"), ()),
        (("bright spot", "cleft"), (2,)),
    ],
)
def test_left_and_right_are_not_mirrored(names, flips):
    labels = tuple(Label(value=i, name=name) for i, name in enumerate(names, 1))
    assert derive_plan(cohort(((48, 48, 48), (1, 1, 1), 1)), ("T1",), labels).training.flip_axes == flips


@pytest.mark.parametrize("name", ["Left-Hippocampus", "kidney.left", "kidney (right)", "Left/Lung"])
def test_left_and_right_are_found_whatever_stands_between_words(name):
    labels = (Label(value=1, name=name),)
    assert derive_plan(cohort(((48, 48, 48), (1, 1, 1), 1)), ("T1",), labels).training.flip_axes == ()


def test_a_plan_of_ct_and_another_channel_keeps_z_scores():
    value = cohort(((48, 48, 48), (1, 1, 1), 1))
    assert derive_plan(value, ("ct",), ONE).preprocess.intensity == "window"
    assert derive_plan(value, ("CT", "PET"), ONE).preprocess.intensity == "zscore"


def test_no_case_no_plan():
    with pytest.raises(ConfigError, match="0 usable cases") as caught:
        derive_plan(Fingerprint(), ("T1",), ONE)
    assert caught.value.code == "plan.empty-cohort"


def test_any_cohort_gives_a_plan_that_is_valid_and_bounded():
    generator = np.random.default_rng(0)
    for _ in range(200):
        grids = [
            (
                tuple(int(n) for n in generator.integers(1, 700, 3)),
                tuple(round(float(s), 4) for s in generator.uniform(0.1, 8, 3)),
                int(generator.integers(1, 4)),
            )
            for _ in range(generator.integers(1, 5))
        ]
        plan = derive_plan(cohort(*grids), ("T1",), ONE)
        assert Plan.from_mapping(json.loads(plan.model_dump_json())) == plan
        assert np.prod(plan.training.patch_size) <= 128**3
        assert plan == derive_plan(cohort(*grids), ("T1",), ONE)
