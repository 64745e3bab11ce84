"""The flow that makes the report of a night anew from its masks, without segmenting."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.session import open_session
from flows.ui.fields import CohortName
from flows.ui.pages import publish_night
from workers.reports.report import load_reporting, measuring, read_rows, reported_night, rewrite_night
from workers.segmentation.masks import load_report


@flow(name="report-night", flow_run_name="report {cohort}", validate_parameters=True)
def report_night_anew(cohort: CohortName, night: str = "", measure: bool = False) -> State[Any]:
    """Make the rows, flags and pages of a night anew, with the cohort's settings of today and without segmenting.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        night: id of the night, such as 2026-11-23_003000; empty: the newest
        measure: measure the masks again, instead of taking the figures that were written with them
    """
    root = open_session().root
    found = reported_night(root, cohort, night or None)
    before = read_rows(root, cohort, found.id)
    report_of = measuring(root, found) if measure else load_report
    rows = rewrite_night(root, found, load_reporting(root, cohort), report_of)
    publish_night(root, found, rows)
    changed = sum(old != new for old, new in zip(before, rows, strict=True))
    flagged = Counter(flag for row in rows for flag in (row["flags"] or "").split())
    message = f"night {found.id} of cohort {cohort}: {changed} of {len(rows)} rows changed"
    data = {"night": found.id, "rows": rows, "changed": changed, "flags": dict(flagged.most_common())}
    return Completed(message=message, data=data)
