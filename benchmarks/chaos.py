"""A night of which something is killed every few seconds, started again until it is done; beside one in peace.

    python -m benchmarks.chaos --seconds 600 --seed 1

Sixty small cases, twenty of them bad in ways of ``tests/bad_inputs``, are segmented in peace once, and then round after
round while processes of the night are killed at moments drawn from the seed: its own, the actor of Ray, a worker of
Dask, Prefect's server, the node of Ray. Every round ends with the verdicts and, by SHA-256, the files of the night in
peace. What was done how often is told by the log of the fail points, which no kill shortens. Ends with 1 where a
published case was executed again, a file or a verdict differs, or a process is left over.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, provenance, tell
from tests.bad_inputs import metaimage, nifti
from tests.flows.command import Command, receipts, until
from tests.workers.tiny_cohort import MODEL, publish_model, take_in
from vnet_core.phantoms import PhantomSpec, phantom
from workers.failpoints import LOG_VARIABLE
from workers.nights.record import records
from workers.reports.report import read_rows
from workers.sources.scans import write_volume
from workers.storage.store import Root

COHORT = "many"
BETWEEN_S = (5.0, 15.0)
"""Shortest and longest time between two kills."""
ROUND_S = 600.0
"""A round that is not done so long after the last kill has failed; so has a night in peace that takes longer."""
OVER_S = 90.0
"""How long what a killed process has started may take to end."""
KINDS = ("flow", "actor", "actor", "dask worker", "dask worker", "prefect server", "raylet")
"""What is killed; the more often it stands here, the more often."""
_PART = {"actor": "ray::Segmenter", "dask worker": "multiprocessing.spawn", "prefect server": "flows.server"}
"""Of the command line of each kind of process, but for the flow's own and the raylet."""


@dataclass
class Tally:
    """What happened in all rounds together."""

    rounds: int = 0
    nights: int = 0
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    """Kills that found no process of their kind at that moment."""
    executions: Counter[str] = field(default_factory=Counter)
    """By stage: how often a case was begun."""
    wrong: list[str] = field(default_factory=list)
    """What must not happen and did."""


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lines, wrong = chaos(Path(folder), options.seconds, options.seed, (options.good, options.bad))
    target = options.output or RESULTS / f"chaos_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    tell([*lines, "", *provenance("prefect", "ray", "dask")], target)
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="kill for so long; the last round is finished")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--good", type=int, default=40, help="cases that can be segmented")
    parser.add_argument("--bad", type=int, default=20, help="cases that must be refused")
    parser.add_argument("--hardware", default="2-cores", help="part of the results file's name")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/chaos_...)")
    return parser.parse_args()


def chaos(folder: Path, seconds: float, seed: int, cases: tuple[int, int]) -> tuple[list[str], list[str]]:
    """The lines of the report, and what went wrong."""
    good, bad = cases
    fresh = made(folder, good, bad)
    peace = folder / "peace"
    shutil.copytree(fresh, peace)
    began = time.monotonic()
    command = Command(*nightly(), root=peace)
    try:
        code = command.wait(ROUND_S)
        assert code == 3, f"the night in peace ended with {code}: {command.err}"
    finally:
        command.end()
    peace_s = time.monotonic() - began
    wanted, verdicts = receipts(peace, f"results/{COHORT}"), told(peace)
    assert len(wanted) == good, f"{len(wanted)} of {good} cases were segmented in peace"
    tally, dice, end = Tally(), random.Random(seed), time.monotonic() + seconds
    while tally.rounds == 0 or time.monotonic() < end:
        root = folder / f"round-{tally.rounds}"
        shutil.copytree(fresh, root)
        one_round(root, dice, end, tally)
        compare(root, wanted, verdicts, tally)
        shutil.rmtree(root)
    return report(tally, peace_s, (good, bad), seed), tally.wrong


def made(folder: Path, good: int, bad: int) -> Path:
    """A root with the cohort and a model; nothing is preprocessed."""
    scans = folder / "scans"
    scans.mkdir(parents=True)
    for number in range(good):
        image, _ = phantom(PhantomSpec(seed=number, shape=(40, 40, 40), spacing_mm=(1.5, 1.5, 1.5)))
        write_volume(scans / f"good-{number:02d}.nii", image)
    inputs = [i for i in (*nifti.INPUTS, *metaimage.INPUTS) if i.kind == "bad" and i.source == "." and not i.during]
    for item in inputs[:bad]:
        with tempfile.TemporaryDirectory() as place:
            item.make(Path(place))
            made_file = Path(place) / item.opens
            shutil.copyfile(made_file, scans / f"bad-{item.number}{''.join(made_file.suffixes)}")
    root = Root(folder / "fresh")
    publish_model(root)
    take_in(root, COHORT, [scans])
    return root.home


def nightly() -> list[str]:
    rules = ["--retries", "0", "--quarantine-after", "1000"]
    return ["nightly", "--cohort", COHORT, "--model", MODEL, "--json", *rules]


