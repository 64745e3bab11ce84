"""The loader benchmark still runs, and a loader that is slow shows as waiting."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.loader import SMALL, training

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_runs(tmp_path):
    output = tmp_path / "result.md"
    command = [sys.executable, "-m", "benchmarks.loader", "--small", "--seconds", "0.3", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = output.read_text("utf-8")
    assert run.stdout.strip() == text.strip()
    for part in ("| 16 x 16 x 16 | 2 | default |", "| 2 | all |", "| histogram matching |", "- command: `python"):
        assert part in text


@pytest.mark.parametrize("seconds_per_batch", [0.0, 1.0])
def test_waiting_is_measured(monkeypatch, seconds_per_batch):
    made = loader.BatchLoader._batch

    def slower(self, step, stream):
        self._stop.wait(seconds_per_batch)
        return made(self, step, stream)

    monkeypatch.setattr(loader.BatchLoader, "_batch", slower)
    row = training(SMALL[0], {}, 1.0)
    assert row.steps > 0
    assert (row.waited_seconds > 0.5) == bool(seconds_per_batch)
