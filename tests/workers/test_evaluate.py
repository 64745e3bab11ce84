"""Folders of masks against truth: rows per case, figures over the cohort, tables."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from vnet_core.errors import ConfigError
from vnet_core.geometry import Geometry
from vnet_core.metrics import Structure
from vnet_core.plan import Label, Region
from workers.evaluate import columns, evaluate, masks_in, patients_in, summary, to_parquet
from workers.sources.scans import write_label

GRID = Geometry((2, 4, 5), (2.0, 1.0, 5.0), (0.0, 0.0, 0.0))
"""10 mm^3, 0.01 mL a voxel."""
ORGAN, LESION = Label(value=1, name="organ"), Label(value=2, name="lesion")


def cube(depth: int, rows: int, columns: int, value: int = 1) -> np.ndarray:
    """Label map on GRID with a box of ``value`` in its first corner."""
    labels = np.zeros(GRID.shape, np.uint8)
    labels[:depth, :rows, :columns] = value
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three cases: a, twice as large as true; b, right; c, missed; each with masks and truth."""
    for name in ("masks", "truth"):
        (tmp_path / name).mkdir()
    for case, predicted, true in [
        ("a", cube(2, 4, 2), cube(2, 2, 2)),
        ("b", cube(1, 2, 2), cube(1, 2, 2)),
        ("c", cube(0, 0, 0), cube(1, 1, 1)),
    ]:
        write_label(tmp_path / "masks" / f"{case}.nii.gz", predicted, GRID)
        write_label(tmp_path / "truth" / f"{case}.mha", true, GRID)
    return tmp_path


def run(folder: Path, *args, **kwargs):
    return evaluate(masks_in(folder / "masks"), masks_in(folder / "truth"), *args, **kwargs)


def test_rows_hold_every_figure_and_none_where_there_is_none(folders):
    a, b, c = (e.labels[0] for e in run(folders, [ORGAN], (1.0, 2.0)))
    assert tuple(a) == columns((1.0, 2.0))[1:]
    assert (a["dice"], a["iou"], a["precision"], a["recall"]) == (2 * 8 / 24, 0.5, 0.5, 1.0)
    assert a["hd_mm"] == 2.0  # two rows of 1 mm too many
    assert a["surface_dice_2mm"] == 1.0
    assert (a["volume_ml"], a["volume_error"]) == (pytest.approx(0.16), 1.0)
    assert (b["dice"], b["hd95_mm"], b["surface_dice_1mm"]) == (1.0, 0.0, 1.0)
    assert (c["dice"], c["hd_mm"], c["assd_mm"], c["surface_dice_1mm"]) == (0.0, None, None, 0.0)


def test_labels_without_names_are_named_by_their_values(folders):
    assert [row["name"] for e in run(folders) for row in e.labels] == ["label-1"] * 3


def test_regions_and_structures_are_scored_as_one_thing(folders):
    write_label(folders / "masks" / "a.nii.gz", cube(2, 4, 2, value=2), GRID)
    whole = Region(name="whole", values=(1, 2), paints=1)
    found = run(folders, [ORGAN, whole, Structure("both", (2, 1))])[0].labels
    assert [(row["name"], row["label"], row["dice"]) for row in found] == [
        ("organ", 1, 0.0),
        ("whole", None, 2 * 8 / 24),
        ("both", None, 2 * 8 / 24),
    ]


def test_cases_side_by_side_give_the_same_in_the_same_order(folders):
    with ThreadPoolExecutor(3) as executor:
        beside = run(folders, [ORGAN], executor=executor)
    alone = run(folders, [ORGAN])
    assert [e.outcome.case for e in beside] == ["a", "b", "c"]
    assert [e.labels for e in beside] == [e.labels for e in alone]


def test_a_case_without_truth_or_on_another_grid_is_a_refused_row(folders):
    (folders / "truth" / "a.mha").unlink()
    other = Geometry(GRID.shape, GRID.spacing_mm, (1.0, 0.0, 0.0))
    write_label(folders / "truth" / "b.mha", cube(1, 2, 2), other)
    found = run(folders, [ORGAN])
    assert [(e.outcome.state, e.outcome.codes) for e in found] == [
        ("refused", ("evaluate.no-truth",)),
        ("refused", ("label.grid",)),
        ("computed", ()),
    ]
    assert [len(e.labels) for e in found] == [0, 0, 1]
    assert summary(found)["summary"]["labels"]["organ"]["dice"]["cases"] == 1


