"""What a night costs beside its work: many tiny scans end to end, and a night with nothing new over them.

    python -m benchmarks.overhead --cases 1000 --once-more 10000 --hardware NAME

The scans are 8 x 8 x 8 voxels and the network has four convolutions. The overhead per case is what the process of the
night, which holds flow, ledger and report but no engine, spends in processor seconds beyond a night of one case. The
night with nothing new follows over the same cases, and over ``--once-more`` cases that are given the result of another
one instead of being segmented; memory is the largest resident size of that process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.machine import RESULTS, provenance, tell
from tests.workers.tiny_cohort import MODEL, publish_model, take_in, write_scan
from workers.cohort import load_entries
from workers.nights.record import load_night, records
from workers.registry.models import load_model
from workers.segmentation.segment import Job, key_of
from workers.storage.store import Root

VNET = str(Path(sys.executable).with_name("vnet"))
COHORT = "tiny"


@dataclass(frozen=True)
class Measured:
    """One night as a command."""

    wall_s: float
    night_s: float
    """Of the record: from the look through the sources to the report."""
    cpu_s: float
    """Processor seconds of the process itself, without its children."""
    peak_mib: float
    """Its largest resident size."""
    task_runs: int
    counts: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--once-more", type=int, default=10_000)
    parser.add_argument("--hardware", default="this-machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or RESULTS / f"overhead_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    with tempfile.TemporaryDirectory(prefix="vnet-overhead-") as name:
        folder = Path(name)
        base = nightly(prepared(folder / "one", 1))
        root = prepared(folder / "new", options.cases)
        rows = [
            (f"{options.cases} new cases", options.cases, nightly(root)),
            (f"{options.cases} cases, nothing new", options.cases, nightly(root)),
        ]
        done = prepared(folder / "done", options.once_more)
        publish_all(done, Root(folder / "one" / "root"))
        rows.append((f"{options.once_more} cases with masks, first night", options.once_more, nightly(done)))
        rows.append((f"{options.once_more} cases, nothing new", options.once_more, nightly(done)))
    tell(lines(base, rows), output)


def lines(base: Measured, rows: Sequence[tuple[str, int, Measured]]) -> list[str]:
    """The results file; ``rows`` hold a name, the number of cases and what was measured."""
    table = [
        f"| {name} | {found.wall_s:.1f} | {found.night_s:.1f} | {1000 * found.night_s / cases:.1f}"
        f" | {1000 * (found.cpu_s - base.cpu_s) / max(1, cases - 1):.1f} | {found.peak_mib:.0f} | {found.task_runs}"
        f" | {told(found.counts)} |"
        for name, cases, found in [("1 new case", 1, base), *rows]
    ]
    return [
        "# What a night costs beside its work",
        "",
        "| night | command, s | night, s | night per case, ms | overhead per case, ms | peak of the process, MiB"
        " | Prefect task runs | cases |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *table,
        "",
        "Overhead: processor time of the process that holds flow, ledger and report, beyond that of one case. The night"
        " per case is wall time and includes reading, network, proof, picture and writing of each mask.",
        "",
        *provenance("prefect", "ray", "dask"),
    ]


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def prepared(folder: Path, cases: int) -> Root:
    """A root with a model and an ingested cohort."""
    for number in range(cases):
        write_scan(folder / "scans", f"case{number:05d}", number)
    root = Root(folder / "root")
    publish_model(root)
    take_in(root, COHORT, [folder / "scans"])
    return root


def publish_all(root: Root, example: Root) -> None:
    """Give every case of a root a result: the files of the example's only one under the key that a night looks for."""
    (folder,) = example.home.glob(f"results/{COHORT}/*/*")
    model = load_model(root, MODEL)
    receipt = json.loads((folder / "receipt.json").read_bytes())
    for entry in load_entries(root, COHORT):
        key = key_of(Job(COHORT, entry.case, "nifti"), model)
        shutil.copytree(folder, root.home / key, ignore=shutil.ignore_patterns("receipt.json"))
        root.put_json(f"{key}/receipt.json", receipt | {"case_digest": entry.case.digest})


def nightly(root: Root) -> Measured:
    """``vnet nightly`` as a process of its own."""
    command = [VNET, "nightly", "--cohort", COHORT, "--model", MODEL, "--root", root.shown, "--json"]
    tasks, started = task_runs(root), time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        cpu_s, peak_mib = watched(process)
        wall_s = time.monotonic() - started
        out.seek(0)
        document = json.load(out)
    newest = load_night(root, COHORT, records(root, COHORT)[-1])
    return Measured(wall_s, newest.seconds, cpu_s, peak_mib, task_runs(root) - tasks, document["counts"])


def watched(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Processor seconds and largest resident MiB of a process, looked at until it ends."""
    cpu_s = peak_mib = 0.0
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, FileNotFoundError):
            times = seen.cpu_times()
            cpu_s = times.user + times.system
            status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
            peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM" in status else peak_mib
        time.sleep(0.05)
    return cpu_s, peak_mib


def task_runs(root: Root) -> int:
    """Task runs in the database of the root's Prefect server."""
    database = root.home / "prefect" / "prefect.db"
    if not database.exists():
        return 0
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return int(connection.execute("select count(*) from task_run").fetchone()[0])


if __name__ == "__main__":
    main()
