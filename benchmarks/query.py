"""Questions over the tables of 1,000 nights of 1,000 cases, beside pandas and pyarrow over the same files.

    python -m benchmarks.query --output benchmarks/results/query_<hardware>_<yyyymm>.md

The tables, one Parquet file for each night with two rows for each case, are made from a seed. Every run is a fresh
process on files in the page cache, the arms in turn; the clock of `vnet query`, a whole command, starts before its
process. `--nights` and `--cases` make it small.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from workers.reports.columns import SCHEMA
from workers.reports.query import Query, query
from workers.storage.store import Root

VNET = str(Path(sys.executable).with_name("vnet"))
COHORT = "liver"
LABELS = ("organ", "lesion")
FIRST = datetime(2023, 3, 1, 1, tzinfo=UTC)
PATIENT = "P00003"
MONTHS = (
    "SELECT night[:7] AS month, name, count(*) AS n, median(volume_ml) AS middle FROM rows GROUP BY ALL ORDER BY ALL"
)
LIMIT = 1000

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One question in the words of each arm; all give the same rows."""

    title: str
    ours: Query
    command: tuple[str, ...]
    """Arguments of ``vnet query``."""
    pandas: Callable[[list[str]], Rows]
    """Of the files, newest first."""
    arrow: Callable[[list[str]], Rows]


def make_root(folder: Path, nights: int, cases: int, seed: int = 0) -> None:
    """Tables of so many nights, two rows a case; one case in fifty is computed anew, one row in a hundred flagged."""
    rng = np.random.default_rng(seed)
    rows = cases * len(LABELS)
    case = np.repeat([f"case-{i:05}" for i in range(cases)], len(LABELS))
    volume = rng.lognormal(3, 0.6, rows)
    never = {name: pa.nulls(rows, SCHEMA.field(name).type) for name in ("reviewed_by", "reviewed_at", "earlier_case")}
    steady: dict[str, Any] = never | {
        "cohort": [COHORT] * rows,
        "case": case,
        "patient": np.repeat([f"P{i // 2:05}" for i in range(cases)], len(LABELS)),
        "codes": [""] * rows,
        "message": [""] * rows,
        "label": np.tile([1, 2], cases),
        "name": np.tile(LABELS, cases),
        "model": [f"{COHORT}@v2"] * rows,
        "result": np.repeat([f"results/{COHORT}/{rng.bytes(16).hex()}" for _ in range(cases)], len(LABELS)),
        "stage": ["segment"] * rows,
        "review": [""] * rows,
    }
    for field in SCHEMA:
        if field.name.endswith("_mm"):
            steady[field.name] = rng.normal(0, 100, rows)
    target = folder / "reports" / COHORT
    target.mkdir(parents=True)
    for number in range(nights):
        night = (FIRST + timedelta(days=number)).strftime("%Y-%m-%d_%H%M%S")
        anew = np.repeat(rng.random(cases) < 0.02, len(LABELS))
        before, volume = volume, volume * np.exp(np.where(anew, rng.normal(0, 0.02, rows), 0.0))
        tonight = {
            "night": [night] * rows,
            "state": np.where(anew, "computed", "cached"),
            "volume_ml": volume,
            "change_ml": volume - before,
            "change_percent": 100 * (volume - before) / before,
            "volume_low_ml": volume * 0.98,
            "volume_high_ml": volume * 1.02,
            "flags": np.where(rng.random(rows) < 0.01, "touches-border", ""),
            "finished": [night] * rows,
            "first_night": [FIRST.strftime("%Y-%m-%d_%H%M%S")] * rows,
        }
        columns = []
        for field in SCHEMA:
            found = (steady | tonight).get(field.name)
            if found is None:
                found = rng.integers(0, 2 if field.type == pa.bool_() else 50, rows)
            columns.append(found if isinstance(found, pa.Array) else pa.array(found).cast(field.type))
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), target / f"{night}.parquet")


def _pandas_filtered(*filters: tuple[str, str, Any]) -> Callable[[list[str]], Rows]:
    def run(files: list[str]) -> Rows:
        import pandas as pd

        return pd.read_parquet(files, filters=list(filters)).to_dict("records")

    return run


def _arrow_filtered(condition: pc.Expression) -> Callable[[list[str]], Rows]:
    return lambda files: ds.dataset(files).to_table(filter=condition).to_pylist()


def _pandas_range(files: list[str]) -> Rows:
    import pandas as pd

    filters = [("name", "==", "organ"), ("volume_ml", ">=", 20.0), ("volume_ml", "<=", 22.0)]
    found = pd.read_parquet(files, filters=filters)
    return found[found["change_percent"].abs() >= 1].head(LIMIT).to_dict("records")


def _arrow_range(files: list[str]) -> Rows:
    volume, change = pc.field("volume_ml"), pc.field("change_percent")
    within = (pc.field("name") == "organ") & (volume >= 20.0) & (volume <= 22.0)
    return ds.dataset(files).head(LIMIT, filter=within & ((change >= 1) | (change <= -1))).to_pylist()


def _pandas_months(files: list[str]) -> Rows:
    import pandas as pd

    found = pd.read_parquet(files, columns=["night", "name", "volume_ml"])
    groups = found.groupby([found["night"].str[:7], "name"])["volume_ml"]
    return groups.agg(n="size", middle="median").reset_index(names=["month", "name"]).to_dict("records")


