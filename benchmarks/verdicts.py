"""The verdict on every case of real folders: what was found, and the grid of what was accepted.

    python -m benchmarks.verdicts ../shared/data/dicom ../shared/data/odd-dicom ../shared/data/odd-nifti

Each folder is ingested as a cohort of its own. The table names the places of the scans, which the storage root does
not: use it on public data only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import RESULTS, provenance, write_lines
from workers.cohort import Entry, load_cohort, load_entries
from workers.ingest import ingest
from workers.storage.store import Root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS / f"verdicts_{datetime.now(UTC):%Y%m}.md")
    options = parser.parse_args()
    lines = ["# Verdicts on real scans", ""]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as executor:
        root = Root(scratch)
        for folder in options.folders:
            lines += section(root, folder, executor)
    write_lines(options.output, [*lines, *provenance("pydicom", "SimpleITK", "zarr")])
    print(options.output)
    return 0


def section(root: Root, folder: Path, executor: ThreadPoolExecutor) -> list[str]:
    """One folder's cases as a table, and what was set aside."""
    name = folder.resolve().name
    ingest(root, name, [str(folder.resolve())], executor)
    aside = load_cohort(root, name).set_aside
    return [
        f"## {name}",
        "",
        "| scan | label | verdict | slices, rows, columns | spacing z, y, x mm | reason |",
        "| --- | --- | --- | --- | --- | --- |",
        *sorted(row(entry, folder.resolve()) for entry in load_entries(root, name)),
        "",
        "Set aside: " + (", ".join(f"{count} {reason}" for reason, count in aside.items()) or "nothing") + ".",
        "",
    ]


def row(entry: Entry, folder: Path) -> str:
    """One case: where it lies below the folder, its verdict, and its grid or the reason why there is none."""
    case, verdict = entry.case, entry.verdict
    places = [Path(source.partition("#")[0]) for source in (*case.channels, *([case.label] if case.label else []))]
    shown = [str(place.relative_to(folder)) if place.is_relative_to(folder) else place.name for place in places]
    channels = ", ".join(dict.fromkeys(shown[: len(case.channels)]))
    label = shown[-1] if case.label else ""
    grid = case.geometry
    shape = " x ".join(map(str, grid.shape)) if grid else ""
    spacing = " x ".join(f"{mm:.4g}" for mm in grid.spacing_mm) if grid else ""
    codes = " ".join([verdict.state, *(f"`{code}`" for code in verdict.codes)])
    reason = verdict.message.replace("|", "/")
    return f"| {channels} | {label} | {codes} | {shape} | {spacing} | {reason} |"


if __name__ == "__main__":
    sys.exit(main())
