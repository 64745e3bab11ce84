"""What is known of the validations beside a training: snapshots of its weights, what whole volumes say, and the best.

<run>/validations/<step>/snapshot/      averaged weights of that step, sealed; only the best ones stay
<run>/validations/<step>/scores/        Dice of every case and pictures of the worst ones, sealed

Needs no torch, which a night's own process does without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.storage.store import Root
from workers.training.run import Run


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


def means(case_dice: Mapping[str, Sequence[float | None]]) -> list[float] | None:
    """Mean Dice of each structure over the cases that have it; None where one of them is in no case."""
    columns = [[score for score in column if score is not None] for column in zip(*case_dice.values(), strict=True)]
    return [sum(column) / len(column) for column in columns] if columns and all(columns) else None


def leave_snapshot(root: Root, run: Run, step: int, minutes: float, weights: bytes) -> None:
    """Leave the averaged weights of a step, as safetensors, to be judged."""
    key = f"{folder(run, step)}/snapshot"
    root.put(f"{key}/weights.safetensors", weights)
    root.seal(key, {"stage": "train", "step": step, "minutes": minutes})


def waiting(root: Root, run: Run) -> list[int]:
    """Steps whose snapshots wait to be judged, the first one first."""
    steps = [int(name) for name in root.names(f"{run.prefix}/validations")]
    return [s for s in steps if root.receipt(f"{folder(run, s)}/snapshot") and not _is_judged(root, run, s)]


def validations(root: Root, run: Run) -> list[Validation]:
    """Those that are done, by step."""
    steps = [int(name) for name in root.names(f"{run.prefix}/validations")]
    return [load_validation(root, run, step) for step in steps if _is_judged(root, run, step)]


def load_validation(root: Root, run: Run, step: int) -> Validation:
    """One that is done."""
    return Validation(**root.get_json(f"{folder(run, step)}/scores/scores.json"))


def best(done: Sequence[Validation]) -> Validation | None:
    """That with the highest mean Dice, of equal ones the first; None where none has one."""
    return max((v for v in done if v.means), key=lambda v: v.score, default=None)


def snapshot_weights(root: Root, run: Run, step: int) -> bytes:
    """The weights of a snapshot that is still there."""
    return root.get(f"{folder(run, step)}/snapshot/weights.safetensors")


def note_failure(root: Root, run: Run, step: int, why: str) -> None:
    """A validation whose process was lost has no scores either."""
    publish(root, run, Validation(step, minutes_of(root, run, step), {}, [], why))


def keep_the_best(root: Root, run: Run) -> None:
    """Delete the weights of snapshots that were judged and are not the best."""
    done = validations(root, run)
    found = best(done)
    for validation in done:
        if found is None or validation.step != found.step:
            root.delete(f"{folder(run, validation.step)}/snapshot")


def publish(root: Root, run: Run, found: Validation) -> None:
    """Seal what was found, pictures that lie there already included."""
    key = f"{folder(run, found.step)}/scores"
    root.put_json(f"{key}/scores.json", {name: getattr(found, name) for name in found.__slots__})
    root.seal(key, {"stage": "validate", "step": found.step})


def minutes_of(root: Root, run: Run, step: int) -> float:
    """Minutes of training until a snapshot that is whole."""
    receipt = root.receipt(f"{folder(run, step)}/snapshot")
    assert receipt is not None, "only snapshots that are whole are judged"
    return float(receipt["minutes"])


def _is_judged(root: Root, run: Run, step: int) -> bool:
    return root.receipt(f"{folder(run, step)}/scores") is not None


def folder(run: Run, step: int) -> str:
    """The key under which all of a step lies."""
    return f"{run.prefix}/validations/{step:09d}"
