"""The rows of nights: labels and regions of every case, what has changed, what is flagged, and all of it made anew."""

import csv
import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save as weights

from tests.files import file_of
from tests.workers.known_model import known_network, known_plan
from vnet_core.errors import ConfigError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Region
from vnet_core.report import flags, measure, measure_regions, to_row
from vnet_core.reporting import Reporting
from vnet_core.sections import OutputPlan
from vnet_core.volume import Volume
from workers.cohort import Case, Entry, Verdict
from workers.dicom.derived import Algorithm
from workers.ledger import Outcome
from workers.nights import attempts
from workers.nights.attempts import Failure
from workers.nights.decisions import Decision, record
from workers.registry.models import Target, publish
from workers.reports import rows
from workers.reports.columns import to_rows
from workers.reports.query import Query, query
from workers.reports.report import (
    SCHEMA,
    Night,
    check_settings,
    load_reporting,
    measuring,
    night_ids,
    read_rows,
    refresh_review,
    reported_night,
    rewrite_night,
    save_reporting,
    to_json,
    write_night,
)
from workers.segmentation.masks import Mask, publish_mask
from workers.sources.scans import write_volume
from workers.storage.store import Root

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


def night(day: int) -> Night:
    return replace(FIRST, id=f"2026-12-{day:02d}_010000")


