"""Commands that segment: ``segment`` and ``nightly``."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.commands.command import Command, Result
from flows.commands.data import ingest_sources
from flows.commands.running import run_flow
from flows.commands.tables import case_row, summary, text_table
from flows.session import Session, open_session
from vnet_core.errors import ConfigError
from workers.identity import Pseudonyms

FORMATS = ("nifti", "mha", "nrrd", "ome-zarr", "dicom-seg", "rtstruct")
"""Formats of masks, by the names that ``--format`` takes."""


def _segment_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="folder, scan file, or manifest")
    parser.add_argument("--cohort", metavar="NAME", help="an ingested cohort, instead of sources")
    parser.add_argument("--model", required=True, metavar="NAME[@VERSION]")
    parser.add_argument("--output", metavar="DIR", help="also copy every mask to DIR, named after its case")
    parser.add_argument("--format", default="nifti", choices=FORMATS, help="format of the masks")


def segment(options: Namespace) -> Result:
    """``vnet segment``."""
    from flows.cohorts import segment_cohort
    from workers.models import load_model

    session = open_session()
    if bool(options.sources) == bool(options.cohort):
        raise ConfigError("segment.input", "name either sources or --cohort, not both and not neither")
    cohort = options.cohort
    if options.sources:
        paths = sorted(str(Path(source).resolve()) for source in options.sources)
        cohort = Pseudonyms.of(session.root).cohort("\0".join(paths))
        plan = load_model(session.root, options.model).plan
        channels = plan.channels if len(plan.channels) > 1 else ()
        ingest_sources(session.root, cohort, options.sources, channels, reading=plan.reading)
    data = run_flow(segment_cohort, cohort=cohort, model=options.model, mask_format=options.format)
    return night_result(session, data, options.output)


SEGMENT = Command("segment", "segment scans or a cohort with a model", "api", _segment_arguments, segment)


def _nightly_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--model", required=True, metavar="NAME[@VERSION]")
    parser.add_argument("--format", default="nifti", choices=FORMATS, help="format of the masks")


def nightly(options: Namespace) -> Result:
    """``vnet nightly``."""
    from flows.cohorts import nightly as flow

    session = open_session()
    data = run_flow(flow, cohort=options.cohort, model=options.model, mask_format=options.format)
    return night_result(session, data, None)


NIGHTLY = Command(
    "nightly", "what is new or changed: ingest, preprocess, segment, report", "api", _nightly_arguments, nightly
)


def night_result(session: Session, data: Mapping[str, Any], output: str | None) -> Result:
    """Cases of a night with their masks and volumes; masks are copied to ``output`` where it is given."""
    from workers.masks import load_report

    cases, rows = [], []
    for outcome in data["outcomes"]:
        case = case_row(outcome)
        if outcome.done:
            report = load_report(session.root, outcome.key)
            mask = session.root.path(f"{outcome.key}/{report['mask']}")
            if output:
                mask = copy_mask(mask, Path(output), outcome.case)
            regions = report.get("regions", [])
            case |= {"mask": str(mask), "labels": [_label(row) for row in report["labels"]]}
            case |= {"regions": [_label(row) for row in regions]} if regions else {}
            rows += [{"case": outcome.case, "state": outcome.state} | row for row in [*report["labels"], *regions]]
        cases.append(case)
    report_path = session.root.path(f"reports/{data['cohort']}/{data['night']}.csv")
    for row in rows:
        row["flags"] = " ".join(row["flags"])
    columns = ("case", "state", "name", "volume_ml", "components", "flags")
    parts = [
        f"night {data['night']} of cohort {data['cohort']}: {summary(data['outcomes'])}",
        text_table(rows, columns) if rows else "",
        f"table: {report_path}",
        f"masks: {Path(output).resolve() if output else session.root.path('results/' + data['cohort'])}",
    ]
    return Result("\n".join(p for p in parts if p), cases, {"night": data["night"], "report": str(report_path)})


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


def copy_mask(mask: Path, folder: Path, case: str) -> Path:
    """The mask as ``folder/<case><suffix>``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{case}{mask.name.removeprefix('mask')}"
    temporary = folder / f".{target.name}.part"
    if mask.is_dir():
        for old in (temporary, target):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(mask, temporary)
    else:
        shutil.copyfile(mask, temporary)
    temporary.replace(target)
    return target
