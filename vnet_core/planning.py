"""A plan from a cohort's fingerprint and the machine at hand, with a reason in words for each choice."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vnet_core.errors import ConfigError
from vnet_core.fingerprint import Fingerprint, labelled_intensities
from vnet_core.geometry import ANISOTROPIC, Shape, Triple
from vnet_core.networks.layout import count_macs
from vnet_core.networks.memory import predicted_training_bytes
from vnet_core.plan import Label, Plan
from vnet_core.sections import AugmentationPlan, Axes, InferencePlan, NetworkPlan, PreprocessPlan, TrainingPlan

STEP_GMACS_PER_CORE = 10.0
"""Multiply-accumulates (10^9) of one forward pass of a batch that a plan allows per processor core. With the backward
pass about twice that again; a core with bfloat16 units does some 100 such a second, so a step takes a third of a
second, and ten minutes have some 2,000."""
STEP_GMACS_PER_GPU = 20_000.0
"""The same for one GPU."""
MEMORY_SHARE = 0.5
"""Share of the memory at hand that one training step may take: the volumes and the engines need room too."""
BOTTOM_VOXELS = 4
"""Least voxels along an axis at the bottom of the network."""
BOTTOM_SLICES = 2
"""The same along an axis of thick slices, which has few."""
LARGEST_PATCH = 128**3
SMALLEST_EDGE = 48
"""An edge that a patch keeps, where the scans have it, however small the machine."""
WIDTHS = (8, 16, 24, 32)
CONVOLUTIONS = (2, 2, 2, 2, 2)
BATCH_SIZE = 2
ROTATION_DEGREES = 10.0
SCALING = 0.1
CHANGE_PROBABILITY = 0.3
"""Leaves (1 - 0.3)^2, about half, of the samples neither turned nor zoomed."""
VALIDATION_SHARE = 0.1
VALIDATION_CASES = 8
"""Most cases that a derived plan keeps out of training: they draw a curve. On 200 hippocampus scans, 160 cases to learn
from where there had been 144 were worth 0.004 of Dice (`benchmarks/results`)."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """What a training step may take."""

    step_gmacs: float
    """Multiply-accumulates (10^9) of the forward pass of a batch."""
    memory_gib: float
    """Memory at hand for training: of the GPU, or of the processor."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a key of the plan has its value."""

    key: str
    value: str
    words: str


@dataclass(frozen=True, slots=True)
class Derivation:
    """A plan and the reasons for it."""

    plan: Plan
    reasons: tuple[Reason, ...]


def derive_plan(
    value: Fingerprint, channels: tuple[str, ...], labels: tuple[Label, ...], machine: Machine
) -> Derivation:
    """A plan from a cohort's fingerprint for a machine; adding cases to the cohort does not change a plan made before.

    Raises ConfigError ``plan.empty-cohort`` without a case, ``plan.memory`` when not even the smallest patch fits.
    """
    if value.cases == 0:
        raise ConfigError("plan.empty-cohort", "the cohort has 0 usable cases; a plan needs at least 1")
    spacings = np.array([spacing for (_, spacing) in value.grids.elements()])
    extents = np.array([np.multiply(shape, s) for (shape, s) in value.grids.elements()])
    spacing, words = _spacing(spacings)
    reasons = [Reason("preprocess.spacing_mm", _triple(spacing), words)]
    thick = max(spacing) > ANISOTROPIC * min(spacing)
    interpolation = "anisotropic" if thick else "linear"
    reasons.append(
        Reason(
            "preprocess.interpolation",
            interpolation,
            f"the coarsest spacing is {max(spacing) / min(spacing):.1f} times the finest, "
            + ("so slices are not mixed" if thick else f"up to {ANISOTROPIC:g} times is one volume"),
        )
    )
    intensity, reason = _intensity(value, channels)
    reasons.append(reason)
    voxels = np.maximum(np.round(np.median(extents, axis=0) / spacing), 1)
    levels, reason = _levels(voxels, spacing)
    reasons.append(reason)
    patch, width, found = _patch_and_width(voxels, levels, len(channels), len(labels) + 1, machine)
    reasons += found
    flips, reason = _flips(labels)
    reasons.append(reason)
    mirrored, reason = _mirrored(flips, bool((np.array(patch) >= voxels).all()))
    reasons.append(reason)
    words = "heads and patients lie a little differently each time; more slows a training of minutes down"
    reasons.append(Reason("training.augmentation.rotation_degrees", f"{ROTATION_DEGREES:g}", words))
    words = "what is turned or zoomed is interpolated, and so less sharp than a scan to segment; half stay as they are"
    reasons.append(Reason("training.augmentation.probability", f"{CHANGE_PROBABILITY:g}", words))
    validating, reason = _validating(max(value.label_cases.values(), default=value.cases))
    reasons.append(reason)
    plan = Plan(
        channels=channels,
        labels=labels,
        preprocess=PreprocessPlan.model_validate({"spacing_mm": spacing, "interpolation": interpolation, **intensity}),
        network=planned_network(width, levels),
        training=TrainingPlan(
            patch_size=patch,
            batch_size=BATCH_SIZE,
            augmentation=AugmentationPlan(
                probability=CHANGE_PROBABILITY,
                flip_axes=flips,
                rotation_degrees=ROTATION_DEGREES,
                scaling=SCALING,
            ),
            validation_fraction=validating,
        ),
        inference=InferencePlan(mirror_axes=mirrored),
    )
    return Derivation(plan, tuple(reasons))


