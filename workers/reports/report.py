"""Stage report: the rows of a night, every case in them, as Parquet, CSV and JSON; and the same made anew."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from vnet_core.errors import ConfigError
from vnet_core.plan import Plan
from vnet_core.report import measure, measure_regions, to_row
from vnet_core.reporting import DEFAULT_REPORTING, Reporting
from workers.cohort import Entry, check_name
from workers.harmless import sheet_cell
from workers.ledger import Outcome
from workers.nights.attempts import failures
from workers.nights.record import Night, load_night
from workers.registry.models import load_model
from workers.reports.columns import (
    SCHEMA,
    Row,
    plain_rows,
    read_table,
    settings_of_table,
    table_key,
    to_parquet,
    to_rows,
)
from workers.reports.rows import Earlier, ReportOf, Told, add_reviews, earlier_rows, night_rows
from workers.segmentation.masks import load_report
from workers.sources.scans import read_label
from workers.storage.store import Root

OF_THE_CASE = (
    "night",
    "cohort",
    "case",
    "patient",
    "state",
    "codes",
    "message",
    "model",
    "seconds",
    "stage",
    "attempts",
    "peak_bytes",
)
"""Columns that say what became of a case in a night, and so stay when its rows are made anew."""

REVIEW = ("review", "reviewed_by", "reviewed_at")
"""Columns that follow the decisions."""


def write_night(root: Root, night: Night, outcomes: Sequence[Outcome], entries: Sequence[Entry]) -> list[Row]:
    """Write the night's rows, with every column of SCHEMA, and return them.

    ``outcomes`` holds the last outcome of every case of the cohort, ``entries`` what the cohort knows of them. A case
    whose result is the one of the night before costs no file.
    """
    cases = {entry.case.id: entry.case for entry in entries}
    failed = failures(root, night.cohort)
    told = []
    for outcome in outcomes:
        case = cases.get(outcome.case)
        columns = {
            "night": night.id,
            "cohort": night.cohort,
            "case": outcome.case,
            "patient": case.patient if case else None,
            "state": outcome.state,
            "codes": " ".join(outcome.codes),
            "message": outcome.message,
            "model": night.model,
            "seconds": outcome.seconds,
            "stage": outcome.stage,
            "attempts": len(failed.get(outcome.case, ())),
            "peak_bytes": outcome.peak_bytes,
        }
        told.append(Told(columns, outcome.key if outcome.done else None, case.digest if case else ""))
    settings = load_reporting(root, night.cohort)
    earlier = earlier_rows(root, night.cohort, _before(root, night), told, settings)
    return _write(root, night, night_rows(root, night.cohort, told, earlier, settings), settings)


def rewrite_night(root: Root, night: Night, settings: Reporting, report_of: ReportOf = load_report) -> list[Row]:
    """Make the rows of a night anew from its results, write them, and return them; no result is touched.

    ``report_of``: what a result measures; the report that was written with it, or :func:`measuring` its mask again.
    What became of the cases stays, and decisions are those of today. Of a result that was deleted since, the old rows
    say what it measured.
    """
    old = _plain_rows(root, night)
    told: list[Told] = []
    results: dict[str, list[Row]] = {}
    for row in old:
        results.setdefault(row["result"], []).append(row)
        if not told or row["case"] != told[-1].case:
            told.append(Told({name: row[name] for name in OF_THE_CASE}, row["result"], "", row["first_night"]))
    found = earlier_rows(root, night.cohort, _before(root, night), told, settings)
    earlier = Earlier(found.latest, found.newest, {})

    def kept(root: Root, result: str) -> Mapping[str, Any]:
        if root.exists(f"{result}/report.json"):
            return report_of(root, result)
        rows = results[result]
        return {"labels": rows, "drift": [row["flags"] for row in rows if "drift" in row["flags"].split()]}

    return _write(root, night, night_rows(root, night.cohort, told, earlier, settings, kept), settings)


def check_settings(root: Root, night: Night, settings: Reporting) -> None:
    """ConfigError ``reporting.label`` when the settings name a label that the night does not have."""
    settings.check_names(frozenset(row["name"] for row in _plain_rows(root, night) if row["name"] is not None))


def _plain_rows(root: Root, night: Night) -> list[Row]:
    return plain_rows(read_table(root, night.cohort, night.id))


def _before(root: Root, night: Night) -> list[str]:
    return [before for before in night_ids(root, night.cohort) if before < night.id]


def _write(root: Root, night: Night, by_case: Mapping[str, list[Row]], settings: Reporting) -> list[Row]:
    add_reviews(root, night.cohort, by_case, _gated(night))
    rows = [row for of_case in by_case.values() for row in of_case]
    _put(root, night, rows, settings)
    return rows


def refresh_review(root: Root, cohort: str, night: str) -> None:
    """Bring the columns of the review of a night up to the decisions of today; nothing else of its rows changes."""
    record, rows = load_night(root, cohort, night), read_rows(root, cohort, night)
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    before = [[row[name] for name in REVIEW] for row in rows]
    add_reviews(root, cohort, by_case, _gated(record))
    if before != [[row[name] for name in REVIEW] for row in rows]:
        _put(root, record, rows, settings_of(root, cohort, night))


def _gated(night: Night) -> bool:
    return night.rules.get("review") == "flagged"


def _put(root: Root, night: Night, rows: Sequence[Row], settings: Reporting) -> None:
    prefix = f"reports/{night.cohort}/{night.id}"
    root.put(f"{prefix}.csv", to_csv(rows))
    root.put(f"{prefix}.json", to_json(rows))
    # last: a night with this table has the others too
    root.put(f"{prefix}.parquet", to_parquet(rows, settings))


def measuring(root: Root, night: Night) -> ReportOf:
    """What a result of the night measures, read from its mask.

    Labels whose value in the written mask is also another label's, or 0, cannot be told apart in it: their rows are
    those of the report.
    """

    @cache
    def plan() -> Plan:
        return load_model(root, night.model).plan

    def report_of(root: Root, result: str) -> dict[str, Any]:
        report = load_report(root, result)
        labels, told = plan().labels, plan().output.values
        written = {label.value: told.get(label.name, label.value) for label in labels}
        alone = {v: w for v, w in written.items() if w and list(written.values()).count(w) == 1}
        with root.at_hand(f"{result}/mask.ome.zarr") as path:
            mask = read_label(path)
        values = np.zeros_like(mask.labels, np.uint16)
        for value, target in alone.items():
            values[mask.labels == target] = value
        regions = [region for region in plan().regions if set(region.values) <= alone.keys()]
        found = [
            *measure(values, mask.geometry, [label for label in labels if label.value in alone]),
            *measure_regions(values, mask.geometry, labels, regions),
        ]
        rows = {(one.label, one.name): to_row(one) for one in found}
        for part in [*report["labels"], *report.get("regions", ())]:
            part.update(rows.get((part["label"], part["name"]), {}))
        return report

    return report_of


def load_reporting(root: Root, cohort: str) -> Reporting:
    """The settings of a cohort's reports; the default ones where nobody has set any."""
    key = _reporting_key(cohort)
    return Reporting.from_mapping(root.get_json(key)) if root.exists(key) else DEFAULT_REPORTING


