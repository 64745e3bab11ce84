"""Plans from fingerprints by pencil, and their reasons."""

import json
from collections import Counter

import numpy as np
import pytest

from vnet_core.errors import ConfigError
from vnet_core.fingerprint import Fingerprint
from vnet_core.plan import Label, Plan
from vnet_core.planning import STEP_GMACS_PER_CORE, STEP_GMACS_PER_GPU, Machine, derive_plan
from vnet_core.splits import split_patients

ONE = (Label(value=1, name="hippocampus"),)
LAPTOP = Machine(2 * STEP_GMACS_PER_CORE, 24.0)
GPU = Machine(STEP_GMACS_PER_GPU, 80.0)


def cohort(*grids, intensities: Counter | None = None) -> Fingerprint:
    found = Counter({(tuple(shape), tuple(map(float, spacing))): n for shape, spacing, n in grids})
    return Fingerprint(found, intensities=intensities or Counter())


def plan_of(value: Fingerprint, channels=("T1",), labels=ONE, machine: Machine = LAPTOP) -> Plan:
    return derive_plan(value, channels, labels, machine).plan


def test_a_small_cohort_by_pencil():
    # 35 x 50 x 35 voxels: at 8 per bottom voxel 5 x 7 x 5, at 16 only 3 along z: four levels, a patch of 40 x 56 x 40
    plan = plan_of(cohort(((35, 50, 35), (1, 1, 1), 20)))
    assert plan.preprocess.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.preprocess.interpolation == "linear"
    assert plan.training.patch_size == (40, 56, 40)
    assert plan.network.levels == 4
    # two patches are 10 GMAC at width 16 and 23 at width 24; 20 are allowed
    assert (plan.training.batch_size, plan.network.width) == (2, 16)
    assert (plan.network.kernel_size, plan.network.normalisation) == (3, "instance")
    assert plan.preprocess.intensity == "zscore"
    assert plan.training.augmentation.flip_axes == (2,)
    assert plan.channels == ("T1",)
    assert plan_of(cohort(((35, 50, 35), (1, 1, 1), 20)), machine=GPU).network.width == 32


def test_a_large_ct_cohort_by_pencil():
    bins = Counter({(0, 110 + i): 100 for i in range(20)})  # labelled voxels of 0 to 190 HU
    value = cohort(((300, 512, 512), (1.5, 0.7, 0.7), 30), ((400, 512, 512), (1.5, 0.8, 0.8), 31), intensities=bins)
    plan = plan_of(value, ("CT",), (Label(value=1, name="liver"),), GPU)
    assert plan.preprocess.spacing_mm == (1.5, 0.8, 0.8)
    assert np.prod(plan.training.patch_size) <= 128**3
    assert plan.network.levels == 5
    assert plan.preprocess.intensity == "percentiles"
    assert plan.preprocess.window[0] < 5 < 180 < plan.preprocess.window[1]
    assert plan.preprocess.mean == pytest.approx(95, abs=6)
    small = plan_of(value, ("CT",), ONE)
    assert small.network.width == 8
    assert 48 <= min(small.training.patch_size) <= max(small.training.patch_size) < 128
    assert plan_of(cohort(*[((300, 512, 512), (1.5, 0.7, 0.7), 3)]), ("CT",)).preprocess.intensity == "window"


def test_thick_slices_stay_slices():
    # 9 slices of 8 mm: at four levels the bottom has 2 of them, at five 1
    plan = plan_of(cohort(((9, 160, 160), (8, 1, 1), 3)), ("T2",), machine=GPU)
    assert plan.preprocess.interpolation == "anisotropic"
    assert plan.network.levels == 4
    assert plan.training.patch_size == (16, 160, 160)


