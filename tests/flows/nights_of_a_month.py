"""Thirty nights of one cohort with an injected clock, and what each of them must come to, told by a model of its own.

    python -m tests.flows.nights_of_a_month FOLDER

prints a JSON line per night; an assertion fails where the ledger is not what the model expects.

The month: scans arrive, change, go, and come truncated; a disk refuses a case's results for some nights, long enough to
put it in quarantine; one night ends at its deadline, one is killed; a new model is promoted and rolled back.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.server.process import local_api
from flows.server.settings import prefect_environment
from tests.files import file_of
from tests.workers.tiny_cohort import MODEL, publish_model, take_in, write_scan
from workers.engines.clusters import ray_session
from workers.reports.report import read_rows
from workers.settings.rules import NightRules
from workers.settings.site import Site
from workers.storage.store import Root

COHORT = "month"
FIRST = datetime(2026, 1, 1, 1, 0, tzinfo=UTC)
QUARANTINE_AFTER = 3
SPOILT, HEALED = range(5, 9), 11
"""Nights in which the disk refuses the results of one case, and the night before which it is released."""
DEADLINE, KILLED, PROMOTED, ROLLED_BACK = 9, 14, 18, 21
NIGHTS = 30


@dataclass
class Expected:
    """What is true of the sources, and what was computed for them so far."""

    contents: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """Seed of each scan's bytes, and whether it is whole."""
    computed: set[tuple[str, int, str]] = field(default_factory=set)
    """Case, seed and model of every mask that was made."""
    failed: Counter[str] = field(default_factory=Counter)
    """Nights with a failure since the last success."""

    def states(self, model: str, spoilt: str | None) -> dict[str, str]:
        """States of a night that nothing interrupts."""
        found = {}
        for case, (seed, whole) in self.contents.items():
            if not whole:
                found[case] = "refused"
            elif (case, seed, model) in self.computed:
                found[case] = "cached"
            elif case == spoilt or self.failed[case] >= QUARANTINE_AFTER:
                found[case] = "failed"
            else:
                found[case] = "computed"
        return found


class Month:
    """The cohort's sources and its root, night after night."""

    def __init__(self, folder: Path) -> None:
        self.scans, self.root = folder / "scans", Root(folder / "root")
        self.expected, self.random = Expected(), random.Random(7)
        self.model = "v1"
        self.arrived = 0

    def arrive(self, whole: bool = True) -> str:
        case = f"case{self.arrived:03d}"
        self.arrived += 1
        self.change(case, whole)
        return case

    def change(self, case: str, whole: bool = True) -> None:
        seed = self.random.randrange(1 << 30)
        path = write_scan(self.scans, case, seed)
        if not whole:
            path.write_bytes(path.read_bytes()[:-64])
        self.expected.contents[case] = (seed, whole)

    def leave(self, case: str) -> None:
        (self.scans / f"{case}.nii").unlink()
        del self.expected.contents[case]

    def day(self, number: int) -> None:
        """What happens to the sources before a night."""
        if number == 0:
            for _ in range(6):
                self.arrive()
        for _ in range(self.random.choice((0, 0, 1, 2))):
            self.arrive(whole=self.random.random() > 0.2)
        cases = sorted(self.expected.contents)
        if number % 4 == 2:
            self.change(self.random.choice(cases[1:]))
        if number % 9 == 8:
            self.leave(cases[-1])

    def blocked(self) -> Path:
        """Where the spoilt case's results would lie, in a place of their own."""
        return file_of(self.root, f"results/{COHORT}/case000")

    def rows_are(self, night: str, states: dict[str, str]) -> None:
        """One state per case, and every case of the sources in the table."""
        rows = read_rows(self.root, COHORT, night)
        found: dict[str, set[str]] = {}
        for row in rows:
            found.setdefault(row["case"], set()).add(row["state"])
        assert found == {case: {state} for case, state in states.items()}, (night, found, states)
        labels = Counter((row["case"], row["label"]) for row in rows)
        assert max(labels.values()) == 1, "a case stands twice"

    def settle(self, states: dict[str, str]) -> None:
        """Remember what a night did."""
        for case, state in states.items():
            if state == "computed":
                self.expected.computed.add((case, self.expected.contents[case][0], self.model))
            if state in ("computed", "cached"):
                self.expected.failed.pop(case, None)
            elif state == "failed" and self.expected.failed[case] < QUARANTINE_AFTER:
                self.expected.failed[case] += 1


