"""What follows a night when its engines are gone: messages, delivery, the challenger, and the question to a person."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger

from flows.nights.challenge import shadow
from flows.nights.events import emit_night_events
from flows.nights.night import Order, Result
from flows.reports import refresh_form
from flows.review import gate
from flows.session import Session
from flows.stages import segment_cases
from vnet_core.errors import VnetError
from workers.delivery.handing import deliver
from workers.ledger import Outcome
from workers.registry.models import Model
from workers.segmentation.segment import Job


def close_night(session: Session, order: Order, result: Result) -> None:
    """Everything that the rules ask for; the gate comes last, since it may suspend the run."""

    def segment(model: Model, jobs: Sequence[Job]) -> list[Outcome]:
        return segment_cases(session, model, jobs)

    scheduled = next((entry for entry in session.site.nightly if entry.cohort == order.cohort), None)
    emit_night_events(result.night, result.rows, scheduled)
    refresh_form(session.root)
    if order.rules.deliver:
        _deliver(session, order, result)
    if order.rules.challenger_share:
        shadow(session, result.night, result.jobs, order.rules, segment)
    if order.rules.review == "flagged":
        gate(session, result.night, result.rows)


def _deliver(session: Session, order: Order, result: Result) -> None:
    """Deliver, and tell what was not; a folder that cannot be written keeps nobody from being asked."""
    log = get_run_logger()
    try:
        done = deliver(session.root, result.night, result.rows, order.rules.deliver, order.rules.deliver_readers)
    except VnetError as error:
        log.error("nothing was delivered: %s: %s", error.code, error.message)
        return
    log.info("delivered %d new masks, %d lay there, %d held back", len(done.written), done.unchanged, len(done.held))
    for case in done.left:
        log.warning("%s was not delivered: something that did not come from here lies in its place", case)
    for case in done.damaged:
        log.error("%s was not delivered: its mask is not what its receipt says; run vnet fsck", case)
