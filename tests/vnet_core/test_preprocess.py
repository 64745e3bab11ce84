"""To the network's grid and back: what comes back, what is refused, and intensities by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vnet_core import volume
from vnet_core.decide import most_probable
from vnet_core.errors import ScanError
from vnet_core.geometry import (
    CANONICAL_DIRECTION,
    Geometry,
    check_label_grid,
    matrix_of,
    same_grid,
    to_canonical,
    world_mm,
)
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.preprocess import normalise, planned, prepare, restore, without_bias
from vnet_core.sections import PreprocessPlan
from vnet_core.volume import Volume, foreground_box

TILTED = Rotation.from_euler("zyx", [20, -35, 50], degrees=True).as_matrix()
GRIDS = {
    "axial": (CANONICAL_DIRECTION, (1.0, 1.0, 1.0)),
    "sagittal": ([[1, 0, 0], [0, 0, 1], [0, -1, 0]], (1.0, 1.2, 1.4)),
    "flipped": ([[0, 0, -1], [0, -1, 0], [-1, 0, 0]], (1.2, 1.0, 0.9)),
    "oblique": (TILTED, (1.0, 0.9, 1.1)),
    "mirrored-oblique": (TILTED[:, ::-1] * [1, 1, -1], (1.3, 0.9, 1.1)),
    "anisotropic": (CANONICAL_DIRECTION, (2.5, 0.6, 0.7)),
}
WHOLE = (1.0, 1.0, 1.0)


def ball_in_noise(direction, spacing_mm) -> tuple[Volume, Volume]:
    """A scan of about 36 mm with an empty border, and its labels: a ball of 10 mm radius (3) and a core (1)."""
    shape = tuple(round(36 / s) for s in spacing_mm)
    geometry = Geometry(shape, spacing_mm, (7.0, -20.0, 3.5), matrix_of(direction))
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    places = world_mm(geometry, indices)
    centre = world_mm(geometry, (np.array(shape) - 1) / 2 + [1.0, -1.3, 0.6])
    distance_mm = np.linalg.norm(places - centre, axis=-1)
    label = np.where(distance_mm < 5, 1, np.where(distance_mm < 10, 3, 0)).astype(np.uint8)
    image = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32) + label
    for axis, margin in enumerate((2, 1, 3)):
        border = np.moveaxis(image, axis, 0)
        border[:margin] = border[-1:] = 0.0
    return Volume(image[None], geometry), Volume(label[None], geometry)


def one_hot_logits(label: np.ndarray, values=(0, 1, 3)) -> torch.Tensor:
    """A network that is sure of every voxel: classes 0, 1, 2 of the label values."""
    return torch.from_numpy(np.stack([20.0 * (label == v) for v in values]).astype(np.float32))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


# --- in slabs


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 0.8, 1.1), (0.7, 1.9, 2.3), (4.0, 3.0, 3.5)])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"interpolation": "anisotropic", "label_interpolation": "nearest", "intensity": "range"},
        {"intensity": "window", "crop_foreground": False},
    ],
    ids=["zscore", "anisotropic", "window"],
)
def test_any_planes_alone_are_those_among_all_to_the_last_bit(name, spacing_mm, sections):
    image, label = ball_in_noise(*GRIDS[name])
    plan = PreprocessPlan(spacing_mm=spacing_mm, **sections)
    whole, parts = prepare(image, label, plan), planned(image, label, plan)
    assert parts.geometry == whole.geometry
    count = parts.geometry.shape[0]
    for planes in (1, 3, 7, count - 1):
        for start in range(0, count, planes):
            wanted = slice(start, min(start + planes, count))
            found = parts.image(wanted)
            assert found.flags.c_contiguous
            assert found.tobytes() == np.ascontiguousarray(whole.image[:, wanted]).tobytes()
            np.testing.assert_array_equal(parts.label(wanted), whole.label[wanted])


def test_statistics_and_foreground_do_not_depend_on_how_much_is_looked_at_together(monkeypatch):
    image, _ = ball_in_noise(*GRIDS["oblique"])
    box, voxels = foreground_box(image.voxels), normalise(image.voxels, PreprocessPlan())
    inside = image.voxels[image.voxels > 0].astype(np.float64)
    expected = (image.voxels - inside.mean()) / inside.std()
    np.testing.assert_allclose(voxels, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(volume, "SLAB_VOXELS", 100)
    assert foreground_box(image.voxels) == box
    np.testing.assert_allclose(normalise(image.voxels, PreprocessPlan()), voxels, rtol=1e-6, atol=1e-6)


MEASURE = """
import ctypes, json, re
import numpy as np
from vnet_core.geometry import Geometry
from vnet_core.preprocess import planned
from vnet_core.sections import PreprocessPlan
from vnet_core.volume import Volume

