"""Stage evaluate: masks against truth, case by case and structure by structure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import check_label_grid
from vnet_core.metrics import FIGURES, Structure, score_labels, structures, surface_dice_name
from vnet_core.plan import Label, Region
from vnet_core.statistics import CONFIDENCE, RESAMPLES, summarise
from workers.ledger import Outcome, State, settle
from workers.sources.scans import case_stem, is_scan, read_label

STAGE = "evaluate"

OUTPUTS = (".csv", ".parquet", ".json")
"""Suffixes of tables of scores."""

_BEST = {
    **dict.fromkeys(("dice", "iou", "precision", "recall"), 1.0),
    **dict.fromkeys(("hd_mm", "hd95_mm", "assd_mm", "abd_mm", "volume_error_ml", "volume_error"), 0.0),
    **dict.fromkeys(("absolute_volume_error_ml", "absolute_volume_error"), 0.0),
}
"""The value that cannot be bettered; surface Dice have 1, volumes none."""
_DISTANCES = ("hd_mm", "hd95_mm", "assd_mm", "abd_mm")
_VOLUMES = ("volume_ml", "truth_volume_ml")
"""Whose mean over different structures says nothing."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one case."""

    outcome: Outcome
    labels: tuple[dict[str, Any], ...]
    """One mapping per structure: label, name and figures; a figure that does not exist or is infinite is None."""


def masks_in(folder: str | Path) -> dict[str, Path]:
    """Mask files by case id. ConfigError ``evaluate.folder`` when there is no such folder."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError("evaluate.folder", f"{folder} is not a folder; name the folder that holds the masks")
    return {case_stem(file): file for file in sorted(path.iterdir()) if is_scan(file) and not file.name.startswith(".")}


def patients_in(table: str | Path) -> dict[str, str]:
    """Patient by case id from a CSV with the columns ``case`` and ``patient``; rows without a patient are left out.

    ConfigError ``evaluate.patients`` when it cannot be read or lacks a column.
    """
    try:
        with Path(table).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("evaluate.patients", f"{table} cannot be read as CSV: {error}; name a CSV file") from error
    if rows and not {"case", "patient"} <= rows[0].keys():
        raise ConfigError(
            "evaluate.patients", f"{table} has the columns {', '.join(rows[0])}; it needs case and patient"
        )
    return {row["case"]: row["patient"] for row in rows if row["patient"]}


def evaluate(
    predictions: dict[str, Path],
    truth: dict[str, Path],
    wanted: Sequence[Label | Region | Structure] = (),
    tolerances_mm: Sequence[float] = (1.0,),
    executor: Executor | None = None,
) -> list[Evaluation]:
    """Scores of every predicted case, by case id.

    ``wanted``: what is scored; without any, every label value that occurs in a case, called ``label-<value>``.
    ``executor``: where cases are worked on side by side; without one, one after the other.

    A case without truth, or on another grid than its truth, is a refused row. Raises ConfigError ``evaluate.empty``
    when there is no prediction, ``metrics.tolerance`` for a tolerance that is none.
    """
    if not predictions:
        raise ConfigError("evaluate.empty", "0 masks to evaluate; name the folder that vnet segment wrote to")
    for tolerance in tolerances_mm:
        if not 0 <= tolerance < math.inf:
            raise ConfigError("metrics.tolerance", f"a tolerance of {tolerance} mm is none; use 0 or more")
    named = tuple(item if isinstance(item, Structure) else structures([item])[0] for item in wanted)
    work = partial(_evaluate, wanted=named, tolerances_mm=tuple(dict.fromkeys(tolerances_mm)))
    cases = sorted(predictions)
    run = map if executor is None else executor.map
    return list(run(work, cases, (predictions[case] for case in cases), (truth.get(case) for case in cases)))


def _evaluate(
    case: str, prediction: Path, truth: Path | None, wanted: Sequence[Structure], tolerances_mm: Sequence[float]
) -> Evaluation:
    scores: list[dict[str, Any]] = []

    def score() -> tuple[State, None, tuple[str, ...]]:
        if truth is None:
            raise ScanError("evaluate.no-truth", f"case {case} has a mask but no truth of that name; add or rename it")
        predicted, true = read_label(prediction), read_label(truth)
        check_label_grid(predicted.geometry, true.geometry)
        found = wanted or [Structure(f"label-{value}", (value,)) for value in _values(predicted.labels, true.labels)]
        # float32 spacings of two headers may differ in the last digit; both masks are measured on the truth's grid
        for result in score_labels(predicted.labels, true.labels, found, true.geometry.spacing_mm, tolerances_mm):
            row = result.row()
            scores.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
        return "computed", None, ()

    outcome = settle(STAGE, case, score)
    return Evaluation(outcome, tuple(scores))


def _values(*maps_ZYX: np.ndarray) -> list[int]:
    """Values above 0 that occur, ascending."""
    seen = np.zeros(65536, bool)
    for labels_ZYX in maps_ZYX:
        for labels_YX in labels_ZYX:
            seen[labels_YX] = True
    return [int(value) for value in np.flatnonzero(seen) if value > 0]


# --- the cohort


def summary(evaluations: Sequence[Evaluation], patients: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every figure over the cases, with bootstrap intervals.

    ``labels``: by structure and figure. ``cohort``: the same of each case's mean over its structures. ``mean_dice``
    is the mean over structures of their mean Dice. ``patients``: patient by case id; cases of one patient are drawn
    together, and a case that is not named is a patient of its own.
    """
    rows = [{"case": e.outcome.case, **_with_absolutes(row)} for e in evaluations for row in e.labels]
    by_name: dict[str, list[dict[str, Any]]] = {}
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
        by_case.setdefault(row["case"], []).append(row)
    means = [{"case": case} | _mean_row(of_case) for case, of_case in by_case.items()]
    labels = {name: _summaries(of_name, patients or {}) for name, of_name in sorted(by_name.items())}
    dice = {name: figures["dice"]["mean"] for name, figures in labels.items() if figures["dice"]["cases"]}
    return {
        "dice": dice,
        "mean_dice": sum(dice.values()) / len(dice) if dice else None,
        "summary": {
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "patients": len({(patients or {}).get(case, f"case {case}") for case in by_case}),
            "labels": labels,
            "cohort": _summaries(means, patients or {}),
        },
    }


