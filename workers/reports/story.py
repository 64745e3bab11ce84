"""What is told of a night, in the order in which a person needs it; pure, and the same for every way of showing it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from workers.nights.attempts import QUARANTINED
from workers.nights.record import Night
from workers.reports.document import Block, Code, Grid, Heading, Items, Link, Paragraph, Strong, Text, named, paragraph
from workers.reports.earlier import Before
from workers.reports.flag_words import FLAGS, flags_of

NAMES = 10
"""Most names in one line."""
UNDONE_LINES = 40
"""Most lines about cases without a mask."""
AWAITING_LINES = 20
"""Most lines about cases that wait for a decision."""
CHANGED = 5
"""Volumes that changed most."""
LABEL_ROWS = 12
"""Most labels of one case."""
SUMMARY_ROWS = 40
"""Most labels of the cohort."""

NOTICE = "Research software, not a medical device: volumes and masks need a qualified person's review."

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is stored about one mask beside its rows."""

    picture: bytes | None
    """The QC picture (PNG)."""
    without: str
    """Why there is no picture; empty where there is one."""
    drift: tuple[str, ...] = ()
    """In which ways the scan is unlike those of the training."""


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each case, in their order."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def worst_first(rows: Iterable[Row]) -> list[list[Row]]:
    """Cases with a mask: those that wait for a decision, then those with most flags that nobody has accepted, then by
    the largest change since the night before."""
    return sorted((case for case in by_case(rows).values() if case[0]["volume_ml"] is not None), key=_rank)


def needs_a_look(case: Sequence[Row]) -> bool:
    """Whether tonight is a reason to look at the case: its mask is new, its volumes changed, it is flagged and nobody
    has accepted that, or it waits for a decision."""
    first = case[0]
    return bool(
        first["state"] != "cached"
        or first.get("review") in ("awaiting", "rejected", "training")
        or any(row["change_ml"] for row in case)
        or (first.get("review") != "accepted" and any(row["flags"] for row in case))
    )


def cases_title(looked_at: int, others: int) -> list[Block]:
    """What comes before the cases to look at: their order, and how many others have a mask."""
    if looked_at:
        text = "Worst first: flagged cases, then by the largest change."
    else:
        text = "No case needs a look tonight: none is new, changed or flagged."
    if others:
        text += f" {others} {'other is as it was' if others == 1 else 'others are as they were'}, or accepted."
    return [Heading(2, "Cases"), paragraph(text)]


def _rank(case: Sequence[Row]) -> tuple[bool, int, float, str]:
    first = case[0]
    accepted = first.get("review") == "accepted"
    flags = 0 if accepted else sum(len(flags_of(row["flags"])) for row in case)
    return first.get("review") != "awaiting", -flags, -max(map(_change, case)), first["case"]


def _change(row: Row) -> float:
    """Relative change of a volume in percent, as a size; infinite when there was nothing the night before."""
    if row["change_percent"] is None:
        return math.inf if row["change_ml"] else 0.0
    return abs(row["change_percent"])


def overview(night: Night, rows: Sequence[Row], before: Before | None, table: Link | Code) -> list[Block]:
    """Everything of a page before its plots and cases. ``table`` is where all rows of the night are."""
    cases = by_case(rows)
    done = {name: case for name, case in cases.items() if case[0]["volume_ml"] is not None}
    blocks = [*_head(night, cases, done), *_since(night, rows, before), *_awaiting(done.values())]
    undone = [case[0] for name, case in cases.items() if name not in done]
    if undone:
        blocks += _without_mask(undone, table)
    if done:
        blocks += _volumes(rows, table)
    return blocks


# --- what happened


def _head(night: Night, cases: Mapping[str, Sequence[Row]], done: Mapping[str, Sequence[Row]]) -> list[Block]:
    counts = ", ".join(f"{number} {state}" for state, number in night.counts.items()) or "the cohort is empty"
    flagged = sum(any(row["flags"] for row in case) for case in done.values())
    words: Text = (f" {flagged or 'None'} of them {'is' if flagged in (0, 1) else 'are'} flagged.",) if done else ()
    return [
        Heading(1, f"{night.cohort}, {_moment(night.started)}"),
        Paragraph((Strong(_coverage(night, cases, len(done))), *words)),
        paragraph(
            "Model ", Code(night.model), f": {counts}, in {_duration(night.seconds)}. Night ", Code(night.id), "."
        ),
        paragraph(NOTICE),
    ]