def status(field):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(field + r":\\s+(\\d+)", file.read())[1])

def peak_of(work):
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    work()
    return status("VmHWM") - before

shape, told = (300, 256, 256), []
voxels = np.random.default_rng(0).integers(0, 1000, (1, *shape), np.int16)
image = Volume(voxels, Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
for spacing_mm in ((1.3, 1.1, 0.9), (2.0, 2.0, 2.0), (0.6, 0.7, 0.8)):
    plan = PreprocessPlan(spacing_mm=spacing_mm, crop_foreground=False)
    planned(image, None, plan).image(slice(0, 2))
    made = []
    finding = peak_of(lambda: made.append(planned(image, None, plan)))
    planes = made[0].planes_within(64 << 20)
    first = made[0].geometry.shape[0] // 2 - planes // 2
    told.append([finding, peak_of(lambda: made[0].image(slice(first, first + planes))), planes])
print(json.dumps(told))
"""


def test_planes_that_fit_a_limit_take_no_more_than_it():
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of one call is read from /proc, which only Linux has")
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    for finding_bytes, slab_bytes, planes in json.loads(run.stdout):
        assert planes > 10
        assert slab_bytes < 64 << 20
        # of 300 planes with 39 MB as stored, beside which as float64 they would be 157 MB
        assert finding_bytes < 80e6


# --- there and back


@pytest.mark.parametrize("name", GRIDS)
def test_a_label_comes_back_voxel_for_voxel_at_the_scans_own_spacing(name):
    image, label = ball_in_noise(*GRIDS[name])
    plan = PreprocessPlan(spacing_mm=to_canonical(image.geometry)[1].spacing_mm)
    prepared = prepare(image, label, plan)
    assert prepared.label.size < label.labels.size, "the empty border was not cut off"
    classes = restore(one_hot_logits(prepared.label), prepared.geometry, image.geometry, most_probable(4))
    np.testing.assert_array_equal(np.array([0, 1, 3])[classes], label.labels)
    assert classes.flags.c_contiguous


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("spacing_mm", [(1.3, 1.3, 1.3), (2.0, 0.8, 1.1)])
def test_a_label_comes_back_nearly_at_another_spacing(name, spacing_mm):
    image, label = ball_in_noise(*GRIDS[name])
    prepared = prepare(image, label, PreprocessPlan(spacing_mm=spacing_mm))
    assert prepared.geometry.spacing_mm == spacing_mm
    classes = restore(one_hot_logits(prepared.label), prepared.geometry, image.geometry, most_probable(4))
    assert classes.shape == label.labels.shape
    for index, value in ((1, 1), (2, 3)):
        assert dice(classes == index, label.labels == value) > 0.9


@pytest.mark.parametrize("name", GRIDS)
def test_a_marked_voxel_keeps_its_world_point(name):
    """The image and its label by world position alone, without the way back."""
    image, label = ball_in_noise(*GRIDS[name])
    image.voxels[label.voxels == 1] = 50.0
    prepared = prepare(image, label, PreprocessPlan(spacing_mm=to_canonical(image.geometry)[1].spacing_mm))
    core = np.argwhere(label.labels == 1)
    for values in (prepared.label == 1, prepared.image[0] > 5):
        found = world_mm(prepared.geometry, np.argwhere(values).mean(axis=0))
        np.testing.assert_allclose(found, world_mm(image.geometry, core.mean(axis=0)), atol=1e-6)


def test_what_was_cropped_away_is_background():
    geometry = Geometry((4, 5, 6), WHOLE, (0.0, 0.0, 0.0))
    voxels = np.zeros((1, 4, 5, 6), np.float32)
    voxels[0, 1:3, 2:4, 1:5] = np.arange(1, 17).reshape(2, 2, 4)
    prepared = prepare(Volume(voxels, geometry), None, PreprocessPlan(spacing_mm=WHOLE))
    assert prepared.geometry.shape == (2, 2, 4)
    everywhere = torch.zeros(2, 2, 2, 4)
    everywhere[1] = 1.0
    expected = np.zeros((4, 5, 6), np.uint8)
    expected[1:3, 2:4, 1:5] = 1
    np.testing.assert_array_equal(
        restore(everywhere, prepared.geometry, geometry, most_probable(len(everywhere))), expected
    )


@pytest.mark.parametrize("spacing_mm", [(4.0, 4.0, 4.0), (3.0, 3.0, 3.0), (1.5, 1.5, 1.5), (0.7, 0.7, 0.7)])
def test_a_structure_that_reaches_the_edge_of_the_scan_reaches_it_again(spacing_mm):
    """Else it would not be told as cut off by the edge."""
    geometry = Geometry((10, 11, 13), WHOLE, (0.0, 0.0, 0.0))
    image = Volume(np.random.default_rng(0).uniform(1, 2, (1, 10, 11, 13)).astype(np.float32), geometry)
    prepared = prepare(image, None, PreprocessPlan(spacing_mm=spacing_mm, crop_foreground=False))
    everywhere = torch.zeros(2, *prepared.geometry.shape)
    everywhere[1] = 1.0
    assert restore(everywhere, prepared.geometry, geometry, most_probable(len(everywhere))).all()


def test_without_crop_the_whole_scan_is_prepared():
    image, label = ball_in_noise(CANONICAL_DIRECTION, WHOLE)
    prepared = prepare(image, label, PreprocessPlan(spacing_mm=WHOLE, crop_foreground=False))
    assert same_grid(prepared.geometry, image.geometry)
    np.testing.assert_array_equal(prepared.label, label.labels)


def test_prepare_changes_neither_image_nor_label():
    image, label = ball_in_noise(CANONICAL_DIRECTION, WHOLE)
    before = image.voxels.copy(), label.voxels.copy()
    for intensity in ("zscore", "window", "percentiles", "range"):
        plan = PreprocessPlan(spacing_mm=WHOLE, intensity=intensity, crop_foreground=False, bias_field="n4")
        prepared = prepare(image, label, plan)
        prepared.label[:] = 9
        prepared.image[:] = 9
    np.testing.assert_array_equal(image.voxels, before[0])
    np.testing.assert_array_equal(label.voxels, before[1])


def test_what_comes_out_is_contiguous_float32_and_the_labels_dtype():
    image, label = ball_in_noise(*GRIDS["sagittal"])
    integers = Volume((image.voxels * 100).astype(np.int16), image.geometry)
    wide = Volume(label.voxels.astype(np.uint16) * 100, label.geometry)
    prepared = prepare(integers, wide, PreprocessPlan(spacing_mm=(1.3, 1.3, 1.3)))
    assert prepared.image.dtype == np.float32
    assert prepared.image.flags.c_contiguous
    assert prepared.label.dtype == np.uint16
    assert set(np.unique(prepared.label)) == {0, 100, 300}
    assert prepared.label.shape == prepared.image.shape[1:] == prepared.geometry.shape


def test_a_case_without_label():
    image, _ = ball_in_noise(CANONICAL_DIRECTION, WHOLE)
    assert prepare(image, None, PreprocessPlan()).label is None


# --- the foreground


def test_the_foreground_box_by_hand():
    voxels = np.full((1, 4, 5, 6), -1000)
    voxels[0, 1, 2, 3] = -999
    voxels[0, 2, 4, 3] = 5
    assert foreground_box(voxels) == ((1, 2, 3), (3, 5, 4))


def test_a_voxel_that_any_channel_sees_is_foreground():
    voxels = np.zeros((2, 4, 5, 6))
    voxels[0, 1, 1, 1] = 1
    voxels[1] = 7  # a minimum of its own
    voxels[1, 3, 3, 3] = 8
    assert foreground_box(voxels) == ((1, 1, 1), (4, 4, 4))


@pytest.mark.parametrize("value", [0, -1024, 3.5])
def test_a_constant_scan_is_refused_with_its_value(value):
    voxels = np.full((1, 3, 3, 3), value, np.float32)
    geometry = Geometry((3, 3, 3), WHOLE, (0.0, 0.0, 0.0))
    for attempt in (
        lambda: foreground_box(voxels),
        lambda: normalise(voxels, PreprocessPlan()),
        lambda: prepare(Volume(voxels, geometry), None, PreprocessPlan()),
        lambda: prepare(Volume(voxels, geometry), None, PreprocessPlan(crop_foreground=False)),
    ):
        with pytest.raises(ScanError) as caught:
            attempt()
        assert caught.value.code == "scan.constant"
        assert str(value) in str(caught.value)


def test_one_constant_channel_is_named():
    voxels = np.zeros((2, 3, 3, 3), np.float32)
    voxels[0] = np.arange(27).reshape(3, 3, 3)
    with pytest.raises(ScanError, match=r"channel 1 has the value 0\.0 everywhere"):
        normalise(voxels, PreprocessPlan())


def test_a_bright_block_in_air_is_no_constant_scan():
    geometry = Geometry((5, 5, 5), WHOLE, (0.0, 0.0, 0.0))
    voxels = np.zeros((1, 5, 5, 5), np.uint8)
    voxels[0, 1:4, 1:4, 1:4] = 255
    prepared = prepare(Volume(voxels, geometry), None, PreprocessPlan(spacing_mm=WHOLE))
    assert np.isfinite(prepared.image).all()


# --- intensities


def test_z_scores_by_hand():
    # above the minimum of 0 are 2, 4 and 6: mean 4, standard deviation sqrt(8 / 3)
    voxels = np.array([0, 2, 4, 6], np.int16).reshape(1, 1, 1, 4)
    expected = (np.array([0, 2, 4, 6]) - 4) / np.sqrt(8 / 3)
    np.testing.assert_allclose(normalise(voxels, PreprocessPlan())[0, 0, 0], expected, rtol=1e-6)


def test_every_channel_has_its_own_scale():
    first = np.random.default_rng(0).normal(100, 5, (6, 7, 8))
    result = normalise(np.stack([first, 1e4 * first + 3e6]), PreprocessPlan())
    np.testing.assert_allclose(result[0], result[1], atol=1e-3)
    inside = result[0][first > first.min()]
    assert inside.mean() == pytest.approx(0, abs=1e-5)
    assert inside.std() == pytest.approx(1, abs=1e-5)


def test_statistics_are_exact_on_large_offsets():
    """float32 sums of a million voxels around 60 000 would be off by more than the deviation of 1."""
    voxels = np.random.default_rng(0).normal(60_000, 1, (1, 100, 100, 100)).astype(np.float32)
    result = normalise(voxels, PreprocessPlan())
    assert abs(float(result.mean(dtype=np.float64))) < 1e-3
    assert float(result.std(dtype=np.float64)) == pytest.approx(1, abs=1e-3)


def test_two_values_keep_their_step():
    voxels = np.array([3, 5, 5, 3], np.uint8).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(normalise(voxels, PreprocessPlan())[0, 0, 0], [-2, 0, 0, -2])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_a_window_by_hand(dtype):
    voxels = np.array([-2000, -160, 40, 240, 3000], dtype).reshape(1, 1, 1, 5)
    result = normalise(voxels, PreprocessPlan(intensity="window", window=(-160, 240)))
    np.testing.assert_allclose(result[0, 0, 0], [-1, -1, 0, 1, 1], atol=1e-6)
    assert result.dtype == np.float32


def test_a_window_below_zero_on_unsigned_voxels():
    voxels = np.array([0, 250], np.uint8).reshape(1, 1, 1, 2)
    result = normalise(voxels, PreprocessPlan(intensity="window", window=(-1000, 1000)))
    np.testing.assert_allclose(result[0, 0, 0], [0, 0.25], atol=1e-6)


def test_percentiles_by_hand():
    voxels = np.array([-2000, -100, 0, 140, 3000], np.int16).reshape(1, 1, 1, 5)
    plan = PreprocessPlan(intensity="percentiles", window=(-100, 140), mean=20, deviation=40)
    np.testing.assert_allclose(normalise(voxels, plan)[0, 0, 0], [-3, -3, -0.5, 3, 3], atol=1e-6)


def test_range_by_hand():
    voxels = np.array([[-1, 0, 1, 3], [5, 5, 5, 6]], np.int16).reshape(2, 1, 1, 4)
    found = normalise(voxels, PreprocessPlan(intensity="range"))[:, 0, 0]
    np.testing.assert_allclose(found, [[0, 0.25, 0.5, 1], [0, 0, 0, 1]], atol=1e-6)
    with pytest.raises(ScanError, match="channel 0 has the value 4"):
        normalise(np.full((1, 2, 2, 2), 4), PreprocessPlan(intensity="range"))


def test_schemes_of_absolute_intensities_take_a_constant_channel():
    voxels = np.full((1, 2, 2, 2), 40, np.int16)
    plan = PreprocessPlan(intensity="percentiles", window=(-100, 100), mean=20, deviation=10)
    assert (normalise(voxels, plan) == 2).all()


def test_the_crop_does_not_move_the_scale():
    """Voxels at the volume's minimum are left out; the smallest voxel of a full box is not one of them."""
    geometry = Geometry((3, 3, 4), WHOLE, (0.0, 0.0, 0.0))
    voxels = np.zeros((1, 3, 3, 4), np.int16)
    voxels[0, 1, 1, 1:3] = [100, 200]
    expected = {}
    for crop in (False, True):
        plan = PreprocessPlan(spacing_mm=WHOLE, crop_foreground=crop)
        image = prepare(Volume(voxels, geometry), None, plan).image[0]
        expected[crop] = image if crop else image[1:2, 1:2, 1:3]
    np.testing.assert_allclose(expected[True][0, 0], [-1, 1], atol=1e-6)
    np.testing.assert_allclose(expected[True], expected[False], atol=1e-6)


# --- the label's grid


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (Geometry((3, 4, 6), (2.0, 1.0, 0.5), (1.0, 2.0, 3.0)), ["(3, 4, 6)", "(3, 4, 5)"]),
        (Geometry((3, 4, 5), (2.5, 1.0, 0.5), (1.0, 2.0, 3.0)), ["(2.5, 1, 0.5) mm", "(2, 1, 0.5) mm"]),
        (Geometry((3, 4, 5), (2.0, 1.0, 0.5), (1.0, 2.5, 3.0)), ["(1, 2.5, 3) mm", "(1, 2, 3) mm"]),
    ],
)
def test_a_label_on_another_grid_is_refused_with_both_grids(label, words):
    image = Geometry((3, 4, 5), (2.0, 1.0, 0.5), (1.0, 2.0, 3.0))
    with pytest.raises(ScanError) as caught:
        check_label_grid(image, label)
    assert caught.value.code == "label.grid"
    assert all(word in str(caught.value) for word in words), str(caught.value)
    voxels = np.random.default_rng(0).normal(size=(1, *image.shape)), np.zeros((1, *label.shape), np.uint8)
    with pytest.raises(ScanError, match="export the label"):
        prepare(Volume(voxels[0], image), Volume(voxels[1], label), PreprocessPlan())