def result(root: Root, key: str, oedema_planes: int, regions: tuple[Region, ...] = REGIONS) -> Outcome:
    """A finished case: 1.0 mL of necrosis and 0.5 mL of oedema per plane, as a mask's ``report.json`` holds them."""
    mask = np.zeros(GRID.shape, np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    mask[3 : 3 + oedema_planes, 1:3, 1:3] = 2
    of = {"labels": measure(mask, GRID, LABELS), "regions": measure_regions(mask, GRID, LABELS, regions)}
    parts = {name: [{**to_row(r), "flags": list(flags(r))} for r in reports] for name, reports in of.items()}
    root.put_json(f"{key}/report.json", {"case": "a", "mask": "mask.nii.gz"} | {n: r for n, r in parts.items() if r})
    return Outcome("a", "segment", "computed", key=key)


def lump(root: Root, case: str, volume_ml: float, key: str = "", **facts: object) -> Outcome:
    """A finished case with one label of a given volume; ``facts`` go into its report and, as digest, its receipt."""
    key = key or f"results/glioma/{case}/{volume_ml:g}"
    spread = {name: facts.pop(name) for name in ("volume_low_ml", "volume_high_ml", "agreement") if name in facts}
    size = {"label": 1, "name": "lump", "voxels": round(1000 * volume_ml), "volume_ml": volume_ml}
    part = size | {"components": 1, "touches_border": False} | spread
    digest = facts.pop("digest", f"bytes of {case}")
    root.put_json(f"{key}/report.json", {"labels": [part], "case": case, "mask": "mask.nii.gz"} | facts)
    root.seal(key, {"case_digest": digest, "finished": "2026-11-22T01:02:03+00:00"})
    return Outcome(case, "segment", "computed", key=key, seconds=1.5, peak_bytes=1 << 30)


def entry(case: str, patient: str | None = None, digest: str | None = None) -> Entry:
    return Entry(Case(case, ("/scan",), patient=patient, digest=digest or f"bytes of {case}"), Verdict("accepted"))


def cached(outcome: Outcome) -> Outcome:
    return replace(outcome, state="cached", seconds=0.0, peak_bytes=0)


def flags_of(rows: list[dict]) -> dict[str, str]:
    return {row["case"]: row["flags"] for row in rows}


def files(root: Root) -> dict[str, bytes]:
    return {
        p.relative_to(root.home).as_posix(): p.read_bytes() for p in file_of(root, "results").rglob("*") if p.is_file()
    }


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(str(tmp_path))


# --- rows


def test_a_region_is_a_row_after_the_labels(root: Root) -> None:
    refused = Outcome("b", "ingest", "refused", ("scan.truncated",), "cut short; copy it again")
    rows = write_night(root, FIRST, [result(root, "results/1", 1), refused], [])
    assert [(row["case"], row["label"], row["name"], row["volume_ml"]) for row in rows] == [
        ("a", 1, "necrosis", 1.0),
        ("a", 2, "oedema", 0.5),
        ("a", None, "whole", 1.5),
        ("a", None, "swelling", 0.5),
        ("b", None, None, None),
    ]
    assert (rows[2]["voxels"], rows[2]["slice_first"], rows[2]["slice_last"], rows[2]["components"]) == (12, 1, 3, 1)
    table = pq.read_table(file_of(root, "reports/glioma/2026-11-22_010000.parquet"))
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows


def test_a_night_lies_there_as_parquet_csv_and_json(root: Root) -> None:
    refused = Outcome("b", "ingest", "refused", ("scan.truncated",), "=1+1")
    rows = write_night(root, FIRST, [lump(root, "a", 2.5), refused], [entry("a", "p1"), entry("b")])
    assert root.names("reports/glioma") == [f"{FIRST.id}.{kind}" for kind in ("csv", "json", "parquet")]
    assert read_rows(root, "glioma", FIRST.id) == rows
    assert root.get_json(f"reports/glioma/{FIRST.id}.json") == rows
    table = list(csv.DictReader(io.StringIO(root.get(f"reports/glioma/{FIRST.id}.csv").decode())))
    assert list(table[0]) == SCHEMA.names
    assert (table[0]["volume_ml"], table[0]["agreement"], table[1]["message"]) == ("2.5", "", "'=1+1")
    assert json.loads(to_json([])) == []


def test_a_night_without_cases_has_an_empty_table(root: Root) -> None:
    assert write_night(root, FIRST, [], []) == []
    assert read_rows(root, "glioma", FIRST.id) == []
    assert write_night(root, SECOND, [lump(root, "a", 1.0)], [entry("a")])[0]["change_ml"] is None


def test_a_row_says_what_the_work_took_and_how_often_it_failed(root: Root) -> None:
    failed = Outcome("b", "preprocess", "failed", ("engine.worker-died",), "again")
    for number in (1, 2):
        failure = Failure("results/glioma/b/1", f"night-{number}", "", "preprocess", failed.codes, failed.message)
        attempts.add_failure(root, "glioma", "b", failure)
    done, undone = write_night(root, FIRST, [lump(root, "a", 1.0), failed], [entry("a"), entry("b")])
    assert [done[name] for name in ("stage", "attempts", "seconds", "peak_bytes")] == ["segment", 0, 1.5, 1 << 30]
    assert done["finished"] == "2026-11-22T01:02:03+00:00"
    assert [undone[name] for name in ("stage", "attempts", "finished", "result")] == ["preprocess", 2, None, None]


def test_change_is_told_of_labels_and_regions(root: Root) -> None:
    write_night(root, FIRST, [result(root, "results/1", 1)], [])
    rows = write_night(root, SECOND, [result(root, "results/2", 2)], [])
    assert [(row["name"], row["change_ml"], row["change_percent"]) for row in rows] == [
        ("necrosis", 0.0, 0.0),
        ("oedema", 0.5, 100.0),
        ("whole", 0.5, pytest.approx(100 / 3)),
        ("swelling", 0.5, 100.0),
    ]


def test_a_query_finds_a_region_by_its_name(root: Root) -> None:
    write_night(root, FIRST, [result(root, "results/1", 1)], [])
    (row,) = query(root, Query(labels=("whole",), volume_min_ml=1.4)).rows
    assert (row["case"], row["volume_ml"]) == ("a", 1.5)
    assert query(root, Query(labels=("whole",), volume_min_ml=1.6)).rows == []


def test_a_plan_without_regions_has_rows_of_labels_alone(root: Root) -> None:
    rows = write_night(root, FIRST, [result(root, "results/1", 1, regions=())], [])
    assert [row["name"] for row in rows] == ["necrosis", "oedema"]


# --- from night to night


def test_rows_of_a_cached_case_are_taken_over_without_its_report(root: Root) -> None:
    outcome, entries = lump(root, "a", 1.0), [entry("a", "p")]
    (first,) = write_night(root, FIRST, [outcome], entries)
    root.delete(outcome.key)
    (second,) = write_night(root, SECOND, [cached(outcome)], entries)
    new = {"night": SECOND.id, "state": "cached", "seconds": 0.0, "peak_bytes": 0, "change_ml": 0, "change_percent": 0}
    assert second == first | new
    assert read_rows(root, "glioma", SECOND.id) == [second]


def test_rows_are_made_anew_when_settings_changed_or_the_table_is_of_an_older_version(root: Root) -> None:
    outcome, entries = lump(root, "a", 1.0, drift=["spacing 5 mm along z, training 1 mm"]), [entry("a")]
    save_reporting(root, "glioma", Reporting(flags=("empty",)))
    assert flags_of(write_night(root, FIRST, [outcome], entries)) == {"a": ""}
    save_reporting(root, "glioma", Reporting())
    assert flags_of(write_night(root, SECOND, [cached(outcome)], entries)) == {"a": "drift"}

    old = pq.read_table(file_of(root, f"reports/glioma/{SECOND.id}.parquet")).select(SCHEMA.names[:30])
    pq.write_table(old.replace_schema_metadata(None), file_of(root, f"reports/glioma/{SECOND.id}.parquet"))
    assert to_rows(old)[0]["review"] is None
    (row,) = write_night(root, night(1), [cached(outcome)], entries)
    assert (row["finished"], row["first_night"], row["change_ml"]) == ("2026-11-22T01:02:03+00:00", SECOND.id, 0.0)


def test_change_reaches_over_nights_without_a_result(root: Root) -> None:
    entries = [entry("a"), entry("b")]
    write_night(root, night(1), [lump(root, "a", 8.0), lump(root, "b", 1.0)], entries)
    write_night(root, night(2), [lump(root, "a", 10.0), lump(root, "b", 1.0)], entries)
    failed = Outcome("a", "segment", "failed", ("engine.worker-died",))
    for day in (3, 4):
        late = Outcome("b", "segment", "carried-over")
        assert [row["change_ml"] for row in write_night(root, night(day), [failed, late], entries)] == [None, None]
    rows = write_night(root, night(5), [lump(root, "a", 12.0), cached(lump(root, "b", 1.0))], entries)
    assert [(row["change_ml"], row["change_percent"]) for row in rows] == [(2.0, 20.0), (0.0, 0.0)]
    assert [row["first_night"] for row in rows] == [night(1).id] * 2


def test_the_look_back_ends(root: Root, monkeypatch) -> None:
    monkeypatch.setattr(rows, "LOOK_BACK_NIGHTS", 2)
    failed = Outcome("a", "segment", "failed", ("engine.worker-died",))
    write_night(root, night(1), [lump(root, "a", 10.0)], [entry("a")])
    for day in (2, 3):
        write_night(root, night(day), [failed], [entry("a")])
    assert write_night(root, night(4), [lump(root, "a", 12.0)], [entry("a")])[0]["change_ml"] == 2.0
    for day in (5, 6, 7):
        write_night(root, night(day), [failed], [entry("a")])
    assert write_night(root, night(8), [lump(root, "a", 15.0)], [entry("a")])[0]["change_ml"] is None


def test_the_first_night_is_that_of_the_bytes(root: Root) -> None:
    def told(day: int, outcome: Outcome, digest: str) -> str:
        (row,) = write_night(root, night(day), [outcome], [entry("a", digest=digest)])
        return row["first_night"]

    failed = Outcome("a", "segment", "failed", ("engine.worker-died",))
    assert told(1, failed, "x") == night(1).id
    assert told(2, lump(root, "a", 1.0, digest="x"), "x") == night(1).id, "they had a row before they had a result"
    assert told(3, lump(root, "a", 1.1, digest="x"), "x") == night(1).id, "another model"
    assert told(4, failed, "y") == night(4).id
    assert told(5, lump(root, "a", 1.2, digest="y"), "y") == night(4).id
    assert told(6, lump(root, "a", 1.3, digest="z"), "z") == night(6).id


# --- flags


def test_a_volume_unlike_those_of_the_cohort_is_flagged(root: Root) -> None:
    volumes = [100.0 + n for n in range(19)]
    outcomes = [lump(root, f"case-{n:02d}", volume) for n, volume in enumerate(volumes)]
    odd = lump(root, "odd", 4.0)
    entries = [entry(outcome.case) for outcome in (*outcomes, odd)]
    assert set(flags_of(write_night(root, night(1), [*outcomes[1:], odd], entries)).values()) == {""}, "19 cases"
    found = flags_of(write_night(root, night(2), [*outcomes, odd], entries))
    assert {case for case, flag in found.items() if flag} == {"odd"}
    assert found["odd"] == "implausible-volume"
    # a case that is refused tonight does not count
    refused = Outcome("case-00", "ingest", "refused", ("scan.truncated",))
    assert flags_of(write_night(root, night(3), [refused, *outcomes[1:], odd], entries))["odd"] == ""
    # one that fails tonight still does, with its newest row
    failed = Outcome("case-00", "segment", "failed", ("engine.worker-died",))
    assert flags_of(write_night(root, night(4), [failed, *outcomes[1:], odd], entries))["odd"] == "implausible-volume"


def test_low_agreement_and_drift_come_from_the_report(root: Root) -> None:
    spread = {"volume_low_ml": 0.9, "volume_high_ml": 1.2, "agreement": 0.7}
    outcome = lump(root, "a", 1.0, drift=["extent 50 mm along z, training 100 mm"], **spread)
    (row,) = write_night(root, FIRST, [outcome], [entry("a")])
    assert row["flags"] == "low-agreement drift"
    assert {name: row[name] for name in spread} == spread
    (again,) = write_night(root, SECOND, [cached(outcome)], [entry("a")])
    assert (again["flags"], again["agreement"]) == ("low-agreement drift", 0.7)


def test_the_same_bytes_with_another_volume_are_flagged(root: Root) -> None:
    write_night(root, night(1), [lump(root, "a", 10.0), lump(root, "b", 10.0)], [entry("a"), entry("b")])
    outcomes = [lump(root, "a", 12.0), lump(root, "b", 12.0, digest="new")]
    found = write_night(root, night(2), outcomes, [entry("a"), entry("b", digest="new")])
    assert flags_of(found) == {"a": "implausible-change", "b": ""}
    assert flags_of(write_night(root, night(3), outcomes, [entry("a"), entry("b", digest="new")])) == {"a": "", "b": ""}


# --- patients


def test_scans_of_a_patient_are_compared_in_the_order_of_their_nights(root: Root) -> None:
    early = lump(root, "z", 10.0, volume_low_ml=7.0, volume_high_ml=13.0, agreement=0.9)
    entries = [entry("z", "p1"), entry("a", "p1"), entry("b", "p1"), entry("c", "p2"), entry("d")]
    write_night(root, night(1), [early], entries)
    late = lump(root, "a", 20.0, volume_low_ml=18.0, volume_high_ml=26.0, agreement=0.9)
    others = [lump(root, "b", 22.0), lump(root, "c", 50.0), lump(root, "d", 60.0)]
    rows = write_night(root, night(2), [late, *others, cached(early)], entries)
    names = ("case", "earlier_case", "patient_change_ml", "patient_change_percent", "change_uncertainty_ml", "flags")
    assert [tuple(row[name] for name in names) for row in rows] == [
        # halves of the ranges: 3 and 4 mL
        ("a", "z", 10.0, 100.0, pytest.approx(5.0), "implausible-change"),
        ("b", "a", 2.0, pytest.approx(10.0), pytest.approx(4.0), ""),
        ("c", None, None, None, None, ""),
        ("d", None, None, None, None, ""),
        ("z", None, None, None, None, ""),
    ]


def test_a_scan_before_that_fails_tonight_is_still_compared_to(root: Root) -> None:
    entries = [entry("a", "p"), entry("b", "p")]
    before, after = lump(root, "a", 10.0), lump(root, "b", 11.0)
    write_night(root, night(1), [before], entries)
    failed = Outcome("a", "segment", "failed", ("engine.worker-died",))
    rows = write_night(root, night(2), [failed, after], entries)
    assert [(row["case"], row["earlier_case"], row["patient_change_ml"]) for row in rows] == [
        ("a", None, None),
        ("b", "a", 1.0),
    ]
    # and rows that are taken over forget a scan that was refused since
    refused = Outcome("a", "ingest", "refused", ("scan.truncated",))
    (_, row) = write_night(root, night(3), [refused, cached(after)], entries)
    assert (row["earlier_case"], row["patient_change_ml"], row["change_ml"]) == (None, None, 0.0)


# --- reviews


def test_flagged_cases_of_a_gated_night_await_a_decision(root: Root) -> None:
    outcomes = [lump(root, "a", 1.0, agreement=0.1), lump(root, "b", 1.0), Outcome("c", "ingest", "refused")]
    entries = [entry("a"), entry("b"), entry("c")]
    assert {row["review"] for row in write_night(root, night(1), outcomes, entries)} == {""}
    gated = replace(night(2), rules={"review": "flagged"})
    root.put_json(f"nights/glioma/{gated.id}.json", asdict(gated))
    rows = write_night(root, gated, outcomes, entries)
    assert [(row["review"], row["reviewed_by"]) for row in rows] == [("awaiting", ""), ("", ""), ("", "")]

    at = "2026-12-02T08:00:00+00:00"
    record(root, "glioma", Decision("a", outcomes[0].key, "reject", "Ada", at, gated.id))
    refresh_review(root, "glioma", gated.id)
    rows = read_rows(root, "glioma", gated.id)
    assert [tuple(row[n] for n in ("review", "reviewed_by", "reviewed_at")) for row in rows] == [
        ("rejected", "Ada", at),
        ("", "", ""),
        ("", "", ""),
    ]
    written = file_of(root, f"reports/glioma/{gated.id}.parquet").stat().st_mtime_ns
    refresh_review(root, "glioma", gated.id)
    assert file_of(root, f"reports/glioma/{gated.id}.parquet").stat().st_mtime_ns == written, (
        "nothing new, nothing written"
    )
    assert write_night(root, night(3), outcomes, entries)[0]["review"] == "rejected"


# --- made anew


def test_a_report_is_made_anew_from_what_the_night_left(root: Root) -> None:
    cases = [lump(root, "a", 10.0, agreement=0.7), lump(root, "b", 11.0), Outcome("c", "ingest", "refused", ("x.y",))]
    entries = [entry("a", "p"), entry("b", "p"), entry("c")]
    write_night(root, FIRST, cases, entries)
    before = write_night(root, SECOND, [cached(cases[0]), cached(cases[1]), cases[2]], entries)
    published = files(root)
    assert rewrite_night(root, SECOND, Reporting()) == before

    changed = Reporting(names={"lump": "Klumpen"}, reference_ml={"lump": (10.5, 20)}, flags=("implausible-volume",))
    rows = rewrite_night(root, SECOND, changed)
    assert [(row["case"], row["name"], row["flags"]) for row in rows] == [
        ("a", "Klumpen", "implausible-volume"),
        ("b", "Klumpen", ""),
        ("c", None, None),
    ]
    same = [name for name in SCHEMA.names if name not in ("name", "flags")]
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in before]
    assert read_rows(root, "glioma", SECOND.id) == rows
    assert read_rows(root, "glioma", FIRST.id)[0]["name"] == "lump", "another night stays as it is"
    assert files(root) == published, "masks, reports and receipts are untouched"
    # and back again, the label told by the plan's name
    assert rewrite_night(root, SECOND, Reporting()) == before


