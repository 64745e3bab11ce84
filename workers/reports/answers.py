"""Answers as files: CSV for sheets, JSON for programs, Parquet for everything else."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from vnet_core.errors import ConfigError
from workers.harmless import sheet_cell
from workers.reports.columns import SCHEMA
from workers.reports.query import Answer

FileFormat = Literal["csv", "json", "parquet"]
FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)


def encode(answer: Answer, file_format: FileFormat) -> bytes:
    """An answer's rows as the bytes of a file. In CSV every text is one line and no formula."""
    if file_format == "csv":
        return _csv(answer)
    if file_format == "json":
        return (json.dumps(answer.rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
    return _parquet(answer)


def _csv(answer: Answer) -> bytes:
    sink = io.StringIO()
    lines = csv.writer(sink, lineterminator="\n")
    lines.writerow(map(sheet_cell, answer.columns))
    lines.writerows([sheet_cell(row[name]) for name in answer.columns] for row in answer.rows)
    return sink.getvalue().encode()


def _parquet(answer: Answer) -> bytes:
    columns = {}
    for name in answer.columns:
        values = [row[name] for row in answer.rows]
        try:
            columns[name] = _array(name, values)
        except pa.ArrowException as error:
            raise ConfigError(
                "query.output", f"column {name} has values of several kinds; cast it, or use --format json"
            ) from error
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _array(name: str, values: list[Any]) -> pa.Array:
    """A column with the type that it has in the tables of nights, if it is one of those and its values fit."""
    if name in SCHEMA.names:
        try:
            return pa.array(values, SCHEMA.field(name).type)
        except pa.ArrowException:  # a SELECT may call anything by that name
            pass
    return pa.array(values)
