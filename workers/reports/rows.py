"""Rows of a night: what became of every case, what its labels measure, what has changed, and what is flagged.

Inside this module labels have the names of the plan; the names that reports use are put in last, and taken out again
when rows of an earlier night are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vnet_core.plausibility import Change, Distribution, Finding, Size, change, distribution, flags
from vnet_core.reporting import Reporting
from workers.nights.decisions import review_of
from workers.reports.columns import SCHEMA, Row, plain_rows, read_table, settings_of_table
from workers.segmentation.masks import load_report
from workers.storage.store import Root

LOOK_BACK_NIGHTS = 30
"""How many nights before are looked through for the last result of a case that had none in the night before."""
ReportOf = Callable[[Root, str], Mapping[str, Any]]
"""Gives what a result measures, by its key, as :func:`workers.segmentation.masks.load_report` does."""
Part = tuple[int | None, str]
"""What a row is about, from night to night: value and name of a label, or None and the name of a region."""


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a case of a night before its result is looked at."""

    columns: Row
    """Columns that are the case's and not a label's: night, case, state and so on."""
    result: str | None
    """Key of its result."""
    digest: str
    """SHA-256 of the bytes of its channels; empty: as its result has it."""
    first_night: str | None = None
    """Where it is known already."""

    @property
    def case(self) -> str:
        """Its id."""
        return str(self.columns["case"])


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the nights before say of the cases of a night, rows by case."""

    latest: dict[str, list[Row]]
    """Of the last night that has the case."""
    newest: dict[str, list[Row]]
    """Of the last night in which the case had a result; the same where that is the last one."""
    reusable: dict[str, list[Row]]
    """Of the last night alone, where its rows were made with today's columns and settings: taken over for a case whose
    result is the same."""


NOTHING = Earlier({}, {}, {})


def earlier_rows(root: Root, cohort: str, nights: Sequence[str], told: Sequence[Told], settings: Reporting) -> Earlier:
    """What ``nights``, those before the one that is told, oldest first, say of its cases."""
    if not nights:
        return NOTHING
    table = read_table(root, cohort, nights[-1])
    known = settings_of_table(table.schema)
    latest = _by_case(plain_rows(table))
    newest = {case: rows for case, rows in latest.items() if rows[0]["result"] is not None}
    reusable = dict(newest) if known == settings and table.column_names == SCHEMA.names else {}
    missing = {one.case for one in told if one.case not in newest and one.columns["state"] != "refused"}
    for night in reversed(nights[-1 - LOOK_BACK_NIGHTS : -1]):
        if not missing:
            break
        table = read_table(root, cohort, night)
        table = table.filter(pc.is_in(table["case"], pa.array(sorted(missing), pa.string())))
        for case, rows in _by_case(plain_rows(table)).items():
            latest.setdefault(case, rows)
            if rows[0]["result"] is not None:
                newest[case] = rows
                missing.discard(case)
    return Earlier(latest, newest, reusable)


def night_rows(
    root: Root,
    cohort: str,
    told: Sequence[Told],
    earlier: Earlier,
    settings: Reporting,
    report_of: ReportOf = load_report,
) -> dict[str, list[Row]]:
    """The rows of every case of a night, cases in the order given, with every column but those of the review.

    ``report_of`` gives what a result measures, by its key. Rows of ``earlier.reusable`` are taken over, and changed in
    place.
    """
    rows, other_model = {}, set()
    for one in told:
        before = earlier.newest.get(one.case)
        same = before is not None and _same_bytes(root, one, before[0]["result"])
        first_night = one.first_night or _first_night(one, before, earlier.latest.get(one.case), same)
        reusable = earlier.reusable.get(one.case)
        if before is not None and same and one.result not in (None, before[0]["result"]):
            other_model.add(one.case)
        if one.result is None:
            rows[one.case] = [dict.fromkeys(SCHEMA.names) | one.columns]
        elif reusable and reusable[0]["result"] == one.result:
            rows[one.case] = reusable
        else:
            rows[one.case] = _measured(root, one.result, report_of)
        for row in rows[one.case]:
            row.update(one.columns)
            row["first_night"] = first_night
    scans = _scans(told, rows, earlier)
    _compare_patients(rows, scans)
    _judge(rows, scans, earlier, other_model, settings)
    for row in _all(rows):
        row["name"] = settings.names.get(row["name"], row["name"])
    return rows


def _same_bytes(root: Root, one: Told, result: str) -> bool:
    """Whether an earlier result is of the bytes that the case has now."""
    if one.result == result:
        return True
    digest = one.digest or (_digest_of_result(root, one.result) if one.result else "")
    return bool(digest) and digest == _digest_of_result(root, result)


def _digest_of_result(root: Root, result: str) -> str:
    """SHA-256 of the scan's bytes that a result was made of; empty where it is gone."""
    return str((root.receipt(result) or {}).get("case_digest", ""))


