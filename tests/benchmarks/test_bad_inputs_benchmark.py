"""The benchmark of bad inputs still runs, and counts what it should by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nibabel", reason="nibabel is a dependency of tests and benchmarks only")

from benchmarks.bad_inputs import count, table
from tests.bad_inputs import INPUTS
from tests.bad_inputs.inputs import Finding

ROOT = Path(__file__).resolve().parents[2]
BAD, UNSUITABLE, SOUND = (next(i for i in INPUTS if i.number == number) for number in ("4", "28", "34"))
TWO = replace(SOUND, expected=("accepted", "accepted"))


def test_it_runs(tmp_path):
    output, page = tmp_path / "result.md", tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.bad_inputs", "--only", "4", "--only", "34"]
    run = subprocess.run(
        [*command, "--output", str(output), "--page", str(page)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.read_text("utf-8").startswith(run.stdout.strip())
    for text in (output.read_text("utf-8"), page.read_text("utf-8")):
        assert "| bad | refused `scan.truncated` | **opens** | refuses |" in text
        assert "| sound | accepted | right | right |" in text
        assert "| vnet-cohort | 1 | 0 | 0 | 1 | 0 | 0 |" in text
        assert "| SimpleITK | 1 | 1 | 0 | 1 | 0 | 0 |" in text
        assert "| nibabel | 1 | 0 | 0 | 1 | 0 | 0 |" in text


@pytest.mark.parametrize(
    ("item", "finding", "cell", "counts"),
    [
        (BAD, Finding(("refused:scan.truncated",)), "refused `scan.truncated`", (1, 0, 0, 0, 0, 0)),
        (BAD, Finding(("warned:scan.trailing-bytes",), False), "warned `scan.trailing-bytes`, **wrong**",
         (1, 1, 0, 0, 0, 0)),
        (UNSUITABLE, Finding(("accepted",), True), "accepted", (0, 0, 0, 0, 0, 0)),
        (SOUND, Finding(("accepted",), True), "accepted", (0, 0, 0, 1, 0, 0)),
        (SOUND, Finding(("accepted",), False), "accepted, **wrong**", (0, 0, 0, 1, 0, 1)),
        (SOUND, Finding(("refused:scan.header",)), "refused `scan.header`", (0, 0, 0, 1, 1, 0)),
        (TWO, Finding(("accepted", "refused:scan.header"), True), "accepted; refused `scan.header`",
         (0, 0, 0, 1, 1, 0)),
        (SOUND, Finding(("warned:a.b,c.d",), True), "warned `a.b` `c.d`", (0, 0, 0, 1, 0, 0)),
    ],
)  # fmt: skip
def test_our_cell_and_count(item, finding, cell, counts):
    results = [{"ours": finding, "SimpleITK": None, "nibabel": None}]
    assert table([item], results)[-1].endswith(f" | {item.kind} | {cell} |  |  |")
    found = count("ours", [item], results)
    assert (found.bad, found.accepted, found.stuck, found.sound, found.refused, found.wrong) == counts


@pytest.mark.parametrize(
    ("item", "state", "right", "cell", "counts"),
    [
        (BAD, "opens", None, "**opens**", (1, 1, 0, 0, 0, 0)),
        (BAD, "hangs", None, "**hangs**", (1, 0, 1, 0, 0, 0)),
        (UNSUITABLE, "opens", None, "opens", (0, 0, 0, 0, 0, 0)),
        (SOUND, "opens", True, "right", (0, 0, 0, 1, 0, 0)),
        (SOUND, "opens", False, "**wrong**", (0, 0, 0, 1, 0, 1)),
        (SOUND, "refuses", None, "**refuses**", (0, 0, 0, 1, 1, 0)),
        (SOUND, "crashes", None, "**crashes**", (0, 0, 1, 1, 0, 0)),
        (TWO, "opens", True, "right", (0, 0, 0, 1, 0, 0)),
    ],
)
def test_their_cell_and_count(item, state, right, cell, counts):
    results = [{"ours": Finding(("accepted",), True), "SimpleITK": Finding((state,), right), "nibabel": None}]
    assert table([item], results)[-1].endswith(f"accepted | {cell} |  |")
    found = count("SimpleITK", [item], results)
    assert (found.bad, found.accepted, found.stuck, found.sound, found.refused, found.wrong) == counts