def _arrow_months(files: list[str]) -> Rows:
    table = ds.dataset(files).to_table(["night", "name", "volume_ml"])
    table = table.append_column("month", pc.utf8_slice_codeunits(table["night"], 0, 7))
    # pyarrow knows an approximate median of groups alone
    sums = table.group_by(["month", "name"]).aggregate([("volume_ml", "count"), ("volume_ml", "approximate_median")])
    return sums.rename_columns(["month", "name", "n", "middle"]).sort_by([("month", "ascending")]).to_pylist()


ASKED = {
    "newest": Asked(
        "flagged rows of the newest night",
        Query(nights=1, flags=("any",)),
        ("--nights", "1", "--flag", "any"),
        lambda files: _pandas_filtered(("flags", "!=", ""))(files[:1]),
        lambda files: _arrow_filtered(pc.field("flags") != "")(files[:1]),
    ),
    "patient": Asked(
        "one patient over all nights",
        Query(patient=PATIENT, limit=0),
        ("--patient", PATIENT, "--limit", "0"),
        _pandas_filtered(("patient", "==", PATIENT)),
        _arrow_filtered(pc.field("patient") == PATIENT),
    ),
    "range": Asked(
        "organ of 20 to 22 mL that changed by 1 % or more, all nights",
        Query(labels=("organ",), volume_min_ml=20, volume_max_ml=22, change_min_percent=1),
        ("--label", "organ", "--volume-min-ml", "20", "--volume-max-ml", "22", "--change-min-percent", "1"),
        _pandas_range,
        _arrow_range,
    ),
    "months": Asked(
        "SQL: median volume by month and label", Query(sql=MONTHS), ("--sql", MONTHS), _pandas_months, _arrow_months
    ),
}
ARMS = ("vnet query, whole command", "ours", "pandas", "pyarrow")


def measure_here(arm: str, name: str, folder: Path) -> dict[str, float]:
    """One run of an arm in this process, imports made before the clock starts."""
    asked = ASKED[name]
    if arm == "pandas":
        import pandas  # noqa: F401
    files = sorted(map(str, (folder / "reports" / COHORT).glob("*.parquet")), reverse=True)
    work: dict[str, Callable[[], Rows]] = {
        "ours": lambda: query(Root(folder), asked.ours).rows,
        "pandas": lambda: asked.pandas(files),
        "pyarrow": lambda: asked.arrow(files),
    }
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = work[arm]()
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu_began, "rows": len(rows)}


def measure(arm: str, name: str, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    if arm == ARMS[0]:
        command = [VNET, "query", *ASKED[name].command, "--json", "--root", str(folder)]
        began, cpu_began = time.perf_counter(), _cpu_of_children()
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, cpu = time.perf_counter() - began, _cpu_of_children() - cpu_began
        return {"seconds": seconds, "cpu": cpu, "rows": len(json.loads(told)["rows"])}
    command = [sys.executable, "-m", "benchmarks.query", "--arm", arm, name, str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(
    options: argparse.Namespace, mebibytes: float, measured: dict[tuple[str, str], list[dict[str, float]]]
) -> list[str]:
    """The results as Markdown, with what is needed to repeat them."""
    from benchmarks.machine import provenance  # imports torch, which no arm should hold

    lines = [
        "# Questions over all nights",
        "",
        f"{options.nights} nights of {options.cases} cases with {len(LABELS)} labels:"
        f" {options.nights * options.cases * len(LABELS):,} rows of {len(SCHEMA)} columns in {options.nights} Parquet"
        f" files, {mebibytes:.0f} MiB. `ours` is the answer alone, from the listing of the files to plain rows; the"
        " whole command has the start of Python and the printing of JSON too. pandas and pyarrow read the same files"
        " with the filter pushed down as far as they can, and give the same rows (pyarrow's median is approximate)."
        " Fresh process for every run, files in the page cache, arms in turn.",
        "",
        "| question | arm | seconds | median | CPU seconds | rows |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (name, arm), runs in measured.items():
        seconds = " · ".join(f"{run['seconds']:.2f}" for run in runs)
        cpu = median(run["cpu"] for run in runs)
        lines.append(
            f"| {ASKED[name].title} | {arm} | {seconds} | {median(run['seconds'] for run in runs):.2f} | {cpu:.2f} |"
            f" {runs[0]['rows']} |"
        )
    slowest = max(median(run["seconds"] for run in runs) for (_, arm), runs in measured.items() if arm == ARMS[0])
    lines += ["", f"The slowest whole command: **{slowest:.2f} s**.", "", *provenance("duckdb", "pyarrow", "pandas")]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--questions", nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--output", type=Path, help="results file")
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "QUESTION", "ROOT"), help="one run here, told as JSON")
    options = parser.parse_args()
    if options.arm:
        arm, name, folder = options.arm
        print(json.dumps(measure_here(arm, name, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "root")
        make_root(folder, options.nights, options.cases)
        mebibytes = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 2**20
        measured: dict[tuple[str, str], list[dict[str, float]]] = {
            (name, arm): [] for name in options.questions for arm in ARMS
        }
        for _ in range(options.runs):
            for (name, arm), runs in measured.items():
                runs.append(measure(arm, name, folder))
        lines = report(options, mebibytes, measured)
    from benchmarks.machine import tell  # after the runs, as it imports torch

    tell(lines, options.output)


if __name__ == "__main__":
    main()
