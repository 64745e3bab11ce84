"""The tables of all nights as one, for DuckDB: in memory, on the report files alone, and able to change nothing.

A connection of :func:`open_tables` reaches the Parquet files that it was given and no other file, no network and no
extension, and its settings are locked; :func:`run_select` takes one SELECT and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, get_args

import duckdb

from vnet_core.errors import ConfigError, StorageError, VnetError
from workers.harmless import one_line
from workers.ledger import State
from workers.reports.columns import SCHEMA
from workers.storage.store import Root

_KINDS = {"string": "VARCHAR", "int32": "INTEGER", "int64": "BIGINT", "double": "DOUBLE", "bool": "BOOLEAN"}
"""DuckDB's names of the types that columns have."""

STATES: tuple[State, ...] = get_args(State)
"""Columns of ``nights`` that count cases, with an underscore for the dash."""

LATEST = """
CREATE VIEW latest AS SELECT rows.* FROM rows SEMI JOIN (
    SELECT cohort AS c, "case" AS k, coalesce(CAST(label AS VARCHAR), name, '') AS part, max(night) AS n
    FROM rows GROUP BY ALL
) ON cohort = c AND "case" = k AND night = n AND coalesce(CAST(label AS VARCHAR), name, '') = part
"""
"""The newest row of each case and label (or region, which has no value but a name)."""

MEMORY = "4GiB"
"""Most memory of one question; what needs more ends with ``query.sql``, and nothing is spilled to a disk."""

_SETTINGS = {
    # no file but the reports, no network, no extension; in Python, no variable of the caller as a table
    "python_enable_replacements": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_extension_repositories": "forbidden",
    "allow_persistent_secrets": False,
    "temp_directory": "",
    "memory_limit": MEMORY,
    # the footer of a file is read once, not for every view
    "parquet_metadata_cache": True,
}
_MESSAGE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by column name, in order."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


@contextmanager
def open_tables(root: Root, keys: Sequence[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection, for the block, with the view ``rows`` over the Parquet files of these keys, in their order.

    Columns that a file lacks are NULL. Raises StorageError ``query.damaged`` when a file is no Parquet.
    """
    with root.all_at_hand(keys) as paths, duckdb.connect(":memory:") as connection:
        _open(root, connection, [str(path) for path in paths])
        yield connection


def _open(root: Root, connection: duckdb.DuckDBPyConnection, files: Sequence[str]) -> None:
    for name, value in _SETTINGS.items():
        connection.execute(f"SET {name} = ?", [value])
    connection.execute("SET allowed_paths = ?", [files])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    shape = ", ".join(f'"{field.name}" {_KINDS[str(field.type)]}' for field in SCHEMA)
    connection.execute(f"CREATE TABLE shape ({shape})")
    source = "FROM shape"
    if files:
        listed = ", ".join(f"'{_quoted(file)}'" for file in files)
        source += f" UNION ALL BY NAME FROM read_parquet([{listed}], union_by_name = true)"
    try:
        connection.execute(f"CREATE VIEW rows AS {source}")
    except duckdb.Error as error:
        raise damaged(root, error) from None


def add_nights(connection: duckdb.DuckDBPyConnection, records: Sequence[Mapping[str, Any]]) -> None:
    """The table ``nights`` from the records of nights as plain data."""
    texts = ("night", "cohort", "model", "started", "ended", "stopped")
    kinds = dict.fromkeys(texts, "VARCHAR") | {"seconds": "DOUBLE"}
    kinds |= dict.fromkeys((state.replace("-", "_") for state in STATES), "INTEGER")
    rows = []
    for record in records:
        counts = record.get("counts", {})
        row = {name: record.get(name, "") for name in texts} | {"night": record["id"], "seconds": record["seconds"]}
        rows.append(row | {state.replace("-", "_"): counts.get(state, 0) for state in STATES})
    connection.execute(
        "CREATE TABLE nights AS SELECT unnest(from_json($1, $2), recursive := true)",
        [json.dumps(rows), json.dumps([kinds])],
    )


def run_select(connection: duckdb.DuckDBPyConnection, text: str, limit: int) -> Table:
    """The first ``limit`` rows of one SELECT, as plain values that JSON holds; 0: all of them.

    Raises ConfigError ``query.sql`` with DuckDB's own words when the text is anything else or does not run.
    """
    try:
        statements = connection.extract_statements(text)
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            raise ConfigError(
                "query.sql",
                f"one SELECT answers a question, and these are {len(statements)} statements or another kind; nothing"
                " can be changed here",
            )
        # as a relation, so that an ORDER BY and the limit are planned together
        asked = connection.sql(text.rstrip().rstrip(";"))
        found = asked.limit(limit) if limit else asked
        return as_table(found.columns, found.fetchall())
    except duckdb.Error as error:
        raise ConfigError("query.sql", f"DuckDB: {_words(error)}") from None


def as_table(names: Sequence[str], tuples: Sequence[Sequence[Any]]) -> Table:
    """Rows as mappings of plain values; a second column of one name gets a number."""
    columns: list[str] = []
    for name in names:
        number = 1
        unique = name
        while unique in columns:
            unique, number = f"{name}_{number}", number + 1
        columns.append(unique)
    rows = [{name: _plain(value) for name, value in zip(columns, row, strict=True)} for row in tuples]
    return Table(tuple(columns), rows)


def damaged(root: Root, error: duckdb.Error) -> VnetError:
    """What to say when the tables themselves cannot be read."""
    words = _words(error).replace(f"{root.home}/", "")
    return StorageError("query.damaged", f"the table of a night cannot be read ({words}); write it again: vnet report")


def _words(error: duckdb.Error) -> str:
    """DuckDB's message as one line, without the picture of the place in the text."""
    return one_line(str(error).split("\n\nLINE ")[0])[:_MESSAGE_CHARACTERS]


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _plain(value: Any) -> Any:
    """A value as JSON, CSV and tables hold it; what is not finite has no number there."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value.hex() if isinstance(value, bytes) else str(value)
