"""Trainings that err alike, apart, or not at all, by pencil."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.agreement import agreement, boundary
from tests.walkthrough import REPOSITORY
from vnet_core.geometry import Geometry
from workers.sources.scans import write_label


def row(*values: int) -> np.ndarray:
    return np.array([[values]], np.uint8)


TRUTH = [row(0, 1, 1, 1, 1, 0, 0, 0), row(1, 1, 0, 0, 0, 0, 0, 0)]


def test_trainings_that_err_alike_share_every_error() -> None:
    # one voxel too many in the first case (Dice 8/9), two in the second (4/6)
    masks = [row(0, 1, 1, 1, 1, 1, 0, 0), row(1, 1, 1, 1, 0, 0, 0, 0)]
    found = agreement(TRUTH, [masks, masks], [1])
    assert found.dice == pytest.approx([(8 / 9 + 2 / 3) / 2] * 2)
    # half the difference, since the deviation of two values by n - 1 is their difference by the root of 2
    assert found.standard_error == pytest.approx((8 / 9 - 2 / 3) / 2)
    assert (found.between, found.shared) == (1, 1)
    # of three wrong voxels one lies two away from the true label
    assert found.at_boundary == pytest.approx(2 / 3)
    assert found.volume_ratio == pytest.approx([(5 / 4 + 4 / 2) / 2] * 2)
    assert found.volume_correlation == pytest.approx(1)


def test_trainings_that_err_apart_share_none() -> None:
    first = [row(1, 1, 1, 1, 1, 0, 0, 0), row(1, 1, 0, 0, 0, 0, 0, 0)]
    second = [row(0, 1, 1, 1, 1, 0, 0, 0), row(1, 0, 0, 0, 0, 0, 0, 0)]
    found = agreement(TRUTH, [first, second], [1])
    assert (found.shared, found.at_boundary) == (0, 1)
    assert found.dice == pytest.approx([(8 / 9 + 1) / 2, (1 + 2 / 3) / 2])
    assert found.between == pytest.approx((8 / 9 + 2 / 3) / 2)


def test_a_boundary_has_both_its_sides() -> None:
    assert boundary(row(0, 0, 1, 1, 1, 2, 2, 0)).tolist() == [[[False, True, True, False, True, True, True, True]]]


def test_it_runs(tmp_path: Path) -> None:
    grid = Geometry((1, 1, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    for number, masks in enumerate((TRUTH, TRUTH, [TRUTH[0], row(0, 1, 1, 0, 0, 0, 0, 0)])):
        (tmp_path / str(number)).mkdir()
        for case, labels in enumerate(masks):
            write_label(tmp_path / str(number) / f"{case}.nii.gz", labels, grid)
    folders = [str(tmp_path / str(number)) for number in range(3)]
    command = [sys.executable, "-m", "benchmarks.agreement", *folders, "--output", str(tmp_path / "new" / "out.md")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "new" / "out.md").read_text()
    assert written == done.stdout
    assert "| Dice against the truth, one by one | 1.0000, 0.7500 |" in written
    assert "2 trainings, 2 cases." in written
