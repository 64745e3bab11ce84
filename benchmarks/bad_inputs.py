"""Inputs that readers get wrong: our verdicts beside what SimpleITK and nibabel do with the same files, in one run.

    python -m benchmarks.bad_inputs --page docs/bad-inputs.md

Every input of ``tests/bad_inputs`` is made from its seed, ingested as a cohort of its own, and opened by both readers
in processes of their own. Values and places are compared with what was written. Prints the table and writes it to a
results file; ``--page`` writes the same table as a page of the documentation.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import RESULTS, provenance, write_lines
from tests.bad_inputs import INPUTS
from tests.bad_inputs.inputs import BadInput, Finding
from tests.bad_inputs.ours import judged
from tests.bad_inputs.peers import READERS, Peers

COLUMNS = ("ours", *READERS)
UNDONE = ("refused", "failed")

Found = Mapping[str, Finding | None]
"""What each of COLUMNS made of one input; None where a reader is not made for it."""


@dataclass(frozen=True, slots=True)
class Count:
    """One reader over all inputs that it is made for."""

    reader: str
    bad: int
    accepted: int
    """Bad inputs that it opened without an error."""
    stuck: int
    """Inputs on which it crashed or did not end."""
    sound: int
    refused: int
    """Sound inputs that it refused."""
    wrong: int
    """Sound inputs of which it gave wrong values or places."""


def main() -> int:
    options = arguments()
    chosen = [item for item in INPUTS if not options.only or item.number in options.only]
    logging.getLogger("vnet").setLevel(logging.CRITICAL)
    results = measured(chosen)
    lines = ["# Inputs that readers get wrong", "", *table(chosen, results), "", *summary(chosen, results)]
    print("\n".join(lines))
    target = options.output or RESULTS / f"bad-inputs_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    write_lines(target, [*lines, "", *provenance("SimpleITK", "nibabel", "pydicom", "highdicom")])
    if options.page:
        options.page.write_text(page(chosen, results))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NUMBER", help="take some of the inputs")
    parser.add_argument("--hardware", default="2-cores", help="part of the results file's name")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/bad-inputs_...)")
    parser.add_argument("--page", type=Path, help="page of the documentation to write as well")
    return parser.parse_args()


def measured(items: Iterable[BadInput]) -> list[Found]:
    """What each reader makes of each input."""
    with ThreadPoolExecutor(1) as threads, Peers() as peers:
        return [
            {"ours": judged(item, threads), **{reader: peers.judged(item, reader) for reader in READERS}}
            for item in items
        ]


def table(items: Sequence[BadInput], results: Sequence[Found]) -> list[str]:
    """One row per input."""
    rows = [
        f"| {item.number} | {item.title}: {item.what} | {item.kind} | "
        + " | ".join(_cell(item, reader, found[reader]) for reader in COLUMNS)
        + " |"
        for item, found in zip(items, results, strict=True)
    ]
    heads = ["| # | input | it is | vnet-cohort | SimpleITK | nibabel |", "| --- | --- | --- | --- | --- | --- |"]
    return [*heads, *rows]


def _cell(item: BadInput, reader: str, finding: Finding | None) -> str:
    if finding is None:
        return ""
    wrong = ", **wrong**" if finding.right is False and usable(finding) > 0 else ""
    if reader == "ours":
        verdicts = [re.sub(r":(.+)", r" `\1`", verdict).replace(",", "` `") for verdict in finding.verdicts]
        return "; ".join(verdicts) + wrong
    (state,) = finding.verdicts
    if item.kind == "sound":
        return {"opens": "right" if finding.right else "**wrong**"}.get(state, f"**{state}**")
    return state if state == "refuses" or item.kind == "unsuitable" else f"**{state}**"


def usable(finding: Finding) -> int:
    """Number of cases, or 1 for a file that a stock reader opened, that can be worked with."""
    return sum(v == "opens" or v.split(":")[0] in ("accepted", "warned") for v in finding.verdicts)


def count(reader: str, items: Sequence[BadInput], results: Sequence[Found]) -> Count:
    """What one reader did over all inputs; ``unsuitable`` ones are no fault either way."""
    accepted = stuck = refused = wrong = bad = sound = 0
    for item, found in zip(items, results, strict=True):
        finding = found[reader]
        if finding is None:
            continue
        wanted = sum(not verdict.startswith("refused") for verdict in item.expected)
        if finding.verdicts[0] in ("crashes", "hangs"):
            stuck += 1
        elif item.kind == "bad":
            accepted += usable(finding) > wanted or finding.right is False
        elif item.kind == "sound":
            given = min(wanted, 1) if reader in READERS else wanted
            refused += usable(finding) < given
            wrong += usable(finding) >= given and finding.right is False
        bad += item.kind == "bad"
        sound += item.kind == "sound"
    return Count(reader, bad, accepted, stuck, sound, refused, wrong)


def summary(items: Sequence[BadInput], results: Sequence[Found]) -> list[str]:
    """One row per reader."""
    rows = []
    for reader in COLUMNS:
        c = count(reader, items, results)
        name = "vnet-cohort" if reader == "ours" else reader
        rows.append(f"| {name} | {c.bad} | {c.accepted} | {c.stuck} | {c.sound} | {c.refused} | {c.wrong} |")
    return [
        "| reader | bad inputs | silently accepted | crashed or hung | sound inputs | refused | opened wrong |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def page(items: Sequence[BadInput], results: Sequence[Found]) -> str:
    """docs/bad-inputs.md."""
    return "\n".join(
        [
            "# Inputs that readers get wrong",
            "",
            "Scans reach an archive cut off, renamed, edited, or exported by a program with a fault. A reader that",
            "opens such a file without a word gives a volume that is wrong, and so are the millilitres that follow.",
            "This table is made and held by the tests: every input is written from a seed, and the verdict is that of",
            "`vnet ingest` on it. `vnet ingest --explain CODE` tells what a code means and what to do about it.",
            "",
            *summary(items, results),
            "",
            "- **sound**: values and places can be known. Accepted ones were compared voxel by voxel, and each voxel's",
            "  place in the world, with what was written.",
            "- **bad**: damaged, contradictory, or a trap.",
            "- **unsuitable**: an honest file that is not one volume of one finite grey value per voxel on a grid with",
            "  right angles in mm. Opening it is no fault of a general reader, so it is not counted.",
            "- *silently accepted*: opened without an error. SimpleITK opens a folder of slices by its own series",
            "  reader; the warnings that this prints on standard error reach no program.",
            "- An empty cell: the reader is not made for such an input (nibabel for MetaImage and DICOM series, both",
            "  for archives and cohorts).",
            "- The defaults of the plan's section `reading` were used: it can have sheared axes, tilted gantries and",
            "  transforms that disagree resolved in place of refused.",
            "",
            *table(items, results),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