def test_the_spacing_through_thick_slices_is_that_of_the_thin_ones():
    value = cohort(((20, 160, 160), (6, 1, 1), 80), ((40, 160, 160), (3.5, 1, 1), 20))
    assert plan_of(value).preprocess.spacing_mm == (3.5, 1.0, 1.0)
    # never finer than the finest axis
    value = cohort(((20, 160, 160), (6, 1, 1), 80), ((40, 160, 160), (0.5, 1, 1), 20))
    assert plan_of(value).preprocess.spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("names", "flips"),
    [
        (("liver", "spleen"), (2,)),
        (("left kidney", "right kidney"), ()),
        (("kidney_left", "kidney_right"), ()),
        (("liver", "Left lung"), ()),
        (("bright spot", "cleft"), (2,)),
        (("Left-Hippocampus",), ()),
        (("kidney.left",), ()),
        (("kidney (right)",), ()),
        (("Left/Lung",), ()),
    ],
)
def test_left_and_right_are_not_mirrored(names, flips):
    labels = tuple(Label(value=i, name=name) for i, name in enumerate(names, 1))
    plan = plan_of(cohort(((48, 48, 48), (1, 1, 1), 1)), labels=labels)
    assert plan.training.augmentation.flip_axes == flips
    assert plan.inference.mirror_axes == flips


def test_the_mirror_image_is_segmented_too_where_a_patch_sees_the_whole():
    machine = Machine(20.0, 8.0)
    assert plan_of(cohort(((40, 56, 40), (1, 1, 1), 1)), machine=machine).inference.mirror_axes == (2,)
    assert plan_of(cohort(((300, 512, 512), (1, 1, 1), 1)), machine=machine).inference.mirror_axes == ()


def test_a_plan_of_ct_and_another_channel_keeps_z_scores():
    value = cohort(((48, 48, 48), (1, 1, 1), 1))
    assert plan_of(value, ("ct",)).preprocess.intensity == "window"
    assert plan_of(value, ("CT", "PET")).preprocess.intensity == "zscore"


def test_no_case_no_plan():
    with pytest.raises(ConfigError, match="0 usable cases") as caught:
        plan_of(Fingerprint())
    assert caught.value.code == "plan.empty-cohort"


def test_a_machine_without_memory_gets_no_plan_but_a_number():
    with pytest.raises(ConfigError, match=r"use a machine with [0-9.]+ GiB") as caught:
        plan_of(cohort(((300, 512, 512), (1, 1, 1), 1)), machine=Machine(100.0, 0.05))
    assert caught.value.code == "plan.memory"


def test_less_memory_makes_the_step_smaller():
    value = cohort(((300, 512, 512), (1, 1, 1), 1))
    large, small = (plan_of(value, machine=Machine(STEP_GMACS_PER_GPU, gib)) for gib in (80.0, 4.0))
    assert (np.prod(small.training.patch_size), small.network.width) < (
        np.prod(large.training.patch_size),
        large.network.width,
    )


def test_every_choice_has_its_reason():
    found = derive_plan(cohort(((35, 50, 35), (1, 1, 1), 20)), ("T1",), ONE, LAPTOP)
    words = {reason.key: reason for reason in found.reasons}
    assert words["preprocess.spacing_mm"].value == "1 x 1 x 1"
    assert "median of 20 cases" in words["preprocess.spacing_mm"].words
    assert "it takes 10" in words["network.width"].words
    assert words["training.patch_size"].value == "40 x 56 x 40"
    document = found.plan.model_dump()
    for key in words:
        section = document
        for part in key.split("."):
            section = section[part]


@pytest.mark.parametrize(("cases", "kept_out"), [(10, 1), (80, 8), (81, 8), (160, 8), (1000, 8), (200_000, 8)])
def test_a_tenth_of_the_cases_and_eight_at_most_do_not_train(cases, kept_out):
    plan = plan_of(cohort(((35, 50, 35), (1, 1, 1), cases)))
    training, validating = split_patients(
        [(f"{number}", None) for number in range(cases)], plan.training.validation_fraction, seed=0
    )
    assert (len(training), len(validating)) == (cases - kept_out, kept_out)


def test_any_cohort_gives_a_plan_that_is_valid_and_bounded():
    generator = np.random.default_rng(0)
    for _ in range(100):
        grids = [
            (
                tuple(int(n) for n in generator.integers(1, 700, 3)),
                tuple(round(float(s), 4) for s in generator.uniform(0.1, 8, 3)),
                int(generator.integers(1, 4)),
            )
            for _ in range(generator.integers(1, 5))
        ]
        plan = plan_of(cohort(*grids))
        assert Plan.from_mapping(json.loads(plan.model_dump_json())) == plan
        assert np.prod(plan.training.patch_size) <= 128**3
        assert plan == plan_of(cohort(*grids))
