"""Changes of intensities by hand: strength 0, the surround, channels of their own, and one generator one result."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from vnet_core import augment
from vnet_core.augment import (
    QUANTILES,
    blur,
    brightness,
    contrast,
    gamma,
    intensity_quantiles,
    low_resolution,
    matched,
    noise,
    random_intensities,
)
from vnet_core.sections import AugmentationPlan

CHANGES = (low_resolution, blur, contrast, brightness, gamma, noise)
OFF = AugmentationPlan(contrast=0, brightness=0, noise=0)
ALL = AugmentationPlan(gamma=0.4, blur_voxels=1.0, low_resolution=0.5, noise=0.2, contrast=0.3, brightness=0.3)


def generator(seed=0):
    return np.random.default_rng(seed)


def random_image(shape=(2, 6, 7, 8), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def named(function):
    return function.__name__


# --- what holds for every change


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_strength_zero_gives_back_the_same(change):
    image = random_image()
    assert change(generator(), image, 0.0) is image


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_the_surround_stays_at_zero_and_the_rest_changes(change):
    image = torch.zeros(2, 9, 9, 9)
    image[:, 2:7, 2:7, 2:7] = 1 + random_image((2, 5, 5, 5)).abs()
    before = image.clone()
    changed = change(generator(), image, 0.5)
    assert torch.equal(image, before)
    assert changed.dtype == torch.float32
    assert (changed[image == 0] == 0).all()
    assert not torch.equal(changed, image)
    assert changed.isfinite().all()


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_one_generator_state_gives_one_result(change):
    image = random_image()
    assert torch.equal(change(generator(3), image, 0.4), change(generator(3), image, 0.4))
    assert not torch.equal(change(generator(3), image, 0.4), change(generator(4), image, 0.4))


@pytest.mark.parametrize("change", CHANGES, ids=named)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 5, 4), (3, 2, 1, 1)])
def test_any_shape_and_a_constant_image(change, shape):
    for image in (random_image(shape), torch.zeros(shape), torch.full(shape, 2.0)):
        changed = change(generator(), image, 0.5)
        assert changed.shape == shape
        assert changed.isfinite().all()


# --- one by one


@pytest.mark.parametrize("seed", range(5))
def test_contrast_and_brightness_by_hand(seed):
    image = torch.tensor([[-2.0, 0.0, 4.0], [-2.0, 0.0, 4.0]]).reshape(2, 1, 1, 3)
    factors = contrast(generator(seed), image, 0.3)[:, 0, 0] / image[:, 0, 0]
    assert torch.equal(factors[:, 0], factors[:, 2])
    assert ((factors[:, 0] - 1).abs() <= 0.3).all()
    offsets = brightness(generator(seed), image, 0.3)[:, 0, 0] - image[:, 0, 0]
    assert (offsets[:, 1] == 0).all()
    torch.testing.assert_close(offsets[:, 0], offsets[:, 2])
    assert (offsets[:, 0].abs() <= 0.3).all()
    assert offsets[0, 0] != offsets[1, 0], "channels vary apart"


@pytest.mark.parametrize("seed", range(5))
def test_gamma_is_a_power_between_the_ends(seed):
    image = torch.tensor([-3.0, -1.0, 1.0, 5.0]).reshape(1, 1, 1, 4)
    changed = gamma(generator(seed), image, 0.5)[0, 0, 0]
    assert changed[0] == -3
    assert changed[3] == pytest.approx(5, abs=1e-5)
    shares = (changed + 3) / 8
    exponent = np.log(float(shares[1])) / np.log(0.25)  # -1 is a quarter of the way
    assert 1 / 1.5 <= exponent <= 1.5
    assert float(shares[2]) == pytest.approx(0.5**exponent, rel=1e-4)


def test_noise_is_white_and_of_its_deviation():
    image = torch.full((200, 8, 8, 8), 5.0)
    added = noise(generator(), image, 0.4) - image
    deviations = added.std(dim=(1, 2, 3))
    assert 0 <= float(deviations.min()) < 0.05
    assert 0.35 < float(deviations.max()) < 0.45
    assert float(deviations.mean()) == pytest.approx(0.2, abs=0.02)
    assert abs(float((added[:, 1:] * added[:, :-1]).mean())) < 0.002


def test_blur_is_scipys_gaussian():
    image = random_image((1, 21, 22, 23))
    drawn = float(np.random.default_rng(0).uniform(0, 1.5))
    expected = ndimage.gaussian_filter(image[0].numpy(), drawn, mode="constant", truncate=8)
    found = blur(generator(), image, 1.5)[0].numpy()
    inner = (slice(7, -7),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-5)
    constant = torch.full((1, 6, 6, 6), 3.0)
    torch.testing.assert_close(blur(generator(), constant, 1.5), constant)


def test_half_the_resolution_by_hand():
    # four voxels become the means 1.5 and 3.5 with their centres at 0.5 and 2.5
    matrix = augment._there_and_back(4, 2)
    np.testing.assert_allclose(matrix @ [1, 2, 3, 4], [1.5, 2.0, 3.0, 3.5])
    np.testing.assert_allclose(augment._there_and_back(5, 5), np.eye(5), atol=1e-12)
    np.testing.assert_allclose(augment._there_and_back(7, 3).sum(axis=1), 1)


# --- histogram matching


def test_quantiles_leave_out_the_minimum():
    image = np.zeros((1, 4, 5, 10), np.float32)
    image[0, 2:] = np.arange(1, 101).reshape(2, 5, 10)
    quantiles = intensity_quantiles(image)
    assert quantiles.shape == (1, QUANTILES + 1)
    assert (quantiles[0, 0], quantiles[0, 1], quantiles[0, -1]) == (0, 1, 100)
    assert np.median(quantiles[0, 1:]) == pytest.approx(50.5)


def test_a_volume_matched_to_another_gets_its_quantiles():
    own = np.random.default_rng(0).normal(2, 1, (1, 20, 20, 20)).astype(np.float32)
    other = np.random.default_rng(1).gamma(2, 3, (1, 22, 20, 20)).astype(np.float32)
    pair = intensity_quantiles(own), intensity_quantiles(other)
    changed = matched(torch.from_numpy(own), *pair).numpy()
    levels = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(changed, levels), np.quantile(other, levels), rtol=0.02)
    assert (np.diff(changed.ravel()[np.argsort(own.ravel())]) >= -1e-5).all(), "the order of intensities changed"


def test_a_linear_change_is_undone():
    own = np.random.default_rng(0).normal(2, 1, (1, 20, 20, 20)).astype(np.float32)
    quantiles = intensity_quantiles(own)
    changed = matched(torch.from_numpy(own), quantiles, 3 * quantiles + 1)
    np.testing.assert_allclose(changed.numpy(), 3 * own + 1, atol=0.02)


def test_matched_to_itself_it_stays_and_so_does_the_surround():
    own = np.zeros((2, 12, 12, 12), np.float32)
    own[:, 2:-2, 2:-2, 2:-2] = np.random.default_rng(0).normal(5, 1, (2, 8, 8, 8))
    quantiles = intensity_quantiles(own)
    changed = matched(torch.from_numpy(own), quantiles, quantiles)
    np.testing.assert_allclose(changed.numpy(), own, atol=0.01)
    shifted = matched(torch.from_numpy(own), quantiles, quantiles + 7)
    assert (shifted.numpy()[own == 0] == 0).all()
    np.testing.assert_allclose(shifted.numpy()[own != 0], own[own != 0] + 7, atol=0.01)


def test_a_constant_channel_is_left_as_it_is():
    image = torch.full((1, 3, 3, 3), 4.0)
    quantiles = intensity_quantiles(image.numpy())
    assert torch.equal(matched(image, quantiles, quantiles + 1), image)


# --- the plan


def test_a_plan_without_strengths_gives_back_the_same():
    image = random_image()
    assert random_intensities(generator(), image, OFF) is image
    some = AugmentationPlan(contrast=0, brightness=0, noise=0, histogram_matching=1)
    quantiles = intensity_quantiles(image.numpy())
    torch.testing.assert_close(
        random_intensities(generator(), image, some, (quantiles, quantiles)), image, atol=0.01, rtol=0
    )


def test_everything_at_once_is_finite_and_repeats():
    image = random_image()
    one, two = (random_intensities(generator(5), image, ALL) for _ in range(2))
    assert torch.equal(one, two)
    assert one.isfinite().all()
    assert not torch.allclose(one[0], image[0])


def test_each_change_comes_with_the_plans_probability():
    plan = AugmentationPlan(probability=0.25, contrast=0.3, brightness=0, noise=0)
    image = random_image((1, 2, 2, 2))
    changed = [not torch.equal(random_intensities(generator(seed), image, plan), image) for seed in range(400)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.06)
