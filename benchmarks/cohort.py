"""The command line on a real cohort: ingest, train, segment and evaluate on cases that were held out.

    python -m benchmarks.cohort FOLDER --label 1=anterior --label 2=posterior --minutes 10 --held-out 40

FOLDER has ``images/`` and ``labels/``. The split is drawn by a seed. Writes a Markdown file with the figures, one row
per held-out case and label.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import provenance

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = arguments()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    training, held = split(options.folder, options.held_out, options.seed)
    if options.training_cases:
        training = training[: options.training_cases]
    names = [f"--label={label}" for label in options.label]
    manifest(work / "training.csv", options.folder, training, with_labels=True)
    manifest(work / "held-out.csv", options.folder, held, with_labels=False)
    manifest(work / "held-out-with-truth.csv", options.folder, held, with_labels=True)
    budget = ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]
    plan = ["--plan", str(options.plan)] if options.plan else []
    truth = work / "truth"
    shutil.rmtree(truth, ignore_errors=True)
    truth.mkdir()
    for case in held:
        shutil.copy(options.folder / "labels" / case, truth)
    log: list[tuple[str, float, dict[str, Any]]] = []
    steps = [
        ["ingest", str(work / "training.csv"), "--cohort", "training", *names],
        ["preprocess", "--cohort", "training", *plan],
        ["train", "--cohort", "training", "--model", "benchmark", *budget],
        ["segment", str(work / "held-out.csv"), "--model", "benchmark", "--output", str(work / "masks")],
        ["evaluate", str(work / "masks"), str(truth), *names, "--output", str(work / "scores.csv")],
    ]
    for step in steps:
        started = time.monotonic()
        log.append((" ".join(["vnet", *step]), 0.0, vnet(step, work / "root")))
        log[-1] = (log[-1][0], time.monotonic() - started, log[-1][2])
        print(f"{log[-1][1]:7.1f} s  {log[-1][0]}", flush=True)
    report(options, log, read_csv(work / "scores.csv"))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=NAME")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--training-cases", type=int, help="use only so many of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--work", type=Path, default=Path("vnet-data/benchmark"), help="scratch folder")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/cohort_...)")
    return parser.parse_args()


def split(folder: Path, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """File names for training and held out, by a seeded permutation of the cases that have image and label."""
    both = {p.name for p in (folder / "images").iterdir()} & {p.name for p in (folder / "labels").iterdir()}
    order = [str(name) for name in np.random.default_rng(seed).permutation(sorted(both))]
    return sorted(order[held_out:]), sorted(order[:held_out])


def manifest(path: Path, folder: Path, names: list[str], with_labels: bool) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image", "label"])
        for name in names:
            label = (folder / "labels" / name).resolve() if with_labels else ""
            writer.writerow([name.removesuffix(".nii.gz"), (folder / "images" / name).resolve(), label])


def vnet(arguments: list[str], root: Path) -> dict[str, Any]:
    """The JSON document of one command; ends the benchmark when the command fails."""
    command = [str(Path(sys.executable).with_name("vnet")), *arguments, "--root", str(root), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=os.environ)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(
    options: argparse.Namespace, log: list[tuple[str, float, dict[str, Any]]], scores: list[dict[str, str]]
) -> None:
    training, evaluation = log[2][2], log[4][2]
    name = options.folder.resolve().name
    target = options.output or RESULTS / f"cohort-{name}_{datetime.now(UTC):%Y%m}.md"
    work = str(options.work.resolve())
    shown = [(c.replace(work, "WORK"), s) for c, s, _ in log]
    lines = [
        f"# Held-out Dice on {name}",
        "",
        f"Mean Dice over labels: **{evaluation['mean_dice']:.4f}**"
        f" ({', '.join(f'{name} {value:.4f}' for name, value in evaluation['dice'].items())}) on"
        f" {options.held_out} held-out cases, after {training['training']['steps']} steps in"
        f" {training['training']['minutes']:.1f} minutes on"
        f" {len(training['training']['training_cases'])} training and"
        f" {len(training['training']['validation_cases'])} validation cases,"
        f" {training['training']['parameters']:,} parameters, {training['training']['precision']}.",
        "",
        "| command | seconds |",
        "| --- | --- |",
        *(f"| `{command}` | {seconds:.1f} |" for command, seconds in shown),
        "",
        "| label | mean Dice | worst Dice | mean volume error mL | mean absolute volume error mL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label in dict.fromkeys(row["name"] for row in scores):
        rows = [row for row in scores if row["name"] == label]
        dice = [float(row["dice"]) for row in rows if row["dice"]]
        errors = [float(row["volume_error_ml"]) for row in rows]
        lines.append(
            f"| {label} | {statistics.mean(dice):.4f} | {min(dice):.4f} | {statistics.mean(errors):+.3f} |"
            f" {statistics.mean(map(abs, errors)):.3f} |"
        )
    lines += ["", "| case | label | volume mL | truth mL | Dice |", "| --- | --- | --- | --- | --- |"]
    for row in scores:
        volumes = f"{float(row['volume_ml']):.3f} | {float(row['truth_volume_ml']):.3f}"
        lines.append(f"| {row['case']} | {row['name']} | {volumes} | {float(row['dice'] or 'nan'):.4f} |")
    lines += ["", *provenance("torch", "ray", "dask", "zarr", "prefect")]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    print(f"mean Dice {evaluation['mean_dice']:.4f}; {target}")


if __name__ == "__main__":
    sys.exit(main())
