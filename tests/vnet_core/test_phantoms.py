"""Phantoms have the volumes that they say, on every grid."""

from dataclasses import replace

import numpy as np
import pytest

from vnet_core.geometry import CANONICAL_DIRECTION, to_canonical, world_mm
from vnet_core.phantoms import (
    LABELS,
    SAGITTAL_DIRECTION,
    PhantomSpec,
    demo_cohort,
    lesion_volume_ml,
    oblique_direction,
    organ_volume_ml,
    phantom,
)
from vnet_core.volume import Volume

OBLIQUE = oblique_direction((20.0, -15.0, 10.0))
GRIDS = {
    "isotropic": {},
    "fine": {"shape": (80, 80, 80), "spacing_mm": (0.75, 0.75, 0.75)},
    "thick": {"shape": (22, 60, 60), "spacing_mm": (3.0, 1.0, 1.0)},
    "oblique": {"direction": OBLIQUE},
    "sagittal": {"direction": SAGITTAL_DIRECTION},
}


def volume_ml(label: Volume, value: int) -> float:
    return np.count_nonzero(label.labels == value) * label.geometry.voxel_ml


def centre_mm(label: Volume) -> np.ndarray:
    return world_mm(label.geometry, np.argwhere(label.labels)).mean(axis=0)


def best_threshold_dice(image: Volume, label: Volume) -> float:
    values, organ = image.voxels[0], label.labels == 1
    thresholds = np.unique(np.percentile(values, np.linspace(50, 99.9, 100)))
    sizes = [(np.count_nonzero((values > t) & organ), np.count_nonzero(values > t)) for t in thresholds]
    return max(2 * common / (above + np.count_nonzero(organ)) for common, above in sizes)


def test_form_of_the_result():
    spec = PhantomSpec(seed=1, shape=(20, 30, 40))
    image, label = phantom(spec)
    assert (image.voxels.shape, image.voxels.dtype) == ((1, 20, 30, 40), np.int16)
    assert (label.voxels.shape, label.voxels.dtype) == ((1, 20, 30, 40), np.uint8)
    assert image.geometry == label.geometry
    assert (image.geometry.spacing_mm, image.geometry.direction) == (spec.spacing_mm, CANONICAL_DIRECTION)
    assert image.voxels.min() >= 0
    assert [label.value for label in LABELS] == [1, 2]


def test_the_same_spec_gives_the_same_voxels_and_another_seed_others():
    first, again, other = (phantom(PhantomSpec(seed=s)) for s in (4, 4, 5))
    assert first[0].geometry == again[0].geometry != other[0].geometry
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.voxels, b.voxels)
        assert (a.voxels != c.voxels).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_holds_the_known_volumes(grid, seed):
    spec = PhantomSpec(seed=seed, **GRIDS[grid])
    _, label = phantom(spec)
    assert volume_ml(label, 1) == pytest.approx(organ_volume_ml(spec), rel=0.02 if grid != "thick" else 0.04)
    assert volume_ml(label, 2) == pytest.approx(lesion_volume_ml(spec), rel=0.10 if grid != "thick" else 0.25)


def test_the_known_volume_does_not_depend_on_the_grid():
    assert len({organ_volume_ml(PhantomSpec(seed=2, **grid)) for grid in GRIDS.values()}) == 1


def test_one_seed_is_one_body_in_the_world():
    centres = np.array([centre_mm(phantom(PhantomSpec(seed=6, **grid))[1]) for grid in GRIDS.values()])
    assert np.abs(centres - centres[0]).max() < 0.3


def test_lesions_lie_inside_their_organs():
    spec = PhantomSpec(seed=8, organs=2, lesions=5)
    whole = replace(spec, lesions=0)
    np.testing.assert_array_equal(phantom(spec)[1].labels > 0, phantom(whole)[1].labels == 1)
    assert organ_volume_ml(whole) == pytest.approx(organ_volume_ml(spec) + lesion_volume_ml(spec))


@pytest.mark.parametrize("organs", [2, 6])
def test_many_organs_and_lesions_do_not_overlap(organs):
    spec = PhantomSpec(seed=3, shape=(72, 72, 72), spacing_mm=(0.8, 0.8, 0.8), organs=organs, lesions=4)
    _, label = phantom(spec)
    # what overlaps would be counted once in the voxels and twice in the known volume
    assert volume_ml(label, 1) == pytest.approx(organ_volume_ml(spec), rel=0.01)
    assert volume_ml(label, 2) == pytest.approx(lesion_volume_ml(spec), rel=0.05)


