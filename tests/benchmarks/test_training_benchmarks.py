"""The benchmarks of training, small."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")

from benchmarks import step
from tests.conftest import Walkthrough
from tests.walkthrough import REPOSITORY

pytestmark = pytest.mark.slow


def bench(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def scans(walkthrough: Walkthrough) -> list[str]:
    labels = ["--label", "1=organ", "--label", "2=lesion", "--held-out", "2"]
    return [str(walkthrough.folder / "scans" / "train"), *labels]


def test_dice_against_minutes(scans, tmp_path: Path) -> None:
    output = tmp_path / "accuracy.md"
    arguments = [*scans, "--minutes", "0.02", "--seeds", "1", "--pace", "vnet=150", "--work", tmp_path / "work"]
    bench("accuracy", *arguments, "--output", output)
    (row,) = [line for line in output.read_text("utf-8").splitlines() if line.startswith("| vnet")]
    assert row.split("|")[2:4] == [" 0.02 ", " 3 "]
    assert " (1) |" in row, "one seed has no spread"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # what is measured already is not measured again
    again = bench("accuracy", *arguments, "--output", output)
    assert "seed" not in again


def test_a_loss(scans, tmp_path: Path) -> None:
    output = tmp_path / "losses.md"
    bench(
        "losses", *scans, "--only", "linear-dice", "--minutes", "0.03", "--work", tmp_path / "work", "--output", output
    )
    assert "linear-dice" in output.read_text("utf-8")


def test_a_step(tmp_path: Path) -> None:
    size, device = step.Size("tiny", step.paper(2), 1, (16, 16, 16), 1), torch.device("cpu")
    rows = step.ours(size, device)
    assert [row.who for row in rows] == ["vnet, tiny", "vnet, tiny, torch's layout"]
    row = rows[0]
    assert row.training_ms > row.inference_ms > 0
    # 502 GMAC at width 16 and 64 x 128 x 128 voxels; the first convolution and the head shrink less than the rest
    assert row.gmacs == pytest.approx(502.1 * (2 / 16) ** 2 * 16**3 / (64 * 128 * 128), rel=0.04)
    step.report(tmp_path / "step.md", [size], device, rows, peak=0.1)
    assert "No CUDA device was at hand" in (tmp_path / "step.md").read_text("utf-8")