def test_renamed_labels_are_compared_with_the_nights_before(root: Root) -> None:
    write_night(root, night(1), [result(root, "results/1", 1)], [])
    save_reporting(root, "glioma", Reporting(names={"whole": "alles", "oedema": "Ödem"}))
    rows = write_night(root, night(2), [result(root, "results/2", 2)], [])
    assert [(row["name"], row["change_ml"]) for row in rows] == [
        ("necrosis", 0.0),
        ("Ödem", 0.5),
        ("alles", 0.5),
        ("swelling", 0.5),
    ]
    save_reporting(root, "glioma", Reporting())
    rows = write_night(root, night(3), [result(root, "results/3", 3)], [])
    assert [(row["name"], row["change_ml"]) for row in rows][1:3] == [("oedema", 0.5), ("whole", 0.5)]


def test_a_result_that_was_deleted_since_keeps_its_rows(root: Root) -> None:
    outcome = lump(root, "a", 10.0, agreement=0.7, drift=["spacing 5 mm along z, training 1 mm"])
    before = write_night(root, FIRST, [outcome], [entry("a")])
    root.delete(outcome.key)
    assert rewrite_night(root, FIRST, Reporting()) == before
    (row,) = rewrite_night(root, FIRST, Reporting(names={"lump": "Klumpen"}, agreement_below=0.5))
    assert (row["name"], row["flags"]) == ("Klumpen", "drift")


