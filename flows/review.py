"""People decide about flagged masks: a run that asks them suspends, and goes on with their answers.

While it is suspended no process of the run is alive. Prefect starts the flow again from the top when the form is sent;
``reviews/<flow run id>.json`` in the storage root, written before the run suspends, says what it had asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from uuid import UUID, uuid4

from prefect import flow, get_client, get_run_logger, suspend_flow_run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from pydantic import BaseModel, Field, create_model

from flows.session import Session, open_session
from flows.ui.artifacts import artifact_key
from flows.ui.fields import CohortName
from flows.ui.pages import publish_night
from vnet_core.errors import ConfigError, VnetError
from workers.delivery.handing import follow_up
from workers.harmless import one_line
from workers.markdown import code, picture, table, text
from workers.nights.decisions import LONGEST_NAME, LONGEST_NOTE, Choice, Decision, checked, decisions, latest, record
from workers.nights.record import Night, load_night
from workers.registry.models import load_model
from workers.reports.flag_words import FLAGS, flags_of
from workers.reports.report import night_ids, read_rows
from workers.reports.story import NOTICE, millilitres
from workers.segmentation.masks import load_report
from workers.storage.store import Root

MOST_CASES = 20
"""Most cases that one form asks about; the others follow when it is answered."""
TIMEOUT_S = 30 * 24 * 3600
"""How long a run waits for its answer; then it fails, and its cases go on waiting for a later form."""
BRIEF_BYTES = 1_200_000
"""Largest text above a form; pictures that would exceed it are left out, and stand in the night's report."""
ALL_AXES = (0, 1, 2)

LATER = "decide later"
Option = Literal[
    "decide later", "accept", "reject", "send to training (to be corrected)", "run again with mirroring (next night)"
]
OptionWithoutMirrors = Literal["decide later", "accept", "reject", "send to training (to be corrected)"]
CHOICES: dict[str, Choice] = dict(zip(get_args(Option)[1:], ("accept", "reject", "train", "mirror"), strict=True))

Row = Mapping[str, Any]


class Asked(BaseModel):
    """A result that somebody shall look at."""

    case: str
    key: str


class Review(BaseModel):
    """What a suspended run has asked: ``reviews/<flow run id>.json``."""

    cohort: str
    night: str
    pause: str
    """Names the form among the forms of the run."""
    asked: list[Asked]
    """In the order of the form."""
    rest: list[Asked] = []
    """For the forms after this one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A form as it was sent."""

    run: str
    """Id of the flow run that had asked."""
    review: Review
    options: tuple[str, ...]
    """One per asked case."""
    by: str
    at: str
    """When it was sent, ISO 8601."""
    note: str


def gate(session: Session, night: Night, rows: Sequence[Row]) -> None:
    """Suspend this run until somebody has decided about the night's waiting masks.

    Returns at once where none is waiting or the run does not belong to a deployment: Prefect could not start it again.
    Call it in the flow itself, not in a task, and with nothing left to lose: what follows is not reached.
    """
    if deployment.id is None:
        return
    with get_client(sync_client=True) as client:
        elsewhere = collect(session, night.cohort, client)
    waiting = [one for one in _waiting(session.root, night.cohort, rows) if one.key not in elsewhere]
    if waiting:
        _ask(session, night, rows, waiting)


def answered(session: Session) -> Answer | None:
    """The answer that this run was started again for; None in a run that has asked nothing yet. Call it first."""
    run = flow_run.id
    review = _load(session.root, run) if run else None
    if run is None or review is None:
        return None
    with get_client(sync_client=True) as client:
        return _answer(client, run, review)


def apply(session: Session, answer: Answer) -> State[Any]:
    """Record an answer, bring the night's report and what was delivered up to date, and end the run.

    Cases that were put off, and those beyond the first form, are asked about again: then the run suspends once more.
    """
    root, review = session.root, answer.review
    decided = _record(root, answer)
    follow_up(root, review.cohort, review.night)
    night = load_night(root, review.cohort, review.night)
    rows = read_rows(root, review.cohort, review.night)
    publish_night(root, night, rows)
    put_off = [one for one, option in zip(review.asked, answer.options, strict=True) if option == LATER]
    rest = [one for one in [*review.rest, *put_off] if latest(root, review.cohort, one.case, one.key) is None]
    if rest:
        get_run_logger().info("%s decided, %s still waiting", len(decided), len(rest))
        _ask(session, night, rows, rest)
    root.delete(_key(answer.run))
    told = [f"{sum(one.choice == choice for one in decided)} {choice}" for choice in get_args(Choice)]
    message = f"reviewed by {answer.by}: {', '.join(part for part in told if not part.startswith('0 ')) or 'nothing'}"
    data = {"night": night.id, "cohort": night.cohort, "outcomes": []}
    if any(night.counts.get(state) for state in ("failed", "refused", "carried-over")):
        return Completed(name="CompletedWithFailures", message=message, data=data)
    return Completed(message=message, data=data)


