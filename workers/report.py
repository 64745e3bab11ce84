"""Stage report: the rows of a night, every case in them, as Parquet and CSV, and the night's record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.harmless import sheet_cell
from workers.ledger import Outcome
from workers.masks import load_report
from workers.store import Root

SCHEMA = pa.schema(
    [
        ("night", pa.string()),
        ("cohort", pa.string()),
        ("case", pa.string()),
        ("patient", pa.string()),
        ("state", pa.string()),
        ("codes", pa.string()),
        ("message", pa.string()),
        ("label", pa.int32()),
        ("name", pa.string()),
        ("volume_ml", pa.float64()),
        ("change_ml", pa.float64()),
        ("change_percent", pa.float64()),
        ("voxels", pa.int64()),
        ("slice_first", pa.int32()),
        ("slice_last", pa.int32()),
        ("bbox_min_x_mm", pa.float64()),
        ("bbox_min_y_mm", pa.float64()),
        ("bbox_min_z_mm", pa.float64()),
        ("bbox_max_x_mm", pa.float64()),
        ("bbox_max_y_mm", pa.float64()),
        ("bbox_max_z_mm", pa.float64()),
        ("centroid_x_mm", pa.float64()),
        ("centroid_y_mm", pa.float64()),
        ("centroid_z_mm", pa.float64()),
        ("components", pa.int32()),
        ("touches_border", pa.bool_()),
        ("flags", pa.string()),
        ("model", pa.string()),
        ("result", pa.string()),
        ("seconds", pa.float64()),
    ]
)
"""Columns of the cohort table, in order.

A row is a label of a case or, after those, a region of the plan, whose ``label`` is empty. A case without a result has
one row without a name.
"""


@dataclass(frozen=True, slots=True)
class Night:
    """One run over a cohort."""

    id: str
    """Start as ``YYYY-MM-DD_HHMMSS`` in UTC; sorts by time."""
    cohort: str
    model: str
    started: str
    """ISO 8601."""
    seconds: float
    counts: dict[str, int]
    """Cases by state."""


def night_id(started: datetime) -> str:
    """The id of a night from the moment it started."""
    return started.strftime("%Y-%m-%d_%H%M%S")


def write_night(
    root: Root, night: Night, outcomes: Sequence[Outcome], patients: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """Write the night's rows and record; returns the rows.

    ``outcomes`` holds the last outcome of every case of the cohort. Change is against the cohort's night before.
    """
    before = _last_volumes(root, night)
    rows = [row for outcome in outcomes for row in _rows(root, night, outcome, patients.get(outcome.case), before)]
    prefix = f"reports/{night.cohort}/{night.id}"
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    root.put(f"{prefix}.parquet", sink.getvalue())
    root.put(f"{prefix}.csv", to_csv(rows))
    root.put_json(f"nights/{night.cohort}/{night.id}.json", asdict(night))
    return rows


def _rows(
    root: Root,
    night: Night,
    outcome: Outcome,
    patient: str | None,
    before: Mapping[tuple[str, int | str], float],
) -> Iterable[dict[str, Any]]:
    common: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {
        "night": night.id,
        "cohort": night.cohort,
        "case": outcome.case,
        "patient": patient,
        "state": outcome.state,
        "codes": " ".join(outcome.codes),
        "message": outcome.message,
        "model": night.model,
        "seconds": outcome.seconds,
    }
    if not outcome.done or outcome.key is None:
        yield common
        return
    report = load_report(root, outcome.key)
    for part in [*report["labels"], *report.get("regions", ())]:
        previous = before.get((outcome.case, _part(part)))
        change = None if previous is None else part["volume_ml"] - previous
        yield (
            common
            | {k: v for k, v in part.items() if k in SCHEMA.names}
            | {
                "result": outcome.key,
                "flags": " ".join(part["flags"]),
                "change_ml": change,
                "change_percent": None if change is None or not previous else 100 * change / previous,
            }
        )


def _part(row: Mapping[str, Any]) -> int | str:
    """What a row is about, from night to night: a label's value, or a region's name."""
    part: int | str = row["name"] if row["label"] is None else row["label"]
    return part


def _last_volumes(root: Root, night: Night) -> dict[tuple[str, int | str], float]:
    """Volumes by case and label or region of the cohort's night before this one."""
    earlier = [n for n in night_ids(root, night.cohort) if n < night.id]
    volumes: dict[tuple[str, int | str], float] = {}
    if earlier:
        for row in read_rows(root, night.cohort, earlier[-1]):
            if row["volume_ml"] is not None:
                volumes[row["case"], _part(row)] = row["volume_ml"]
    return volumes


def night_ids(root: Root, cohort: str) -> list[str]:
    """Nights of a cohort that have a table, oldest first."""
    return [n.removesuffix(".parquet") for n in root.names(f"reports/{cohort}") if n.endswith(".parquet")]


def read_rows(root: Root, cohort: str, night: str) -> list[dict[str, Any]]:
    """All rows of a night."""
    rows: list[dict[str, Any]] = pq.read_table(root.path(f"reports/{cohort}/{night}.parquet")).to_pylist()
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV, UTF-8; every text is one harmless line, see :func:`workers.harmless.sheet_cell`."""
    sink = io.StringIO()
    names = list(rows[0]) if rows else SCHEMA.names
    writer = csv.DictWriter(sink, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: sheet_cell(row[name]) for name in names} for row in rows)
    return sink.getvalue().encode()
