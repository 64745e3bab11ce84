"""The bias field: found where it is known, and that of SimpleITK's N4."""

import numpy as np
import pytest
import SimpleITK as sitk

from vnet_core.bias import log_field

SHAPE = (16, 20, 24)


def everywhere(shape):
    return tuple(np.arange(n, dtype=float) for n in shape)


def body(shape=SHAPE):
    """Tissue of 100 with a core of 160 and a part of 60 in air of 0; the tissue, and all of the body."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    mask = z**2 + y**2 + x**2 < 0.9
    core = (z - 0.2) ** 2 + y**2 + (x + 0.2) ** 2 < 0.12
    part = (z + 0.2) ** 2 + (y - 0.3) ** 2 + (x - 0.3) ** 2 < 0.1
    signal = np.where(core, 160.0, np.where(part, 60.0, np.where(mask, 100.0, 0.0)))
    noise = np.random.default_rng(0).normal(0, 2, shape) * mask
    field = 0.3 * np.sin(2 * x + 1) + 0.2 * y
    return signal + noise, field, mask, mask & ~core & ~part


def variation(values):
    return values.std() / values.mean()


def test_a_known_field_is_found():
    signal, field, mask, tissue = body()
    found = log_field(signal * np.exp(field), mask, everywhere(SHAPE))
    expected = field - field[mask].mean()
    assert np.abs(found - expected)[mask].mean() < 0.015
    biased = signal * np.exp(field)
    assert variation(biased[tissue]) > 0.13
    assert variation((biased / np.exp(found))[tissue]) < 0.2 * variation(biased[tissue])


def test_where_there_is_no_field_nothing_changes():
    signal, _, mask, _ = body()
    assert np.abs(log_field(signal, mask, everywhere(SHAPE)))[mask].max() < 0.01


def test_it_is_the_field_of_simpleitk():
    signal, field, mask, _ = body()
    biased = (signal * np.exp(field)).astype(np.float32)
    image, region = sitk.GetImageFromArray(biased), sitk.GetImageFromArray(mask.astype(np.uint8))
    peer = sitk.N4BiasFieldCorrectionImageFilter()
    peer.SetMaximumNumberOfIterations([50, 50, 50])
    peer.Execute(image, region)
    theirs = sitk.GetArrayFromImage(peer.GetLogBiasFieldAsImage(image))
    theirs = theirs - theirs[mask].mean()
    ours = log_field(biased, mask, everywhere(SHAPE))
    assert np.corrcoef(ours[mask], theirs[mask])[0, 1] > 0.999
    assert np.abs(ours - theirs)[mask].mean() < 0.005


def test_the_field_is_the_same_function_at_every_place():
    signal, field, mask, _ = body()
    biased = signal * np.exp(field)
    whole = log_field(biased, mask, everywhere(SHAPE))
    between = log_field(biased, mask, (np.array([3.0, 3.5, 4.0]), np.array([7.0]), np.array([-9.0, 0.0, 2.0])))
    np.testing.assert_allclose(between[[0, 2], 0, 1:], whole[3:5, 7, [0, 2]], atol=1e-6)
    assert min(whole[3, 7, 2], whole[4, 7, 2]) < between[1, 0, 2] < max(whole[3, 7, 2], whole[4, 7, 2])
    assert between[0, 0, 0] == pytest.approx(between[0, 0, 1], abs=0.02), "beyond the edge it runs away"


def test_the_scale_of_the_intensities_does_not_matter():
    signal, field, mask, _ = body()
    biased = signal * np.exp(field)
    one, thousand = (log_field(biased * scale, mask, everywhere(SHAPE)) for scale in (1, 1000))
    np.testing.assert_allclose(one, thousand, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (2, 8, 8), (3, 30, 3)])
def test_tiny_volumes_have_a_finite_field(shape):
    image = np.random.default_rng(0).uniform(50, 100, shape)
    found = log_field(image, np.ones(shape, bool), everywhere(shape))
    assert found.shape == shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 0.7


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_one_intensity_or_an_empty_mask_has_no_field(value):
    image = np.full(SHAPE, value)
    for mask in (np.ones(SHAPE, bool), np.zeros(SHAPE, bool)):
        assert not log_field(image, mask, everywhere(SHAPE)).any()
