"""The table of a night: its columns, and how it is written and read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vnet_core.errors import StorageError
from vnet_core.reporting import Reporting
from workers.storage.store import Root

Row = dict[str, Any]

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
        ("stage", pa.string()),
        ("attempts", pa.int32()),
        ("finished", pa.string()),
        ("peak_bytes", pa.int64()),
        ("volume_low_ml", pa.float64()),
        ("volume_high_ml", pa.float64()),
        ("agreement", pa.float64()),
        ("first_night", pa.string()),
        ("earlier_case", pa.string()),
        ("patient_change_ml", pa.float64()),
        ("patient_change_percent", pa.float64()),
        ("change_uncertainty_ml", pa.float64()),
        ("review", pa.string()),
        ("reviewed_by", pa.string()),
        ("reviewed_at", pa.string()),
    ]
)
"""Columns of the cohort table, in order; docs/quality.md explains each.

A row is a label of a case or, after those, a region of the plan, whose ``label`` is empty. A case without a result has
one row without a name.
"""

SETTINGS = b"vnet.reporting"
"""Under this key the table of a night holds the settings that its rows were made with."""


def to_parquet(rows: Sequence[Mapping[str, Any]], settings: Reporting) -> bytes:
    """Rows as Parquet, with the settings that they were made with."""
    schema = SCHEMA.with_metadata({SETTINGS: settings.model_dump_json()})
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink)
    return sink.getvalue()


def to_rows(table: pa.Table) -> list[Row]:
    """The rows of a table with every column of SCHEMA, None where an older table has none."""
    nothing = [None] * table.num_rows
    columns = [_values(table[name]) if name in table.column_names else nothing for name in SCHEMA.names]
    rows, empty = [], dict.fromkeys(SCHEMA.names)
    for values in zip(*columns, strict=True):
        row: Row = empty.copy()  # a dictionary that grows key by key takes three times the memory
        row.update(zip(SCHEMA.names, values, strict=True))
        rows.append(row)
    return rows


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; equal texts are one object, since most of them are equal."""
    if pa.types.is_string(column.type):
        texts: dict[str | None, str | None] = {}
        return [texts.setdefault(text, text) for text in column.to_pylist()]
    if column.null_count or pa.types.is_boolean(column.type):
        return list(column.to_pylist())
    return list(column.to_numpy().tolist())


def plain_rows(table: pa.Table) -> list[Row]:
    """The same, with labels by their names in the plan."""
    told = {shown: name for name, shown in settings_of_table(table.schema).names.items()}
    rows = to_rows(table)
    if told:
        for row in rows:
            row["name"] = told.get(row["name"], row["name"])
    return rows


def settings_of_table(schema: pa.Schema) -> Reporting:
    """The settings that the rows of a table were made with; the default ones for tables of older versions."""
    return Reporting.from_mapping(json.loads((schema.metadata or {}).get(SETTINGS, b"{}")))


def read_table(root: Root, cohort: str, night: str) -> pa.Table:
    """The table of a night. StorageError ``store.corrupt`` when it is none."""
    # whole and by one thread: the readers of larger-than-memory data take more memory than such a table
    key = table_key(cohort, night)
    try:
        with root.open(key) as file:
            return pq.ParquetFile(file).read(use_threads=False)
    except pa.ArrowInvalid:
        raise StorageError("store.corrupt", f"{key} is no Parquet table; restore it from a copy") from None


def table_key(cohort: str, night: str) -> str:
    """Where the table of a night lies."""
    return f"reports/{cohort}/{night}.parquet"
