"""Questions over the rows of all nights: filters, or SQL over the same tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from typing import Any, ClassVar

import duckdb

from vnet_core.errors import ConfigError, StorageError
from workers.reports.columns import SCHEMA
from workers.reports.tables import LATEST, Table, add_nights, as_table, damaged, open_tables, run_select
from workers.storage.store import Root

ANY_FLAG = "any"
"""Among flags: whatever is flagged."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question; what is empty or None does not restrict. Ranges include their ends.

    Raises ConfigError ``query.date``, ``query.range``, ``query.number`` or ``query.sql-filters``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    cohorts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """Names of labels or regions."""
    models: tuple[str, ...] = ()
    """``name`` for all of its versions, or ``name@version``."""
    flags: tuple[str, ...] = ()
    """Rows with at least one of these; ``any``: with one at all."""
    states: tuple[str, ...] = ()
    reviews: tuple[str, ...] = ()
    """States of a person's decision."""
    patient: str = ""
    """Pseudonym."""
    case: str = ""
    nights: int = 0
    """Only the newest so many nights of each cohort; 0: all."""
    first: str = ""
    """Day of the oldest night, ``YYYY-MM-DD`` in UTC."""
    last: str = ""
    """Day of the newest night."""
    volume_min_ml: float | None = None
    volume_max_ml: float | None = None
    change_min_percent: float | None = None
    """Smallest change since the night before, up or down, in percent."""
    change_max_percent: float | None = None
    patient_change_min_percent: float | None = None
    """Smallest change since the patient's scan before, up or down, in percent."""
    patient_change_max_percent: float | None = None
    sql: str = ""
    """A SELECT over ``rows``, ``latest`` and ``nights`` of the chosen cohorts and nights, instead of other filters."""
    limit: int = 1000
    """Most rows, newest night first; 0: all."""

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            _check_day(name, getattr(self, name))
        if self.first and self.last and self.first > self.last:
            raise ConfigError("query.date", f"the first day {self.first} is after the last {self.last}; exchange them")
        for name in ("nights", "limit"):
            if getattr(self, name) < 0:
                raise ConfigError("query.number", f"{name} is {getattr(self, name)}; give 0 for all, or more")
        for column in _RANGES:
            low, high = self._range(column)
            if low is not None and high is not None and low > high:
                raise ConfigError("query.range", f"no {column} is both at least {low:g} and at most {high:g}")
        filtering = [name for name in _ROW_FILTERS if getattr(self, name) not in ((), "", None)]
        if self.sql and filtering:
            raise ConfigError(
                "query.sql-filters",
                f"with SQL only cohorts, nights, days and the limit restrict, not {', '.join(filtering)}; say it in"
                " the WHERE of the SELECT",
            )

    def _range(self, column: str) -> tuple[float | None, float | None]:
        stem, unit = column.rsplit("_", 1)
        return getattr(self, f"{stem}_min_{unit}"), getattr(self, f"{stem}_max_{unit}")


_RANGES = {
    "volume_ml": "volume_ml",
    "change_percent": "abs(change_percent)",
    "patient_change_percent": "abs(patient_change_percent)",
}
"""What a pair of ``_min_`` and ``_max_`` restricts."""
_ROW_FILTERS = tuple(
    field.name for field in fields(Query) if field.name not in ("cohorts", "nights", "first", "last", "sql", "limit")
)
"""Filters that a SELECT has in its own text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows of a question."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    more: bool
    """Whether the limit left rows out."""


def query(root: Root, wanted: Query, columns: Sequence[str] = ()) -> Answer:
    """The rows that pass every filter, newest night first and within a night as its table has them; or what the SQL
    finds. ``columns``: only these of the filtered rows.

    Raises ConfigError ``query.cohort``, which names the cohorts there are, or ``query.sql``; StorageError
    ``query.damaged``.
    """
    _check_cohorts(root, wanted)
    limit = wanted.limit + 1 if wanted.limit else 0
    with open_tables(root, _keys(root, wanted, "reports", ".parquet")) as connection:
        if wanted.sql:
            if _mentions(wanted.sql, "nights"):
                records = [root.get_json(key) for key in _keys(root, wanted, "nights", ".json")]
                add_nights(connection, records)
            if _mentions(wanted.sql, "latest"):
                connection.execute(LATEST)
            found = run_select(connection, wanted.sql, limit)
        else:
            found = _filtered(root, connection, wanted, columns or tuple(SCHEMA.names), limit)
    more = bool(wanted.limit) and len(found.rows) > wanted.limit
    return Answer(found.columns, found.rows[: wanted.limit] if more else found.rows, more)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a form can offer, sorted."""

    cohorts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """Names, which stand for all their versions, and the versions."""


