"""The command line on a real cohort: ingest, train, segment and evaluate on cases that were held out.

    python -m benchmarks.cohort FOLDER --label 1=anterior --label 2=posterior --minutes 10 --held-out 40

FOLDER has ``images/`` and ``labels/``. The split is drawn by a seed. Writes a Markdown file with the figures, one row
per held-out case and label. Other benchmarks that train on a part of a cohort take their files from here.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, provenance, write_lines


@dataclass(frozen=True)
class Trial:
    """A cohort in two parts, as files in a scratch folder, and the commands on them."""

    work: Path
    labels: list[str]
    """``VALUE=NAME`` each."""
    training: list[str]
    """File names of the training cases."""
    held: list[str]
    """File names of the cases held out."""

    @property
    def training_manifest(self) -> Path:
        """The training cases with their labels."""
        return self.work / "training.csv"

    @property
    def held_manifest(self) -> Path:
        """The cases held out, without their labels."""
        return self.work / "held-out.csv"

    @property
    def truth(self) -> Path:
        """Folder of the label maps of the cases held out."""
        return self.work / "truth"

    def ingest(self) -> list[str]:
        """Arguments of `vnet` that ingest the training cases as the cohort ``training``."""
        return ["ingest", str(self.training_manifest), "--cohort", "training", *self._named()]

    def segment(self, model: str, masks: Path) -> list[str]:
        """Arguments of `vnet` that segment the cases held out."""
        return ["segment", str(self.held_manifest), "--model", model, "--output", str(masks)]

    def evaluate(self, masks: Path) -> list[str]:
        """Arguments of `vnet` that hold masks against the truth."""
        return ["evaluate", str(masks), str(self.truth), *self._named()]

    def _named(self) -> list[str]:
        return [f"--label={label}" for label in self.labels]

    def vnet(self, arguments: list[str]) -> dict[str, Any]:
        """The JSON document of one command on the scratch folder's storage root."""
        return vnet(arguments, self.work / "root")


def main() -> int:
    options = arguments()
    trial = prepared(options)
    plan = ["--plan", str(options.plan)] if options.plan else []
    log: list[tuple[str, float, dict[str, Any]]] = []
    steps = [
        trial.ingest(),
        ["preprocess", "--cohort", "training", *plan],
        ["train", "--cohort", "training", "--model", "benchmark", *budget(options)],
        trial.segment("benchmark", trial.work / "masks"),
        [*trial.evaluate(trial.work / "masks"), "--output", str(trial.work / "scores.csv")],
    ]
    for step in steps:
        started = time.monotonic()
        document = trial.vnet(step)
        log.append((" ".join(["vnet", *step]), time.monotonic() - started, document))
        print(f"{log[-1][1]:7.1f} s  {log[-1][0]}", flush=True)
    report(options, log, read_csv(trial.work / "scores.csv"))
    return 0


def arguments() -> argparse.Namespace:
    parser = trial_parser(__doc__, "benchmark")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--plan", type=Path)
    return parser.parse_args()


def trial_parser(description: str | None, work: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark that trains on one part of a cohort; ``work`` names the scratch folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=NAME")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--training-cases", type=int, help="use only so many of the others")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--work", type=Path, default=Path("vnet-data") / work, help="scratch folder")
    parser.add_argument("--output", type=Path, help="results file (default: one in benchmarks/results)")
    return parser


def budget(options: argparse.Namespace) -> list[str]:
    """How long `vnet train` trains."""
    return ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]


def prepared(options: argparse.Namespace) -> Trial:
    """Draw the split of ``trial_parser``'s arguments and write its manifests and the truth of the cases held out."""
    training, held = split(options.folder, options.held_out, options.seed)
    trial = Trial(options.work.resolve(), options.label, training[: options.training_cases], held)
    trial.work.mkdir(parents=True, exist_ok=True)
    manifest(trial.training_manifest, options.folder, trial.training, with_labels=True)
    manifest(trial.held_manifest, options.folder, held, with_labels=False)
    emptied(trial.truth)
    for case in held:
        shutil.copy(options.folder / "labels" / case, trial.truth)
    return trial


def emptied(folder: Path) -> Path:
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


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
    write_lines(target, lines)
    print(f"mean Dice {evaluation['mean_dice']:.4f}; {target}")


if __name__ == "__main__":
    sys.exit(main())