def test_a_label_whose_header_was_rounded_is_accepted():
    image = Geometry((3, 4, 5), (2.0, 1.0, 0.5), (1.0, 2.0, 3.0))
    check_label_grid(image, Geometry((3, 4, 5), (2.001, 1.0, 0.5), (1.004, 2.0, 3.0)))


# --- the bias field


def biased(geometry: Geometry, offset: float = 0.0) -> tuple[Volume, np.ndarray]:
    """A ball of one tissue under a smooth field of 0.6 to 1.6, and the ball."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in geometry.shape), indexing="ij")
    ball = z**2 + y**2 + x**2 < 0.8
    field = np.exp(0.35 * np.sin(2 * x + 0.5) + 0.2 * y)
    noise = np.random.default_rng(0).normal(0, 2, geometry.shape)
    return Volume(((ball * (100 + noise) * field) + offset)[None].astype(np.float32), geometry), ball


@pytest.mark.parametrize("name", ["axial", "anisotropic", "oblique"])
@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_n4_takes_a_smooth_field_away(name, offset):
    direction, spacing = GRIDS[name]
    geometry = Geometry((24, 40, 44), spacing, (0.0, 0.0, 0.0), matrix_of(direction))
    scan, ball = biased(geometry, offset)
    before, after = scan.voxels[0][ball] - offset, without_bias(scan).voxels[0][ball] - offset
    variations = [float(values.std() / values.mean()) for values in (before, after)]
    assert variations[0] > 0.2
    assert variations[1] < 0.25 * variations[0]


def test_n4_leaves_a_flat_field_and_the_air():
    image, ball = biased(Geometry((24, 40, 44), WHOLE, (0.0, 0.0, 0.0)))
    flat = Volume(
        np.where(ball, 100, 0)[None] + np.random.default_rng(0).normal(0, 2, (1, *ball.shape)) * ball, image.geometry
    )
    found = without_bias(flat)
    np.testing.assert_allclose(found.voxels, flat.voxels, rtol=0.02, atol=1e-4)
    assert (found.voxels[0][~ball] == 0).all()
    assert found.voxels.dtype == np.float32


def test_n4_gives_the_same_bits_with_any_number_of_threads():
    scan, _ = biased(Geometry((41, 43, 47), (1.0, 1.1, 0.9), (0.0, 0.0, 0.0)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(without_bias(scan).voxels)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 40, 40), (3, 5, 4)])
def test_n4_on_tiny_scans(shape):
    voxels = np.random.default_rng(0).uniform(0, 100, (2, *shape))
    plan = PreprocessPlan(spacing_mm=WHOLE, bias_field="n4")
    assert np.isfinite(prepare(Volume(voxels, Geometry(shape, WHOLE, (0.0, 0.0, 0.0))), None, plan).image).all()


def test_n4_makes_a_phantoms_organ_even():
    image, label = phantom(PhantomSpec(seed=3, shape=(40, 40, 40), spacing_mm=(2.0, 2.0, 2.0), bias=0.5, lesions=0))
    organ = label.labels == 1
    before, after = image.voxels[0][organ].astype(float), without_bias(image).voxels[0][organ]
    assert after.std() / after.mean() < before.std() / before.mean()


# --- interpolation


def test_thick_slices_are_copied_and_not_mixed():
    """Slices of 4 mm against 1 mm in plane: between two slices there is the nearer one."""
    geometry = Geometry((2, 3, 3), (4.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    voxels = np.zeros((1, 2, 3, 3), np.float32)
    voxels[0, 1] = 1.0
    found = {}
    for interpolation in ("linear", "anisotropic"):
        plan = PreprocessPlan(spacing_mm=WHOLE, intensity="range", interpolation=interpolation, crop_foreground=False)
        found[interpolation] = prepare(Volume(voxels, geometry), None, plan).image[0, :, 1, 1]
    np.testing.assert_allclose(found["linear"], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(found["anisotropic"], [0, 0, 0, 0, 1, 1, 1, 1])


def test_three_times_the_finest_spacing_is_not_yet_thick():
    geometry = Geometry((2, 3, 3), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    voxels = np.zeros((1, 2, 3, 3), np.float32)
    voxels[0, 1] = 1.0
    plan = PreprocessPlan(spacing_mm=WHOLE, intensity="range", interpolation="anisotropic", crop_foreground=False)
    assert len(np.unique(prepare(Volume(voxels, geometry), None, plan).image)) > 2


def test_fine_stripes_become_grey_and_not_stripes():
    """Lines of 1 mm at 3 mm voxels: each voxel is the mean of the three that it covers."""
    geometry = Geometry((1, 1, 12), WHOLE, (0.0, 0.0, 0.0))
    voxels = np.array([0, 0, 3, 3, 3, 3, 0, 3, 0, 0, 0, 0], np.float32).reshape(1, 1, 1, 12)
    plan = PreprocessPlan(spacing_mm=(1.0, 1.0, 3.0), intensity="range", crop_foreground=False)
    found = prepare(Volume(voxels, geometry), None, plan).image[0, 0, 0]
    np.testing.assert_allclose(found, [1 / 3, 1, 1 / 3, 0], atol=1e-6)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("spacing_mm", [(0.7, 0.7, 0.7), (2.3, 2.3, 2.3), (4.0, 1.3, 0.6)])
def test_labels_are_never_numbers(interpolation, spacing_mm):
    """Between background and label 3, and between labels 1 and 3, no label 2 appears."""
    image, label = ball_in_noise(*GRIDS["anisotropic"])
    plan = PreprocessPlan(spacing_mm=spacing_mm, label_interpolation=interpolation)
    assert set(np.unique(prepare(image, label, plan).label)) == {0, 1, 3}


def test_nearest_labels_by_hand():
    geometry = Geometry((1, 1, 4), WHOLE, (0.0, 0.0, 0.0))
    image = Volume(np.arange(4.0).reshape(1, 1, 1, 4), geometry)
    label = Volume(np.array([1, 3, 0, 7], np.uint8).reshape(1, 1, 1, 4), geometry)
    plan = PreprocessPlan(spacing_mm=(1.0, 1.0, 0.5), label_interpolation="nearest", crop_foreground=False)
    np.testing.assert_array_equal(prepare(image, label, plan).label.ravel(), [1, 1, 3, 3, 0, 0, 7, 7])