def _first_night(one: Told, before: list[Row] | None, latest: list[Row] | None, same_bytes: bool) -> str:
    """The night in which the bytes that the case has now first had a row."""
    tonight = str(one.columns["night"])
    since = latest[0]["first_night"] if latest else None
    if before is None:
        return since or tonight
    first = before[0]["first_night"] or before[0]["night"]
    if latest is not before and since is not None and since != first:
        return str(since)  # other bytes came after that result, and have had none of their own
    return str(first) if same_bytes else tonight


def _measured(root: Root, result: str, report_of: ReportOf) -> list[Row]:
    """The rows of a result, with what its report says."""
    report = report_of(root, result)
    finished = {"finished": (root.receipt(result) or {}).get("finished")}
    return [
        dict.fromkeys(SCHEMA.names)
        | finished
        | {name: value for name, value in part.items() if name in SCHEMA.names}
        | {"result": result, "flags": "drift" if report.get("drift") else ""}
        for part in [*report["labels"], *report.get("regions", ())]
    ]


def _scans(told: Sequence[Told], rows: Mapping[str, list[Row]], earlier: Earlier) -> dict[str, list[Row]]:
    """Rows with volumes by case: this night's, or the newest of a case that failed or was not reached; a refused case
    has none."""
    scans = {}
    for one in told:
        if one.result is not None:
            scans[one.case] = rows[one.case]
        elif one.columns["state"] != "refused" and one.case in earlier.newest:
            scans[one.case] = earlier.newest[one.case]
    return scans


def _compare_patients(rows: Mapping[str, list[Row]], scans: Mapping[str, list[Row]]) -> None:
    """Fill the columns of change since the patient's scan before.

    Scans of a patient are in the order of the nights in which they were first seen, then of their ids.
    """
    patients = defaultdict(list)
    for case, found in scans.items():
        patient = rows[case][0]["patient"]
        if patient:
            patients[patient].append((rows[case][0]["first_night"], case, found))
    names = ("earlier_case", "patient_change_ml", "patient_change_percent", "change_uncertainty_ml")
    for row in _all(rows):
        row.update(dict.fromkeys(names))
    for of_patient in patients.values():
        of_patient.sort(key=lambda scan: scan[:2])
        for (_, earlier_case, before), (_, _, now) in pairwise(of_patient):
            sizes = {_part(row): _size(row) for row in before}
            for row in now:
                row["earlier_case"] = earlier_case
                if (size := sizes.get(_part(row))) is not None:
                    since = change(_size(row), size)
                    values = (earlier_case, since.ml, since.percent, since.uncertainty_ml)
                    row.update(zip(names, values, strict=True))


def _judge(
    rows: Mapping[str, list[Row]],
    scans: Mapping[str, list[Row]],
    earlier: Earlier,
    other_model: Collection[str],
    settings: Reporting,
) -> None:
    """Fill change since the last result and flags; ``other_model``: cases whose last result is of the same bytes."""
    volumes = defaultdict(list)
    for row in _all(scans):
        volumes[_part(row)].append(row["volume_ml"])
    among: dict[Part, Distribution | None] = {part: distribution(found) for part, found in volumes.items()}
    for case, of_case in rows.items():
        if of_case[0]["result"] is None:
            continue
        before = earlier.newest.get(case, [])
        if before and before[0]["result"] == of_case[0]["result"]:
            before = of_case  # nothing lies between them, however the figures of that night were taken
        sizes = {_part(row): _size(row) for row in before}
        for row in of_case:
            size = sizes.get(_part(row))
            since = change(_size(row), size) if size else None
            row["change_ml"] = since.ml if since else None
            row["change_percent"] = since.percent if since else None
            finding = _finding(row, since if case in other_model else None)
            row["flags"] = " ".join(flags(finding, among[_part(row)], settings))


def _finding(row: Row, same_scan: Change | None) -> Finding:
    patient_ml = row["patient_change_ml"]
    patient = row["patient_change_percent"], row["change_uncertainty_ml"]
    return Finding(
        name=row["name"],
        size=_size(row),
        voxels=row["voxels"],
        components=row["components"],
        touches_border=row["touches_border"],
        agreement=row["agreement"],
        drift="drift" in row["flags"].split(),
        same_scan=same_scan,
        patient=None if patient_ml is None else Change(patient_ml, *patient),
    )


def add_reviews(root: Root, cohort: str, rows: Mapping[str, list[Row]], gated: bool) -> None:
    """Fill the columns of the review; ``gated``: masks with a flag wait for somebody's decision."""
    decided = set(root.names(f"decisions/{cohort}"))
    for case, of_case in rows.items():
        result, flagged = of_case[0]["result"], any(row["flags"] for row in of_case)
        state, by, at = "", "", ""
        asked = flagged and gated
        if result is not None and (case in decided or asked):
            state, by, at = review_of(root, cohort, case, result, asked)
        for row in of_case:
            row.update(review=state, reviewed_by=by, reviewed_at=at)


def _by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _all(rows: Mapping[str, list[Row]]) -> Iterable[Row]:
    return (row for of_case in rows.values() for row in of_case)


def _part(row: Row) -> Part:
    return row["label"], row["name"]


def _size(row: Row) -> Size:
    return Size(row["volume_ml"], row["volume_low_ml"], row["volume_high_ml"])
