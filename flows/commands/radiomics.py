"""The command ``radiomics``: features of the published masks of a night."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.command import Command, Result
from flows.commands.tables import case_row, summary, text_table
from flows.session import open_session
from vnet_core.errors import ConfigError

if TYPE_CHECKING:
    from workers.ledger import Outcome

SHOWN = ("case", "name", "voxels", "morph_volume", "morph_sphericity", "stat_mean", "stat_var", "undefined")
"""Columns of the table on a terminal; all are in the file and in the JSON document."""


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--night", metavar="ID", help="which night (default: the newest with a report)")
    parser.add_argument("--label", metavar="NAME", help="only this label of the masks")
    parser.add_argument("--channel", metavar="NAME", help="whose intensities (default: the first channel)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--bins", type=int, metavar="N", help="grey levels between lowest and highest (default: 32)")
    levels.add_argument("--bin-width", type=float, metavar="W", help="or the width of a grey level, such as 25 HU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all features as .csv, .parquet or .json")


def radiomics(options: Namespace) -> Result:
    """``vnet radiomics``."""
    from workers.outputs import output_folder, write_output
    from workers.reports.radiomics import OUTPUTS, USUAL_LEVELS, GreyLevels, Wanted, radiomics_of_night, table

    output: Path | None = options.output
    suffix = output.suffix.lower() if output else ""
    if output and suffix not in OUTPUTS:
        raise ConfigError("radiomics.output", f"--output {output} ends in none of {', '.join(OUTPUTS)}; rename it")
    if output:
        output_folder(output.parent)
    given = options.bins is not None or options.bin_width is not None
    levels = GreyLevels(options.bins, options.bin_width) if given else USUAL_LEVELS
    wanted = Wanted(options.cohort, options.night, options.label, options.channel, levels)
    done = list(radiomics_of_night(open_session().root, wanted, _tell))
    rows = [row for computed in done for row in computed.rows]
    if output:
        write_output(output, table(rows, suffix))
    outcomes = [computed.outcome for computed in done]
    shown = [{name: row.get(name) for name in SHOWN} for row in rows]
    parts = [text_table(shown, SHOWN) if shown else "no labels", summary(outcomes)]
    parts += [f"table: {output}"] if output else []
    return Result("\n".join(parts), [case_row(one) for one in outcomes], {"rows": rows})


def _tell(outcome: Outcome) -> None:
    if sys.stderr.isatty():
        print(f"{outcome.case}: {outcome.state} in {outcome.seconds:.1f} s", file=sys.stderr)


RADIOMICS = Command(
    "radiomics",
    "shape, intensity and texture features of a night's masks, by IBSI's names (needs the extra radiomics)",
    "root",
    _arguments,
    radiomics,
)
