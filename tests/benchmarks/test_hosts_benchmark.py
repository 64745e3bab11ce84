"""The benchmark of two hosts still runs, and tells masks that differ."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import Night, lines
from tests.namespaces import why_not
from tests.walkthrough import REPOSITORY
from vnet_core.phantoms import PhantomSpec, phantom
from workers.sources.scans import write_volume


def test_a_mask_that_differs_is_told() -> None:
    one = Night(10.0, {"computed": 2}, {"a": "1", "b": "2"}, {"a": {"files": 1}, "b": {"files": 2}})
    other = Night(20.0, {"computed": 2}, {"a": "1", "b": "3"}, {"a": {"files": 1}, "b": {"files": 2}})
    done = {"preprocess": {"first": 0, "second": 2}, "segment": {"first": 1, "second": 1}}
    text = "\n".join(lines(one, other, done, 2))
    assert "1 of 2 masks have the same SHA-256 on both: **no**. 2 of 2 receipts" in text
    assert "| two hosts, a bucket | 2 | 0 | 0 + 2 | 1 + 1 | 20.0 |" in text
    assert "2 of 2 masks have the same SHA-256 on both: **yes**" in "\n".join(lines(one, one, done, 2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    scans, output = tmp_path / "scans", tmp_path / "result.md"
    scans.mkdir()
    for number in range(4):
        write_volume(scans / f"case{number}.nii.gz", phantom(PhantomSpec(number))[0])
    command = [sys.executable, "-m", "benchmarks.hosts", str(scans), "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    text = output.read_text("utf-8")
    assert "4 of 4 masks have the same SHA-256 on both: **yes**" in text
    assert "- command: `python -m benchmarks.hosts" in text
