"""The rows of nights: labels and regions of every case, and what has changed since the night before."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Region
from vnet_core.report import flags, measure, measure_regions, to_row
from workers.ledger import Outcome
from workers.query import Query, query
from workers.report import SCHEMA, Night, write_night
from workers.store import Root

LABELS = (Label(value=1, name="necrosis"), Label(value=2, name="oedema"))
REGIONS = (
    Region(name="whole", values=(1, 2), paints=2),
    Region(name="swelling", values=(2,), paints=2),
    Region(name="necrosis", values=(1,), paints=1),
)
GRID = Geometry((6, 6, 6), (5.0, 5.0, 5.0), (0.0, 0.0, 0.0))
"""Of voxels of 0.125 mL."""
FIRST = Night("2026-11-22_010000", "glioma", "glioma@v1", "2026-11-22T01:00:00+00:00", 1.0, {"computed": 1})
SECOND = replace(FIRST, id="2026-11-23_010000", started="2026-11-23T01:00:00+00:00")


def result(root: Root, key: str, oedema_planes: int, regions: tuple[Region, ...] = REGIONS) -> Outcome:
    """A finished case: 1.0 mL of necrosis and 0.5 mL of oedema per plane, as a mask's ``report.json`` holds them."""
    mask = np.zeros(GRID.shape, np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    mask[3 : 3 + oedema_planes, 1:3, 1:3] = 2
    of = {"labels": measure(mask, GRID, LABELS), "regions": measure_regions(mask, GRID, LABELS, regions)}
    rows = {name: [{**to_row(r), "flags": list(flags(r))} for r in reports] for name, reports in of.items()}
    root.put_json(f"{key}/report.json", {"case": "a", "mask": "mask.nii.gz"} | {n: r for n, r in rows.items() if r})
    return Outcome("a", "segment", "computed", key=key)


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(str(tmp_path))


def test_a_region_is_a_row_after_the_labels(root: Root) -> None:
    refused = Outcome("b", "ingest", "refused", ("scan.truncated",), "cut short; copy it again")
    rows = write_night(root, FIRST, [result(root, "results/1", 1), refused], {})
    assert [(row["case"], row["label"], row["name"], row["volume_ml"]) for row in rows] == [
        ("a", 1, "necrosis", 1.0),
        ("a", 2, "oedema", 0.5),
        ("a", None, "whole", 1.5),
        ("a", None, "swelling", 0.5),
        ("b", None, None, None),
    ]
    assert (rows[2]["voxels"], rows[2]["slice_first"], rows[2]["slice_last"], rows[2]["components"]) == (12, 1, 3, 1)
    table = pq.read_table(root.path("reports/glioma/2026-11-22_010000.parquet"))
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows


def test_change_is_told_of_labels_and_regions(root: Root) -> None:
    write_night(root, FIRST, [result(root, "results/1", 1)], {})
    rows = write_night(root, SECOND, [result(root, "results/2", 2)], {})
    assert [(row["name"], row["change_ml"], row["change_percent"]) for row in rows] == [
        ("necrosis", 0.0, 0.0),
        ("oedema", 0.5, 100.0),
        ("whole", 0.5, pytest.approx(100 / 3)),
        ("swelling", 0.5, 100.0),
    ]


def test_a_query_finds_a_region_by_its_name(root: Root) -> None:
    write_night(root, FIRST, [result(root, "results/1", 1)], {})
    (row,) = query(root, Query(label="whole", volume_min_ml=1.4))
    assert (row["case"], row["volume_ml"]) == ("a", 1.5)
    assert query(root, Query(label="whole", volume_min_ml=1.6)) == []


def test_a_plan_without_regions_has_rows_of_labels_alone(root: Root) -> None:
    rows = write_night(root, FIRST, [result(root, "results/1", 1, regions=())], {})
    assert [row["name"] for row in rows] == ["necrosis", "oedema"]