def _coverage(night: Night, cases: Mapping[str, Sequence[Row]], done: int) -> str:
    """``312 of 400 usable cases have a mask (78 %), 88 carried over: the deadline 06:00 came.``"""
    states = [case[0]["state"] for case in cases.values()]
    usable = len(states) - states.count("refused")
    if not usable:
        return (
            f"No case has a mask: {'none of ' + str(len(states)) + ' is usable' if states else 'the cohort is empty'}."
        )
    text = f"{done} of {usable} usable {'case' if usable == 1 else 'cases'} {'has' if done == 1 else 'have'} a mask"
    if done < usable:
        # never rounded up: 999 of 1000 are not all
        text += f" ({math.floor(100 * done / usable)} %)"
    if "carried-over" in states:
        text += f", {states.count('carried-over')} carried over"
    return f"{text}{_why_stopped(night)}."


def _why_stopped(night: Night) -> str:
    if not night.stopped:
        return ""
    hours = night.rules.get("hours", 0)
    told = {
        "deadline": f"the deadline {night.rules.get('deadline', '')} came",
        "hours": f"its {hours:g} {'hour' if hours == 1 else 'hours'} of machine time were used up",
        "cancelled": "it was cancelled",
        "died": "its run died",
    }
    return f": {told[night.stopped]}"


def _moment(iso: str) -> str:
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%d %B %Y, %H:%M} UTC"


def _moment_of_id(night: str) -> str:
    """An id of a night as a moment; ids that are none stay as they are."""
    try:
        return f"{datetime.strptime(night, '%Y-%m-%d_%H%M%S'):%d %B %Y, %H:%M} UTC"
    except ValueError:
        return night


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# --- what changed


def _since(night: Night, rows: Sequence[Row], before: Before | None) -> list[Block]:
    if before is None:
        return [Heading(2, "Since the night before"), paragraph("There is no earlier night to compare with.")]
    changes = _changes(rows, before.rows)
    title = Heading(2, f"Since {_moment_of_id(before.night)}")
    if not changes:
        return [title, paragraph("Nothing changed.")]
    return [title, Items(tuple(changes))]


def _changes(rows: Sequence[Row], before: Sequence[Row]) -> list[Text]:
    """One line for each kind of change that there is."""
    now, then = by_case(rows), by_case(before)
    state = {case: found[0]["state"] for case, found in then.items()}
    newly = {
        wanted: [c for c, found in now.items() if found[0]["state"] == wanted and state.get(c) != wanted]
        for wanted in ("failed", "refused")
    }
    flags = {(row["case"], _part(row)): set(flags_of(row["flags"])) for row in before}
    lines: list[tuple[str, list[str]]] = [
        ("New cases", [case for case in now if case not in then]),
        ("Gone cases", [case for case in then if case not in now]),
        ("New masks", [case for case, found in now.items() if found[0]["state"] == "computed"]),
        ("Newly failing", newly["failed"]),
        ("Newly refused", newly["refused"]),
    ]
    texts: list[Text] = [(Strong(f"{what} ({len(names)}): "), named(names, NAMES)) for what, names in lines if names]
    flagged = [
        (row, tuple(flag for flag in flags_of(row["flags"]) if flag not in flags.get((row["case"], _part(row)), ())))
        for row in rows
    ]
    new_flags = [f"{_of(row)} {' '.join(found)}" for row, found in flagged if found]
    if new_flags:
        texts.append((Strong(f"Newly flagged ({len(new_flags)}): "), named(new_flags, NAMES)))
    # a change that is not 0 although its percentage rounds to that is still told
    changed = sorted((row for row in rows if row["change_ml"]), key=lambda r: (-_change(r), r["case"], str(r["name"])))
    if changed:
        told = [f"{_of(row)} {_was(row)} → {millilitres(row['volume_ml'])} mL ({_change_text(row)})" for row in changed]
        texts.append((Strong(f"Volumes that changed most (of {len(changed)}): "), "; ".join(told[:CHANGED])))
    return texts


