"""The overhead benchmark still runs, and its nights do what they are measured for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    output = tmp_path / "result.md"
    command = [sys.executable, "-m", "benchmarks.overhead", "--cases", "3", "--once-more", "4", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = [
        line.split(" | ")
        for line in output.read_text("utf-8").splitlines()
        if line.endswith(("computed |", "cached |"))
    ]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "1 new case",
        "3 new cases",
        "3 cases, nothing new",
        "4 cases with masks, first night",
        "4 cases, nothing new",
    ]
    assert [row[-1].removesuffix(" |") for row in rows] == [
        "1 computed",
        "3 computed",
        "3 cached",
        "4 cached",
        "4 cached",
    ]
    assert all(float(row[5]) > 100 for row in rows), "MiB of a process that has imported Prefect"
