"""Dice on held-out scans against minutes of training, beside nnU-Net and MONAI's VNet: same cases, minutes, machine.

    python -m benchmarks.accuracy FOLDER --label 1=anterior --label 2=posterior --minutes 1 5 30 --seeds 5 \
        --nnunet-python ../nnunet/bin/python

FOLDER has ``images/`` and ``labels/``; the split is drawn by a seed. The plan is the one that `--plan auto` makes; a
seed changes the first weights, the validation cases and every sample. nnU-Net runs in an environment of its own (its
pins differ), MONAI in this one; both by their own loaders, losses and predictions, see ``benchmarks/peers``. All masks
are scored by `vnet evaluate`. What was measured is kept in WORK/measured.json, so that the same command goes on after
an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cohort import Trial, prepared, trial_parser
from benchmarks.machine import RESULTS, provenance, write_lines
from vnet_core.pictures.curves import curve_picture

PEERS = Path(__file__).parent / "peers"
METRICS = ("dice", "hd95_mm", "surface_dice_1mm")


@dataclass(frozen=True)
class Training:
    """What was trained."""

    who: str
    minutes: float
    seed: int
    steps: int
    load: float
    """Mean load of the machine over the last minute, when done."""


@dataclass(frozen=True)
class Measured(Training):
    """One training and its held-out scores."""

    dice: float
    hd95_mm: float
    surface_dice_1mm: float
    by_label: dict[str, float]
    worst_dice: float


def main() -> int:
    options = arguments()
    trial = prepared(options)
    trial.vnet(trial.ingest())
    kept = trial.work / "measured.json"
    measured = [Measured(**row) for row in json.loads(kept.read_text("utf-8"))] if kept.exists() else []
    done = {(m.who, m.minutes, m.seed) for m in measured}
    for minutes in options.minutes:
        todo = [(who, 0) for who in peers(options)] + [("vnet", seed) for seed in range(options.seeds)]
        for who, seed in todo:
            if (who, minutes, seed) in done:
                continue
            one = ours(options, trial, minutes, seed) if who == "vnet" else peer(options, trial, who, minutes)
            measured.append(one)
            kept.write_text(json.dumps([asdict(m) for m in measured]))
            print(f"{who} {minutes:g} min seed {seed}: {one.steps} steps, Dice {one.dice:.4f}", flush=True)
    report(options, measured)
    return 0


def arguments() -> argparse.Namespace:
    parser = trial_parser(__doc__, "accuracy")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 5.0, 30.0])
    parser.add_argument("--seeds", type=int, default=5, help="trainings of ours, each with another seed")
    parser.add_argument("--nnunet-python", type=Path, help="interpreter of an environment with nnunetv2")
    parser.add_argument("--monai", action="store_true", help="train MONAI's VNet too, in float32")
    parser.add_argument(
        "--pace",
        action="append",
        default=[],
        metavar="WHO=STEPS",
        help="train WHO for so many steps per minute instead of by the clock, on a machine that has other work too;"
        " measure them on a quiet one",
    )
    return parser.parse_args()


def pace(options: argparse.Namespace, who: str) -> float | None:
    """Steps per minute that a training is counted in, or None: by the clock."""
    return {name: float(steps) for name, steps in (text.split("=") for text in options.pace)}.get(who)


def peers(options: argparse.Namespace) -> list[str]:
    return [*(["nnunet"] if options.nnunet_python else []), *(["monai"] if options.monai else [])]


def ours(options: argparse.Namespace, trial: Trial, minutes: float, seed: int) -> Measured:
    plan, masks = trial.work / f"seed-{seed}.toml", trial.work / f"vnet-{minutes:g}-{seed}"
    plan.write_text(f"[training]\nseed = {seed}\n")
    name = f"accuracy-{minutes:g}-{seed}".replace(".", "-")
    shutil.rmtree(masks, ignore_errors=True)
    trial.vnet(["preprocess", "--cohort", "training", "--plan", str(plan)])
    steps = pace(options, "vnet")
    budget = ["--steps", str(round(steps * minutes))] if steps else ["--minutes", str(minutes)]
    arguments = ["train", "--cohort", "training", "--model", name, *budget, "--plan", str(plan)]
    trained = trial.vnet(arguments)
    load = os.getloadavg()[0]
    trial.vnet(trial.segment(name, masks))
    return scored(trial, masks, Training("vnet", minutes, seed, trained["training"]["steps"], load))


def peer(options: argparse.Namespace, trial: Trial, who: str, minutes: float) -> Measured:
    files = [str(trial.training_manifest), str(trial.held_manifest), str(trial.work), str(minutes)]
    if who == "nnunet":
        interpreter = options.nnunet_python.absolute()
        names = {name: int(value) for value, name in (label.split("=") for label in trial.labels)}
        command = [str(interpreter), str(PEERS / "nnunet.py"), *files]
        environment = os.environ | {
            "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}",
            "PEER_LABELS": json.dumps(names),
        }
    else:
        command = [sys.executable, "-m", "benchmarks.peers.monai_vnet", *files]
        environment = dict(os.environ)
    if steps := pace(options, who):
        environment["STEPS_PER_MINUTE"] = str(steps)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, text=True)
    load = os.getloadavg()[0]
    steps = json.loads(done.stdout.strip().splitlines()[-1])["steps"]
    return scored(trial, trial.work / f"{who}-{minutes:g}", Training(who, minutes, 0, steps, load))


def scored(trial: Trial, masks: Path, training: Training) -> Measured:
    """Means over labels and held-out cases. A case that the peer left out counts with Dice 0."""
    document = trial.vnet(trial.evaluate(masks))
    rows = [row for case in document["cases"] for row in case["labels"]]
    missing = len(trial.held) * len(trial.labels) - len(rows)

    def mean(metric: str, name: str | None = None) -> float:
        values = [row[metric] for row in rows if row[metric] is not None and name in (None, row["name"])]
        values += [0.0] * missing if metric == "dice" and name is None else []
        # no mask at all has no distances
        return statistics.mean(values) if values else math.nan

    labels = dict.fromkeys(row["name"] for row in rows)
    return Measured(
        **(asdict(training)),
        **{metric: mean(metric) for metric in METRICS},
        by_label={name: mean("dice", name) for name in labels},
        worst_dice=min(row["dice"] for row in rows if row["dice"] is not None),
    )


def report(options: argparse.Namespace, measured: list[Measured]) -> None:
    target = options.output or RESULTS / f"accuracy-{options.folder.resolve().name}_{datetime.now(UTC):%Y%m}.md"
    whos = list(dict.fromkeys(["vnet", *(m.who for m in measured)]))
    curves: dict[str, list[tuple[float, float]]] = {}
    lines = [
        f"# Dice against minutes of training on {options.folder.resolve().name}",
        "",
        f"{options.held_out} held-out cases. Mean over labels and cases, then over seeds; in brackets the standard"
        " deviation over seeds and their number.",
        "",
        "| who | minutes | steps | Dice | by label | worst case | HD95 mm | surface Dice 1 mm | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for who in whos:
        for minutes in sorted({m.minutes for m in measured}):
            runs = [m for m in measured if (m.who, m.minutes) == (who, minutes)]
            if not runs:
                continue
            dice = [m.dice for m in runs]
            spread = f" ({statistics.stdev(dice):.4f}, {len(dice)})" if len(dice) > 1 else " (1)"
            labels = ", ".join(
                f"{name} {statistics.mean(m.by_label[name] for m in runs):.4f}" for name in runs[0].by_label
            )
            curves.setdefault(who, []).append((minutes, statistics.mean(dice)))
            lines.append(
                f"| {who} | {minutes:g} | {statistics.mean(m.steps for m in runs):.0f} |"
                f" {statistics.mean(dice):.4f}{spread} | {labels} | {min(m.worst_dice for m in runs):.3f} |"
                f" {statistics.mean(m.hd95_mm for m in runs):.2f} |"
                f" {statistics.mean(m.surface_dice_1mm for m in runs):.4f} |"
                f" {statistics.mean(m.load for m in runs):.1f} |"
            )
    picture = target.with_suffix(".png")
    lines += ["", f"![Dice against minutes]({picture.name})", "", *provenance("torch", "monai", "ray", "prefect")]
    write_lines(target, lines)
    picture.write_bytes(curve_picture(curves, "minutes", "Dice", "Mean Dice on held-out cases"))
    print(target)


if __name__ == "__main__":
    sys.exit(main())
