"""Commands that segment: ``segment`` and ``nightly``."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.commands.command import Command, Result
from flows.commands.data import ingest_sources
from flows.commands.running import run_flow
from flows.commands.tables import case_row, summary, text_table
from flows.session import Session, open_session
from vnet_core.errors import ConfigError
from vnet_core.plan import config_error
from workers.identity import Pseudonyms
from workers.outputs import output_folder, unwritable
from workers.settings.rules import DEFAULT_RULES, NightRules
from workers.storage.store import Root

FORMATS = ("nifti", "mha", "nrrd", "ome-zarr", "dicom-seg", "rtstruct")
"""Formats of masks, by the names that ``--format`` takes."""
SHOWN = 200
"""Most rows of a night that are printed."""


def _segment_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="folder, scan file, or manifest")
    parser.add_argument("--cohort", metavar="NAME", help="an ingested cohort, instead of sources")
    parser.add_argument("--model", required=True, metavar="NAME[@VERSION|@ALIAS]")
    parser.add_argument("--output", metavar="DIR", help="also copy every mask to DIR, named after its case")
    parser.add_argument("--format", default="nifti", choices=FORMATS, help="format of the masks")


def segment(options: Namespace) -> Result:
    """``vnet segment``."""
    from flows.cohorts import segment_cohort
    from workers.ingest import Names
    from workers.registry.models import load_model

    session = open_session()
    if bool(options.sources) == bool(options.cohort):
        raise ConfigError("segment.input", "name either sources or --cohort, not both and not neither")
    if options.output:
        output_folder(Path(options.output))
    cohort = options.cohort
    if options.sources:
        paths = sorted(str(Path(source).resolve()) for source in options.sources)
        cohort = Pseudonyms.of(session.root).cohort("\0".join(paths))
        plan = load_model(session.root, options.model).plan
        channels = plan.channels if len(plan.channels) > 1 else ()
        ingest_sources(session.root, cohort, options.sources, Names(channels, reading=plan.reading))
    data = run_flow(segment_cohort, cohort=cohort, model=options.model, mask_format=options.format)
    return night_result(session, data, options.output)


SEGMENT = Command("segment", "segment scans or a cohort with a model", "api", _segment_arguments, segment)


def _nightly_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--model", required=True, metavar="NAME[@VERSION|@ALIAS]")
    parser.add_argument("--format", default="nifti", choices=FORMATS, help="format of the masks")
    parser.add_argument("--plan-only", action="store_true", help="say what the night would do and cost, and do nothing")
    rules = parser.add_argument_group("rules", "what is left out is as in the site file, or as it stands without one")
    rules.add_argument("--deadline", metavar="HH:MM", help="stop at this time of day; the rest is carried over")
    rules.add_argument("--hours", type=float, metavar="N", help="stop after so many hours; the rest is carried over")
    rules.add_argument("--retries", type=int, metavar="N", help="how often a failed case is tried again")
    rules.add_argument(
        "--quarantine-after", type=int, metavar="N", help="nights with a failure before a case is left alone"
    )
    rules.add_argument("--review", choices=("none", "flagged"), help="whether masks with a flag wait for a person")
    rules.add_argument(
        "--deliver", metavar="DIR", help="copy masks there that need no decision, named after their case"
    )
    rules.add_argument("--challenger-share", type=float, metavar="X", help="share that the model's challenger does too")


def nightly(options: Namespace) -> Result:
    """``vnet nightly``."""
    from flows.cohorts import nightly as flow
    from flows.cohorts import plan_night

    session = open_session()
    asked = {
        "cohort": options.cohort,
        "model": options.model,
        "mask_format": options.format,
        "rules": _rules(session, options),
    }
    if options.plan_only:
        found = run_flow(plan_night, **asked)["forecast"]
        return Result(f"next night of cohort {options.cohort}: {found.words}", [], {"forecast": asdict(found)})
    return night_result(session, run_flow(flow, **asked), None)


def _rules(session: Session, options: Namespace) -> NightRules:
    """Those of the cohort's schedule, if it has one, with what the options say on top."""
    base = next((entry.rules for entry in session.site.nightly if entry.cohort == options.cohort), DEFAULT_RULES)
    said = {name: getattr(options, name, None) for name in NightRules.model_fields}
    try:
        return NightRules(**{**base.model_dump(), **{name: value for name, value in said.items() if value is not None}})
    except ValidationError as error:
        raise config_error(error, NightRules, "rules") from None


NIGHTLY = Command(
    "nightly", "what is new or changed: ingest, preprocess, segment, report", "api", _nightly_arguments, nightly
)


def night_result(session: Session, data: Mapping[str, Any], output: str | None) -> Result:
    """Cases of a night with their masks and volumes; masks are copied to ``output`` where it is given.

    A mask that waits for a decision or was rejected is not handed out.
    """
    from workers.nights.decisions import published
    from workers.nights.record import load_night
    from workers.reports.report import read_rows
    from workers.segmentation.masks import mask_file

    root, cohort = session.root, data["cohort"]
    rows = [row for row in read_rows(root, cohort, data["night"]) if row["result"]]
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    name = mask_file(load_night(root, cohort, data["night"]).mask_format)
    cases, held = [], 0
    for outcome in data["outcomes"]:
        case = case_row(outcome)
        if outcome.case in by_case:
            parts = by_case[outcome.case]
            review = parts[0]["review"] or ""
            key = f"{parts[0]['result']}/{name}" if published(review) else ""
            mask = root.where(key) if key else None
            held += mask is None
            if output and key:
                mask = str(copy_mask(root, key, Path(output), outcome.case))
            regions = [_label(row) for row in parts if row["label"] is None]
            labels = [_label(row) for row in parts if row["label"] is not None]
            case |= {"mask": mask, "review": review, "labels": labels}
            case |= {"regions": regions} if regions else {}
        cases.append(case)
    report_path = root.where(f"reports/{cohort}/{data['night']}.csv")
    columns = ("case", "state", "name", "volume_ml", "components", "flags")
    lines = [
        f"night {data['night']} of cohort {cohort}: {summary(data['outcomes'])}",
        text_table(rows[:SHOWN], columns) if rows else "",
        f"and {len(rows) - SHOWN} more rows, all in the table" if len(rows) > SHOWN else "",
        f"{held} masks wait for a decision or were rejected: vnet review list --cohort {cohort}" if held else "",
        f"table: {report_path}",
        f"masks: {Path(output).resolve() if output else root.where('results/' + cohort)}",
    ]
    return Result("\n".join(line for line in lines if line), cases, {"night": data["night"], "report": report_path})


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
    slices = None if row["slice_first"] is None else [row["slice_first"], row["slice_last"]]
    return {
        "label": row["label"],
        "name": row["name"],
        "volume_ml": row["volume_ml"],
        "voxels": row["voxels"],
        "slices": slices,
        "touches_border": row["touches_border"],
    }


def copy_mask(root: Root, key: str, folder: Path, case: str) -> Path:
    """The mask of that key as ``folder/<case><suffix>``, whole or not at all. ConfigError ``output.unwritable``."""
    output_folder(folder)
    target = folder / f"{case}{key.rpartition('/')[2].removeprefix('mask')}"
    temporary = folder / f".{target.name}.part"
    with root.at_hand(key) as mask:
        try:
            if mask.is_dir():
                for old in (temporary, target):
                    shutil.rmtree(old, ignore_errors=True)
                shutil.copytree(mask, temporary)
            else:
                shutil.copyfile(mask, temporary)
            temporary.replace(target)
        except OSError as error:
            raise unwritable(target, error) from None
    return target
