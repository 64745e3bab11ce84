"""Validations beside a training: snapshots of its weights, what whole volumes say of them, and which is the best.

<run>/validations/<step>/snapshot/      averaged weights of that step, sealed; only the best ones stay
<run>/validations/<step>/scores/        Dice of every case and pictures of the worst ones, sealed
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from vnet_core.comparison import two_outlines
from vnet_core.decide import Structure, structures
from vnet_core.errors import VnetError
from vnet_core.inference import precision
from vnet_core.plan import Plan
from workers.cohort import volume_geometry
from workers.modes import for_the_owner_alone
from workers.patches import TrainingVolume, load_volume
from workers.store import Root
from workers.training_run import Run
from workers.validation import Judge, dice_row, means

WORST = 3
"""Cases with a picture."""
NICENESS = 10
"""Of a validation that shares a machine's cores with the training."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What whole volumes say of the weights of a step."""

    step: int
    minutes: float
    """Of training until then."""
    case_dice: Mapping[str, Sequence[float | None]]
    """Dice of each structure per case."""
    worst: Sequence[Mapping[str, Any]]
    """`case`, `structure`, `dice` and perhaps `picture`, a key in the root; the worst case first."""
    failed: str = ""
    """Why there are no scores."""

    @property
    def means(self) -> list[float] | None:
        """Mean Dice of each structure, None where one of them occurs in no case."""
        return means(self.case_dice)

    @property
    def score(self) -> float:
        """Mean Dice over the structures, -1 without one."""
        found = self.means
        return sum(found) / len(found) if found else -1.0


def leave_snapshot(root: Root, run: Run, step: int, minutes: float, weights: Mapping[str, torch.Tensor]) -> None:
    """Leave the averaged weights of a step to be judged."""
    key = f"{_folder(run, step)}/snapshot"
    contiguous = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    root.put(f"{key}/weights.safetensors", safetensors.torch.save(contiguous))
    root.seal(key, {"stage": "train", "step": step, "minutes": minutes})


def waiting(root: Root, run: Run) -> list[int]:
    """Steps whose snapshots wait to be judged, the first one first."""
    steps = [int(name) for name in root.names(f"{run.prefix}/validations")]
    return [s for s in steps if root.receipt(f"{_folder(run, s)}/snapshot") and not _receipt(root, run, s)]


def validations(root: Root, run: Run) -> list[Validation]:
    """Those that are done, by step."""
    steps = [int(name) for name in root.names(f"{run.prefix}/validations")]
    return [load_validation(root, run, step) for step in steps if _receipt(root, run, step)]


def load_validation(root: Root, run: Run, step: int) -> Validation:
    """One that is done."""
    return Validation(**root.get_json(f"{_folder(run, step)}/scores/scores.json"))


def best(done: Sequence[Validation]) -> Validation | None:
    """That with the highest mean Dice, of equal ones the first; None where none has one."""
    return max((v for v in done if v.means), key=lambda v: v.score, default=None)


def snapshot_weights(root: Root, run: Run, step: int) -> bytes:
    """The weights of a snapshot that is still there."""
    return root.get(f"{_folder(run, step)}/snapshot/weights.safetensors")


def validate(config: Mapping[str, Any], step: int, niceness: int) -> None:
    """Judge a snapshot in this process; ``config`` is a Run as a mapping. A named error becomes a validation without
    scores, so that the training does not wait for it."""
    if niceness:
        os.nice(niceness)
        torch.set_num_threads(1)
    run = Run(**config)
    for_the_owner_alone()
    root = Root(run.root_url)
    minutes = _minutes(root, run, step)
    try:
        found = _judged(root, run, step, minutes)
    except VnetError as error:
        found = Validation(step, minutes, {}, [], f"{error.code}: {error.message}")
    _publish(root, run, found)


def note_failure(root: Root, run: Run, step: int, why: str) -> None:
    """A validation whose process was lost has no scores either."""
    _publish(root, run, Validation(step, _minutes(root, run, step), {}, [], why))


def keep_the_best(root: Root, run: Run) -> None:
    """Delete the weights of snapshots that were judged and are not the best."""
    done = validations(root, run)
    found = best(done)
    for validation in done:
        if found is None or validation.step != found.step:
            root.delete(f"{_folder(run, validation.step)}/snapshot")


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
            entry["picture"] = f"{_folder(run, step)}/scores/worst-{place}.png"
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


def _publish(root: Root, run: Run, found: Validation) -> None:
    key = f"{_folder(run, found.step)}/scores"
    root.put_json(f"{key}/scores.json", {name: getattr(found, name) for name in found.__slots__})
    root.seal(key, {"stage": "validate", "step": found.step})


def _minutes(root: Root, run: Run, step: int) -> float:
    receipt = root.receipt(f"{_folder(run, step)}/snapshot")
    assert receipt is not None, "only snapshots that are whole are judged"
    return float(receipt["minutes"])


def _receipt(root: Root, run: Run, step: int) -> bool:
    return root.receipt(f"{_folder(run, step)}/scores") is not None


def _folder(run: Run, step: int) -> str:
    return f"{run.prefix}/validations/{step:09d}"
