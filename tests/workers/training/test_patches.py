"""Batches: the same data whoever computes them and wherever they begin."""

import threading

import numpy as np
import pytest
import torch

from vnet_core.augment import intensity_quantiles
from vnet_core.errors import TrainingError
from vnet_core.plan import Label, Plan
from vnet_core.sections import AugmentationPlan, NetworkPlan, TrainingPlan
from workers.storage.arrays import write_arrays
from workers.storage.store import Root
from workers.training.patches import (
    FOREGROUND_VOXELS,
    BatchLoader,
    Share,
    TrainingVolume,
    batch_of,
    classes_of,
    load_volume,
)

PLAN = Plan(
    labels=(Label(value=2, name="liver"), Label(value=7, name="tumour")),
    network=NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1)),
    training=TrainingPlan(
        patch_size=(4, 6, 8),
        batch_size=4,
        augmentation=AugmentationPlan(
            flip_axes=(0, 1, 2), shift_voxels=2, rotation_degrees=0, scaling=0, contrast=0, brightness=0, noise=0
        ),
        seed=5,
    ),
)


def with_plan(**change) -> Plan:
    return Plan.model_validate({**PLAN.model_dump(), **change})


def with_training(**change) -> Plan:
    return with_plan(training={**PLAN.training.model_dump(), **change})


def with_augmentation(**change) -> Plan:
    return with_training(augmentation={**PLAN.training.augmentation.model_dump(), **change})


def volume(number: int) -> TrainingVolume:
    """Its voxels are numbered, so that a patch tells where it was cut; classes follow the numbers."""
    shape = (8 + number, 9, 10)
    voxels = np.arange(np.prod(shape)).reshape(shape)
    classes = (voxels % 3).astype(np.uint8)
    image = (voxels + 10_000 * (number + 1)).astype(np.float32)
    foreground = {1: np.argwhere(classes == 1), 2: np.argwhere(classes == 2)}
    return TrainingVolume(image[None], classes, foreground, intensity_quantiles(image[None]))


RANDOM = with_augmentation(
    rotation_degrees=20,
    scaling=0.2,
    bspline_voxels=2,
    elastic_voxels=1,
    histogram_matching=0.5,
    contrast=0.3,
    brightness=0.3,
    gamma=0.3,
    noise=0.1,
    blur_voxels=1,
    low_resolution=0.5,
    probability=0.7,
)
VOLUMES = [volume(number) for number in range(3)]
ALONE = Share(0, 1)


# --- loading


LABEL = np.array([0, 2, 7, 1, 9, 255, 2, 0], np.uint8).reshape(2, 2, 2)


def written(tmp_path, label: np.ndarray) -> Root:
    root = Root(tmp_path)
    image = np.arange(2 * label.size, dtype=np.float32).reshape(2, *label.shape)
    write_arrays(root, "v", {"image": image, "label": label}, {})
    return root


def test_labels_become_classes_and_other_values_background_where_the_plan_says_so(tmp_path):
    loaded = load_volume(written(tmp_path, LABEL), "v", with_plan(other_labels="background"))
    np.testing.assert_array_equal(loaded.classes.ravel(), [0, 1, 2, 0, 0, 0, 1, 0])
    assert loaded.classes.dtype == np.uint8
    np.testing.assert_array_equal(loaded.image.ravel(), np.arange(16))
    np.testing.assert_array_equal(loaded.foreground[1], [[0, 0, 1], [1, 1, 0]])
    np.testing.assert_array_equal(loaded.foreground[2], [[0, 1, 0]])
    assert loaded.quantiles is None


def test_other_values_are_refused_with_their_numbers(tmp_path):
    with pytest.raises(TrainingError, match=r"volume v holds 1, 9, 255, the plan names \[2, 7\]; add") as caught:
        load_volume(written(tmp_path, LABEL), "v", PLAN)
    assert caught.value.code == "train.label-value"
    with pytest.raises(TrainingError, match=r"holds 1, 9, the plan names \[2, 7\] and 255 to ignore"):
        load_volume(written(tmp_path, LABEL), "v", with_plan(ignore_label=255))


def test_of_many_other_values_ten_are_shown():
    label = np.arange(1000, dtype=np.uint16).reshape(10, 10, 10)
    with pytest.raises(TrainingError, match=r"holds 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, \.\.\., the"):
        classes_of(label, PLAN, "v")


def test_ignored_voxels_are_one_past_the_last_class_and_no_foreground(tmp_path):
    label = np.where(np.isin(LABEL, [1, 9]), 0, LABEL)
    plan = with_plan(ignore_label=255)
    loaded = load_volume(written(tmp_path, label), "v", plan)
    np.testing.assert_array_equal(loaded.classes.ravel(), [0, 1, 2, 0, 0, plan.ignored_class, 1, 0])
    assert set(loaded.foreground) == {1, 2}
    below = with_plan(ignore_label=1)  # a value below the labels
    np.testing.assert_array_equal(classes_of(LABEL % 8, below, "v").ravel(), [0, 1, 2, 3, 3, 2, 1, 0])


