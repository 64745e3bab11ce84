"""Batches: the same data whoever computes them and wherever they begin."""

import threading

import numpy as np
import pytest
import torch

from vnet_core.plan import Label, NetworkPlan, Plan, TrainingPlan
from workers.arrays import write_arrays
from workers.patches import FOREGROUND_VOXELS, BatchLoader, Share, TrainingVolume, batch_of, load_volume
from workers.store import Root

PLAN = Plan(
    labels=(Label(value=2, name="liver"), Label(value=7, name="tumour")),
    network=NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1)),
    training=TrainingPlan(
        patch_size=(4, 6, 8),
        batch_size=4,
        flip_axes=(0, 1, 2),
        shift_voxels=2,
        rotation_degrees=0,
        scaling=0,
        intensity=0,
        seed=5,
    ),
)


def with_training(**change) -> Plan:
    return Plan.model_validate({**PLAN.model_dump(), "training": {**PLAN.training.model_dump(), **change}})


def volume(number: int) -> TrainingVolume:
    """Its voxels are numbered, so that a patch tells where it was cut; classes follow the numbers."""
    shape = (8 + number, 9, 10)
    voxels = np.arange(np.prod(shape)).reshape(shape)
    classes = (voxels % 3).astype(np.uint8)
    image = (voxels + 10_000 * (number + 1)).astype(np.float32)
    return TrainingVolume(image[None], classes, {1: np.argwhere(classes == 1), 2: np.argwhere(classes == 2)})


RANDOM = with_training(rotation_degrees=20, scaling=0.2, intensity=0.3)
VOLUMES = [volume(number) for number in range(3)]
ALONE = Share(0, 1)


# --- loading


def test_labels_become_classes_and_unknown_values_background(tmp_path):
    root = Root(tmp_path)
    label = np.array([0, 2, 7, 1, 9, 255, 2, 0], np.uint8).reshape(2, 2, 2)
    image = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    write_arrays(root, "v", {"image": image, "label": label}, {})
    loaded = load_volume(root, "v", PLAN)
    np.testing.assert_array_equal(loaded.classes.ravel(), [0, 1, 2, 0, 0, 0, 1, 0])
    assert loaded.classes.dtype == np.uint8
    np.testing.assert_array_equal(loaded.image, image)
    np.testing.assert_array_equal(loaded.foreground[1], [[0, 0, 1], [1, 1, 0]])
    np.testing.assert_array_equal(loaded.foreground[2], [[0, 1, 0]])


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
    with pytest.raises(AssertionError):
        Share(0, 3).positions(4)


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
    images, classes = batch_of([small], with_training(shift_voxels=0), 0, ALONE)
    assert images.shape == (4, 1, 4, 6, 8)
    assert ((images[:, 0] == 5) == (classes == 1)).all()
    assert classes.sum() == 4 * 2 * 3 * 8


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