@flow(name="review-cases", flow_run_name="review {cohort}", validate_parameters=True)
def review_cases(cohort: CohortName, cases: list[str] = []) -> State[Any]:  # noqa: B006
    """Ask about masks of a cohort's newest night: this run suspends, and its Resume button opens the form.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        cases: names of the cases to decide about; left empty, all that are waiting for a decision
    """
    session = open_session()
    answer = answered(session)
    if answer is not None:
        return apply(session, answer)
    if deployment.id is None:
        raise ConfigError("review.form", "only a run of a deployment can show a form; use vnet review decide")
    night, rows = newest_rows(session.root, cohort)
    with get_client(sync_client=True) as client:
        collect(session, cohort, client)
    if cases:
        found = [Asked(case=case, key=result_of(rows, cohort, case)) for case in dict.fromkeys(cases)]
    else:
        found = _waiting(session.root, cohort, rows)
    if found:
        _ask(session, night, rows, found)
    return Completed(message=f"no mask of cohort {cohort} is waiting for a decision", data={"cohort": cohort})


def newest_rows(root: Root, cohort: str) -> tuple[Night, list[dict[str, Any]]]:
    """The newest night of a cohort that has a report, and its rows. ConfigError ``review.no-night``."""
    nights = night_ids(root, cohort)
    if not nights:
        raise ConfigError("review.no-night", f"cohort {cohort!r} has no report yet; run vnet nightly")
    return load_night(root, cohort, nights[-1]), read_rows(root, cohort, nights[-1])


def result_of(rows: Iterable[Row], cohort: str, case: str) -> str:
    """Key of a case's result in a night's rows. ConfigError ``review.case``."""
    keys = [str(row["result"]) for row in rows if row["case"] == case and row["result"]]
    if not keys:
        raise ConfigError(
            "review.case", f"the newest night of cohort {cohort} has no mask of case {case!r}; see vnet review list"
        )
    return keys[0]


def mirrorable(root: Root, key: str) -> bool:
    """Whether the mask was computed without mirroring along all axes, by a model that is still there."""
    report = load_report(root, key)
    try:
        plan = load_model(root, report["model"]).plan
    except VnetError:
        return False
    everywhere = plan.inference.model_copy(update={"mirror_axes": ALL_AXES})
    digest = plan.model_copy(update={"inference": everywhere}).digest
    return bool(report["plan_digest"] != digest)


# --- asking


def _waiting(root: Root, cohort: str, rows: Iterable[Row]) -> list[Asked]:
    """Masks that wait and about which nobody has decided yet, those with the most flags first."""
    flags: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["review"] == "awaiting":
            one = (row["case"], row["result"])
            flags[one] = flags.get(one, 0) + len((row["flags"] or "").split())
    ordered = sorted(flags, key=lambda one: (-flags[one], one))
    return [Asked(case=case, key=key) for case, key in ordered if latest(root, cohort, case, key) is None]


def _ask(session: Session, night: Night, rows: Sequence[Row], waiting: Sequence[Asked]) -> None:
    """Suspend the run with a form about the first of the waiting masks."""
    root, asked = session.root, list(waiting[:MOST_CASES])
    # a name of its own: Prefect takes a form that it knows for answered
    review = Review(
        cohort=night.cohort, night=night.id, pause=f"review-{uuid4().hex}", asked=asked, rest=list(waiting[MOST_CASES:])
    )
    of = _by_result(rows)
    form = _form(root, asked, of).with_initial_data(description=_brief(root, night, of, review))
    assert flow_run.id is not None, "asked only in a run of a deployment"
    root.put_json(_key(flow_run.id), review.model_dump())
    suspend_flow_run(wait_for_input=form, timeout=TIMEOUT_S, key=review.pause)


def _by_result(rows: Iterable[Row]) -> dict[str, list[Row]]:
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["result"], []).append(row)
    return of


def _form(root: Root, asked: Sequence[Asked], of: Mapping[str, Sequence[Row]]) -> type[RunInput]:
    fields: dict[str, Any] = {
        "reviewer": (
            str,
            Field(title="Your name", description="Goes into the record", pattern=r"\S", max_length=LONGEST_NAME),
        )
    }
    for number, one in enumerate(asked):
        options = Option if mirrorable(root, one.key) else OptionWithoutMirrors
        # the pictures stand far above the field
        told = "; ".join(one_line(f"{row['name']}: {row['flags']}") for row in of[one.key] if row["flags"])
        fields[_field(number)] = (options, Field(default=LATER, title=one.case, description=told or None))
    fields["note"] = (
        str,
        Field(default="", title="Note", description="For all decisions of this form", max_length=LONGEST_NOTE),
    )
    return create_model("Review", __base__=RunInput, **fields)