def planned_network(width: int, levels: int) -> NetworkPlan:
    """The network that a derived plan has, of ``width`` channels at full resolution."""
    return NetworkPlan(
        kernel_size=3,
        width=width,
        convolutions=CONVOLUTIONS[:levels],
        activation="leaky-relu",
        normalisation="instance",
        decoder="narrow",
        initialisation="msra-small-head",
    )


def _spacing(spacings: np.ndarray) -> tuple[Triple, str]:
    """The median along each axis; along one of thick slices the 10th percentile, so that thin ones keep theirs."""
    median = np.median(spacings, axis=0)
    spacing, notes = median.copy(), []
    for axis, name in enumerate("zyx"):
        if median[axis] > ANISOTROPIC * median.min():
            spacing[axis] = max(np.quantile(spacings[:, axis], 0.1), median.min())
            notes.append(f"; along {name} the 10th percentile, because {median[axis]:.3g} mm is a thick slice")
    z, y, x = (float(round(s, 4)) for s in spacing)
    return (z, y, x), f"the median of {len(spacings)} cases" + "".join(notes)


def _levels(voxels: np.ndarray, spacing: Triple) -> tuple[int, Reason]:
    """Resolutions of the network: the most that leave enough voxels (z, y, x) at the bottom."""
    least = np.where(np.array(spacing) > ANISOTROPIC * min(spacing), BOTTOM_SLICES, BOTTOM_VOXELS)
    levels = len(CONVOLUTIONS)
    while levels > 2 and (np.ceil(voxels / 2 ** (levels - 1)) < least).any():
        levels -= 1
    words = (
        f"the median volume of {_triple(voxels)} voxels leaves at least {_triple(least)} at the bottom of"
        f" {levels} levels" + (", the most there are" if levels == len(CONVOLUTIONS) else "")
    )
    return levels, Reason("network.convolutions", str(CONVOLUTIONS[:levels]), words)


def _flips(labels: tuple[Label, ...]) -> tuple[Axes, Reason]:
    """Axes that samples are mirrored along."""
    sided = [label.name for label in labels if _tells_sides(label.name)]
    flips: Axes = () if sided else (2,)
    words = (
        f"{', '.join(sided)} tells left from right, so nothing is mirrored"
        if sided
        else "no label's name tells left from right"
    )
    return flips, Reason("training.augmentation.flip_axes", str(list(flips)), words)


def _mirrored(flips: Axes, one_pass: bool) -> tuple[Axes, Reason]:
    """Axes along which a mask is the mean over the mirror images; ``one_pass``: the patch sees the whole volume."""
    mirrored = flips if one_pass else ()
    words = "a second pass takes as long as the first"
    if one_pass:
        words = (
            "the patch sees the whole volume, so a pass is short enough to be made of the mirror image too"
            if flips
            else "no mirror image was trained on"
        )
    return mirrored, Reason("inference.mirror_axes", str(list(mirrored)), words)


def _validating(cases: int) -> tuple[float, Reason]:
    """Share of the cases with a label that is kept out of training."""
    share = min(VALIDATION_SHARE, VALIDATION_CASES / cases)
    words = (
        f"a tenth of {cases} cases draws the curve of validation Dice"
        if share == VALIDATION_SHARE
        else f"{VALIDATION_CASES} of {cases} cases draw the curve of validation Dice; the others are worth more as"
        " cases to learn from, and `--folds` judges every case"
    )
    return share, Reason("training.validation_fraction", f"{share:.3g}", words)


