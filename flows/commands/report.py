"""The command ``report``: the report of a night, made anew from its masks without segmenting."""

from __future__ import annotations

import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Command, Result
from flows.commands.running import run_flow
from flows.commands.tables import text_table
from flows.session import open_session
from vnet_core.errors import ConfigError

if TYPE_CHECKING:
    from vnet_core.reporting import Reporting


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--night", metavar="ID", help="such as 2026-11-23_003000 (default: the newest)")
    parser.add_argument(
        "--settings", type=Path, metavar="FILE.toml", help="names, reference ranges and flags; kept for later nights"
    )
    parser.add_argument("--measure", action="store_true", help="measure the masks again")


def report(options: Namespace) -> Result:
    """``vnet report``."""
    from flows.reporting import report_night_anew
    from workers.reports.report import check_settings, reported_night, save_reporting

    root = open_session().root
    night = reported_night(root, options.cohort, options.night)
    if options.settings:
        settings = read_settings(options.settings)
        check_settings(root, night, settings)
        save_reporting(root, options.cohort, settings)
    data = run_flow(report_night_anew, cohort=options.cohort, night=night.id, measure=options.measure)
    return told(options.cohort, data, root.where(f"reports/{options.cohort}/{night.id}.csv"))


REPORT = Command("report", "make the report of a night anew from its masks", "api", _report_arguments, report)


def read_settings(file: Path) -> Reporting:
    """Settings of a TOML file. ConfigError ``reporting.file``, ``reporting.unknown-key`` or ``reporting.value``."""
    from vnet_core.reporting import Reporting

    try:
        mapping = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("reporting.file", f"the settings in {file} cannot be read: {error}; correct them") from None
    return Reporting.from_mapping(mapping)


def told(cohort: str, data: Mapping[str, Any], table: str) -> Result:
    """What changed in a night's rows and what is flagged now; ``table``: where they lie."""
    rows = data["rows"]
    cases = len({row["case"] for row in rows})
    lines = [f"night {data['night']} of cohort {cohort}: {data['changed']} of {len(rows)} rows changed, {cases} cases"]
    if data["flags"]:
        lines.append(text_table([{"flag": flag, "rows": n} for flag, n in data["flags"].items()], ("flag", "rows")))
    return Result("\n".join([*lines, f"table: {table}"]), [], {**data, "report": table})
