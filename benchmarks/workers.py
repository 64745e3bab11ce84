"""Two training workers beside one at the same global batch, and a training that was killed and resumed.

    python -m benchmarks.workers --root ROOT --cohort training --steps 40

Needs an ingested, labelled cohort (``benchmarks.cohort`` leaves one behind).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch

from benchmarks.machine import RESULTS, provenance, tell

VNET = str(Path(sys.executable).with_name("vnet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cohort", default="training")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS / f"workers_{datetime.now(UTC):%Y%m}.md")
    options = parser.parse_args()
    base = [VNET, "train", "--cohort", options.cohort, "--root", str(options.root), "--steps", str(options.steps)]
    one = finished([*base, "--model", "one-worker"], options.root, "one-worker")
    two = finished([*base, "--model", "two-workers", "--workers", "2"], options.root, "two-workers")
    kill_after_checkpoint([*base, "--model", "killed"], options.root / "training" / "killed" / "v1" / "checkpoints")
    resumed = finished([*base, "--model", "killed", "--resume"], options.root, "killed")
    arms = {"one worker": one, "two workers": two, "one worker, killed with -9 and resumed": resumed}
    lines = [
        "# Training on one and on two workers",
        "",
        f"{options.steps} steps of the derived plan, the same global batch. The difference is the largest between two"
        " weights of the model and those of one worker, against the largest weight.",
        "",
        "| arm | steps | minutes | first loss | last loss | validation Dice | weights differ by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (facts, weights) in arms.items():
        losses = [value for _, value in facts["loss"]]
        dice = facts["metrics"]["validation_dice"].values()
        lines.append(
            f"| {name} | {facts['training']['steps']} | {facts['training']['minutes']:.2f} | {losses[0]:.4f} |"
            f" {losses[-1]:.4f} | {sum(dice) / max(1, len(dice)):.4f} | {difference(one[1], weights):.2e} |"
        )
    lines += ["", *provenance("torch", "ray")]
    tell(lines, options.output)


def finished(command: list[str], root: Path, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model.json`` and the weights of a training that ran to its end."""
    subprocess.run(command, check=True)
    folder = max((root / "models" / model).iterdir())
    return json.loads((folder / "model.json").read_text("utf-8")), safetensors.torch.load_file(
        folder / "weights.safetensors"
    )


def kill_after_checkpoint(command: list[str], checkpoints: Path) -> None:
    """Start a training and end it with SIGKILL as soon as it has a whole checkpoint."""
    process = subprocess.Popen(command, env=os.environ)
    while process.poll() is None and not any(checkpoints.glob("*/receipt.json")):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest difference of two sets of weights, as a share of the largest weight."""
    largest = max(float(a[name].abs().max()) for name in a)
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


if __name__ == "__main__":
    main()
