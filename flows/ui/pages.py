"""What people read of a night: the report and the table in the Prefect UI, and the HTML page in the storage root."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from flows.ui.artifacts import artifact_key, volume_table
from flows.ui.markdown import NO_PICTURE, night_report
from vnet_core.errors import StorageError
from vnet_core.pictures import plots
from workers.harmless import one_line
from workers.nights.record import Night
from workers.reports.document import Block, Code, Link, Picture, paragraph
from workers.reports.earlier import Sums, night_before, trend
from workers.reports.html_page import CaseView, night_page
from workers.reports.previews import Volumes, volumes_of
from workers.reports.story import Evidence, Row, by_case, case_blocks, cases_title, needs_a_look, overview, worst_first
from workers.segmentation.masks import NO_PICTURE as BURNT_IN
from workers.segmentation.masks import load_report
from workers.storage.store import Root

TABLE_ROWS = 1_000
"""Most rows of a night's table, about half a megabyte, kept by Prefect for every night; the Parquet file has all."""
MISSING = "No picture: the result does not hold one any more."


def publish_night(root: Root, night: Night, rows: Sequence[Row]) -> None:
    """Write ``reports/<cohort>/<night>.html`` and create the artifacts ``night-<cohort>`` and ``volumes-<cohort>``.

    ``rows`` are those of :func:`workers.reports.report.write_night`. Called within a flow or task run, whose page then
    shows the artifacts.
    """
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    table = artifact_key("volumes", night.cohort)
    link = Link(table, f"/v2/artifacts/key/{table}")
    told = overview(night, rows, night_before(root, night.cohort, night.id), link)
    told += night_plots(rows, trend(root, night.cohort, night.id))
    ranked = worst_first(rows)
    looked_at = [case for case in ranked if needs_a_look(case)]
    told += cases_title(len(looked_at), len(ranked) - len(looked_at))
    page = f"reports/{night.cohort}/{night.id}.html"
    root.put(page, _html(root, night, told, rows, looked_at))
    where = paragraph("All rows are in ", link, ". The same with viewers in 3-D: ", Code(page), " in the storage root.")
    create_markdown_artifact(
        markdown=night_report(told, looked_at, lambda key: evidence(root, key), where),
        key=artifact_key("night", night.cohort),
        description=f"{len(ranked)} of {len(by_case(rows))} cases have a mask; night {night.id}",
    )
    create_table_artifact(
        table=volume_table(first_to_be_read(rows)[:TABLE_ROWS]), key=table, description=f"Volumes of night {night.id}"
    )


def evidence(root: Root, key: str) -> Evidence:
    """Picture of a result and in which ways its scan is unlike those of the training."""
    try:
        report = load_report(root, key)
    except StorageError:
        return Evidence(None, MISSING)
    drift = tuple(map(str, report.get("drift", ())))
    if report.get("picture") == BURNT_IN:
        return Evidence(None, NO_PICTURE, drift)
    if not root.exists(f"{key}/qc.png"):
        return Evidence(None, MISSING, drift)
    return Evidence(root.get(f"{key}/qc.png"), "", drift)


def first_to_be_read(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of a table that not everybody reads to its end: cases without a mask, then those that need a
    look, worst first, then the others."""
    cases = by_case(rows)
    undone = [case for case in cases.values() if case[0]["volume_ml"] is None]
    # the sort is stable: worst first within each part
    done = sorted(worst_first(rows), key=lambda case: not needs_a_look(case))
    return [row for case in (*undone, *done) for row in case]


def night_plots(rows: Sequence[Row], nights: Sequence[Sums]) -> list[Picture]:
    """Volumes by label, nights and seconds, as far as there is anything to draw."""
    drawn = []
    volumes: dict[str, list[float]] = {}
    outliers: dict[str, list[plots.Mark]] = {}
    for row in rows:
        if row["volume_ml"] is not None:
            name = one_line(row["name"])
            volumes.setdefault(name, []).append(row["volume_ml"])
            if "implausible-volume" in (row["flags"] or "").split():
                outliers.setdefault(name, []).append(plots.Mark(one_line(row["case"]), row["volume_ml"]))
    if volumes:
        # labels with outliers first, since not all labels may be drawn
        ordered = {name: volumes[name] for name in sorted(volumes, key=lambda name: name not in outliers)}
        drawn.append(Picture("volumes by label", plots.volumes_plot(ordered, outliers)))
    if len(nights) > 1:
        names = [_day(one.night) for one in nights]
        states = dict.fromkeys(state for one in nights for state in one.cases)
        cases = {state: [one.cases.get(state, 0) for one in nights] for state in states}
        drawn.append(Picture("cases by night", plots.counts_plot(names, cases)))
        labels = dict.fromkeys(name for one in reversed(nights) for name in one.median_ml)
        medians = {one_line(name): [one.median_ml.get(name) for one in nights] for name in labels}
        if any(any(values) for values in medians.values()):
            drawn.append(Picture("median volume by night", plots.medians_plot(names, medians)))
    seconds = [case[0]["seconds"] for case in by_case(rows).values() if case[0]["state"] == "computed"]
    known = [second for second in seconds if second]
    if known:
        drawn.append(Picture("seconds per case", plots.seconds_plot(known)))
    return drawn


def _day(night: str) -> str:
    """``22 Nov`` of an id; ids that are no moment as they are."""
    try:
        return f"{datetime.strptime(night, '%Y-%m-%d_%H%M%S'):%d %b}".lstrip("0")
    except ValueError:
        return night


def _html(
    root: Root, night: Night, told: Sequence[Block], rows: Sequence[Row], looked_at: Sequence[Sequence[Row]]
) -> bytes:
    cases = {case[0]["case"]: case for case in looked_at}

    def look(name: str) -> CaseView:
        found = evidence(root, cases[name][0]["result"])
        return CaseView(case_blocks(cases[name], found), found.picture)

    def volumes(name: str) -> Volumes | None:
        return volumes_of(root, night.cohort, name, cases[name][0]["result"])

    title = f"{night.cohort}, night {night.id}"
    return night_page(title, told, first_to_be_read(rows), list(cases), look, volumes)