def _part(row: Row) -> Any:
    """What a row is about, from night to night: a label's value, since its name may change; a region's name."""
    return row["name"] if row["label"] is None else row["label"]


def _of(row: Row) -> str:
    return f"{row['case']} {row['name']}"


def _was(row: Row) -> str:
    return millilitres(max(0.0, row["volume_ml"] - row["change_ml"]))


# --- what waits for a person, and what has no mask


def _awaiting(done: Iterable[Sequence[Row]]) -> list[Block]:
    waiting = sorted((case for case in done if case[0].get("review") == "awaiting"), key=_rank)
    if not waiting:
        return []
    lines: list[Text] = [(Strong(case[0]["case"]), *_flag_names(case)) for case in waiting[:AWAITING_LINES]]
    if len(waiting) > len(lines):
        lines.append((f"and {len(waiting) - len(lines)} more",))
    how = paragraph(
        "Their masks are not delivered until somebody decides: in the form of the run that waits, with the form ",
        Code("review-cases"),
        ", or with ",
        Code("vnet review decide"),
        ".",
    )
    return [Heading(2, f"Awaiting review ({len(waiting)})"), how, Items(tuple(lines))]


def _flag_names(case: Sequence[Row]) -> Text:
    told = [f"{row['name']} {' '.join(flags_of(row['flags']))}" for row in case if row["flags"]]
    return (f": {named(told, NAMES)}",) if told else ()


def _without_mask(undone: Sequence[Row], table: Link | Code) -> list[Block]:
    """Cases without a mask as a list, which unlike a table wraps on a phone; equal reasons are one line."""
    order = {"failed": 0, "refused": 1, "carried-over": 2}
    reasons: dict[tuple[int, str, str, str], list[Row]] = {}
    for row in undone:
        # the reason of a carried-over case is the night's
        message = "" if row["state"] == "carried-over" else row["message"]
        reasons.setdefault((order.get(row["state"], 3), row["state"], row["codes"], message), []).append(row)
    ordered = sorted(reasons.items())
    lines: list[Text] = [_reason(*key[1:], rows) for key, rows in ordered[:UNDONE_LINES]]
    rest = sum(len(rows) for _, rows in ordered[UNDONE_LINES:])
    if rest:
        lines.append((f"and {rest} more, all in ", table))
    return [Heading(2, f"Without a mask ({len(undone)})"), Items(tuple(lines))]


def _reason(state: str, codes: str, message: str, rows: Sequence[Row]) -> Text:
    names = named(sorted(row["case"] for row in rows), NAMES)
    if state == "carried-over":
        return Strong(names), " carried over: the next night begins with them"
    tries = max(row.get("attempts") or 0 for row in rows)
    told = "quarantined" if QUARANTINED in codes.split() else state
    often = f" ({tries} tries so far)" if tries > 1 and told == "failed" else ""
    if not codes:
        return Strong(names), f" {told}{often}: {message}"
    return Strong(names), f" {told}{often}, ", Code(codes), f": {message}"


# --- volumes


def _volumes(rows: Sequence[Row], table: Link | Code) -> list[Block]:
    labels: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        if row["volume_ml"] is not None:
            labels.setdefault((row["label"], row["name"]), []).append(row)
    lines = []
    # regions, which have no value of their own, come last
    for (_, name), found in sorted(labels.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0, item[0][1])):
        volumes = [row["volume_ml"] for row in found]
        # three figures, so that the table fits on a phone
        extent = f"{_short(min(volumes))} to {_short(max(volumes))}"
        lines.append((name, str(len(found)), millilitres(statistics.median(volumes)), extent))
    blocks: list[Block] = [
        Heading(2, "Volumes"),
        Grid(("label", "masks", "median mL", "range mL"), tuple(lines[:SUMMARY_ROWS])),
    ]
    if len(lines) > SUMMARY_ROWS:
        blocks.append(paragraph(f"{len(lines) - SUMMARY_ROWS} more labels are in ", table, "."))
    flagged = {flag: {row["case"] for row in rows if flag in flags_of(row["flags"])} for flag in FLAGS}
    told: list[Text] = [
        (Code(flag), f" {len(cases)} {'case' if len(cases) == 1 else 'cases'}: {FLAGS[flag]}")
        for flag, cases in flagged.items()
        if cases
    ]
    return [*blocks, Items(tuple(told))] if told else blocks


