"""Whether one loader thread keeps up with the training: the share of time that the training waits for data.

    python -m benchmarks.loader --output benchmarks/results/loader_<hardware>_<yyyymm>.md

Phantom volumes from a seed are held in memory; a small network trains on what the loader's thread cuts and changes,
with the plan's default changes and with all of them. A second table has the milliseconds of every change alone, on one
core. `--small` does the same in miniature in a few seconds, to see that the script runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import provenance, tell
from vnet_core.augment import intensity_quantiles
from vnet_core.fitting import StepSettings, build_optimiser, train_step
from vnet_core.geometry import Shape
from vnet_core.inference import processor_precision
from vnet_core.losses import build_loss
from vnet_core.networks.vnet import build_vnet, count_parameters, initialise
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.plan import Plan
from vnet_core.preprocess import prepare
from workers.training.patches import BatchLoader, Share, TrainingVolume, batch_of

CPU = torch.device("cpu")
ALONE = Share(0, 1)
NOTHING: Mapping[str, Any] = {
    "flip_axes": [], "shift_voxels": 0, "rotation_degrees": 0, "scaling": 0, "contrast": 0, "brightness": 0, "noise": 0,
}  # fmt: skip
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "cut only": {},
    "flip and shift": {"flip_axes": [0, 1, 2], "shift_voxels": 4},
    "rotation and zoom": {"rotation_degrees": 5.0, "scaling": 0.05},
    "rotation to 30 degrees": {"rotation_degrees": 30.0},
    "B-spline": {"bspline_voxels": 15.0},
    "elastic": {"elastic_voxels": 2.0},
    "histogram matching": {"histogram_matching": 1.0},
    "contrast": {"contrast": 0.1},
    "brightness": {"brightness": 0.05},
    "gamma": {"gamma": 0.3},
    "noise": {"noise": 0.05},
    "blur": {"blur_voxels": 1.0},
    "low resolution": {"low_resolution": 0.5},
}
"""Each with nothing else."""
EVERYTHING: Mapping[str, Any] = {
    "flip_axes": [0, 1, 2], "bspline_voxels": 15.0, "elastic_voxels": 2.0, "histogram_matching": 1.0, "gamma": 0.3,
    "blur_voxels": 1.0, "low_resolution": 0.5,
}  # fmt: skip
"""Beside the defaults."""


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    patch: Shape
    batch: int
    width: int
    convolutions: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One training."""

    steps: int
    seconds: float
    waited_seconds: float
    step_alone_seconds: float
    """A step on a batch that is there already, while nothing loads."""


SETTINGS = (Setting((48, 64, 48), 4, 8, (1, 2, 3, 3)), Setting((96, 96, 96), 2, 8, (1, 2, 3, 3)))
SMALL = (Setting((16, 16, 16), 2, 2, (1, 1)),)