def test_a_label_above_what_the_map_can_hold_is_no_error():
    plan = with_plan(labels=[{"value": 2, "name": "a"}, {"value": 700, "name": "b"}], other_labels="background")
    np.testing.assert_array_equal(classes_of(LABEL, plan, "v").ravel(), [0, 1, 0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize(("labels", "ignore", "dtype"), [(255, None, np.uint8), (255, 999, np.uint16)])
def test_as_many_bits_as_classes_need(labels, ignore, dtype):
    plan = with_plan(labels=[{"value": v, "name": str(v)} for v in range(1, labels + 1)], ignore_label=ignore)
    label = np.full((1, 1, 2), 255, np.uint16)
    label[0, 0, 1] = ignore or 1
    classes = classes_of(label, plan, "v")
    assert classes.dtype == dtype
    assert classes.ravel().tolist() == [255, 256 if ignore else 1]
    volume = TrainingVolume(np.ones((1, 1, 1, 2), np.float32), classes, {})
    assert int(batch_of([volume], plan, 0, ALONE)[1].max()) == (256 if ignore else 255)


def test_quantiles_are_kept_where_histograms_are_matched(tmp_path):
    plan = Plan.model_validate({**with_augmentation(histogram_matching=1).model_dump(), "other_labels": "background"})
    loaded = load_volume(written(tmp_path, LABEL), "v", plan)
    np.testing.assert_array_equal(loaded.quantiles, intensity_quantiles(loaded.image))


def test_a_case_without_labelled_voxels_has_no_foreground(tmp_path):
    root = Root(tmp_path)
    write_arrays(root, "v", {"image": np.ones((1, 3, 3, 3), np.float32), "label": np.zeros((3, 3, 3), np.uint8)}, {})
    assert load_volume(root, "v", PLAN).foreground == {}


def test_many_voxels_are_thinned_out_the_same_way_every_time(tmp_path):
    root = Root(tmp_path)
    label = np.zeros((20, 20, 20), np.uint16)
    label[:, :, :15] = 7
    write_arrays(root, "v", {"image": np.ones((1, 20, 20, 20), np.float32), "label": label}, {})
    first, second = (load_volume(root, "v", PLAN).foreground for _ in range(2))
    assert list(first) == [2]
    assert first[2].shape == (FOREGROUND_VOXELS, 3)
    assert len(np.unique(first[2], axis=0)) == FOREGROUND_VOXELS
    assert (label[tuple(first[2].T)] == 7).all()
    np.testing.assert_array_equal(first[2], second[2])


# --- batches


def test_a_batch_is_cut_from_the_volumes():
    images, classes = batch_of(VOLUMES, PLAN, 0, ALONE)
    assert (images.shape, images.dtype) == ((4, 1, 4, 6, 8), torch.float32)
    assert (classes.shape, classes.dtype) == ((4, 4, 6, 8), torch.int64)
    for image, target in zip(images[:, 0], classes, strict=True):
        numbers = image.long() % 10_000
        torch.testing.assert_close(target, numbers % 3)  # image and classes were cut and mirrored alike
        assert len(numbers.unique()) == numbers.numel()


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("plan", [PLAN, RANDOM], ids=["as it is", "changed at random"])
def test_the_shares_of_all_workers_are_the_batch_of_one(workers, plan):
    for step in (0, 1, 17):
        whole = batch_of(VOLUMES, plan, step, ALONE)
        shares = [batch_of(VOLUMES, plan, step, Share(rank, workers)) for rank in range(workers)]
        for part in (0, 1):
            together = torch.empty_like(whole[part])
            for rank in range(workers):
                together[rank::workers] = shares[rank][part]
            assert torch.equal(together, whole[part])


def test_positions_are_dealt_out_whole():
    shares = [list(Share(rank, 3).positions(6)) for rank in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
    assert [list(Share(rank, 3).positions(4)) for rank in range(3)] == [[0, 3], [1], [2]]
    with pytest.raises(AssertionError):
        Share(0, 3).positions(2)


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    assert torch.equal(batch_of(VOLUMES, PLAN, 9, ALONE)[0], batch_of(VOLUMES, PLAN, 9, ALONE)[0])
    assert not torch.equal(batch_of(VOLUMES, PLAN, 9, ALONE)[0], batch_of(VOLUMES, PLAN, 10, ALONE)[0])
    assert not torch.equal(batch_of(VOLUMES, PLAN, 9, ALONE)[0], batch_of(VOLUMES, with_training(seed=6), 9, ALONE)[0])


def test_random_changes_keep_shape_dtype_and_classes():
    images, classes = batch_of(VOLUMES, RANDOM, 0, ALONE)
    plain = batch_of(VOLUMES, PLAN, 0, ALONE)
    assert (images.shape, images.dtype, classes.shape, classes.dtype) == (
        plain[0].shape,
        plain[0].dtype,
        plain[1].shape,
        plain[1].dtype,
    )
    assert not torch.equal(images, plain[0])
    assert set(classes.unique().tolist()) <= {0, 1, 2}
    assert images.isfinite().all()


def test_every_volume_is_seen_once_per_epoch_in_changing_order():
    plan = with_training(batch_size=1)
    seen = [int(batch_of(VOLUMES, plan, step, ALONE)[0].max()) // 10_000 for step in range(30)]
    epochs = [tuple(seen[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(epoch) == [1, 2, 3] for epoch in epochs)
    assert len(set(epochs)) > 2


def test_one_volume_smaller_than_the_patch_is_enough():
    small = TrainingVolume(np.full((1, 2, 3, 9), 5, np.float32), np.ones((2, 3, 9), np.uint8), {})
    images, classes = batch_of([small], with_augmentation(shift_voxels=0), 0, ALONE)
    assert images.shape == (4, 1, 4, 6, 8)
    assert ((images[:, 0] == 5) == (classes == 1)).all()
    assert classes.sum() == 4 * 2 * 3 * 8


def test_a_turned_patch_sees_what_surrounds_it():
    """A volume of ones that is larger than the patch leaves no black corner."""
    ones = np.ones((24, 24, 24))
    large = TrainingVolume(ones[None].astype(np.float32), ones.astype(np.uint8), {})
    plan = with_augmentation(rotation_degrees=30, scaling=0.2, bspline_voxels=1, shift_voxels=0)
    centred = Plan.model_validate(
        {**plan.model_dump(), "training": {**plan.training.model_dump(), "foreground_fraction": 1.0}}
    )
    middle = TrainingVolume(large.image, large.classes, {1: np.array([[12, 12, 12]])})
    for step in range(5):
        images, classes = batch_of([middle], centred, step, ALONE)
        assert float(images.min()) > 0.999
        assert (classes == 1).all()


def test_histograms_are_matched_to_another_volume_of_the_training_set():
    """Each volume holds other numbers; matched, a patch of one holds those of any."""
    plan = with_augmentation(histogram_matching=1)
    found = {int(image.max()) // 10_000 for step in range(9) for image in batch_of(VOLUMES[:2], plan, step, ALONE)[0]}
    pairs = set()
    for step in range(9):
        matched, plain = (batch_of(VOLUMES[:2], p, step, ALONE)[0] for p in (plan, PLAN))
        pairs |= {(int(a.max()) // 10_000, int(b.max()) // 10_000) for a, b in zip(plain, matched, strict=True)}
    assert found == {1, 2}
    assert pairs == {(1, 1), (1, 2), (2, 1), (2, 2)}


# --- the loader's thread


def loader_threads() -> int:
    return sum(thread.name == "vnet-loader" for thread in threading.enumerate())


def test_the_loader_gives_the_batches_in_order_from_any_step():
    for first in (0, 7):
        loader = BatchLoader(VOLUMES, PLAN, Share(1, 2), first)
        try:
            for step, (images, classes) in zip(range(first, first + 6), loader, strict=False):
                expected = batch_of(VOLUMES, PLAN, step, Share(1, 2))
                assert torch.equal(images, expected[0])
                assert torch.equal(classes, expected[1])
        finally:
            loader.close()


def test_the_training_threads_keep_their_number():
    before = torch.get_num_threads()
    loader = BatchLoader(VOLUMES, RANDOM, ALONE, 0)
    next(iter(loader))
    loader.close()
    assert torch.get_num_threads() == before


def test_the_loader_counts_how_long_the_training_waited():
    loader = BatchLoader(VOLUMES, PLAN, ALONE, 0)
    try:
        assert loader.waited_seconds == 0
        for _ in zip(range(3), loader, strict=False):
            pass
        assert 0 < loader.waited_seconds < 30
    finally:
        loader.close()


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_made_there():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    loader = BatchLoader(VOLUMES, PLAN, ALONE, 0, device)
    try:
        for step, (images, classes) in zip(range(6), loader, strict=False):
            expected = batch_of(VOLUMES, PLAN, step, ALONE)
            assert images.is_cuda
            assert torch.equal(images.cpu(), expected[0])
            assert torch.equal(classes.cpu(), expected[1])
        one, two = (batch_of(VOLUMES, RANDOM, 3, ALONE, device)[0] for _ in range(2))
        assert torch.equal(one, two)
    finally:
        loader.close()


def test_closing_ends_the_thread_even_when_nothing_was_taken():
    before = loader_threads()
    loader = BatchLoader(VOLUMES, PLAN, ALONE, 0)
    assert loader_threads() == before + 1
    loader.close()
    assert loader_threads() == before


def test_an_error_in_the_thread_is_raised_where_batches_are_taken():
    broken = TrainingVolume(np.zeros((1, 8, 9, 10), np.float32), np.zeros((8, 9, 10), np.uint8), {1: np.zeros((0, 3))})
    plan = with_training(foreground_fraction=1.0)
    loader = BatchLoader([broken], plan, ALONE, 0)
    try:
        with pytest.raises(ValueError, match="high <= 0"):
            next(iter(loader))
    finally:
        loader.close()
    assert loader_threads() == 0