def test_settings_are_checked_against_the_labels_of_a_night_when_they_are_set(root: Root) -> None:
    before = write_night(root, FIRST, [lump(root, "a", 10.0)], [entry("a")])
    with pytest.raises(ConfigError, match="no label liver; the plan's names are lump"):
        check_settings(root, FIRST, Reporting(names={"liver": "Leber"}))
    renamed = Reporting(names={"lump": "Klumpen", "liver": "Leber"})
    (row,) = rewrite_night(root, FIRST, renamed)  # kept settings may be of labels that older nights did not have
    assert row == before[0] | {"name": "Klumpen"}
    check_settings(root, FIRST, Reporting(names={"lump": "Knoten"}))


def test_settings_are_kept_by_cohort(root: Root) -> None:
    assert load_reporting(root, "glioma") == Reporting()
    settings = Reporting(reference_ml={"lump": (1, 2)}, many_components=3)
    save_reporting(root, "glioma", settings)
    assert load_reporting(root, "glioma") == settings
    assert load_reporting(root, "liver") == Reporting()


def test_a_night_is_found_by_its_id_or_is_the_newest(root: Root) -> None:
    with pytest.raises(ConfigError, match="known: none") as error:
        reported_night(root, "glioma", None)
    assert error.value.code == "report.cohort"
    for one in (FIRST, SECOND):
        write_night(root, one, [lump(root, "a", 1.0)], [entry("a")])
        root.put_json(f"nights/glioma/{one.id}.json", asdict(one))
    assert night_ids(root, "glioma") == [FIRST.id, SECOND.id]
    assert reported_night(root, "glioma", None).id == SECOND.id
    assert reported_night(root, "glioma", FIRST.id).model == "glioma@v1"
    with pytest.raises(ConfigError, match=f"it has 2: {SECOND.id}, {FIRST.id}") as error:
        reported_night(root, "glioma", "2026-11-24_010000")
    assert error.value.code == "report.night"


