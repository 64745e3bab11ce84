"""The table of verdicts on a folder of two scans, one of them torn."""

import sys
from pathlib import Path

import numpy as np

from benchmarks import verdicts
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry
from vnet_core.volume import Volume
from workers.sources.scans import write_volume


def test_every_scan_is_a_row_with_its_grid_or_its_reason(tmp_path: Path, monkeypatch) -> None:
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 0.5), (0.0, 0.0, 0.0), CANONICAL_DIRECTION)
    voxels = np.arange(120, dtype=np.int16).reshape(1, 4, 5, 6)
    folder = tmp_path / "scans"
    folder.mkdir()
    write_volume(folder / "sound.nii.gz", Volume(voxels, geometry))
    (folder / "torn.nii.gz").write_bytes((folder / "sound.nii.gz").read_bytes()[:-60])
    (folder / "notes.txt").write_text("no scan")
    output = tmp_path / "verdicts.md"
    monkeypatch.setattr(sys, "argv", ["verdicts.py", str(folder), "--output", str(output)])
    assert verdicts.main() == 0
    lines = output.read_text("utf-8").splitlines()
    assert "| sound.nii.gz |  | accepted | 4 x 5 x 6 | 2 x 1 x 0.5 |  |" in lines
    assert any(line.startswith("| torn.nii.gz |  | refused `scan.truncated` |  |  |") for line in lines)
    assert "Set aside: 1 not-a-scan." in lines
