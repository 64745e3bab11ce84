"""Fifty scans, ten of them bad in ten ways, from the command line to masks."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Walkthrough
from tests.walkthrough import environment
from tests.workers.test_ingest import label, scan, spoil

pytestmark = pytest.mark.slow


def vnet(root: Path, *arguments: str) -> tuple[int, dict]:
    command = ["vnet", *arguments, "--root", str(root), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(), timeout=600, check=False)
    return done.returncode, json.loads(done.stdout)


def test_forty_masks_ten_reasons_and_exit_code_3(walkthrough: Walkthrough, tmp_path: Path) -> None:
    source, masks, root = tmp_path / "source", tmp_path / "masks", walkthrough.copy_root(tmp_path / "root")
    for number in range(40):
        scan(source / f"images/good-{number:02}.nii.gz", number)
        label(source / f"labels/good-{number:02}.nii.gz")
    expected = spoil(source / "images", source / "labels")
    code, ingested = vnet(root, "ingest", str(source), "--cohort", "fifty", "--label", "1=organ")
    assert (code, ingested["counts"]) == (3, {"accepted": 40, "refused": 10})

    code, night = vnet(root, "segment", "--cohort", "fifty", "--model", "organs", "--output", str(masks))
    assert (code, night["counts"]) == (3, {"computed": 40, "refused": 10})
    refused = {case["case"]: case for case in night["cases"] if case["state"] == "refused"}
    assert {name: case["codes"][0] for name, case in refused.items()} == expected
    assert all(case["message"] for case in refused.values())
    assert sorted(path.name for path in masks.iterdir()) == [f"good-{number:02}.nii.gz" for number in range(40)]
    assert Counter(row["code"] for row in ingested["codes"]) == Counter(set(expected.values()))