# --- large cohorts


def test_a_cached_night_of_1000_cases_reads_no_result_and_takes_under_a_second(root: Root) -> None:
    one = lump(root, "a", 100.0)
    outcomes = [replace(one, case=f"case-{number:04d}") for number in range(1000)]
    entries = [entry(outcome.case, f"p{number // 2}") for number, outcome in enumerate(outcomes)]
    write_night(root, FIRST, outcomes, entries)
    root.delete("results")
    started = time.process_time()
    rows = write_night(root, SECOND, [cached(outcome) for outcome in outcomes], entries)
    assert time.process_time() - started < 1.0
    assert len(rows) == 1000
    assert {(row["state"], row["change_ml"], row["flags"]) for row in rows} == {("cached", 0.0, "")}


def test_the_columns_that_older_versions_wrote_are_still_the_first_and_in_order() -> None:
    world = [f"{place}_{axis}_mm" for place in ("bbox_min", "bbox_max", "centroid") for axis in "xyz"]
    assert SCHEMA.names[:15] == [
        *("night", "cohort", "case", "patient", "state", "codes", "message"),
        *("label", "name", "volume_ml", "change_ml", "change_percent", "voxels", "slice_first", "slice_last"),
    ]
    assert SCHEMA.names[15:30] == [*world, "components", "touches_border", "flags", "model", "result", "seconds"]
    assert pa.types.is_int32(SCHEMA.field("attempts").type)


