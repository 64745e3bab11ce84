"""What people read in the Prefect UI, as Markdown and rows; pure text, nothing is sent from here."""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from workers.report import Night

PICTURES = 8
"""Most QC pictures in a report."""
REPORT_BYTES = 1_200_000
"""Largest report; pictures that would exceed it are left out and counted."""
TABLE_ROWS = 2_000
"""Most rows of a table artifact; the Parquet file has all."""

NOTICE = "Research software, not a medical device: volumes and masks need a qualified person's review."

Row = Mapping[str, Any]


def artifact_key(*parts: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def night_markdown(night: Night, rows: Sequence[Row], picture: Callable[[str], bytes]) -> str:
    """The report of a night: counts, what needs a person's eye, then the cases with their pictures, worst first.

    ``picture`` gives the QC picture (PNG) of a result key. Pictures are embedded as data URIs until ``PICTURES`` or
    ``REPORT_BYTES`` is reached.
    """
    cases = _by_case(rows)
    done = [case for case in cases.values() if case[0]["volume_ml"] is not None]
    undone = [case[0] for case in cases.values() if case[0]["volume_ml"] is None]
    parts = [
        f"# {_text(night.cohort)}: night {night.id}",
        f"{len(done)} of {len(cases)} cases have a mask by model `{night.model}`"
        f" ({', '.join(f'{n} {state}' for state, n in night.counts.items())}; {night.seconds:.0f} s).",
        f"*{NOTICE}*",
    ]
    if undone:
        parts.append("## Without a mask")
        parts.append(
            _table(
                ("case", "state", "reason", "what was found, what to do"),
                ((r["case"], r["state"], f"`{r['codes']}`", r["message"]) for r in undone),
            )
        )
    parts.append("## Volumes")
    parts.append(_table(("label", "cases", "median mL", "smallest mL", "largest mL", "flagged"), _summary(rows)))
    body = "\n\n".join(parts)
    ranked = sorted(done, key=_rank)
    sections, left = [], REPORT_BYTES - len(body.encode())
    for case in ranked[:PICTURES]:
        section = _case_section(case, picture(case[0]["result"]))
        left -= len(section.encode())
        if left < 0:
            break
        sections.append(section)
    if sections:
        title = "## Cases, worst first"
        rest = len(ranked) - len(sections)
        note = f"{rest} more cases are in the table of volumes." if rest else "All cases with a mask."
        body = "\n\n".join([body, title, note, *sections])
    return body + "\n"


def _by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _rank(case: Sequence[Row]) -> tuple[int, float, str]:
    """Most flags first, then the largest change since the night before."""
    flags = sum(len((row["flags"] or "").split()) for row in case)
    change = max((abs(row["change_percent"] or 0.0) for row in case), default=0.0)
    return -flags, -change, case[0]["case"]


def _summary(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    labels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["volume_ml"] is not None:
            labels.setdefault((row["label"], row["name"]), []).append(row)
    table = []
    for (_, name), found in sorted(labels.items()):
        volumes = [row["volume_ml"] for row in found]
        flagged = sum(bool(row["flags"]) for row in found)
        figures = (statistics.median(volumes), min(volumes), max(volumes))
        table.append((name, len(found), *(f"{v:.2f}" for v in figures), flagged))
    return table


def _case_section(case: Sequence[Row], png: bytes) -> str:
    rows = (
        (
            row["name"],
            f"{'>= ' if row['touches_border'] else ''}{row['volume_ml']:.2f}",
            "" if row["change_percent"] is None else f"{row['change_percent']:+.1f} %",
            "" if row["slice_first"] is None else f"{row['slice_first']} to {row['slice_last']}",
            row["components"],
            row["flags"],
        )
        for row in case
    )
    table = _table(("label", "mL", "change", "slices", "components", "flags"), rows)
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f"### {_text(case[0]['case'])}\n\n{table}\n\n![{_text(case[0]['case'])}]({uri})"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Text that Markdown and HTML take as it is."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", str(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


VOLUME_COLUMNS = (
    "case",
    "name",
    "volume_ml",
    "change_percent",
    "slice_first",
    "slice_last",
    "components",
    "touches_border",
    "flags",
    "state",
    "codes",
    "night",
    "cohort",
    "model",
)


def volume_table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows for a table artifact: the columns that people read, figures rounded, nothing empty as None."""
    table: list[dict[str, Any]] = []
    for row in rows:
        if len(table) == TABLE_ROWS:
            break
        shown = {column: row[column] for column in VOLUME_COLUMNS}
        for column in ("volume_ml", "change_percent"):
            if shown[column] is not None:
                shown[column] = round(shown[column], 3)
        table.append({column: "" if value is None else value for column, value in shown.items()})
    return table


def training_markdown(facts: Mapping[str, Any], curves: Mapping[str, bytes]) -> str:
    """The page of a trained model: its figures and curves."""
    training = facts["training"]
    parts = [
        f"# Model {facts['name']}@{facts['version']}",
        f"*{NOTICE}*",
        _table(
            ("steps", "minutes", "workers", "precision", "parameters", "training cases", "validation cases"),
            [
                (
                    training["steps"],
                    training["minutes"],
                    training["workers"],
                    training["precision"],
                    f"{training['parameters']:,}",
                    len(training["training_cases"]),
                    len(training["validation_cases"]),
                )
            ],
        ),
    ]
    scores = facts["metrics"]["validation_dice"]
    if scores:
        parts.append(_table(("label", "validation Dice"), ((n, f"{v:.3f}") for n, v in scores.items())))
    for name, png in curves.items():
        parts.append(f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})")
    return "\n\n".join(parts) + "\n"
