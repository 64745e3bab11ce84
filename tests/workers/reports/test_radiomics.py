"""Radiomics of our own masks: IBSI's published values, labels that have none, and a night from end to end."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.workers.ibsi_phantom import COHORT, GRID, INSIDE, VOXELS, night_of_phantoms, phantom, published
from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label
from vnet_core.volume import Volume
from workers.reports.radiomics import COLUMNS, FAMILIES, GreyLevels, Wanted, radiomics, radiomics_of_night, table
from workers.sources.scans import read_label, write_label, write_volume

REGION = [Label(value=1, name="region")]
WIDTH = GreyLevels(width=1.0)
extra = pytest.mark.skipif(
    importlib.util.find_spec("zrad") is None, reason="the extra radiomics (Z-Rad) is not installed"
)


def agrees(value: float, expected: float, tolerance: float) -> bool:
    """Within IBSI's tolerance, or equal in the three digits that IBSI publishes."""
    return abs(value - expected) <= tolerance or float(f"{value:.3g}") == expected


# --- IBSI's digital phantom


@extra
@pytest.mark.parametrize("levels", [WIDTH, GreyLevels(bins=6)], ids=["levels of one", "six levels"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_features_of_a_mask_file_are_those_that_ibsi_published(tmp_path, suffix, levels):
    write_label(tmp_path / f"mask{suffix}", INSIDE.astype(np.uint8), GRID)
    mask = read_label(tmp_path / f"mask{suffix}")
    (row,) = radiomics(phantom(), mask.labels, mask.geometry, REGION, levels)
    assert (row["label"], row["name"], row["voxels"], row["undefined"]) == (1, "region", 74, "")
    wrong = {name: (row[name], *told) for name, told in published().items() if not agrees(row[name], *told)}
    assert not wrong
    assert len(published()) == 161
    assert set(row) == {"label", "name", "voxels", "undefined", *published()}


@extra
def test_features_of_a_published_mask_of_a_night_are_those_that_ibsi_published(tmp_path):
    """The mask file holds the value 7, the plan's label has 1."""
    root = night_of_phantoms(tmp_path, ("one", "two"), output={"values": {"region": 7}})
    told = []
    found = list(radiomics_of_night(root, Wanted(COHORT, levels=WIDTH), told.append))
    assert [one.outcome.case for one in found] == ["one", "two"]
    assert told == [one.outcome for one in found]
    for one in found:
        assert one.outcome.state == "computed"
        none, region = one.rows
        assert (none["name"], none["voxels"], none["undefined"]) == ("none", 0, " ".join(FAMILIES))
        assert (region["label"], region["name"], region["voxels"]) == (7, "region", 74)
        assert (region["night"], region["cohort"], region["model"]) == ("2026-11-22_010000", COHORT, "organs@v1")
        assert (region["channel"], region["grey_levels"]) == ("image", "width 1")
        assert all(agrees(region[name], *value) for name, value in published().items())


def test_the_phantom_is_ibsis():
    """Without any library: 74 voxels, and the moments that IBSI published."""
    inside = VOXELS[INSIDE].astype(float)
    values = published()
    assert inside.size == 74
    assert agrees(inside.mean(), *values["stat_mean"])
    assert agrees(inside.var(), *values["stat_var"])
    assert (inside**2).sum() == values["stat_energy"][0]
    assert inside.size * GRID.voxel_ml * 1000 == values["morph_vol_approx"][0]


# --- axes


@extra
def test_shapes_follow_the_spacing_of_each_axis():
    """Turned with its spacing, a mask keeps its shape; and a long voxel makes a long region."""
    spacing = (1.0, 2.0, 4.0)

    def of(order: tuple[int, int, int]) -> dict:
        shape, steps = (tuple(of[axis] for axis in order) for of in (GRID.shape, spacing))
        image = Volume(VOXELS.transpose(order)[None], Geometry(shape, steps, (0.0, 0.0, 0.0)))
        return radiomics(image, INSIDE.transpose(order).astype(np.uint8), image.geometry, REGION, WIDTH)[0]

    straight, turned = of((0, 1, 2)), of((2, 0, 1))
    names = [name for name in straight if name.startswith(("morph_", "stat_"))]
    assert [turned[name] for name in names] == pytest.approx([straight[name] for name in names], rel=1e-6)
    assert straight["morph_vol_approx"] == pytest.approx(74 * 8)
    x = np.argwhere(INSIDE)[:, 2] * 4.0
    assert straight["morph_pca_maj_axis"] == pytest.approx(4 * x.std(), rel=0.05)


# --- labels that have few features or none


@extra
def test_labels_without_features_say_so():
    values = np.zeros((9, 9, 9), np.uint8)
    values[1:6, 1:6, 1:6] = 1
    values[5, 5, 5] = 0
    values[7, 1:4, 1:4] = 2
    values[1:5, 1:6, 7:9] = 4
    rng = np.random.default_rng(0)
    image = Volume(rng.integers(0, 100, (1, 9, 9, 9)).astype(np.int16), Geometry((9, 9, 9), (1.0, 1.0, 1.0), (0, 0, 0)))
    labels = [Label(value=value, name=f"l{value}") for value in (1, 2, 3, 4)]
    whole, flat, absent, thin = radiomics(image, values, image.geometry, labels)
    assert whole["undefined"] == ""
    assert [row["voxels"] for row in (whole, flat, absent, thin)] == [124, 9, 0, 40]
    for row in (flat, absent, thin):
        assert row["undefined"].split() == list(FAMILIES)
        assert set(row) == {"label", "name", "voxels", "undefined"}


@extra
def test_one_intensity_has_a_shape_and_no_histogram():
    values = INSIDE.astype(np.uint8)
    image = Volume(np.full((1, *GRID.shape), 5, np.int16), GRID)
    (row,) = radiomics(image, values, GRID, REGION)
    assert agrees(row["morph_volume"], *published()["morph_volume"])
    assert (row["stat_mean"], row["stat_var"]) == (5.0, 0.0)
    assert row["undefined"] == "intensity_histogram glcm"
    assert "ih_mean" not in row
    json.dumps(row, allow_nan=False)


@extra
def test_another_grid_is_refused():
    moved = Geometry(GRID.shape, GRID.spacing_mm, (1.0, 0.0, 0.0))
    with pytest.raises(ScanError) as caught:
        radiomics(phantom(), INSIDE.astype(np.uint8), moved, REGION)
    assert caught.value.code == "radiomics.grid"


# --- nights


@extra
def test_a_scan_that_changed_or_is_gone_is_refused_and_the_others_go_on(tmp_path):
    root = night_of_phantoms(tmp_path, ("a", "b", "c"))
    write_volume(tmp_path / "a.nii.gz", Volume(VOXELS[None] + np.int16(1), GRID))
    (tmp_path / "b.nii.gz").unlink()
    found = {one.outcome.case: one for one in radiomics_of_night(root, Wanted(COHORT, label="region"))}
    assert {case: one.outcome.codes for case, one in found.items()} == {
        "a": ("scan.changed",),
        "b": ("scan.unreadable",),
        "c": (),
    }
    assert [len(one.rows) for one in found.values()] == [0, 0, 1]


@extra
@pytest.mark.parametrize(
    ("wanted", "code", "names"),
    [
        (Wanted(COHORT, night="2020-01-01_000000"), "report.night", "2026-11-22_010000"),
        (Wanted("other"), "report.cohort", COHORT),
        (Wanted(COHORT, label="liver"), "radiomics.label", "region"),
        (Wanted(COHORT, channel="T1"), "radiomics.channel", "image"),
    ],
)
def test_what_is_unknown_is_told_with_what_there_is(tmp_path, wanted, code, names):
    root = night_of_phantoms(tmp_path)
    with pytest.raises(ConfigError, match=names) as caught:
        list(radiomics_of_night(root, wanted))
    assert caught.value.code == code


def test_without_the_extra_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zrad", None)
    with pytest.raises(ConfigError, match=r"pip install 'vnet-cohort\[radiomics\]'") as caught:
        radiomics(phantom(), INSIDE.astype(np.uint8), GRID, REGION)
    assert caught.value.code == "radiomics.missing"


@pytest.mark.parametrize("wrong", [(None, None), (32, 1.0), (1, None), (None, 0.0), (None, float("inf"))])
def test_grey_levels_need_one_sensible_number(wrong):
    with pytest.raises(ConfigError) as caught:
        GreyLevels(*wrong)
    assert caught.value.code == "radiomics.levels"


# --- tables

ROWS = [
    {**dict.fromkeys(COLUMNS), "case": "a", "name": "=1+1", "label": 1, "voxels": 0, "undefined": "morphology"},
    {**dict.fromkeys(COLUMNS), "case": "b", "name": "x", "label": 1, "voxels": 7, "undefined": "", "stat_mean": 2.5},
]


def test_tables_hold_every_feature_of_any_row_and_harmless_texts():
    lines = list(csv.DictReader(io.StringIO(table(ROWS, ".csv").decode())))
    assert [(line["case"], line["name"], line["stat_mean"]) for line in lines] == [
        ("a", "'=1+1", ""),
        ("b", "x", "2.5"),
    ]
    found = pq.read_table(io.BytesIO(table(ROWS, ".parquet"))).to_pylist()
    assert found == json.loads(table(ROWS, ".json"))
    assert found == [ROWS[0] | {"stat_mean": None}, ROWS[1]]
    assert list(found[0]) == [*COLUMNS, "stat_mean"]


def test_tables_without_rows_have_their_columns():
    assert table([], ".csv").decode() == ",".join(COLUMNS) + "\n"
    assert json.loads(table([], ".json")) == []
    assert pq.read_table(io.BytesIO(table([], ".parquet"))).column_names == list(COLUMNS)
    with pytest.raises(ConfigError) as caught:
        table([], ".xlsx")
    assert caught.value.code == "radiomics.output"