def save_reporting(root: Root, cohort: str, settings: Reporting) -> None:
    """Keep the settings for this and all later reports of a cohort."""
    root.put_json(_reporting_key(cohort), settings.model_dump(mode="json", exclude_defaults=True))


def _reporting_key(cohort: str) -> str:
    return f"cohorts/{check_name(cohort, 'cohort')}/reporting.json"


def night_ids(root: Root, cohort: str) -> list[str]:
    """Nights of a cohort that have a table, oldest first."""
    return [n.removesuffix(".parquet") for n in root.names(f"reports/{cohort}") if n.endswith(".parquet")]


def reported_night(root: Root, cohort: str, night: str | None) -> Night:
    """The record of a night that has a table, the newest where none is named.

    ConfigError ``report.cohort`` and ``report.night`` name what there is.
    """
    nights = night_ids(root, check_name(cohort, "cohort"))
    if not nights:
        known = ", ".join(root.names("reports")) or "none"
        raise ConfigError("report.cohort", f"cohort {cohort!r} has no report (known: {known}); run vnet nightly")
    if night is not None and night not in nights:
        newest = ", ".join(reversed(nights[-5:]))
        raise ConfigError("report.night", f"cohort {cohort} has no night {night!r}; it has {len(nights)}: {newest}")
    return load_night(root, cohort, night or nights[-1])


def settings_of(root: Root, cohort: str, night: str) -> Reporting:
    """The settings that the rows of a night were made with."""
    with root.open(table_key(cohort, night)) as file:
        return settings_of_table(pq.read_schema(file))


def read_rows(root: Root, cohort: str, night: str) -> list[Row]:
    """All rows of a night, with every column of SCHEMA; None where a table of an older version has none."""
    return to_rows(read_table(root, cohort, night))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV, UTF-8; every text is one harmless line, see :func:`workers.harmless.sheet_cell`."""
    sink = io.BytesIO()  # a StringIO takes four bytes for a character
    lines = io.TextIOWrapper(sink, encoding="utf-8", newline="")
    names = list(rows[0]) if rows else SCHEMA.names
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(names)
    # few texts differ in a table of many rows
    text = cache(sheet_cell)
    cells = ((text(row[name]) if isinstance(row[name], str) else row[name] for name in names) for row in rows)
    writer.writerows(cells)
    lines.flush()
    return sink.getvalue()


def to_json(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as one JSON array, a row to a line, nothing in it that is not JSON."""
    sink = io.BytesIO()
    sink.write(b"[")
    for number, row in enumerate(rows):
        sink.write((",\n" if number else "\n").encode() + json.dumps(row, allow_nan=False).encode())
    sink.write(b"\n]\n")
    return sink.getvalue()
