"""The scaling benchmark still runs, and a case costs the pool no more with sixteen times the actors."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(output: Path, *arguments: str) -> list[list[str]]:
    """Numbers of the rows of both tables."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--output", str(output), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in output.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0].isdigit()]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    size = ["--pairs", "2", "--cases", "2", "--side", "16", "--width", "2", "--handed-out", "400"]
    pair, again, few, many = run(tmp_path / "result.md", *size)
    assert float(again[3]) > 0
    one, two, ratio = map(float, pair[1:])
    assert one > 0
    assert two > 0
    assert ratio == pytest.approx(two / one, rel=0.1)
    assert [row[:2] for row in (few, many)] == [["4", "400"], ["64", "400"]]


@pytest.mark.slow
def test_ten_thousand_cases_cost_no_more_per_case_with_64_actors_than_with_4(tmp_path: Path) -> None:
    *_, few, many = run(tmp_path / "result.md", "--pairs", "1", "--cases", "2", "--side", "16", "--width", "2")
    assert few[1] == many[1] == "10000"
    assert float(many[3]) < 2 * float(few[3])
