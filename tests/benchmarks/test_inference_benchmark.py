"""The inference benchmark still runs, and its agreement tells a right mask from a wrong one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="MONAI is a dependency of the benchmark only")

from benchmarks.inference import agreement, dice, small, synthetic_image
from vnet_core.inference import predict_logits, prepare
from vnet_core.networks.vnet import build_vnet

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs(tmp_path):
    output = tmp_path / "result.md"
    command = [sys.executable, "-m", "benchmarks.inference", "--small", "--runs", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = output.read_text("utf-8")
    assert run.stdout.strip() == text.strip()
    for part in (
        "| one pass |",
        "| MONAI sliding window |",
        "times** as long",
        "- command: `python -m benchmarks.infer",
    ):
        assert part in text


def test_agreement():
    plan = small(1).plan
    network = build_vnet(plan.network, 1, plan.outputs)
    image = synthetic_image((8, 16, 16))
    logits = predict_logits(prepare(network, torch.device("cpu"), torch.float32), image, plan)
    right = logits.argmax(0).numpy()
    assert 0.1 < right.mean() < 0.9
    same, other = agreement(network, plan, [(image, right), (image, 1 - right)], roi=(8, 16, 16))
    assert same.label == "structure"
    assert same.peer == 1
    assert same.ours == same.between > 0.95
    assert other.peer == 0


def test_dice_by_hand():
    a = np.array([True, True, False, False])
    assert dice(a, np.array([False, True, False, True])) == 0.5
    assert dice(~a & a, ~a & a) == 1