@pytest.mark.parametrize("tolerance_mm", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused_before_anything_is_read(folders, tolerance_mm):
    with pytest.raises(ConfigError) as caught:
        run(folders, [ORGAN], (tolerance_mm,))
    assert caught.value.code == "metrics.tolerance"


def test_no_masks_or_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="0 masks") as caught:
        evaluate({}, {})
    assert caught.value.code == "evaluate.empty"
    with pytest.raises(ConfigError) as caught:
        masks_in(tmp_path / "nowhere")
    assert caught.value.code == "evaluate.folder"


# --- over the cases


def test_the_summary_says_over_how_many_cases(folders):
    found = summary(run(folders, [ORGAN, LESION]))
    organ = found["summary"]["labels"]["organ"]
    assert organ["dice"]["mean"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (organ["dice"]["cases"], organ["dice"]["worst"], organ["dice"]["worst_case"]) == (3, 0.0, "c")
    assert organ["dice"]["low"] <= organ["dice"]["mean"] <= organ["dice"]["high"]
    # c was missed: no distance, and the mean of the two others says so
    assert (organ["hd_mm"]["cases"], organ["hd_mm"]["infinite"], organ["hd_mm"]["missing"]) == (2, 1, 0)
    assert (organ["hd_mm"]["mean"], organ["hd_mm"]["worst_case"]) == (1.0, "a")
    assert organ["volume_error"]["mean"] == 0.0  # twice the volume, right, and nothing
    assert organ["absolute_volume_error"]["mean"] == pytest.approx(2 / 3)
    lesion = found["summary"]["labels"]["lesion"]
    assert (lesion["dice"]["cases"], lesion["dice"]["missing"], lesion["dice"]["mean"]) == (0, 3, None)
    assert (lesion["hd_mm"]["infinite"], lesion["hd_mm"]["missing"]) == (0, 3)
    assert found["dice"] == {"organ": organ["dice"]["mean"]}
    assert found["mean_dice"] == organ["dice"]["mean"]


def test_the_cohort_runs_over_the_means_of_the_cases(folders):
    predicted, true = cube(1, 2, 2), cube(1, 2, 2)
    predicted[1, 3, :2], true[1, 3, :4] = 2, 2
    for folder, labels in (("masks", predicted), ("truth", true)):
        write_label(next((folders / folder).glob("b.*")), labels, GRID)
    cohort = summary(run(folders, [ORGAN, LESION]))["summary"]["cohort"]
    # b: organ 1, lesion 2 * 2 / 6; a and c have the organ alone
    assert cohort["dice"]["mean"] == pytest.approx((2 / 3 + (1 + 2 / 3) / 2 + 0) / 3)
    assert (cohort["hd_mm"]["cases"], cohort["hd_mm"]["infinite"]) == (2, 1)
    assert "volume_ml" not in cohort


def test_cases_of_one_patient_are_drawn_together(folders):
    found = run(folders, [ORGAN])
    alone = summary(found)["summary"]
    together = summary(found, {"a": "p", "b": "p", "c": "p"})["summary"]
    assert (alone["patients"], together["patients"]) == (3, 1)
    assert together["labels"]["organ"]["dice"]["low"] is None
    assert together["labels"]["organ"]["dice"]["mean"] == alone["labels"]["organ"]["dice"]["mean"]


def test_without_a_scored_case_the_summary_is_empty():
    found = summary([])
    assert (found["mean_dice"], found["dice"], found["summary"]["labels"]) == (None, {}, {})


def test_patients_come_from_a_table(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,image,patient\na,x.nii,p1\nb,y.nii,\n")
    assert patients_in(table) == {"a": "p1"}
    table.write_text("case;patient\na;p1\n")
    for path in (table, tmp_path / "nowhere.csv"):
        with pytest.raises(ConfigError) as caught:
            patients_in(path)
        assert caught.value.code == "evaluate.patients"


# --- tables


def test_parquet_keeps_numbers_and_what_does_not_exist(folders):
    rows = [{"case": e.outcome.case} | row for e in run(folders, [ORGAN]) for row in e.labels]
    read = pq.read_table(io.BytesIO(to_parquet(rows, columns((1.0,)))))
    assert tuple(read.column_names) == columns((1.0,))
    assert read["hd_mm"].to_pylist() == [2.0, 0.0, None]
    assert read["label"].to_pylist() == [1, 1, 1]


def test_a_table_without_rows_has_its_columns():
    read = pq.read_table(io.BytesIO(to_parquet([], columns((1.0,)))))
    assert (read.num_rows, tuple(read.column_names)) == (0, columns((1.0,)))