def main(folder: Path) -> None:
    month = Month(folder)
    publish_model(month.root)
    month.day(0)
    take_in(month.root, COHORT, [month.scans])
    os.environ["VNET_ROOT"] = str(month.root.home)
    home = month.root.home / "prefect"
    os.environ.update(prefect_environment(home))
    with local_api(home) as api:
        os.environ["PREFECT_API_URL"] = api.url
        import flows.cohorts  # noqa: F401  the server starts meanwhile

        api.wait_until_ready()
        with ray_session(None, 2):
            for number in range(NIGHTS):
                print(json.dumps(one(month, number)), flush=True)


def one(month: Month, number: int) -> dict[str, object]:
    """One day and its night."""
    from workers.nights import attempts
    from workers.registry import aliases as registry

    if number:
        month.day(number)
    if number == PROMOTED:
        publish_model(month.root, "v2", mirror_axes=(2,))
        registry.promote(month.root, MODEL, "v2", "a person", "finds more")
        month.model = "v2"
    if number == ROLLED_BACK:
        registry.rollback(month.root, MODEL, "a person")
        month.model = "v1"
    spoilt = "case000" if number in SPOILT else None
    if number == SPOILT.start:
        month.change("case000")
        spoil(month.blocked())
    if number == SPOILT.stop:
        heal(month.blocked())
    if number == HEALED:
        attempts.release(month.root, COHORT, ["case000"])
        month.expected.failed.pop("case000", None)
    started = FIRST + timedelta(days=number)
    if number == KILLED:
        return killed(month, started)
    states = month.expected.states(month.model, spoilt)
    rules = NightRules(retries=1 if number == SPOILT.start else 0, retry_delay_s=0, quarantine_after=QUARANTINE_AFTER)
    clock: Callable[[], datetime] = lambda: started  # noqa: E731
    if number == DEADLINE:
        month.change("case001")
        states = {**month.expected.states(month.model, None), "case001": "carried-over"}
        states = {case: "carried-over" if state == "computed" else state for case, state in states.items()}
        rules = rules.model_copy(update={"deadline": "06:00"})
        clock = late(started)
    night = run(month, started, rules, clock)
    month.rows_are(night, states)
    month.settle(states)
    return {"night": night, **Counter(states.values())}


def late(started: datetime) -> Callable[[], datetime]:
    """A clock that shows the deadline as soon as the night has begun."""
    shown = iter([started])
    return lambda: next(shown, started + timedelta(hours=5))


def run(month: Month, started: datetime, rules: NightRules, clock: Callable[[], datetime]) -> str:
    """A night in this process, with the flow's own parts."""
    from prefect import flow

    from flows.nights.night import Order, checked_model, run_night
    from flows.session import Session
    from flows.tasks import refresh_cohort

    session = Session(month.root, Site(preprocess_workers=1), clock)
    order = Order(COHORT, MODEL, "nifti", rules)

    @flow(name="simulated")
    def simulated() -> str:
        refresh_cohort(month.root, COHORT)
        return run_night(session, order, checked_model(session, order), session.clock()).night.id

    return simulated()


def spoil(results: Path) -> None:
    """Let the disk refuse whatever is written for a case."""
    results.rename(results.with_name(f"{results.name}.kept"))
    results.write_bytes(b"in the way")


def heal(results: Path) -> None:
    results.unlink()
    results.with_name(f"{results.name}.kept").rename(results)


def killed(month: Month, started: datetime) -> dict[str, object]:
    """A night of four new cases whose process is killed after two, and the night that closes and finishes it."""
    for _ in range(4):
        month.arrive()
    states = month.expected.states(month.model, None)
    todo = [case for case, state in states.items() if state == "computed"]
    subprocess.run([sys.executable, "-m", "tests.flows.killed_night", str(month.root.home), started.isoformat()])
    again = started + timedelta(hours=1)
    after = run(month, again, NightRules(retries=0), lambda: again)
    dead = month.root.names(f"nights/{COHORT}")[-2].removesuffix(".json")
    assert month.root.get_json(f"nights/{COHORT}/{dead}.json")["stopped"] == "died"
    found = {row["case"]: row["state"] for row in read_rows(month.root, COHORT, dead)}
    done = [case for case in todo if found[case] == "computed"]
    assert 2 <= len(done) < len(todo), found
    month.rows_are(dead, {**states, **{case: "carried-over" for case in todo if case not in done}})
    month.settle(dict.fromkeys(done, "computed"))
    states = month.expected.states(month.model, None)
    month.rows_are(after, states)
    month.settle(states)
    return {"night": after, "killed": dead, **Counter(states.values())}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
