"""Stage evaluate: masks against truth, case by case and label by label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vnet_core.errors import ConfigError, ScanError
from vnet_core.metrics import score_labels
from vnet_core.plan import Label
from vnet_core.preprocess import check_label_grid
from workers.ledger import Outcome, State, settle
from workers.scans import case_stem, is_scan, read_label

STAGE = "evaluate"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one case."""

    outcome: Outcome
    labels: tuple[dict[str, Any], ...]
    """One mapping per label: label, name, dice, volumes; a figure that does not exist is None."""


def masks_in(folder: str | Path) -> dict[str, Path]:
    """Mask files by case id. ConfigError ``evaluate.folder`` when there is no such folder."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError("evaluate.folder", f"{folder} is not a folder; name the folder that holds the masks")
    return {case_stem(file): file for file in sorted(path.iterdir()) if is_scan(file) and not file.name.startswith(".")}


def evaluate(predictions: dict[str, Path], truth: dict[str, Path], labels: Sequence[Label] = ()) -> list[Evaluation]:
    """Scores of every predicted case. Labels without a given name are called ``label-<value>``.

    A case without truth, or on another grid than its truth, is a refused row. Raises ConfigError ``evaluate.empty``
    when there is no prediction.
    """
    if not predictions:
        raise ConfigError("evaluate.empty", "0 masks to evaluate; name the folder that vnet segment wrote to")
    return [_evaluate(case, path, truth.get(case), labels) for case, path in sorted(predictions.items())]


def _evaluate(case: str, prediction: Path, truth: Path | None, labels: Sequence[Label]) -> Evaluation:
    scores: list[dict[str, Any]] = []

    def score() -> tuple[State, None, tuple[str, ...]]:
        if truth is None:
            raise ScanError("evaluate.no-truth", f"case {case} has a mask but no truth of that name; add or rename it")
        predicted, true = read_label(prediction), read_label(truth)
        check_label_grid(predicted.geometry, true.geometry)
        values = np.union1d(np.unique(predicted.labels), np.unique(true.labels))
        wanted = labels or [Label(value=int(v), name=f"label-{v}") for v in values if v > 0]
        for result in score_labels(predicted.labels, true.labels, wanted, true.geometry.voxel_ml):
            row = asdict(result)
            scores.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
        return "computed", None, ()

    outcome = settle(STAGE, case, score)
    return Evaluation(outcome, tuple(scores))


def summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Mean Dice over cases by label name, and over all labels."""
    by_name: dict[str, list[float]] = {}
    for evaluation in evaluations:
        for row in evaluation.labels:
            if row["dice"] is not None:
                by_name.setdefault(row["name"], []).append(row["dice"])
    means = {name: sum(values) / len(values) for name, values in sorted(by_name.items())}
    return {"dice": means, "mean_dice": sum(means.values()) / len(means) if means else None}
