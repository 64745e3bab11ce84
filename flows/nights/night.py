"""One night from the cohort's entries to the report; what a dead one left open is closed by the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prefect import get_run_logger

from flows.nights.shift import Assignment, Shift, carried_over
from flows.session import Session
from flows.stages import refusals, usable
from flows.tasks import Progress, report_night, unsearched
from vnet_core.errors import ConfigError, VnetError
from vnet_core.geometry import Geometry
from workers.cohort import Entry, check_reading, load_cohort, load_entries
from workers.failpoints import fail_point
from workers.ingest import preview
from workers.leases import Run, run, sweep
from workers.ledger import Outcome
from workers.nights import attempts
from workers.nights import record as nights
from workers.nights.attempts import Failure
from workers.nights.events_log import EventLog, keep_events
from workers.nights.forecast import Forecast, Kind, forecast, kind_of, recorded_cost
from workers.nights.record import Night
from workers.registry.models import Model, load_model
from workers.reports.report import write_night
from workers.segmentation.masks import MaskFormat, mask_file
from workers.segmentation.segment import STAGE, Job, key_of
from workers.settings.rules import NightRules
from workers.storage.store import Root

MIRROR_AXES = (0, 1, 2)
"""What a person's "run again with mirroring" mirrors along: z, y, x."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a night is asked for."""

    cohort: str
    model: str
    """Reference of a model."""
    mask_format: MaskFormat
    rules: NightRules


@dataclass(frozen=True, slots=True)
class Result:
    """What a night left."""

    night: Night
    outcomes: list[Outcome]
    """One per case, by case."""
    rows: list[dict[str, Any]]
    jobs: list[Job]
    """All that could be segmented, whether they were or not."""


def checked_model(session: Session, order: Order) -> Model:
    """The model of an order. ConfigError ``mask.format``, ``plan.reading``, ``model.channels`` and those of loading."""
    mask_file(order.mask_format)
    model = load_model(session.root, order.model)
    cohort = load_cohort(session.root, order.cohort)
    check_reading(cohort, model.plan)
    if len(cohort.channels) != len(model.plan.channels):
        raise ConfigError(
            "model.channels",
            f"cohort {order.cohort} has {len(cohort.channels)} channels {cohort.channels}, model {model.reference}"
            f" takes {len(model.plan.channels)} {model.plan.channels}; choose one that was trained on these channels",
        )
    return model


def run_night(session: Session, order: Order, model: Model, started: datetime) -> Result:
    """Segment what has no mask yet, and report on all; started in UTC.

    Whatever ends it, its record and one row per case are written: by itself, or by the next night when it was killed.
    """
    root = session.root
    with run(root) as own:
        for dead in nights.abandoned(root, order.cohort):
            close_abandoned(session, dead)
        sweep(root)
        entries = load_entries(root, order.cohort)
        rules = order.rules.model_dump(mode="json")
        night = Night("", order.cohort, model.reference, "", mask_format=order.mask_format, run=own.id, rules=rules)
        night = nights.begin(root, night, started)
        fail_point("night:begun")
        jobs = jobs_of(root, order, model, entries)
        shift = _shift(session, own, model, night, len(entries))
        try:
            shift.add(refusals(entries))
            shift.sort_out(jobs, attempts.failures(root, order.cohort))
            stopped = shift.work()
        except BaseException:
            # also when it is cancelled: a row for every case, and no time for more than that
            shift.carry_over([entry.case.id for entry in entries], "cancelled")
            ended = nights.ended(night, list(shift.settled.values()), "cancelled", session.clock())
            write_night(root, ended, _by_case(shift.settled), entries)
            _close(root, ended)
            raise
        outcomes = _by_case(shift.settled)
        _remember(session, model, night, jobs, shift.settled)
        ended = nights.ended(night, outcomes, stopped, session.clock())
        fail_point("night:rows")
        rows = report_night(root, ended, unsearched(outcomes), unsearched(entries))
        fail_point("night:record")
        _close(root, ended)
    return Result(ended, outcomes, rows, jobs)


def jobs_of(root: Root, order: Order, model: Model, entries: Sequence[Entry]) -> list[Job]:
    """A job for every usable case, with mirroring where a person asked for it."""
    from workers.nights.decisions import mirrored

    wanted = mirrored(root, order.cohort)
    jobs = []
    for case in usable(entries):
        job = Job(order.cohort, case, order.mask_format)
        again = wanted and key_of(job, model) in wanted
        jobs.append(Job(order.cohort, case, order.mask_format, MIRROR_AXES) if again else job)
    return jobs


