"""What became of cases as text for a terminal and as rows of a JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.harmless import one_line
from workers.ledger import Outcome, counts


def case_row(outcome: Outcome) -> dict[str, Any]:
    """The keys that every case of a JSON document has."""
    return {
        "case": outcome.case,
        "state": outcome.state,
        "codes": list(outcome.codes),
        "message": outcome.message,
    }


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned columns; numbers to the right."""
    shown = [[_shown(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in shown)) if shown else len(c) for i, c in enumerate(columns)]
    numeric = [all(isinstance(row[c], int | float | None) for row in rows) for c in columns]
    lines = [
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(line, widths, numeric, strict=True))
        for line in [list(columns), *shown]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else one_line(value)


def undone(outcomes: Sequence[Outcome]) -> str:
    """A table of the cases that are not done or done with warnings, after a line end; '' without any."""
    rows = [
        {"case": o.case, "state": o.state, "code": " ".join(o.codes), "reason": o.message}
        for o in outcomes
        if not o.done or o.state == "warned"
    ]
    return "\n" + text_table(rows, ("case", "state", "code", "reason")) if rows else ""


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many cases are in which state, and the table of those that need attention."""
    found = counts(outcomes)
    text = ", ".join(f"{number} {state}" for state, number in found.items()) or "no cases"
    done = [o for o in outcomes if o.done]
    if done and all(o.state == "cached" for o in done):
        text = f"no case computed: {text}"
    return text + undone(outcomes)