def _with_absolutes(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what it says about infinity told apart from what does not exist, and with errors without sign."""
    told = dict(row)
    one_empty = row["dice"] is not None
    for name in _DISTANCES:
        if told[name] is None and one_empty:
            told[name] = math.inf
    for name in ("volume_error_ml", "volume_error"):
        told[f"absolute_{name}"] = None if row[name] is None else abs(row[name])
    return told


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over the structures of one case that have the figure; infinite where one structure was missed."""
    means: dict[str, float | None] = {}
    for name in (name for name in _figures(rows) if name not in _VOLUMES):
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (rows[0] if rows else {}) if name not in ("case", "label", "name")]


def _summaries(rows: Sequence[Mapping[str, Any]], patients: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    cases = [row["case"] for row in rows]
    groups = [patients.get(case, f"case {case}") for case in cases]
    return {
        name: asdict(
            summarise(
                [math.nan if row[name] is None else row[name] for row in rows],
                cases,
                _BEST.get(name, 1.0 if name.startswith("surface_dice") else None),
                groups,
            )
        )
        for name in _figures(rows)
    }


# --- tables


def columns(tolerances_mm: Sequence[float]) -> tuple[str, ...]:
    """Columns of the table of scores."""
    volumes = FIGURES.index("volume_ml")
    tolerant = tuple(surface_dice_name(tolerance) for tolerance in dict.fromkeys(tolerances_mm))
    return ("case", "label", "name", *FIGURES[:volumes], *tolerant, *FIGURES[volumes:])


def to_parquet(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Rows with the columns ``names`` as Parquet: case and name text, label whole numbers, the rest float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"case": pa.string(), "name": pa.string(), "label": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), sink)
    return sink.getvalue()