def _shift(session: Session, own: Run, model: Model, night: Night, cases: int) -> Shift:
    log = EventLog(session.root, night.cohort, night.id)
    progress = Progress(f"progress {night.cohort}", cases, f"Night {night.id} of cohort {night.cohort}")

    def settled(outcome: Outcome) -> None:
        log(outcome, session.clock())
        progress(outcome)
        fail_point("night:settled")

    started = datetime.fromisoformat(night.started).astimezone(session.site.zone)
    return Shift(session, own, Assignment(night.cohort, model, NightRules(**night.rules), started), settled)


def _remember(
    session: Session, model: Model, night: Night, jobs: Sequence[Job], settled: Mapping[str, Outcome]
) -> None:
    """Keep in mind what failed, and forget it where it went well."""
    root, failed = session.root, attempts.failures(session.root, night.cohort)
    for job in jobs:
        outcome = settled[job.case.id]
        if outcome.done:
            if job.case.id in failed:
                attempts.forget(root, night.cohort, job.case.id)
        elif outcome.state == "failed" and outcome.codes[0] != attempts.QUARANTINED:
            failure = attempts.failure_of(outcome, key_of(job, model), night.id, session.clock())
            attempts.add_failure(root, night.cohort, job.case.id, failure)


def close_abandoned(session: Session, night: Night) -> None:
    """Write the rows and the record of a night whose process died, from what it left in the root.

    Where its model is gone or damaged, nobody can tell which results were its own: every usable case that has not
    failed is carried over.
    """
    root, log = session.root, get_run_logger()
    entries = load_entries(root, night.cohort)
    failed = attempts.failures(root, night.cohort)
    outcomes = refusals(entries)
    keys = dict.fromkeys(case.id for case in usable(entries))
    try:
        model = load_model(root, night.model)
    except VnetError as error:
        log.warning("night %s of cohort %s: %s: %s", night.id, night.cohort, error.code, error.message)
    else:
        order = Order(night.cohort, night.model, night.mask_format, NightRules(**night.rules))
        keys = {job.case.id: key_of(job, model) for job in jobs_of(root, order, model, entries)}
    outcomes += [_found(root, night, case, key, failed.get(case, ())) for case, key in keys.items()]
    outcomes.sort(key=lambda outcome: outcome.case)
    ended = nights.ended(night, outcomes, "died", session.clock())
    write_night(root, ended, outcomes, entries)
    _close(root, ended)
    log.warning("night %s of cohort %s had died; its record is closed now", night.id, night.cohort)


def _close(root: Root, night: Night) -> None:
    """Write the record of a night that is over, after its log."""
    keep_events(root, night.cohort, night.id)
    nights.save(root, night)


def _found(root: Root, night: Night, case: str, key: str | None, failed: Sequence[Failure]) -> Outcome:
    """What became of a case in a night that died."""
    receipt = root.receipt(key) if key else None
    if receipt is not None:
        if receipt.get("run") != night.run:
            return Outcome(case, STAGE, "cached", key=key)
        costs = {"seconds": receipt["seconds"], "peak_bytes": receipt["peak_bytes"]}
        return Outcome(case, STAGE, "computed", key=key, **costs)
    last = next((failure for failure in failed if failure.night == night.id), None)
    if last:
        return Outcome(case, last.stage, "failed", last.codes, last.message)
    return carried_over(case, "died")


def _by_case(settled: Mapping[str, Outcome]) -> list[Outcome]:
    return [settled[case] for case in sorted(settled)]


def expected(session: Session, order: Order) -> Forecast:
    """What the next night would do with the cohort's sources as they are now; no scan is read."""
    root, model = session.root, checked_model(session, order)
    seen = preview(root, order.cohort)
    failed = attempts.failures(root, order.cohort)
    refused = sum(not entry.verdict.usable for entry in seen.unchanged)
    unread: tuple[tuple[Kind, int], ...] = (
        ("new", len(seen.new)),
        ("changed", len(seen.changed)),
        ("refused", refused),
    )
    kinds: list[tuple[Kind, Geometry | None]] = [(kind, None) for kind, number in unread for _ in range(number)]
    jobs = jobs_of(root, order, model, seen.unchanged)
    for job in jobs:
        found = failed.get(job.case.id, ())
        kind = kind_of(root, order.cohort, job.case, key_of(job, model), found, order.rules.quarantine_after)
        kinds.append((kind, job.case.geometry))
    cost = recorded_cost(root, {job.case.id: job.case for job in jobs}, order.cohort, model.digest)
    return forecast(kinds, cost, session.site.engines.segment_workers)