def main() -> None:
    options = arguments()
    settings = SMALL if options.small else SETTINGS
    lines = [
        "# Does one loader thread keep up?",
        "",
        "Share of time that the training waits for its data, with one loader thread. The training computes on"
        f" {torch.get_num_threads()} of {os.cpu_count()} cores for {options.seconds:g} seconds in each row; its network"
        " is small, so its steps are short.",
        "",
        "| patch | batch | changes | steps | seconds a step | the same without a loader | waiting |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting in settings:
        for name, change in (("default", {}), ("all", EVERYTHING)):
            row = training(setting, change, options.seconds)
            lines.append(
                f"| {' x '.join(map(str, setting.patch))} | {setting.batch} | {name} | {row.steps} |"
                f" {row.seconds / row.steps:.3f} | {row.step_alone_seconds:.3f} |"
                f" **{row.waited_seconds / row.seconds:.1%}** |"
            )
    lines += [
        "",
        f"Milliseconds per sample of {' x '.join(map(str, settings[0].patch))}, one channel, on one core:",
        "",
    ]
    lines += ["| change | median | fastest |", "| --- | --- | --- |"]
    samples = 4 if options.small else 60
    for name, change in {**{n: {**NOTHING, **c} for n, c in CHANGES.items()}, "default": {}, "all": EVERYTHING}.items():
        found = milliseconds(settings[0], change, samples)
        lines.append(f"| {name} | {np.median(found):.2f} | {found.min():.2f} |")
    network = build(plan_of(settings[0], {}))
    lines += ["", f"- network: {count_parameters(network):,} parameters, {str(precision()).removeprefix('torch.')}"]
    tell([*lines, *provenance("torch", "numpy")], options.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each training")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def plan_of(setting: Setting, augmentation: Mapping[str, Any]) -> Plan:
    return Plan.from_mapping(
        {
            "labels": [{"value": 1, "name": "organ"}, {"value": 2, "name": "lesion"}],
            "network": {
                "kernel_size": 3,
                "width": setting.width,
                "convolutions": setting.convolutions,
                "normalisation": "instance",
            },
            "training": {
                "patch_size": setting.patch,
                "batch_size": setting.batch,
                "augmentation": dict(augmentation),
            },
        }
    )


def volumes_of(plan: Plan, count: int = 4) -> list[TrainingVolume]:
    """Phantoms a quarter larger than the patch."""
    z, y, x = (n * 5 // 4 for n in plan.training.patch_size)
    volumes = []
    for seed in range(count):
        image, label = phantom(
            PhantomSpec(seed=seed, shape=(z, y, x), spacing_mm=(1.0, 1.0, 1.0), body_mm=0.42 * min(z, y, x))
        )
        prepared = prepare(image, label, plan.preprocess)
        assert prepared.label is not None
        classes = prepared.label.astype(np.uint8)
        foreground = {value: np.argwhere(classes == value)[::7] for value in (1, 2) if (classes == value).any()}
        volumes.append(TrainingVolume(prepared.image, classes, foreground, intensity_quantiles(prepared.image)))
    return volumes


def build(plan: Plan) -> torch.nn.Module:
    network = build_vnet(plan.network, 1, plan.outputs)
    initialise(network, 0)
    return network


def precision() -> torch.dtype:
    return processor_precision(CPU)


def training(setting: Setting, augmentation: Mapping[str, Any], seconds: float) -> Row:
    """A training of ``seconds``; what it waits for the very first batch is not counted."""
    plan = plan_of(setting, augmentation)
    volumes = volumes_of(plan)
    network = build(plan).train()
    optimiser = build_optimiser(network, plan.training)
    settings = StepSettings(build_loss(plan, (100, 10, 1)), precision(), plan.training.gradient_clip)
    batch = batch_of(volumes, plan, 0, ALONE)
    train_step(network, optimiser, [batch], 0.0, settings)
    alone: list[float] = []
    while sum(alone) < seconds / 4 or len(alone) < 2:
        started = time.monotonic()
        train_step(network, optimiser, [batch], 0.5, settings)
        alone.append(time.monotonic() - started)
    loader = BatchLoader(volumes, plan, ALONE, 0)
    try:
        batches = iter(loader)
        train_step(network, optimiser, [next(batches)], 0.5, settings)
        waited, started, steps = loader.waited_seconds, time.monotonic(), 0
        while time.monotonic() - started < seconds:
            train_step(network, optimiser, [next(batches)], 0.5, settings)
            steps += 1
        return Row(steps, time.monotonic() - started, loader.waited_seconds - waited, float(np.median(alone)))
    finally:
        loader.close()


def milliseconds(setting: Setting, augmentation: Mapping[str, Any], samples: int) -> np.ndarray:
    """Of each of some samples, made one after the other on one core."""
    plan = plan_of(Setting(setting.patch, 1, setting.width, setting.convolutions), augmentation)
    volumes = volumes_of(plan, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batch_of(volumes, plan, 0, ALONE)
        found = []
        for step in range(samples):
            started = time.perf_counter()
            batch_of(volumes, plan, step, ALONE)
            found.append(1e3 * (time.perf_counter() - started))
        return np.array(found)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
