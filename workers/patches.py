"""Training samples cut from preprocessed volumes that are held in memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.augment import intensities, rotation_zoom, warped
from vnet_core.plan import Plan
from vnet_core.training import class_table, cut, place, sample_generator
from workers.arrays import read_array
from workers.store import Root

FOREGROUND_VOXELS = 2000
"""Voxels per label that are kept of each case to centre patches on."""
PREFETCH = 3
"""Batches that the loader thread keeps ready."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingVolume:
    """One case in memory."""

    image: np.ndarray
    """float32 (C, Z, Y, X)."""
    classes: np.ndarray
    """Class indices (Z, Y, X), uint8 or uint16."""
    foreground: dict[int, np.ndarray]
    """Some voxels (N, 3) of each class that occurs."""


def load_volume(root: Root, key: str, plan: Plan) -> TrainingVolume:
    """A preprocessed volume with its labels as class indices."""
    label = read_array(root, key, "label")
    table = class_table([entry.value for entry in plan.labels])
    known = np.where(label < len(table), label, 0)
    classes = table[known].astype(np.uint8 if plan.classes <= 256 else np.uint16)
    generator = np.random.default_rng(plan.training.seed)
    foreground = {}
    for value in range(1, plan.classes):
        voxels = np.argwhere(classes == value)
        if len(voxels) > FOREGROUND_VOXELS:
            voxels = voxels[generator.choice(len(voxels), FOREGROUND_VOXELS, replace=False)]
        if len(voxels):
            foreground[value] = voxels.astype(np.int32)
    return TrainingVolume(read_array(root, key, "image"), classes, foreground)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of every global batch that one worker computes."""

    rank: int
    world: int

    def positions(self, batch_size: int) -> range:
        """Positions in the global batch."""
        assert batch_size % self.world == 0
        return range(self.rank, batch_size, self.world)


def batch_of(
    volumes: Sequence[TrainingVolume], plan: Plan, step: int, share: Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's part of the batch of ``step``: images (B, C, Z, Y, X) float32 and classes (B, Z, Y, X) int64."""
    training = plan.training
    images, classes = [], []
    for position in share.positions(training.batch_size):
        generator = sample_generator(training.seed, step, position)
        volume = volumes[_epoch_order(len(volumes), training.seed, step * training.batch_size + position)]
        placement = place(generator, _shape(volume), volume.foreground, training)
        image = cut(volume.image, placement, training.patch_size)
        target = cut(volume.classes, placement, training.patch_size)
        matrix = rotation_zoom(generator, training.rotation_degrees, training.scaling, plan.preprocess.spacing_mm)
        image, target = warped(np.ascontiguousarray(image), np.ascontiguousarray(target), matrix)
        images.append(intensities(generator, image, training.intensity))
        classes.append(target.astype(np.int64))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(classes))


def _shape(volume: TrainingVolume) -> tuple[int, int, int]:
    z, y, x = volume.classes.shape
    return z, y, x


def _epoch_order(count: int, seed: int, sample: int) -> int:
    """The volume of the n-th sample: every epoch is a permutation of all volumes."""
    epoch, place_in_epoch = divmod(sample, count)
    return int(np.random.default_rng([seed, 1, epoch]).permutation(count)[place_in_epoch])


class BatchLoader:
    """Batches of successive steps, made by one thread ahead of the training."""

    def __init__(self, volumes: Sequence[TrainingVolume], plan: Plan, share: Share, first_step: int) -> None:
        self._made: queue.Queue[tuple[torch.Tensor, torch.Tensor] | BaseException] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._arguments = (volumes, plan, share, first_step)
        self._thread = threading.Thread(target=self._make, name="vnet-loader", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        volumes, plan, share, step = self._arguments
        item: tuple[torch.Tensor, torch.Tensor] | BaseException
        while not self._stop.is_set():
            try:
                item = batch_of(volumes, plan, step, share)
            except Exception as error:  # noqa: BLE001  raised again in the training thread
                item = error
            while not self._stop.is_set():
                try:
                    self._made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            step += 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            item = self._made.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()
