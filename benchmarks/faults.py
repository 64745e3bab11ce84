"""The catalogue of faults: what is injected, what must happen, and what was seen, in one run of the tests that do it.

    python -m benchmarks.faults --page docs/faults.md
    python -m benchmarks.faults --page docs/faults.md --keep FILE -- tests/flows

Tests name their faults by ``@pytest.mark.fault("F7")``; those that take long are marked ``faults`` too. All of them are
run, and the table is printed and written to a results file; ``--page`` writes it into a page of the documentation as
well, and ``--keep`` lets several runs add up to one table, in which a test that is run again has its latest outcome.
Ends with 1 where a test failed or a fault has none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import RESULTS, commit, provenance, tell

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table of faults: begin -->", "<!-- table of faults: end -->"
"""Of the table in a page."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the catalogue."""

    number: str
    injected: str
    expected: str


FAULTS = tuple(
    Fault(f"F{number}", injected, expected)
    for number, (injected, expected) in enumerate(
        (
            ("kill -9 of a Ray task's worker", "told or tried again; what was done is kept"),
            ("kill -9 of a segmenting actor", "replaced; its cases are tried again"),
            ("kill -9 of Ray's node (raylet)", "the night ends within 60 s and says so; the next finishes it"),
            ("kill -9 of Ray's control store (GCS)", "the night ends within 60 s and says so; the next finishes it"),
            ("kill -9 of a Dask worker, nanny or scheduler", "only what is not published is done again"),
            ("a case that kills its worker", "it alone fails; its neighbours are done"),
            ("kill -9 of every process at every fail point", "the next night finishes with the same bytes"),
            ("kill -9 of Prefect's server", "finished, or ended within 60 s; the next night finishes it"),
            ("Prefect's database locked, corrupt, read-only", "told before any work, or no result changes"),
            ("SIGTERM, Ctrl-C, Ctrl-C twice", "everything has ended within 30 s; the next night finishes it"),
            ("disk full", "`store.full`, nothing torn; finished once it is enlarged"),
            ("no inodes, quota used up, EIO", "`store.full` or the system's error; what was acknowledged is whole"),
            ("read-only root or folder", "`store.unwritable` before any work, or a failed row for every case"),
            ("no memory for a task", "`engine.memory` or `segment.out-of-memory` for the case; the next goes on"),
            ("small /dev/shm", "a whole night"),
            ("S3 answers 500 or 503, now and then or always", "asked again; `store.unavailable` after a bounded time"),
            ("S3 hangs, resets, cuts, lies about length, flips", "asked again or named; never half an object"),
            ("the answer to a PUT is lost", "one object, one winner"),
            ("kill -9 in an upload of many parts", "no object; the parts are found and removed"),
            ("kill -9 and restart of the S3 server", "writers wait; every acknowledged object is there"),
            ("wrong or read-only credentials", "`store.denied` before any work; no secret in any text"),
            ("power cut", "files and folders are synced before the receipt has its name"),
            ("the clock jumps by an hour or a day", "no two runs publish; no negative durations"),
            ("two runs of one cohort", "every case is done once"),
            ("a dead or stopped run holds a claim", "taken over; it publishes nothing when it wakes"),
            ("loss that is not finite", "steps are left out, or `train.diverged`; good weights are kept"),
            ("kill in a training, damaged checkpoint", "goes on from the last whole one, to the same weights"),
            ("a training worker dies or hangs", "the group starts again from its checkpoint"),
            ("GPU out of memory, device error", "smaller tiles, then named; a broken actor is replaced"),
            ("a straggler is stopped", "taken over or waited for; nothing is published twice"),
            ("a scan goes or changes between the stages", "refused; no mask"),
            ("a volume is damaged, an unfinished chunk planted", "not used; made again"),
            ("plan or model change between run and resume", "results of their own; none is mixed"),
            ("standard output or error closed or full", "no traceback; the work is done"),
            ("few open files or processes", "told before any work"),
        ),
        start=1,
    )
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one test came to."""

    faults: tuple[str, ...]
    outcome: str
    """passed, failed or skipped."""
    note: str
    seconds: float
    """From the fault to the end where the test measured it, else of the whole test."""
    measured: bool
    commit: str


class Recorder:
    """A plugin of pytest that keeps what the tests of faults came to, over what was known of them."""

    def __init__(self, known: Mapping[str, Outcome], commit: str) -> None:
        self.outcomes = dict(known)
        self._commit = commit

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """After every phase of every test."""
        report = yield
        faults = tuple(number for marker in item.iter_markers("fault") for number in marker.args)
        if faults and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[item.nodeid] = self._outcome(item, report, faults)
        return report

    def _outcome(self, item: pytest.Item, report: pytest.TestReport, faults: tuple[str, ...]) -> Outcome:
        facts: dict[str, Any] = dict(item.user_properties)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            facts["seen"] = f"left out: {report.longrepr[2].removeprefix('Skipped: ')}"
        seconds, note = float(facts.get("seconds", report.duration)), str(facts.get("seen", ""))
        return Outcome(faults, report.outcome, note, seconds, "seconds" in facts, self._commit)


def main() -> int:
    options = arguments()
    kept = read(options.keep) if options.keep else {}
    recorder = Recorder(kept, commit())
    code = pytest.main(["-m", "fault", "-p", "no:cacheprovider", *options.pytest], plugins=[recorder])
    outcomes = recorder.outcomes
    if options.keep:
        write(options.keep, outcomes)
    commits = ", ".join(sorted({outcome.commit for outcome in outcomes.values()}))
    lines = ["# Faults", "", *table(outcomes), "", f"- commits of the tests: {commits}"]
    lines += provenance("pytest", "prefect", "ray", "dask", "obstore")
    target = options.output or RESULTS / f"faults_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    tell(lines, target)
    if options.page:
        text = options.page.read_text("utf-8")
        options.page.write_text(with_table(text, table(outcomes)), "utf-8")
    missing = [fault.number for fault in FAULTS if not of(fault.number, outcomes)]
    if missing:
        print("no test: " + ", ".join(missing))
    return 1 if code or missing else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2-cores", help="part of the results file's name")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/faults_...)")
    parser.add_argument("--page", type=Path, help="page of the documentation whose table is written anew")
    parser.add_argument(
        "--keep", type=Path, help="file of what each test came to: read before, written after, so that runs add up"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    return parser.parse_args()


def read(file: Path) -> dict[str, Outcome]:
    """What tests came to in earlier runs, by test; none where the file does not exist yet."""
    if not file.exists():
        return {}
    told = json.loads(file.read_text("utf-8"))
    return {test: Outcome(**{**facts, "faults": tuple(facts["faults"])}) for test, facts in told.items()}


def write(file: Path, outcomes: Mapping[str, Outcome]) -> None:
    """The same, for a later run."""
    told = {test: asdict(outcome) for test, outcome in outcomes.items()}
    file.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def of(number: str, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """What the tests of one fault came to, by test."""
    return {test: outcome for test, outcome in sorted(outcomes.items()) if number in outcome.faults}


def table(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The rows, by number."""
    named = marked()
    lines = [
        "| fault | injected | must happen | seen | seconds to the end | shown by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault in FAULTS:
        found = of(fault.number, outcomes)
        cells = (
            fault.number,
            fault.injected,
            fault.expected,
            _seen(list(found.values()), fault.number in named),
            _seconds(list(found.values())),
            _shown(found),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seen(found: Sequence[Outcome], has_test: bool) -> str:
    if not found:
        return "not in this run" if has_test else "no test yet"
    counts = Counter(outcome.outcome for outcome in found)
    words = "passed" if counts["passed"] == len(found) else _counted(counts)
    notes = dict.fromkeys(outcome.note for outcome in found if outcome.note)
    return "; ".join([words, *notes]).replace("|", "\\|")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if counts[outcome])


def _seconds(found: Sequence[Outcome]) -> str:
    """Longest time, from the fault to the end where a test measured it."""
    measured = [outcome.seconds for outcome in found if outcome.measured]
    if measured:
        return f"{max(measured):.1f}"
    return f"{max(outcome.seconds for outcome in found):.1f} (whole test)" if found else ""


def _shown(tests: Iterable[str]) -> str:
    """Modules of the tests."""
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    return ", ".join(f"`{file}`" for file in files)


def with_table(text: str, lines: Sequence[str]) -> str:
    """A page with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *lines, END + after])


def marked() -> set[str]:
    """Numbers that tests name, read from their sources."""
    found = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        for names in re.findall(r"mark\.fault\(([^)]*)\)", path.read_text("utf-8")):
            found |= set(re.findall(r"F\d+", names))
    return found


if __name__ == "__main__":
    sys.exit(main())
