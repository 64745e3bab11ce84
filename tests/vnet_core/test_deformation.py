"""Warps by hand and against SimpleITK: what turns, what stays, and that image and label move together."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from vnet_core.deformation import Warp, bspline, elastic, random_warp, rotation_zoom, spline_of, spline_weights, warped
from vnet_core.sections import AugmentationPlan

QUARTER_TURN = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""In the plane of z and y."""
OFF = AugmentationPlan(rotation_degrees=0, scaling=0)
STRONG = AugmentationPlan(rotation_degrees=20, scaling=0.2, bspline_voxels=6, elastic_voxels=1.5)


def generator(seed=0):
    return np.random.default_rng(seed)


def numbered(shape):
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def pair(shape, channels=1):
    """An image of one class per voxel, and the classes."""
    values = numbered(shape)
    return values.expand(channels, *shape).clone(), values.to(torch.uint16)


# --- rotation and zoom


def test_strength_zero_draws_no_warp_and_gives_back_the_same():
    image, classes = pair((3, 4, 5))
    assert np.array_equal(rotation_zoom(generator(), 0.0, 0.0, (3.0, 1.0, 2.0)), np.eye(3))
    assert random_warp(generator(), (3, 4, 5), (3.0, 1.0, 2.0), OFF) is None
    moved, named = warped(image, classes, None, (3, 4, 5))
    assert moved is image
    assert named is classes


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 4), (1, 1, 1), (2, 1, 7)])
def test_the_identity_samples_every_voxel_itself(shape):
    image, classes = pair(shape, channels=2)
    still = spline_of(np.zeros((4, 4, 4, 3)), tuple(spline_weights(np.zeros(n), 4) for n in shape))
    moved, named = warped(image, classes, Warp(np.eye(3), (still,)), shape)
    torch.testing.assert_close(moved, image, atol=1e-4, rtol=0)
    assert torch.equal(named, classes)
    assert (named.dtype, moved.dtype) == (torch.uint16, torch.float32)


def test_a_quarter_turn_of_image_and_label_by_hand():
    image, classes = pair((3, 3, 3))
    moved, named = warped(image, classes, Warp(QUARTER_TURN, ()), (3, 3, 3))
    expected = np.rot90(image[0].numpy(), 1, (0, 1))
    np.testing.assert_allclose(moved[0], expected, atol=1e-4)
    np.testing.assert_array_equal(named, expected)


def test_beyond_what_is_given_is_zero_and_background():
    ones = torch.ones(5, 5, 5)
    moved, named = warped(ones[None], ones.to(torch.uint8), Warp(2 * np.eye(3), ()), (5, 5, 5))
    assert named.sum() == 3**3  # seen through a matrix of 2 the cube is half as wide
    assert moved[0, 0, 0, 0] == 0
    assert moved[0, 2, 2, 2] == 1


def test_with_a_margin_the_corners_see_what_is_there():
    ones = torch.ones(9, 9, 9)
    warp = Warp(2 * np.eye(3), ())
    assert warp.margin_voxels((5, 5, 5)) == (2, 2, 2)
    moved, named = warped(ones[None], ones.to(torch.uint8), warp, (5, 5, 5))
    assert (moved == 1).all()
    assert (named == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_anatomy_stays_rigid_on_anisotropic_grids(seed):
    spacing = np.array([3.0, 1.0, 2.0])
    matrix = rotation_zoom(generator(seed), 20.0, 0.2, tuple(spacing))
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    zoom = 1 / np.cbrt(np.linalg.det(in_mm))
    assert 0.8 <= zoom <= 1.2
    turn = in_mm * zoom
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-9)
    angles = np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    assert angles <= np.sqrt(3) * 20 + 1e-6


# --- B-splines


def test_the_weights_of_a_cubic_b_spline_by_hand():
    np.testing.assert_allclose(
        spline_weights(np.array([0.0, 0.5, 1.0, 2.0]), 5) * 48,
        [[8, 32, 8, 0, 0], [1, 23, 23, 1, 0], [0, 8, 32, 8, 0], [0, 0, 8, 32, 8]],
        atol=1e-12,
    )


def test_the_bspline_is_that_of_simpleitk():
    """Over the patch from edge to edge, with as many cells as the plan names points."""
    shape = (10, 12, 14)
    plan = AugmentationPlan(bspline_voxels=3, bspline_points=(2, 3, 1))
    transform = sitk.BSplineTransform(3, 3)
    transform.SetTransformDomainOrigin([-0.5, -0.5, -0.5])
    transform.SetTransformDomainPhysicalDimensions([14.0, 12.0, 10.0])
    transform.SetTransformDomainMeshSize([1, 3, 2])
    control = generator().normal(0, 3, (5, 6, 4, 3))  # what bspline draws
    transform.SetParameters(np.ravel([control[..., 2], control[..., 1], control[..., 0]]).tolist())
    found = bspline(generator(), shape, plan).displacement
    for place in [(0, 0, 0), (4, 5, 6), (8, 11, 12), (1, 10, 3)]:
        at = place[::-1]
        expected = np.subtract(transform.TransformPoint([float(v) for v in at]), at)[::-1]
        np.testing.assert_allclose(found[place], expected, atol=1e-4)


