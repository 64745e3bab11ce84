"""What people read in the Prefect UI, as Markdown and rows; pure text, nothing is sent from here."""

from __future__ import annotations

import base64
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from workers.harmless import one_line
from workers.report import Night

PICTURES = 8
"""Most QC pictures in a report."""
REPORT_BYTES = 1_200_000
"""Largest report; pictures that would exceed it are left out and counted."""
UNDONE_LINES = 50
"""Most cases without a mask that a report lists; the table of volumes has all."""
TEXT_CHARACTERS = 400
"""Most characters of one name or message in a report."""
TABLE_ROWS = 2_000
"""Most rows of a table artifact; the Parquet file has all."""

NOTICE = "Research software, not a medical device: volumes and masks need a qualified person's review."
NO_PICTURE = "No picture: this scan may have text in its pixels."
FLAGS = {
    "empty": "the model found no voxel of this label",
    "touches-border": "the structure reaches the edge of the scan: its volume is at least what is stated",
    "many-components": "the label lies in more than ten pieces",
}

Row = Mapping[str, Any]


def artifact_key(*parts: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def night_markdown(night: Night, rows: Sequence[Row], picture: Callable[[str], bytes | None]) -> str:
    """The report of a night: counts, what needs a person's eye, then the cases with their pictures, worst first.

    ``picture`` gives the QC picture (PNG) of a result key, None where it has none. Pictures are embedded as data URIs,
    up to ``PICTURES``, and as far as the report stays within ``REPORT_BYTES``.
    """
    cases = _by_case(rows)
    done = [case for case in cases.values() if case[0]["volume_ml"] is not None]
    undone = [case[0] for case in cases.values() if case[0]["volume_ml"] is None]
    table = f"`{artifact_key('volumes', night.cohort)}`"
    parts = [_head(night, done, len(cases))]
    if undone:
        parts.append(_without_mask(undone, table))
    if done:
        header = ("label", "cases", "median mL", "smallest", "largest", "flagged")
        parts.append(f"## Volumes\n\n{_table(header, _summary(rows))}")
    # the sentence that counts what was left out comes before the pictures, and is short
    left = REPORT_BYTES - len("\n\n".join(parts).encode()) - 1_000
    ranked, sections = sorted(done, key=_rank), []
    for case in ranked[:PICTURES]:
        section = _case_section(case, picture(case[0]["result"]))
        size = len(section.encode()) + 2
        if size <= left:
            sections.append(section)
            left -= size
    if done:
        parts.append(f"## Cases\n\n{_order(rows, len(ranked) - len(sections), table)}")
    return "\n\n".join([*parts, *sections]) + "\n"


def _head(night: Night, done: Sequence[Sequence[Row]], cases: int) -> str:
    started = datetime.fromisoformat(night.started).astimezone(UTC)
    counts = ", ".join(f"{number} {state}" for state, number in night.counts.items()) or "the cohort is empty"
    flagged = sum(any(row["flags"] for row in case) for case in done)
    masks = f"**{len(done)} of {cases} cases have a mask.** {flagged or 'None'} of them {_are(flagged)} flagged."
    return "\n\n".join(
        [
            f"# {_text(night.cohort)}, {started:%d %B %Y, %H:%M} UTC",
            masks if done else f"**No case has a mask** ({cases} in the cohort).",
            f"Model `{_code(night.model)}`: {counts}, in {_duration(night.seconds)}. Night `{_code(night.id)}`.",
            f"*{NOTICE}*",
        ]
    )


def _are(number: int) -> str:
    return "is" if number in (0, 1) else "are"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _without_mask(undone: Sequence[Row], table: str) -> str:
    """Cases without a mask as a list, which unlike a table wraps on a phone; equal reasons together."""
    ordered = sorted(undone, key=lambda row: (row["state"], row["codes"], row["case"]))
    lines = [
        f"- **{_text(row['case'])}** {row['state']}, `{_code(row['codes'])}`: {_text(row['message'])}"
        for row in ordered[:UNDONE_LINES]
    ]
    if len(ordered) > len(lines):
        lines.append(f"- and {len(ordered) - len(lines)} more, all in {table}")
    return "\n".join([f"## Without a mask ({len(ordered)})", "", *lines])


def _order(rows: Sequence[Row], rest: int, table: str) -> str:
    """How the cases are ordered, what was left out, and what their flags mean."""
    compared = any(row["change_ml"] is not None for row in rows)
    if compared:
        text = "Flagged cases first, then by the largest change since the night before."
    else:
        text = "Flagged cases first. No earlier night to compare with."
    if rest:
        text += f" {rest} more {'case is' if rest == 1 else 'cases are'} in {table}."
    seen = {flag for row in rows for flag in (row["flags"] or "").split()}
    return "\n".join([text, "", *(f"- `{flag}`: {meaning}" for flag, meaning in FLAGS.items() if flag in seen)]).strip()


def _by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _rank(case: Sequence[Row]) -> tuple[int, float, str]:
    """Most flags first, then the largest change since the night before."""
    flags = sum(len((row["flags"] or "").split()) for row in case)
    return -flags, -max(map(_change, case)), case[0]["case"]


def _change(row: Row) -> float:
    """Relative change of a volume in percent, as a size; infinite when there was nothing the night before."""
    if row["change_percent"] is None:
        return math.inf if row["change_ml"] else 0.0
    return abs(row["change_percent"])


def _summary(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    labels: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        if row["volume_ml"] is not None:
            labels.setdefault((row["label"], row["name"]), []).append(row)
    table = []
    # regions, which have no value of their own, come last
    for (_, name), found in sorted(labels.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0)):
        volumes = [row["volume_ml"] for row in found]
        flagged = sum(bool(row["flags"]) for row in found)
        figures = (statistics.median(volumes), min(volumes), max(volumes))
        table.append((name, len(found), *map(_millilitres, figures), flagged))
    return table


def _millilitres(volume_ml: float) -> str:
    """At least three figures, and never more than four decimals, as in the pictures."""
    if volume_ml == 0:
        return "0"
    decimals = 1 if volume_ml >= 100 else 2 if volume_ml >= 1 else 3 if volume_ml >= 0.1 else 4
    return f"{volume_ml:.{decimals}f}"


def _case_section(case: Sequence[Row], png: bytes | None) -> str:
    compared = any(row["change_ml"] is not None for row in case)
    columns: list[tuple[str, list[Any]]] = [
        ("label", [row["name"] for row in case]),
        ("mL", [_volume_text(row) for row in case]),
        ("change", [_change_text(row) for row in case] if compared else []),
        ("slices", [_slices(row) for row in case]),
        ("pieces", [row["components"] for row in case]),
        ("flags", [row["flags"] for row in case] if any(row["flags"] for row in case) else []),
    ]
    filled = [(name, cells) for name, cells in columns if cells]
    table = _table([name for name, _ in filled], zip(*(cells for _, cells in filled), strict=True))
    name = _text(case[0]["case"])
    shown = f"![{name}]({_data_uri(png)})" if png else f"*{NO_PICTURE}*"
    return f"### {name}\n\n{table}\n\n{shown}"


def _volume_text(row: Row) -> str:
    # the space does not break
    return ("≥\u00a0" if row["touches_border"] else "") + _millilitres(row["volume_ml"])


def _change_text(row: Row) -> str:
    if row["change_percent"] is not None:
        return f"{row['change_percent']:+.1f} %"
    return "was 0" if row["change_ml"] else ""


def _slices(row: Row) -> str:
    first, last = row["slice_first"], row["slice_last"]
    if first is None:
        return ""
    # not a plain dash, at which a narrow column would break
    return f"{first}" if first == last else f"{first}\u2011{last}"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Text that Markdown and HTML show as it is, cut at ``TEXT_CHARACTERS``."""
    text = one_line(value)
    if len(text) > TEXT_CHARACTERS:
        text = f"{text[: TEXT_CHARACTERS - 2]} …"
    text = re.sub(r"([\\`*_~|\[\]#!])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(value: Any) -> str:
    """Text for a code span, in which nothing can be escaped."""
    return re.sub(r"[`|<>&]", "", one_line(value))[:TEXT_CHARACTERS]


VOLUME_COLUMNS = (
    "case",
    "state",
    "name",
    "volume_ml",
    "change_percent",
    "flags",
    "codes",
    "components",
    "touches_border",
    "slice_first",
    "slice_last",
    "message",
    "model",
    "cohort",
    "night",
)
"""The UI shows about the first six without scrolling."""
ANSWER_COLUMNS = ("night", "cohort", *VOLUME_COLUMNS[:-2])
"""The same for rows of several nights and cohorts."""


def volume_table(rows: Iterable[Row], columns: Sequence[str] = VOLUME_COLUMNS) -> list[dict[str, Any]]:
    """Rows for a table artifact: the columns that people read, figures rounded, nothing empty as None."""
    return [{column: _cell(row[column]) for column in columns} for row in itertools.islice(rows, TABLE_ROWS)]


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return round(value, 3)
    return one_line(value) if isinstance(value, str) else value


def training_markdown(facts: Mapping[str, Any], curves: Mapping[str, bytes]) -> str:
    """The page of a trained model: its figures and curves."""
    training = facts["training"]
    parts = [
        f"# Model {_text(facts['name'])}@{facts['version']}",
        f"*{NOTICE}*",
        _table(
            (
                "networks",
                "steps",
                "minutes",
                "workers",
                "precision",
                "parameters",
                "training cases",
                "validation cases",
                "started from",
            ),
            [
                (
                    training["folds"],
                    training["steps"],
                    f"{training['minutes']:.1f}",
                    training["workers"],
                    training["precision"],
                    f"{training['parameters']:,}",
                    len(training["training_cases"]),
                    len(training["validation_cases"]),
                    training["started_from"] or "nothing",
                )
            ],
        ),
    ]
    scores = facts["metrics"]["validation_dice"]
    if scores:
        parts.append(_table(("structure", "validation Dice"), ((n, f"{v:.3f}") for n, v in scores.items())))
    parts += [f"- {_text(reason)}" for reason in facts["cleaning"]]
    for name, png in curves.items():
        parts.append(f"![{_text(name)}]({_data_uri(png)})")
    return "\n\n".join(parts) + "\n"