def _brief(root: Root, night: Night, of: Mapping[str, Sequence[Row]], review: Review) -> str:
    """What stands above the form: of each mask its flags in words, its volumes and its QC picture."""
    more = f" {len(review.rest)} more follow in the next form." if review.rest else ""
    report = code(artifact_key("night", night.cohort))
    parts = [
        f"**Masks of cohort {text(night.cohort)} that wait for a decision: {len(review.asked)}.**{more}"
        f" Night {code(night.id)}, model {code(night.model)}; the whole report is the artifact {report}.",
        "**accept**: the mask is delivered. **reject**: it is not. **send to training**: it is not either, and waits to"
        " be corrected. **run again with mirroring**: the cohort's next night computes it again, more slowly and"
        " often better, and asks again if it is flagged again. **decide later**: you are asked again at once.",
        f"*{NOTICE}*",
    ]
    left = BRIEF_BYTES - len("\n\n".join(parts).encode())
    sections = [_section(one.case, of[one.key]) for one in review.asked]
    left -= sum(len(section.encode()) + 200 for section in sections)
    for section, one in zip(sections, review.asked, strict=True):
        shown = "*No picture: this scan may have text in its pixels.*"
        if root.exists(f"{one.key}/qc.png"):
            shown = picture(one.case, root.get(f"{one.key}/qc.png"))
            if len(shown) > left:
                shown = f"*Its picture is in the artifact {report}, or in the report of the night as a file.*"
            else:
                left -= len(shown)
        parts += [section, shown]
    return "\n\n".join(parts)


def _section(case: str, rows: Sequence[Row]) -> str:
    changes = ["" if row["change_ml"] is None else f"{row['change_ml']:+.2f}" for row in rows]
    columns = [("label", [row["name"] for row in rows]), ("mL", [millilitres(row["volume_ml"]) for row in rows])]
    columns += [("change mL", changes)] if any(changes) else []
    volumes = zip(*(cells for _, cells in columns), strict=True)
    told = [
        f"- {text(row['name'])}: {FLAGS.get(flag, flag)} ({code(flag)})"
        for row in rows
        for flag in flags_of(row["flags"])
    ]
    return "\n\n".join(
        [f"### {text(case)}", "\n".join(told) or "No flag.", table([name for name, _ in columns], volumes)]
    )


def _field(number: int) -> str:
    return f"case_{number:02d}"


# --- answers


def collect(session: Session, cohort: str, client: SyncPrefectClient) -> set[str]:
    """Take in the answers of runs that were not started again, and close runs that have nothing left to ask.

    A run whose form is sent while the cohort's next night is under way is cancelled, because two may not run at once;
    its answer would be lost. Returns the keys of the results that other runs are asking about.
    """
    root, open_keys = session.root, set()
    for name in root.names("reviews"):
        run = name.removesuffix(".json")
        review = _load(root, run)
        if review is None or review.cohort != cohort or run == flow_run.id:
            continue
        try:
            state = client.read_flow_run(UUID(run)).state
        except ObjectNotFound:
            root.delete(_key(run))
            continue
        everything = [*review.asked, *review.rest]
        if state is not None and not state.is_final():
            undecided = [one for one in everything if latest(root, cohort, one.case, one.key) is None]
            if undecided or not state.is_paused():
                open_keys |= {one.key for one in everything}
                continue
            client.set_flow_run_state(
                UUID(run), Completed(message="all of its cases were decided elsewhere"), force=True
            )
        elif answer := _answer(client, run, review):
            _record(root, answer)
            follow_up(root, cohort, review.night)
        root.delete(_key(run))
    return open_keys


def _answer(client: SyncPrefectClient, run: str, review: Review) -> Answer | None:
    """What was sent for the form, or None."""
    key = f"suspended-{review.pause}-response"
    found = client.filter_flow_run_input(UUID(run), key_prefix=key, limit=1, exclude_keys=set())
    if not found:
        return None
    values, sent = found[0].decoded_value, found[0].created or datetime.now(UTC)
    options = tuple(values.get(_field(number), LATER) for number in range(len(review.asked)))
    at = sent.astimezone(UTC).isoformat(timespec="seconds")
    return Answer(run, review, options, values["reviewer"], at, values.get("note", ""))


def _record(root: Root, answer: Answer) -> list[Decision]:
    """Record what was decided; what an interrupted run has recorded of the same answer already is not doubled."""
    review = answer.review
    decided = [
        checked(Decision(one.case, one.key, CHOICES[option], answer.by, answer.at, review.night, answer.note))
        for one, option in zip(review.asked, answer.options, strict=True)
        if option != LATER
    ]
    for decision in decided:
        if decision not in decisions(root, review.cohort, decision.case):
            record(root, review.cohort, decision)
    return decided


def _load(root: Root, run: str) -> Review | None:
    return Review.model_validate(root.get_json(_key(run))) if root.exists(_key(run)) else None


def _key(run: str) -> str:
    return f"reviews/{run}.json"
