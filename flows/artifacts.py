"""Keys, tables and the page of a model, as the Prefect UI takes them; nothing is sent from here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers import markdown
from workers.harmless import one_line
from workers.story import NOTICE, Row

TABLE_ROWS = 2_000
"""Most rows of a table artifact; the Parquet file has all."""
TEXT_CHARACTERS = 400
"""Most characters of one cell."""


def artifact_key(*parts: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


VOLUME_COLUMNS = (
    "case",
    "state",
    "name",
    "volume_ml",
    "change_percent",
    "flags",
    "review",
    "codes",
    "volume_low_ml",
    "volume_high_ml",
    "agreement",
    "patient_change_ml",
    "patient_change_percent",
    "change_uncertainty_ml",
    "earlier_case",
    "components",
    "touches_border",
    "slice_first",
    "slice_last",
    "seconds",
    "message",
    "model",
    "cohort",
    "night",
)
"""The same in every night. The UI shows about the first six without scrolling."""
ANSWER_COLUMNS = ("night", "cohort", *VOLUME_COLUMNS[:-2])
"""The same for rows of several nights and cohorts."""


def volume_table(rows: Iterable[Row], columns: Sequence[str] = VOLUME_COLUMNS) -> list[dict[str, Any]]:
    """Rows for a table artifact: the columns that people read, figures rounded, nothing empty as None.

    A column that an old row does not have is empty.
    """
    return [{column: _cell(row.get(column)) for column in columns} for row in itertools.islice(rows, TABLE_ROWS)]


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return round(value, 3)
    return one_line(value)[:TEXT_CHARACTERS] if isinstance(value, str) else value


def training_markdown(facts: Mapping[str, Any], curves: Mapping[str, bytes]) -> str:
    """The page of a trained model: its figures and curves."""
    training = facts["training"]
    figures = (
        ("networks", training["folds"]),
        ("steps", training["steps"]),
        ("minutes", f"{training['minutes']:.1f}"),
        ("workers", training["workers"]),
        ("precision", training["precision"]),
        ("parameters", f"{training['parameters']:,}"),
        ("training cases", len(training["training_cases"])),
        ("validation cases", len(training["validation_cases"])),
        ("started from", training["started_from"] or "nothing"),
    )
    parts = [
        f"# Model {markdown.text(facts['name'])}@{facts['version']}",
        f"*{NOTICE}*",
        markdown.table(("training", ""), figures),
    ]
    scores = facts["metrics"]["validation_dice"]
    if scores:
        parts.append(markdown.table(("structure", "validation Dice"), ((n, f"{v:.3f}") for n, v in scores.items())))
    parts += [f"- {markdown.text(reason)}" for reason in facts["cleaning"]]
    parts += [markdown.picture(name, png) for name, png in curves.items()]
    return "\n\n".join(parts) + "\n"