def test_without_organs_there_is_a_body_and_no_label():
    spec = PhantomSpec(seed=3, organs=0)
    image, label = phantom(spec)
    assert not label.voxels.any()
    assert (organ_volume_ml(spec), lesion_volume_ml(spec)) == (0.0, 0.0)
    middle = image.voxels[0, 20:28, 20:28, 20:28].mean()
    assert middle > 3 * image.voxels[0, 0].mean()


def test_noise_and_bias_are_what_the_spec_says():
    spec = PhantomSpec(seed=9, bias=0.0, noise=0.0, lesions=0)
    image, label = phantom(spec)
    organ = image.voxels[0][label.labels == 1].astype(float)
    scale = np.median(organ)
    assert 200 * 0.95 < scale < 3000 * 1.05
    noisy = phantom(replace(spec, noise=0.1))[0].voxels[0].astype(float)
    assert np.std((noisy - image.voxels[0])[label.labels == 1]) == pytest.approx(0.1 * scale, rel=0.1)
    # where there is no signal the noise is Rayleigh: its mean is sigma * sqrt(pi / 2)
    air = phantom(replace(spec, noise=0.5))[0].voxels[0, :3].mean()
    assert air == pytest.approx(0.5 * scale * np.sqrt(np.pi / 2), rel=0.05)
    biased = phantom(replace(spec, bias=0.4))[0].voxels[0]
    ratio = biased[label.labels == 1] / organ
    assert np.exp(-0.4) * 0.98 < ratio.min() < ratio.max() < np.exp(0.4) * 1.02
    assert ratio.max() > 1.1 * ratio.min()


def test_voxels_on_a_boundary_hold_both_sides():
    image, label = phantom(PhantomSpec(seed=9, bias=0.0, noise=0.0, lesions=0))
    values = image.voxels[0] / np.median(image.voxels[0][label.labels == 1])
    # tissue is near 0.5 and the organ near 1, with a texture of 6 %
    assert np.count_nonzero((values > 0.6) & (values < 0.9)) > np.count_nonzero(label.labels) / 10


def test_turning_about_the_head_axis_by_90_degrees_turns_left_to_the_back():
    turned = np.array(oblique_direction((0.0, 0.0, 90.0)))
    np.testing.assert_allclose(turned[:, 2], (0, 1, 0), atol=1e-12)
    np.testing.assert_allclose(turned[:, 0], (0, 0, 1), atol=1e-12)


def test_the_demo_cohort_is_varied():
    cohort = demo_cohort(0, 10)
    assert len({name for name, _ in cohort}) == len({spec.seed for _, spec in cohort}) == 10
    specs = [spec for _, spec in cohort]
    assert [spec.organs for spec in specs].count(0) == 1
    assert cohort[5][0].endswith("without-foreground")
    assert any(max(s.spacing_mm) >= 2.5 * min(s.spacing_mm) for s in specs)
    assert any(s.direction == SAGITTAL_DIRECTION for s in specs)
    assert any(0.5 < np.abs(np.array(s.direction)).max(axis=0).min() < 0.99 for s in specs)
    assert len({s.shape for s in specs}) > 4
    assert all(np.prod(s.shape) <= 60**3 for s in specs)


def test_a_longer_demo_cohort_begins_with_the_shorter_one():
    assert demo_cohort(7, 9)[:4] == demo_cohort(7, 4)
    assert demo_cohort(7, 4) != demo_cohort(8, 4)
    assert demo_cohort(7, 0) == []


def test_demo_organs_are_whole_and_no_threshold_finds_them():
    for name, spec in demo_cohort(1, 7):
        image, label = phantom(spec)
        borders = [np.take(image.voxels[0], end, axis) for axis in range(3) for end in (0, -1)]
        # Rayleigh noise alone has its 99th percentile at 3 sigma; the body is brighter by far
        assert max(np.percentile(b, 99) for b in borders) < 0.5 * np.percentile(image.voxels, 98), name
        if spec.organs:
            assert volume_ml(label, 1) == pytest.approx(organ_volume_ml(spec), rel=0.05), name
            assert (label.labels == 2).any(), name
            assert best_threshold_dice(image, label) < 0.7, name


def test_the_sagittal_grid_turns_into_the_canonical_one_by_swaps_and_flips():
    spec = PhantomSpec(seed=0, shape=(5, 6, 7), direction=SAGITTAL_DIRECTION)
    turn, geometry = to_canonical(phantom(spec)[0].geometry)
    assert geometry.direction == CANONICAL_DIRECTION
    assert (turn.source_axis, turn.flip) == ((1, 2, 0), (True, False, True))