def one_round(root: Path, dice: random.Random, end: float, tally: Tally) -> None:
    """Nights under fire until one has settled all cases, then what the fail points saw."""
    began, log, commands = time.monotonic(), root / "executions", []
    late = max(began, end) + ROUND_S
    strike = began + dice.uniform(*BETWEEN_S)
    done = False
    while not done:
        if time.monotonic() > late:
            tally.wrong.append(f"round {tally.rounds} was not done {ROUND_S:.0f} s after the last kill")
            break
        command = Command(*nightly(), root=root, **{LOG_VARIABLE: str(log)})
        commands.append(command)
        tally.nights += 1
        while command.running and time.monotonic() <= late:
            if strike <= time.monotonic() < end:
                kill(command, dice.choice(KINDS), tally)
                strike = time.monotonic() + dice.uniform(*BETWEEN_S)
            time.sleep(0.05)
        done = not command.running and is_done(command)
    tally.seconds += time.monotonic() - began
    tally.rounds += 1
    for command in commands:
        try:
            until(command.over, OVER_S)
        except AssertionError:
            tally.wrong.append("left over: " + "; ".join(str(p) for p in command.left()))
        command.end()
    count(root, log, tally)


def kill(command: Command, kind: str, tally: Tally) -> None:
    """kill -9 of one process of a kind, where there is one."""
    if kind == "flow":
        command.kill()
        tally.kills[kind] += 1
        return
    process = raylet(command) if kind == "raylet" else command.process(_PART[kind])
    if process is None:
        tally.missed[kind] += 1
        return
    try:
        process.kill()
    except psutil.NoSuchProcess:
        tally.missed[kind] += 1
        return
    tally.kills[kind] += 1


def raylet(command: Command) -> psutil.Process | None:
    for process in command.left():
        try:
            if process.name() == "raylet":
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def is_done(command: Command) -> bool:
    """Whether a night has ended by itself with a mask or a refusal for every case."""
    try:
        cases = json.loads(command.out)["cases"]
    except (ValueError, KeyError):
        return False
    return all(case["state"] in ("computed", "cached", "refused") for case in cases)


def count(root: Path, log: Path, tally: Tally) -> None:
    """Add up the executions of a round; one that began after its result was published is wrong."""
    passes = [line.split(" ") for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    published: dict[str, int] = {}
    for path in (*root.glob(f"results/{COHORT}/*/*/receipt.json"), *root.glob("volumes/*/receipt.json")):
        published[path.parent.relative_to(root).as_posix()] = path.stat().st_mtime_ns
    for point, key, moment_ns in passes:
        # a receipt that was written twice has the time of the second
        if point.endswith(":sealed"):
            published[key] = min(published.get(key, sys.maxsize), int(moment_ns))
    for point, key, moment_ns in passes:
        stage, _, what = point.partition(":")
        if what != "read":
            continue
        tally.executions[stage] += 1
        if int(moment_ns) > published.get(key, sys.maxsize):
            tally.wrong.append(f"{stage} of {key} was executed again after it was published")


def told(root: Path) -> dict[str, tuple[str, str]]:
    """State and codes of every case in the newest night; a mask is a mask, whichever night made it."""
    newest = records(Root(root), COHORT)[-1]
    rows = read_rows(Root(root), COHORT, newest)
    return {row["case"]: ("done" if row["state"] == "cached" else row["state"], row["codes"]) for row in rows} | {
        row["case"]: ("done", row["codes"]) for row in rows if row["state"] == "computed"
    }


def compare(root: Path, wanted: Mapping[str, Any], verdicts: Mapping[str, tuple[str, str]], tally: Tally) -> None:
    """Note every difference between a round and the night in peace."""
    found = receipts(root, f"results/{COHORT}")
    tally.wrong += [f"the files of {case} differ" for case in wanted if found.get(case) != wanted[case]]
    tally.wrong += [f"{case} has a result" for case in found.keys() - wanted.keys()]
    if told(root) != verdicts:
        tally.wrong.append("the verdicts differ")
    for path in root.glob(f"results/{COHORT}/*/*/receipt.json"):
        key = path.parent.relative_to(root).as_posix()
        tally.wrong += [f"{key}/{name} is damaged" for name in Root(root).damaged(key)]
    if Root(root).names("leases"):
        tally.wrong.append("claims are left over")


def report(tally: Tally, peace_s: float, cases: tuple[int, int], seed: int) -> list[str]:
    good, bad = cases
    once = good * tally.rounds
    hits = ", ".join(f"{number} {kind}" for kind, number in sorted(tally.kills.items()))
    extra = {stage: number - once for stage, number in sorted(tally.executions.items())}
    lines = [
        "# A night under fire",
        "",
        f"{good + bad} small cases, {bad} of them bad; seed {seed}; a kill -9 every {BETWEEN_S[0]:.0f} to"
        f" {BETWEEN_S[1]:.0f} s, and the night started again until it was done.",
        "",
        "| what | |",
        "| --- | --- |",
        f"| rounds, each a whole night from nothing | {tally.rounds} |",
        f"| nights started | {tally.nights} |",
        f"| kills | {sum(tally.kills.values())}: {hits or 'none'} |",
        f"| kills that found no such process | {sum(tally.missed.values())} |",
        *(
            f"| executions of {stage}: needed, done, extra | {once}, {tally.executions[stage]}, {number} |"
            for stage, number in extra.items()
        ),
        f"| published cases that were executed again | {_number(tally.wrong, 'executed again')} |",
        f"| seconds in peace | {peace_s:.0f} |",
        f"| seconds of a round | {tally.seconds / tally.rounds:.0f}, {tally.seconds / tally.rounds / peace_s:.1f} times"
        " that |",
        f"| files and verdicts are those in peace, by SHA-256 | {'no' if tally.wrong else 'yes'} |",
    ]
    return lines if not tally.wrong else [*lines, "", "Wrong:", "", *(f"- {text}" for text in tally.wrong)]


def _number(wrong: Sequence[str], part: str) -> int:
    return sum(part in text for text in wrong)


if __name__ == "__main__":
    sys.exit(main())