def choices(root: Root) -> Choices:
    """The cohorts, labels and models that rows have; the cohorts alone when the table of a night is damaged."""
    cohorts = tuple(root.names("reports"))
    try:
        with open_tables(root, _keys(root, Query(), "reports", ".parquet")) as connection:
            found = connection.execute("SELECT DISTINCT name, model FROM rows").fetchall()
    except (StorageError, duckdb.Error):
        return Choices(cohorts)
    models = {model for _, model in found if model}
    return Choices(
        cohorts,
        tuple(sorted({name for name, _ in found if name})),
        tuple(sorted(models | {model.partition("@")[0] for model in models})),
    )


def describe(wanted: Query) -> str:
    """A question in words: what it restricts, on one line."""
    parts = []
    for field in fields(Query):
        value = getattr(wanted, field.name)
        if value != field.default:
            text = ", ".join(value) if isinstance(value, tuple) else value
            parts.append(f"{field.name.replace('_', ' ')} {text}")
    return "; ".join(parts) or "all rows"


def _filtered(
    root: Root, connection: duckdb.DuckDBPyConnection, wanted: Query, columns: Sequence[str], limit: int
) -> Table:
    conditions, values = _conditions(wanted)
    listed = ", ".join(f'"{name}"' for name in columns)
    # the files come newest first, and DuckDB keeps the order of what it reads
    # columns are named by this module, and values go apart from the text
    text = f"SELECT {listed} FROM rows"  # noqa: S608
    text += f" WHERE {' AND '.join(conditions)}" if conditions else ""
    text += f" LIMIT {limit}" if limit else ""
    try:
        return as_table(columns, connection.execute(text, values).fetchall())
    except duckdb.Error as error:
        raise damaged(root, error) from None


def _conditions(wanted: Query) -> tuple[list[str], list[Any]]:
    """Conditions of a WHERE and the values of their question marks."""
    conditions: list[str] = []
    values: list[Any] = []

    def among(expression: str, allowed: Sequence[str]) -> None:
        if allowed:
            conditions.append(f"{expression} IN ({', '.join('?' * len(allowed))})")
            values.extend(allowed)

    among("name", wanted.labels)
    among("state", wanted.states)
    among("review", wanted.reviews)
    among("patient", [wanted.patient] if wanted.patient else [])
    among('"case"', [wanted.case] if wanted.case else [])
    if wanted.models:
        marks = ", ".join("?" * len(wanted.models))
        conditions.append(f"(model IN ({marks}) OR split_part(model, '@', 1) IN ({marks}))")
        values += [*wanted.models, *wanted.models]
    if ANY_FLAG in wanted.flags:
        conditions.append("flags <> ''")
    elif wanted.flags:
        conditions.append("list_has_any(string_split(flags, ' '), ?)")
        values.append(list(wanted.flags))
    for column, expression in _RANGES.items():
        for comparison, bound in zip((">=", "<="), wanted._range(column), strict=True):
            if bound is not None:
                conditions.append(f"{expression} {comparison} ?")
                values.append(bound)
    return conditions, values


def _check_cohorts(root: Root, wanted: Query) -> None:
    cohorts = root.names("reports")
    unknown = sorted(set(wanted.cohorts) - set(cohorts))
    if unknown:
        known = ", ".join(cohorts) or "none"
        raise ConfigError("query.cohort", f"cohort {unknown[0]!r} has no report (known: {known}); run vnet nightly")


def _keys(root: Root, wanted: Query, prefix: str, suffix: str) -> list[str]:
    """Keys ``<prefix>/<cohort>/<night><suffix>`` of the cohorts and nights of a question, newest night first."""
    found = []
    for cohort in wanted.cohorts or root.names(prefix):
        nights = [name.removesuffix(suffix) for name in root.names(f"{prefix}/{cohort}") if name.endswith(suffix)]
        within = [night for night in nights if _within(night, wanted)]
        found += [(night, cohort) for night in within[-wanted.nights :]]
    return [f"{prefix}/{cohort}/{night}{suffix}" for night, cohort in sorted(set(found), reverse=True)]


def _within(night: str, wanted: Query) -> bool:
    day = night[:10]
    return (not wanted.first or day >= wanted.first) and (not wanted.last or day <= wanted.last)


def _mentions(sql: str, table: str) -> bool:
    return re.search(rf"\b{table}\b", sql, re.IGNORECASE) is not None


def _check_day(name: str, text: str) -> None:
    try:
        if text and date.fromisoformat(text).isoformat() != text:
            raise ValueError
    except ValueError:
        raise ConfigError("query.date", f"the {name} day is {text!r}; give it as YYYY-MM-DD") from None
