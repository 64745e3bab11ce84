"""Each term of the loss on a real cohort: the same cases, network and minutes, and the Dice on cases held out.

    python -m benchmarks.losses FOLDER --label 1=anterior --label 2=posterior --minutes 5 --held-out 40

FOLDER has ``images/`` and ``labels/``. The split is drawn by a seed. ``--base`` is a plan whose other keys are used for
all; ``--only TERM`` (again and again) takes some of them. Writes a Markdown file with one row per loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cohort import Trial, budget, prepared, read_csv, trial_parser
from benchmarks.machine import RESULTS, provenance, write_lines

LOSSES: Mapping[str, Mapping[str, Any]] = {
    "dice + cross-entropy": {"terms": {"dice": 1.0, "cross-entropy": 1.0}},
    "dice": {"terms": {"dice": 1.0}},
    "dice after cross-entropy": {"terms": {"dice": 1.0}, "warmup_fraction": 0.1},
    "linear-dice": {"terms": {"linear-dice": 1.0}},
    "linear-dice per sample": {"terms": {"linear-dice": 1.0}, "dice_over": "sample"},
    "generalised-dice": {"terms": {"generalised-dice": 1.0}},
    "cross-entropy": {"terms": {"cross-entropy": 1.0}},
    "weighted cross-entropy": {"terms": {"cross-entropy": 1.0}, "class_weights": "square-root"},
    "focal": {"terms": {"focal": 1.0}},
    "exponential-logarithmic": {"terms": {"exponential-logarithmic": 1.0}},
}
"""The plan's loss section by the name in the table."""

AIM = 0.80
"""Mean Dice below which a row says that it is not reached."""


def main() -> int:
    options = arguments()
    trial = prepared(options)
    base = tomllib.loads(options.base.read_text("utf-8")) if options.base else {}
    trial.vnet(trial.ingest())
    rows = []
    for name in options.only or LOSSES:
        rows.append(row(name, measured(name, base, trial, budget(options))))
        print(rows[-1], flush=True)
    report(options, len(trial.training), rows)
    return 0


def arguments() -> argparse.Namespace:
    parser = trial_parser(__doc__, "losses")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--base", type=Path, help="TOML plan (default: derived from the cohort)")
    parser.add_argument("--only", action="append", choices=list(LOSSES))
    parser.add_argument("--hardware", default="2-cores", help="part of the results file's name")
    return parser.parse_args()


def measured(name: str, base: Mapping[str, Any], trial: Trial, trained_for: list[str]) -> dict[str, Any]:
    """Train with one loss and evaluate: the ``training`` facts and the ``scores`` of every held-out case and label."""
    model = name.replace(" + ", "-").replace(" ", "-")
    plan = trial.work / f"{model}.toml"
    plan.write_text(toml({**base, "training": {**base.get("training", {}), "loss": LOSSES[name]}}))
    masks, scores = trial.work / "masks" / model, trial.work / f"{model}.csv"
    shutil.rmtree(masks, ignore_errors=True)
    trial.vnet(["preprocess", "--cohort", "training", "--plan", str(plan)])
    trained = trial.vnet(["train", "--cohort", "training", "--model", model, *trained_for])
    trial.vnet(trial.segment(model, masks))
    trial.vnet([*trial.evaluate(masks), "--output", str(scores)])
    return {"training": trained["training"], "scores": read_csv(scores)}


def toml(mapping: Mapping[str, Any], table: str = "") -> str:
    """Plain data as TOML: texts, numbers, lists and tables, as plans have them."""
    plain = [f"{key} = {inline(value)}" for key, value in mapping.items() if not isinstance(value, Mapping)]
    text = "\n".join([f"[{table}]" if table else "", *plain, ""])
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            text += toml(value, f"{table}.{key}" if table else key)
    return text


def inline(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {inline(part)}' for key, part in value.items())} }}"
    return json.dumps(value)


def row(name: str, facts: Mapping[str, Any]) -> str:
    """One line of the table: mean Dice, each label's, the worst case, and what is to be said."""
    scores = [(score["name"], score["case"], float(score["dice"] or "nan")) for score in facts["scores"]]
    labels = {label: [dice for n, _, dice in scores if n == label] for label in dict.fromkeys(n for n, _, _ in scores)}
    means = {label: statistics.mean(values) for label, values in labels.items()}
    mean = statistics.mean(means.values())
    _, case, worst = min(scores, key=lambda score: score[2])
    remarks = [] if mean >= AIM else [f"below {AIM:.2f}"]
    for label, values in labels.items():
        if missed := sum(dice == 0 for dice in values):
            remarks.append(f"{label} not found at all in {missed} of {len(values)}")
    each = ", ".join(f"{label} {value:.4f}" for label, value in means.items())
    steps = facts["training"]["steps"]
    return f"| {name} | {mean:.4f} | {each} | {worst:.4f} ({case}) | {steps} | {'; '.join(remarks)} |"


def report(options: argparse.Namespace, training_cases: int, rows: list[str]) -> None:
    name = options.folder.resolve().name
    target = options.output or RESULTS / f"losses_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    budget = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
    lines = [
        f"# Each loss on {name}",
        "",
        f"{budget} of training each on {training_cases} cases, Dice on {options.held_out} held out. The same split,"
        f" network, seed and budget for all; one run each, so differences of about 0.01 say nothing.",
        "",
        "| loss | mean Dice | per label | worst | steps | remarks |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        *provenance("torch", "ray", "dask", "zarr", "prefect"),
    ]
    write_lines(target, lines)


if __name__ == "__main__":
    sys.exit(main())