def _intensity(value: Fingerprint, channels: tuple[str, ...]) -> tuple[dict[str, object], Reason]:
    if any(name.upper() != "CT" for name in channels):
        words = f"channels {', '.join(channels)} have no common scale, so each volume gets its own"
        return {"intensity": "zscore"}, Reason("preprocess.intensity", "zscore", words)
    found = labelled_intensities(value, 0) if len(channels) == 1 else None
    if found is None:
        words = "CT has a scale of its own, in Hounsfield units; no labelled voxel says which part of it matters"
        return {"intensity": "window"}, Reason("preprocess.intensity", "window", words)
    words = (
        f"CT: the labelled voxels lie between {found.window[0]:.0f} and {found.window[1]:.0f} HU (0.5th and 99.5th"
        f" percentile), mean {found.mean:.0f}, standard deviation {found.deviation:.0f}"
    )
    settings = {
        "intensity": "percentiles",
        "window": found.window,
        "mean": found.mean,
        "deviation": found.deviation,
    }
    return settings, Reason("preprocess.intensity", "percentiles", words)


def _patch_and_width(
    voxels: np.ndarray, levels: int, channels: int, outputs: int, machine: Machine
) -> tuple[Shape, int, list[Reason]]:
    """The whole median volume and the widest network that the machine can step through; else a smaller patch."""
    divisor = 2 ** (levels - 1)
    whole = np.ceil(voxels / divisor) * divisor
    patch = whole.copy()

    def gmacs(width: int) -> float:
        return BATCH_SIZE * count_macs(planned_network(width, levels), channels, outputs, _shape(patch)) / 1e9

    def step_gib(width: int) -> float:
        network = planned_network(width, levels)
        return predicted_training_bytes(network, channels, outputs, _shape(patch), BATCH_SIZE, 4) / GIB

    def fits(width: int) -> bool:
        return gmacs(width) <= machine.step_gmacs and step_gib(width) <= MEMORY_SHARE * machine.memory_gib

    while patch.prod() > LARGEST_PATCH or not fits(WIDTHS[0]):
        if patch.prod() <= LARGEST_PATCH and patch.max() <= max(SMALLEST_EDGE, divisor):
            break
        patch[patch.argmax()] -= divisor
    if step_gib(WIDTHS[0]) > MEMORY_SHARE * machine.memory_gib:
        raise ConfigError(
            "plan.memory",
            f"a training step on a patch of {_triple(patch)} voxels, the smallest, needs {step_gib(WIDTHS[0]):.1f} GiB,"
            f" {MEMORY_SHARE * machine.memory_gib:.1f} of {machine.memory_gib:.1f} GiB are for it; use a machine with"
            f" {step_gib(WIDTHS[0]) / MEMORY_SHARE:.0f} GiB",
        )
    width = max((w for w in WIDTHS if fits(w)), default=WIDTHS[0])
    smaller = bool((patch < whole).any())
    reasons = [
        Reason(
            "training.patch_size",
            _triple(patch),
            f"the median volume of {_triple(voxels)} voxels in steps of {divisor}"
            + (", made smaller for the machine" if smaller else ", so a patch sees the whole"),
        ),
        Reason("training.batch_size", str(BATCH_SIZE), "many small steps learn faster than few large ones"),
        Reason(
            "network.width",
            str(width),
            f"the widest of {', '.join(map(str, WIDTHS))} whose step takes at most {machine.step_gmacs:.0f} GMAC"
            f" forward (it takes {gmacs(width):.0f}) and {MEMORY_SHARE * machine.memory_gib:.1f} GiB"
            f" ({step_gib(width):.1f})",
        ),
        Reason("network.kernel_size", "3", "faster than the published 5 at the same Dice"),
        Reason("network.decoder", "narrow", "half the arithmetic of the published way up, better spent on steps"),
        Reason("network.activation", "leaky-relu", "a fifth less time per step than PReLU on processors"),
        Reason("network.normalisation", "instance", "independent of the batch, which is small"),
        Reason(
            "network.initialisation", "msra-small-head", "no class is favoured by much, which steps would have to undo"
        ),
    ]
    return _shape(patch), width, reasons


def _shape(values: np.ndarray) -> Shape:
    z, y, x = (int(v) for v in values)
    return z, y, x


def _triple(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _tells_sides(name: str) -> bool:
    return any(word in re.split(r"[^a-z]+", name.lower()) for word in ("left", "right"))
