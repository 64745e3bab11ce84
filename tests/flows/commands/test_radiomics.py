"""``vnet radiomics``: the features of a night's masks on a terminal, as JSON and as files."""

from __future__ import annotations

import csv
import json
import sys

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from tests.workers.ibsi_phantom import COHORT, night_of_phantoms
from tests.workers.reports.test_radiomics import extra
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path, monkeypatch) -> Root:
    for name in ("VNET_ROOT", "VNET_SITE"):
        monkeypatch.setenv(name, "")
    return night_of_phantoms(tmp_path, ("a", "b"), label="=lesion")


def run(root: Root, *arguments: str) -> int:
    return main(["radiomics", "--cohort", COHORT, "--root", str(root.home), *arguments])


@extra
def test_the_document_and_the_file_hold_every_row(root, tmp_path, capfd):
    for suffix in ("csv", "parquet", "json"):
        output = tmp_path / "out" / f"features.{suffix}"
        assert run(root, "--json", "--bin-width", "1", "--label", "=lesion", "--output", str(output)) == 0
        document = json.loads(capfd.readouterr().out)
        assert document["counts"] == {"computed": 2}
        assert [(row["case"], row["name"], row["stat_max"]) for row in document["rows"]] == [
            ("a", "=lesion", 6.0),
            ("b", "=lesion", 6.0),
        ]
    with (tmp_path / "out" / "features.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["'=lesion", "'=lesion"]
    assert float(rows[0]["cm_contrast_3D_avg"]) == pytest.approx(5.32, abs=0.005)
    assert pq.read_table(tmp_path / "out" / "features.parquet").to_pylist() == document["rows"]
    assert json.loads((tmp_path / "out" / "features.json").read_text("utf-8")) == document["rows"]


@extra
def test_a_case_that_cannot_be_read_is_told_and_the_exit_code_says_so(root, tmp_path, capfd):
    (tmp_path / "a.nii.gz").unlink()
    assert run(root) == 3
    text = capfd.readouterr().out
    assert "1 computed, 1 refused" in text
    assert "morph_sphericity" in text
    assert "0.843" in text


def test_without_the_extra_nothing_is_begun_and_the_remedy_is_named(root, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "zrad", None)
    assert run(root) == 2
    assert "pip install 'vnet-cohort[radiomics]'" in capfd.readouterr().err


def test_an_output_of_another_kind_is_refused_first(root, tmp_path, capfd):
    assert run(root, "--output", str(tmp_path / "features.xlsx")) == 2
    assert "radiomics.output" in capfd.readouterr().err
