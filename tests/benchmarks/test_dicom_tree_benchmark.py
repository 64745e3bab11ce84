"""The benchmark of DICOM trees still runs, and its arms find what was written."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dcm2niix", reason="dcm2niix is a dependency of the benchmark only")

from benchmarks.dicom_tree import make_tree, ours, pydicom_walk

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs(tmp_path):
    output = tmp_path / "result.md"
    command = [sys.executable, "-m", "benchmarks.dicom_tree", "--files", "40", "--series", "4", "--runs", "1"]
    run = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=True)
    text = output.read_text("utf-8")
    assert run.stdout.strip() == text.strip()
    cells = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in text.splitlines() if row.startswith("|")}
    assert (cells["ours"], cells["pydicom"], cells["dcm2niix"]) == ("4", "40", "4")
    assert "- command: `python -m benchmarks.dicom_tree" in text


def test_the_tree_is_the_same_each_time_and_every_series_is_sound(tmp_path):
    from workers.dicom.tree import scan_tree

    for name in ("a", "b"):
        make_tree(tmp_path / name, 21, 4)
    a, b = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.dcm"))] for name in ("a", "b"))
    assert a == b
    assert ours(tmp_path / "a") == 4
    assert pydicom_walk(tmp_path / "a") == 21
    volumes = scan_tree(tmp_path / "a").volumes
    assert sorted(series.slices for series in volumes) == [5, 5, 5, 6]
    assert all(series.problem is None and series.slice_spacing_mm == 2.5 for series in volumes)
