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

from benchmarks.cohort import manifest, read_csv, split, vnet
from benchmarks.machine import provenance

RESULTS = Path(__file__).parent / "results"

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
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    training, held = split(options.folder, options.held_out, options.seed)
    training = training[: options.training_cases]
    manifest(work / "training.csv", options.folder, training, with_labels=True)
    manifest(work / "held-out.csv", options.folder, held, with_labels=False)
    truth = work / "truth"
    shutil.rmtree(truth, ignore_errors=True)
    truth.mkdir()
    for case in held:
        shutil.copy(options.folder / "labels" / case, truth)
    base = tomllib.loads(options.base.read_text()) if options.base else {}
    names = [f"--label={label}" for label in options.label]
    vnet(["ingest", str(work / "training.csv"), "--cohort", "training", *names], work / "root")
    rows = []
    for name in options.only or LOSSES:
        rows.append(row(name, measured(name, base, names, options)))
        print(rows[-1], flush=True)
    report(options, len(training), rows)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=NAME")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--training-cases", type=int, help="use only so many of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--base", type=Path, help="TOML plan (default: derived from the cohort)")
    parser.add_argument("--only", action="append", choices=list(LOSSES))
    parser.add_argument("--hardware", default="2-cores", help="part of the results file's name")
    parser.add_argument("--work", type=Path, default=Path("vnet-data/losses"), help="scratch folder")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/losses_...)")
    return parser.parse_args()


def measured(name: str, base: Mapping[str, Any], names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Train with one loss and evaluate: the ``training`` facts and the ``scores`` of every held-out case and label."""
    work, model = options.work.resolve(), name.replace(" + ", "-").replace(" ", "-")
    plan = work / f"{model}.toml"
    plan.write_text(toml({**base, "training": {**base.get("training", {}), "loss": LOSSES[name]}}))
    masks, scores = work / "masks" / model, work / f"{model}.csv"
    shutil.rmtree(masks, ignore_errors=True)
    budget = ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]
    vnet(["preprocess", "--cohort", "training", "--plan", str(plan)], work / "root")
    trained = vnet(["train", "--cohort", "training", "--model", model, *budget], work / "root")
    vnet(["segment", str(work / "held-out.csv"), "--model", model, "--output", str(masks)], work / "root")
    vnet(["evaluate", str(masks), str(work / "truth"), *names, "--output", str(scores)], work / "root")
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
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