def test_the_papers_displacement_in_numbers():
    """N(0, 15) at 5^3 control points: at a knot the weights 1/6, 4/6, 1/6 leave 15 x (1/2)^1.5 = 5.3 voxels."""
    plan = AugmentationPlan(bspline_voxels=15)
    shape = (15, 15, 15)  # its centre voxel is the knot between the two cells
    centre = torch.stack([bspline(generator(seed), shape, plan).displacement[7, 7, 7] for seed in range(400)])
    assert float(centre.std()) == pytest.approx(15 * 0.5**1.5, rel=0.08)
    assert float(centre.mean()) == pytest.approx(0, abs=0.6)


def test_control_points_move_along_the_axes_of_the_plan():
    plan = AugmentationPlan(bspline_voxels=15, bspline_axes=(1, 2))
    found = bspline(generator(), (8, 8, 8), plan).displacement
    assert not found[..., 0].any()
    assert found[..., 1].any()
    assert found[..., 2].any()


def test_elastic_has_its_deviation_everywhere_and_its_smoothness():
    """White noise under a Gaussian s correlates by exp(-d^2 / 4 s^2) at a distance of d voxels."""
    fields = torch.stack([elastic(generator(seed), (8, 8, 24), 2.0, 5.0).displacement for seed in range(300)])
    assert float(fields.std()) == pytest.approx(2, rel=0.03)
    per_voxel = fields.std(dim=(0, -1))
    assert 1.7 < float(per_voxel.min()) < float(per_voxel.max()) < 2.3
    row = fields[:, 4, 4]
    for distance in (5, 10):
        found = float((row[:, 0] * row[:, distance]).mean() / 4)
        assert found == pytest.approx(np.exp(-(distance**2) / 100), abs=0.08)


# --- all together


@pytest.mark.parametrize("seed", range(4))
def test_image_and_label_move_together(seed):
    """A bright ball stays on its label, whatever moves it."""
    shape = (20, 24, 28)
    distance = np.linalg.norm(np.indices(shape) - np.array([10, 12, 12])[:, None, None, None], axis=0)
    ball = torch.from_numpy((distance < 7).astype(np.float32))
    warp = random_warp(generator(seed), shape, (2.0, 1.0, 1.0), STRONG)
    moved, named = warped(ball[None], ball.to(torch.uint8), warp, shape)
    assert named.sum() > 100
    assert not torch.equal(named, ball.to(torch.uint8))
    assert moved[0][named == 1].mean() > 0.85
    assert moved[0][named == 0].mean() < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_the_margin_is_wide_enough_and_no_wider_than_it_may(seed):
    shape = (12, 10, 14)
    warp = random_warp(generator(seed), shape, (2.0, 1.0, 1.0), STRONG)
    margin = warp.margin_voxels(shape)
    wide = tuple(n + 2 * m for n, m in zip(shape, margin, strict=True))
    moved, named = warped(torch.ones(1, *wide), torch.ones(wide, dtype=torch.uint8), warp, shape)
    assert float(moved.min()) > 0.999
    assert (named == 1).all()
    assert Warp(np.eye(3), ()).margin_voxels(shape) == (0, 0, 0)


def test_a_larger_surround_gives_the_same_patch():
    shape = (12, 10, 14)
    warp = random_warp(generator(1), shape, (1.0, 1.0, 1.0), STRONG)
    margin = warp.margin_voxels(shape)
    results = []
    for more in (0, 3):
        at = [np.arange(n + 2 * (m + more)) - (m + more) for n, m in zip(shape, margin, strict=True)]
        plane = at[0][:, None, None] + 2.0 * at[1][:, None] - 0.5 * at[2]
        image = torch.from_numpy(plane.astype(np.float32))
        results.append(warped(image[None], image.to(torch.uint8) % 3, warp, shape)[0])
    torch.testing.assert_close(*results, atol=1e-3, rtol=0)


def test_each_change_is_drawn_with_its_probability():
    plan = AugmentationPlan(probability=0.3, rotation_degrees=10, scaling=0, bspline_voxels=1, elastic_voxels=1)
    warps = [random_warp(generator(seed), (4, 4, 4), (1.0, 1.0, 1.0), plan) for seed in range(300)]
    turned = np.mean([w is not None and not np.array_equal(w.matrix, np.eye(3)) for w in warps])
    splines = np.mean([len(w.splines) if w else 0 for w in warps])
    assert turned == pytest.approx(0.3, abs=0.08)
    assert splines == pytest.approx(0.6, abs=0.12)


def test_one_generator_state_gives_one_warp():
    one, two = (random_warp(generator(3), (6, 6, 6), (1.0, 1.0, 1.0), STRONG) for _ in range(2))
    assert np.array_equal(one.matrix, two.matrix)
    assert all(torch.equal(a.displacement, b.displacement) for a, b in zip(one.splines, two.splines, strict=True))


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = (12, 10, 14)
    warp = random_warp(generator(1), shape, (1.0, 1.0, 1.0), STRONG)
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0))
    classes = (image[0] > 0.5).to(torch.uint8)
    here, there = (warped(image.to(d), classes.to(d), warp, shape) for d in ("cpu", "cuda"))
    torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-4, rtol=0)
    assert (there[1].cpu() == here[1]).float().mean() > 0.999
