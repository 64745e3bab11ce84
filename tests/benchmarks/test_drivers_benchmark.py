"""The benchmark of handing out still runs, and counts what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drivers import Measured

ROOT = Path(__file__).resolve().parents[2]


def test_idle_is_what_is_not_slept() -> None:
    found = Measured(
        cases=10, workers=4, wall_s=10.0, slept_s=30.0, driver_cpu_s=2.0, driver_peak_mib=100, others_cpu_s=1.0
    )
    assert found.idle == pytest.approx(0.25)
    assert found.cores == pytest.approx(0.2)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    output = tmp_path / "result.md"
    options = ["--cases", "40", "--workers", "4", "--seconds", "0.1", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "benchmarks.drivers", *options], cwd=ROOT, check=True, capture_output=True)
    (row,) = (line.split(" | ") for line in output.read_text("utf-8").splitlines() if line.startswith("| 40 | 4 |"))
    wall_s, without_idling_s = float(row[2]), float(row[3])
    assert 40 * 0.05 / 4 < without_idling_s < wall_s
    assert float(row[7]) > 50, "MiB of a process that has imported Dask"
