"""Keys, tables and the page of a model, as the Prefect UI takes them; nothing is sent from here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flows.ui.markdown import NO_PICTURE
from vnet_core.plan import Plan
from vnet_core.structures import structures
from workers import markdown
from workers.harmless import one_line
from workers.reports.story import NOTICE, Row
from workers.storage.store import Root
from workers.training.run import Run
from workers.training.validations import Validation, validations

TABLE_ROWS = 2_000
"""Most rows of a table artifact; the Parquet file has all."""
VALIDATION_ROWS = 30
"""Most validations in a page."""
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


def validation_page(root: Root, model: str, run: Run, validation: Validation) -> str:
    """The page of a validation beside a training: Dice at every step so far, and pictures of the worst cases."""
    names = [structure.name for structure in structures(Plan.from_mapping(run.plan))]
    parts = [f"# Validation of model {markdown.text(model)} while it trains", f"*{NOTICE}*"]
    if validation.failed:
        parts.append(f"**Step {validation.step} could not be judged.** {markdown.text(validation.failed)}")
    rows = [
        (done.step, f"{done.minutes:.1f}", *(f"{mean:.3f}" for mean in done.means or ()))
        for done in reversed(validations(root, run)[-VALIDATION_ROWS:])
    ]
    rows = [(*row, *[""] * (2 + len(names) - len(row))) for row in rows]
    parts += [markdown.table(("step", "minutes", *(f"Dice of {name}" for name in names)), rows)]
    parts.append(f"{len(run.validation)} whole volumes that do not train; the newest weights first.")
    for worst in validation.worst:
        case, told = markdown.text(worst["case"]), f"{markdown.text(worst['structure'])} {worst['dice']:.3f}"
        parts.append(f"## {case}: Dice of {told}")
        picture = worst.get("picture")
        parts.append(markdown.picture(worst["case"], root.get(picture)) if picture else NO_PICTURE)
    return "\n\n".join(parts) + "\n"
