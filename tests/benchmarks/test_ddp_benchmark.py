"""The benchmark of distributed training still runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_runs(tmp_path):
    output = tmp_path / "result.md"
    arguments = ["--small", "--steps", "20", "--pairs", "1", "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.ddp", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = output.read_text("utf-8")
    assert run.stdout.strip().endswith(text.strip())
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 |")]
    own, other, ratio = (float(cell) for cell in row.split("|")[2:5])
    assert own > 0
    assert other > 0
    assert ratio == pytest.approx(own / other, abs=0.01)
    assert "Ratio: **median" in text
