"""Training samples cut from preprocessed volumes that are held in memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vnet_core.augment import intensity_quantiles, random_intensities
from vnet_core.deformation import random_warp, warped
from vnet_core.errors import TrainingError
from vnet_core.geometry import Shape
from vnet_core.plan import Plan
from vnet_core.training import class_table, cut, place, sample_generator
from workers.storage.arrays import read_array
from workers.storage.store import Root

FOREGROUND_VOXELS = 2000
"""Voxels per label that are kept of each case to centre patches on."""
PREFETCH = 3
"""Batches that the loader thread keeps ready."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class TrainingVolume:
    """One case in memory."""

    image: np.ndarray
    """float32 (C, Z, Y, X)."""
    classes: np.ndarray
    """Class indices (Z, Y, X), uint8 or uint16; ignored voxels have the plan's ``ignored_class``."""
    foreground: dict[int, np.ndarray]
    """Some voxels (N, 3) of each label's class that occurs; neither background nor ignored voxels."""
    quantiles: np.ndarray | None = None
    """Of its intensities, where the plan matches histograms."""


def load_volume(root: Root, key: str, plan: Plan) -> TrainingVolume:
    """A preprocessed volume with its labels as class indices.

    Raises TrainingError ``train.label-value`` when the label map holds values that the plan does not name and refuses.
    """
    label = read_array(root, key, "label")
    classes = classes_of(label, plan, key)
    generator = np.random.default_rng(plan.training.seed)
    foreground = {}
    for value in range(1, plan.classes):
        voxels = np.argwhere(classes == value)
        if len(voxels) > FOREGROUND_VOXELS:
            voxels = voxels[generator.choice(len(voxels), FOREGROUND_VOXELS, replace=False)]
        if len(voxels):
            foreground[value] = voxels.astype(np.int32)
    image = read_array(root, key, "image")
    matches = plan.training.augmentation.histogram_matching > 0
    return TrainingVolume(image, classes, foreground, intensity_quantiles(image) if matches else None)


def classes_of(label: np.ndarray, plan: Plan, key: str) -> np.ndarray:
    """Class indices, uint8 or uint16, of a label map of unsigned integers; see :func:`load_volume`."""
    named = [entry.value for entry in plan.labels] + ([plan.ignore_label] if plan.ignore_label else [])
    seen = np.zeros(np.iinfo(label.dtype).max + 1, bool)
    for plane in label:  # indexing holds eight bytes per voxel
        seen[plane] = True
    others = sorted({int(value) for value in np.flatnonzero(seen)} - {0, *named})
    if others and plan.other_labels == "refuse":
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        ignored = f" and {plan.ignore_label} to ignore" if plan.ignore_label else ""
        raise TrainingError(
            "train.label-value",
            f"the label map of volume {key} holds {shown}, the plan names {[e.value for e in plan.labels]}{ignored};"
            ' add the values to labels, set ignore_label, or set other_labels = "background"',
        )
    table = np.zeros(len(seen), np.uint8 if len(named) <= 255 else np.uint16)
    # the ignored value comes last, so it becomes one past the last class
    known = class_table(named)[: len(table)]
    table[: len(known)] = known
    return table[label]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of every global batch that one worker computes; the shares differ by one sample at most."""

    rank: int
    world: int

    def positions(self, batch_size: int) -> range:
        """Positions in the global batch; one at least."""
        assert batch_size >= self.world
        return range(self.rank, batch_size, self.world)


def batch_of(
    volumes: Sequence[TrainingVolume], plan: Plan, step: int, share: Share, device: torch.device = CPU
) -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's part of the batch of ``step``, on ``device``.

    Images (B, C, Z, Y, X) float32 and classes (B, Z, Y, X) int64. What is random in a sample comes from its own
    generator alone; noise has other values on another kind of device.
    """
    samples = [_sample(volumes, plan, step, position, device) for position in share.positions(plan.training.batch_size)]
    images, classes = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(classes).long()


def _sample(
    volumes: Sequence[TrainingVolume], plan: Plan, step: int, position: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (C, Z, Y, X) and classes (Z, Y, X) of one sample."""
    training = plan.training
    change, shape = training.augmentation, training.patch_size
    generator = sample_generator(training.seed, step, position)
    volume = volumes[_epoch_order(len(volumes), training.seed, step * training.batch_size + position)]
    placement = place(generator, _shape(volume), volume.foreground, training)
    warp = random_warp(generator, shape, plan.preprocess.spacing_mm, change)
    margin = warp.margin_voxels(shape) if warp else (0, 0, 0)
    wide = (shape[0] + 2 * margin[0], shape[1] + 2 * margin[1], shape[2] + 2 * margin[2])
    image, classes = (
        _on_device(cut(array, placement.widened(margin), wide), device) for array in (volume.image, volume.classes)
    )
    image, classes = warped(image, classes, warp, shape)
    quantiles = None
    if change.histogram_matching:
        other = volumes[int(generator.integers(len(volumes)))]
        assert volume.quantiles is not None, "load_volume was given another plan"
        assert other.quantiles is not None, "load_volume was given another plan"
        quantiles = volume.quantiles, other.quantiles
    return random_intensities(generator, image, change, quantiles), classes


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _shape(volume: TrainingVolume) -> Shape:
    z, y, x = volume.classes.shape
    return z, y, x


def _epoch_order(count: int, seed: int, sample: int) -> int:
    """The volume of the n-th sample: every epoch is a permutation of all volumes."""
    epoch, place_in_epoch = divmod(sample, count)
    return int(np.random.default_rng([seed, 1, epoch]).permutation(count)[place_in_epoch])


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A batch, and on a GPU the event after which it is whole."""

    images: torch.Tensor
    classes: torch.Tensor
    whole: torch.cuda.Event | None


class BatchLoader:
    """Batches of successive steps, made by one thread ahead of the training.

    On a GPU the samples are copied and changed there, on a stream of their own beside that of the training.
    """

    def __init__(
        self, volumes: Sequence[TrainingVolume], plan: Plan, share: Share, first_step: int, device: torch.device = CPU
    ) -> None:
        self.waited_seconds = 0.0
        """How long the training has waited for batches."""
        self._made: queue.Queue[_Made | BaseException] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._device = device
        self._arguments = (volumes, plan, share, first_step)
        self._thread = threading.Thread(target=self._make, name="vnet-loader", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        # one core for this thread; the training's threads keep their own count
        torch.set_num_threads(1)
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        step = self._arguments[3]
        item: _Made | BaseException
        while not self._stop.is_set():
            try:
                item = self._batch(step, stream)
            except Exception as error:  # noqa: BLE001  raised again in the training thread
                item = error
            while not self._stop.is_set():
                try:
                    self._made.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            step += 1

    def _batch(self, step: int, stream: torch.cuda.Stream | None) -> _Made:
        volumes, plan, share, _ = self._arguments
        if stream is None:
            return _Made(*batch_of(volumes, plan, step, share, self._device), None)
        with torch.cuda.stream(stream):
            images, classes = batch_of(volumes, plan, step, share, self._device)
            return _Made(images, classes, stream.record_event())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            asked = time.monotonic()
            item = self._made.get()
            self.waited_seconds += time.monotonic() - asked
            if isinstance(item, BaseException):
                raise item
            if item.whole is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(item.whole)
                # else their memory could be given to the loader's next batch while the training still reads it
                item.images.record_stream(stream)
                item.classes.record_stream(stream)
            yield item.images, item.classes

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()
