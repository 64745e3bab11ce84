"""Judges a snapshot of a training by whole volumes: Dice of every case, and pictures of the worst ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from vnet_core.errors import VnetError
from vnet_core.inference import precision
from vnet_core.pictures.outlines import two_outlines
from vnet_core.plan import Plan
from vnet_core.structures import Structure, structures
from workers.cohort import volume_geometry
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root
from workers.training.judge import Judge, dice_row
from workers.training.patches import TrainingVolume, load_volume
from workers.training.run import Run
from workers.training.validations import Validation, folder, minutes_of, publish, snapshot_weights

WORST = 3
"""Cases with a picture."""
NICENESS = 10
"""Of a validation that shares a machine's cores with the training."""


def validate(config: Mapping[str, Any], step: int, niceness: int) -> None:
    """Judge a snapshot in this process; ``config`` is a Run as a mapping. A named error becomes a validation without
    scores, so that the training does not wait for it."""
    if niceness:
        os.nice(niceness)
        torch.set_num_threads(1)
    run = Run(**config)
    for_the_owner_alone()
    root = Root(run.root_url)
    minutes = minutes_of(root, run, step)
    try:
        found = _judged(root, run, step, minutes)
    except VnetError as error:
        found = Validation(step, minutes, {}, [], f"{error.code}: {error.message}")
    publish(root, run, found)


def _judged(root: Root, run: Run, step: int, minutes: float) -> Validation:
    plan = Plan.from_mapping(run.plan)
    told = structures(plan)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = safetensors.torch.load(snapshot_weights(root, run, step))
    judge = Judge(weights, plan, device, precision(plan.training, device))
    case_dice = {}
    for case, key in sorted(run.validation.items()):
        volume = load_volume(root, key, plan)
        case_dice[case] = dice_row(judge.classes(volume), volume.classes, told)
    worst = []
    for place, (case, structure) in enumerate(_worst(case_dice, told)):
        entry: dict[str, Any] = {"case": case, "structure": structure.name}
        entry["dice"] = case_dice[case][told.index(structure)]
        if case not in run.unshown:
            entry["picture"] = f"{folder(run, step)}/scores/worst-{place}.png"
            volume = load_volume(root, run.validation[case], plan)
            root.put(entry["picture"], _picture(root, run, case, volume, judge, structure))
        worst.append(entry)
    return Validation(step, minutes, case_dice, worst)


def _worst(case_dice: Mapping[str, Sequence[float | None]], told: Sequence[Structure]) -> list[tuple[str, Structure]]:
    """The cases with the lowest Dice of any structure, and that structure; the worst first."""
    lowest = []
    for case, row in case_dice.items():
        known = [(score, index) for index, score in enumerate(row) if score is not None]
        if known:
            score, index = min(known)
            lowest.append((score, case, index))
    return [(case, told[index]) for _, case, index in sorted(lowest)[:WORST]]


def _picture(root: Root, run: Run, case: str, volume: TrainingVolume, judge: Judge, structure: Structure) -> bytes:
    known, found = structure.mask(volume.classes), structure.mask(judge.classes(volume))
    grid = volume_geometry(root, run.validation[case])
    return two_outlines(volume.image[0], known, found, grid, f"{case}: {structure.name}", ("truth", "found"))
