"""The command ``evaluate``: masks against truth."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Command, Result
from flows.commands.tables import case_row, text_table, undone
from vnet_core.errors import ConfigError
from workers.engines.clusters import processors

if TYPE_CHECKING:
    from vnet_core.metrics import Structure


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PREDICTIONS", help="folder of masks")
    parser.add_argument("truth", metavar="TRUTH", help="folder of true label maps with the same names")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="VALUES=NAME",
        help="what to score: 1=liver, or labels together as 1,2,4=whole-tumour (default: every label)",
    )
    parser.add_argument(
        "--tolerance-mm", nargs="+", type=float, default=[1.0], metavar="MM", help="of surface Dice (default: 1)"
    )
    parser.add_argument("--patients", metavar="FILE", help="CSV with the columns case and patient, for the intervals")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write scores as .csv, .parquet or .json")


def evaluate(options: Namespace) -> Result:
    """``vnet evaluate``."""
    from workers.evaluate import OUTPUTS, columns, masks_in, patients_in, summary, to_parquet
    from workers.evaluate import evaluate as run
    from workers.outputs import output_folder, write_output
    from workers.reports.report import to_csv

    output: Path | None = options.output
    if output and output.suffix.lower() not in OUTPUTS:
        raise ConfigError("evaluate.output", f"--output {output} ends in none of {', '.join(OUTPUTS)}; rename it")
    if output:
        output_folder(output.parent)
    patients = patients_in(options.patients) if options.patients else {}
    tolerances_mm = options.tolerance_mm
    with ThreadPoolExecutor(processors()) as executor:
        found = run(
            masks_in(options.predictions),
            masks_in(options.truth),
            parse_structures(options.label),
            tolerances_mm,
            executor,
        )
    means = summary(found, patients)
    cases = [case_row(e.outcome) | {"labels": list(e.labels)} for e in found]
    rows = [{"case": e.outcome.case} | row for e in found for row in e.labels]
    names = columns(tolerances_mm)
    if output:
        written = {
            ".csv": lambda: to_csv(rows) if rows else (",".join(names) + "\n").encode(),
            ".parquet": lambda: to_parquet(rows, names),
            ".json": lambda: json.dumps({"cases": cases, **means}, allow_nan=False, indent=1).encode(),
        }[output.suffix.lower()]()
        write_output(output, written)
    return Result(_scores_text(found, rows, means, names), cases, means)


EVALUATE = Command(
    "evaluate",
    "masks against truth: overlap, distances and volumes per case, label and cohort",
    "nothing",
    _arguments,
    evaluate,
)


def _scores_text(
    found: Sequence[Any], rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any], names: Sequence[str]
) -> str:
    """Scores of each case, then of each structure over the cases."""
    tolerant = [name for name in names if name.startswith("surface_dice")]
    shown = ["dice", "hd95_mm", "assd_mm", *tolerant, "volume_ml", "truth_volume_ml", "volume_error"]
    over_cases = [
        {"name": name, "metric": metric, **of_name[metric]}
        for name, of_name in means["summary"]["labels"].items()
        for metric in ("dice", "iou", "hd95_mm", "assd_mm", "abd_mm", *tolerant, "absolute_volume_error")
    ]
    lines = [
        text_table(rows, ("case", "name", *shown)),
        undone([e.outcome for e in found]),
        "over the cases: mean with 95 % interval; infinite: prediction or truth was empty",
        text_table(
            over_cases,
            ("name", "metric", "cases", "infinite", "mean", "low", "high", "median", "worst", "worst_case"),
        ),
    ]
    lines += [f"mean Dice {name}: {value:.4f}" for name, value in means["dice"].items()]
    if means["mean_dice"] is not None:
        lines.append(f"mean Dice over labels: {means['mean_dice']:.4f}")
    return "\n".join(line for line in lines if line)


def parse_structures(given: Sequence[str]) -> tuple[Structure, ...]:
    """What is scored, from ``VALUE=NAME`` or ``VALUE,VALUE=NAME``; ConfigError ``label.option`` otherwise."""
    from vnet_core.metrics import Structure

    found = []
    for text in given:
        numbers, _, name = text.partition("=")
        values = numbers.split(",")
        if not name or not all(v.isdecimal() and 0 < int(v) < 65536 for v in values):
            raise ConfigError(
                "label.option", f"--label {text!r} is not VALUE=NAME or VALUE,VALUE=NAME, such as 1=liver or 1,4=core"
            )
        found.append(Structure(name, tuple(dict.fromkeys(int(v) for v in values))))
    names = [structure.name for structure in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("label.option", f"--label gives the name {twice[0]!r} twice; give each a name of its own")
    return tuple(sorted(found, key=lambda structure: (len(structure.values) > 1, structure.values)))