def millilitres(volume_ml: float) -> str:
    """At least three figures, and never more than four decimals, as in the pictures."""
    if volume_ml == 0:
        return "0"
    decimals = 1 if volume_ml >= 100 else 2 if volume_ml >= 1 else 3 if volume_ml >= 0.1 else 4
    return f"{volume_ml:.{decimals}f}"


def _short(volume_ml: float) -> str:
    return f"{volume_ml:.0f}" if volume_ml >= 100 else f"{volume_ml:.3g}"


# --- one case


def case_blocks(case: Sequence[Row], evidence: Evidence) -> list[Block]:
    """A case with its volumes and those of the night before, what there is to say about them, and its picture."""
    first = case[0]
    shown = sorted(case, key=lambda row: (not row["flags"], case.index(row)))[:LABEL_ROWS]
    shown = [row for row in case if row in shown]
    if any(row["change_ml"] is not None for row in case):
        header: tuple[str, ...] = ("label", "mL", "before", "change")
        lines: tuple[tuple[str, ...], ...] = tuple(
            (row["name"], _volume_text(row), _before_text(row), _change_text(row)) for row in shown
        )
    else:
        header = ("label", "mL")
        lines = tuple((row["name"], _volume_text(row)) for row in shown)
    blocks: list[Block] = [Heading(3, first["case"]), Grid(header, lines)]
    notes = [note for row in shown for note in _notes(row)]
    if any("drift" in flags_of(row["flags"]) for row in case):
        reasons = f": {'; '.join(evidence.drift)}" if evidence.drift else ""
        notes.append((Code("drift"), f": {FLAGS['drift']}{reasons}"))
    if len(case) > len(shown):
        notes.append((f"{len(case) - len(shown)} more labels",))
    review = _review(first)
    if review:
        notes.append((review,))
    if notes:
        blocks.append(Items(tuple(notes)))
    if evidence.without:
        blocks.append(paragraph(evidence.without))
    return blocks


def _notes(row: Row) -> list[Text]:
    name, notes = row["name"], list[Text]()
    low, high = row.get("volume_low_ml"), row.get("volume_high_ml")
    if low is not None and high is not None:
        agreement = row.get("agreement")
        told = "" if agreement is None else f", agreement {agreement:.2f}"
        notes.append((f"{name}: {millilitres(low)} to {millilitres(high)} mL over folds and mirror images{told}",))
    if row.get("patient_change_ml") is not None:
        percent = row.get("patient_change_percent")
        share = "" if percent is None else f" ({percent:+.1f} %)"
        doubt = row.get("change_uncertainty_ml")
        technical = "" if doubt is None else f", of which {millilitres(doubt)} mL may be technical"
        earlier = row.get("earlier_case") or "the scan before"
        change = f"{'+' if row['patient_change_ml'] >= 0 else '-'}{millilitres(abs(row['patient_change_ml']))}"
        notes.append((f"{name}: {change} mL{share} since the patient's scan {earlier}{technical}",))
    # drift is about the scan, and stands on every row of the case
    for flag in (flag for flag in flags_of(row["flags"]) if flag != "drift"):
        pieces = f" ({row['components']})" if flag == "many-components" else ""
        notes.append((f"{name} ", Code(flag), f"{pieces}: {FLAGS.get(flag, 'see the documentation')}"))
    return notes


def _review(row: Row) -> str:
    said = {
        "awaiting": "awaits review",
        "accepted": "accepted",
        "rejected": "rejected: its mask is not delivered",
        "training": "sent to training: its mask is not delivered",
    }.get(row.get("review") or "", "")
    if not said or not row.get("reviewed_by"):
        return said
    return f"{said}, by {row['reviewed_by']}" + (f" at {row['reviewed_at']}" if row.get("reviewed_at") else "")


def _volume_text(row: Row) -> str:
    # the space does not break
    return ("≥\u00a0" if row["touches_border"] else "") + millilitres(row["volume_ml"])


def _before_text(row: Row) -> str:
    return "" if row["change_ml"] is None else _was(row)


def _change_text(row: Row) -> str:
    if row["change_percent"] is not None:
        return f"{row['change_percent']:+.1f}\u00a0%"
    return "new" if row["change_ml"] else ""