def test_every_column_is_explained_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "quality.md").read_text("utf-8")
    missing = [name for name in SCHEMA.names if f"`{name}`" not in page]
    assert not missing


# --- measured again


@pytest.mark.parametrize(
    ("written", "measured"),
    [({}, ("grey", "white")), ({"grey": 9}, ("grey", "white")), ({"grey": 7}, ()), ({"grey": 0}, ("white",))],
)
def test_volumes_are_measured_again_in_the_mask(root: Root, tmp_path: Path, written, measured) -> None:
    """By what a mask still tells of its labels: not those of one value, nor one that was left out."""
    plan = known_plan((1.0, 1.0, 1.0)).model_copy(update={"output": OutputPlan(values=written)})
    model = publish(root, Target("organs", "v1", plan), [weights(known_network(plan).state_dict())], {}, {})
    values = np.zeros(GRID.shape, np.uint8)
    values[1:3, 1:3, 1:3], values[4, 4, 4] = 2, 7
    write_volume(tmp_path / "a.nii.gz", Volume(np.arange(216, dtype="<i2").reshape(1, 6, 6, 6), GRID))
    case = Case("a", (str(tmp_path / "a.nii.gz"),), digest="d", geometry=GRID)
    facts = {"model": model.reference}
    publish_mask(root, "results/glioma/a/1", Mask(case, values, plan, "nifti", Algorithm("organs@v1", "0"), facts))
    # as if an older version had measured wrongly
    report = root.get_json("results/glioma/a/1/report.json")
    for part in report["labels"]:
        part |= {"volume_ml": 99.0, "components": 50, "volume_low_ml": 0.1, "volume_high_ml": 100.0}
    root.put_json("results/glioma/a/1/report.json", report)

    one = replace(SECOND, model="organs@v1")
    outcome = Outcome("a", "segment", "computed", key="results/glioma/a/1")
    write_night(root, FIRST, [outcome], [Entry(case, Verdict("accepted"))])
    before = write_night(root, one, [outcome], [Entry(case, Verdict("accepted"))])
    assert [(row["volume_ml"], row["flags"]) for row in before] == [(99.0, "many-components")] * 2
    published = files(root)
    found = {row["name"]: row for row in rewrite_night(root, one, Reporting(), measuring(root, one))}
    truth = {"grey": 1.0, "white": 0.125}
    assert {name: row["volume_ml"] for name, row in found.items()} == {
        name: volume if name in measured else 99.0 for name, volume in truth.items()
    }
    assert {name for name, row in found.items() if row["flags"] == ""} == set(measured)
    assert {row["volume_high_ml"] for row in found.values()} == {100.0}
    assert files(root) == published
