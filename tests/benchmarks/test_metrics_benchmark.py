"""The benchmark of the metrics still runs, and its arms tell the same of the same masks."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="MONAI is a dependency of the benchmark only")
pytest.importorskip("surface_distance", reason="surface-distance is a dependency of the benchmark only")

from benchmarks.metrics import PAIRS, SMALL, masks, monai, ours, reference

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs(tmp_path):
    output = tmp_path / "result.md"
    command = [sys.executable, "-m", "benchmarks.metrics", "--small", "--runs", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = output.read_text("utf-8")
    assert run.stdout.strip() == text.strip()
    for part in ("| ours |", "| surface-distance |", "| MONAI |", "- command: `python -m benchmarks.metrics"):
        assert part in text


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.filterwarnings("ignore:.*ndimage.*:DeprecationWarning")
def test_the_arms_agree_on_what_they_share(pair):
    prediction, truth = masks(pair, SMALL)
    found = ours(prediction, truth)
    assert 0 < found["Dice"] < 1
    assert found == pytest.approx(reference(prediction, truth), abs=1e-6)
    assert monai(prediction, truth)["Dice"] == pytest.approx(found["Dice"], abs=1e-6)
