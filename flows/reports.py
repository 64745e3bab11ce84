"""The flow that answers questions over all nights from its form, and the form, whose choices are those of the root."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field, WithJsonSchema, create_model

from flows.session import open_session
from vnet_core.pictures.query_plot import answer_picture
from vnet_core.reporting import Flag
from workers import markdown
from workers.harmless import one_line
from workers.ledger import State as CaseState
from workers.reports.query import Answer, Query, choices, describe, query
from workers.reports.questions import NAME, NONE, load_question, question_names, save_question
from workers.storage.store import Root

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.utilities.callables import ParameterSchema

KEY = "query-reports"
"""Key of the table artifact; its history in the UI holds the earlier answers."""
PLOT_KEY = "query-reports-plot"
FORM = "query-reports-form"
"""Name of the deployment that has the form."""
TABLE_ROWS = Query().limit
"""Most rows of the table."""
PLOT_ROWS = 100_000
"""Most rows that the picture shows."""
FORM_CHOICES = 500
"""Most choices of a list; a form with more is slow, and a name that is missing can be given to `vnet query`."""

TABLE_COLUMNS = (
    "night",
    "cohort",
    "case",
    "name",
    "volume_ml",
    "change_percent",
    "flags",
    "state",
    "patient",
    "patient_change_percent",
    "change_uncertainty_ml",
    "review",
    "codes",
    "message",
    "model",
)
"""Columns of the table, the same in every answer by filters; the UI shows about the first six without scrolling."""
PLOT_COLUMNS = ("night", "cohort", "case", "name", "volume_ml")
_DAY = r"^$|^\d{4}-\d{2}-\d{2}$"
_WORD = r"^[^\x00-\x1f]{0,200}$"
Review = Literal["awaiting", "accepted", "rejected", "training"]


class Question(BaseModel):
    """Volumes over all nights; a field that is empty or 0 does not restrict."""

    # plain types: a form shows a field that may be None as a choice between types
    saved: str = Field(
        default=NONE,
        title="Saved question",
        description="Its answer; what you fill in below takes the place of its own",
    )
    cohorts: list[str] = Field(default=[], title="Cohorts", description="None chosen: all")
    labels: list[str] = Field(default=[], title="Labels", description="Structures; none chosen: all")
    models: list[str] = Field(default=[], title="Models", description="A name without a version: all its versions")
    flags: list[Literal[Flag, "any"]] = Field(
        default=[], title="Flags", description="Rows with one of these; any: whatever is flagged"
    )
    states: list[CaseState] = Field(default=[], title="States", description="What became of the case")
    reviews: list[Review] = Field(default=[], title="Review", description="What a person decided")
    nights: int = Field(
        default=1, title="Newest nights", description="How many of each cohort, of the days below; 0: all", ge=0
    )
    first: str = Field(default="", title="From", description="Day of the oldest night, as 2026-01-31", pattern=_DAY)
    last: str = Field(default="", title="To", description="Day of the newest night", pattern=_DAY)
    patient: str = Field(default="", title="Patient", description="Pseudonym; empty: all", pattern=_WORD)
    case: str = Field(default="", title="Case", description="Name of a case; empty: all", pattern=_WORD)
    volume_min_ml: float = Field(default=0.0, title="Smallest volume (mL)", description="0: no limit", ge=0)
    volume_max_ml: float = Field(default=0.0, title="Largest volume (mL)", description="0: no limit", ge=0)
    change_min_percent: float = Field(
        default=0.0,
        title="Smallest change (%)",
        description="Since the night before, up or down; 0: also what did not change or is new",
        ge=0,
    )
    change_max_percent: float = Field(default=0.0, title="Largest change (%)", description="0: no limit", ge=0)
    patient_change_min_percent: float = Field(
        default=0.0,
        title="Smallest change of the patient (%)",
        description="Since the patient's scan before, up or down; 0: no limit",
        ge=0,
    )
    patient_change_max_percent: float = Field(
        default=0.0, title="Largest change of the patient (%)", description="0: no limit", ge=0
    )
    save_as: str = Field(
        default="",
        title="Save this question as",
        description="Small letters, digits and dashes, such as large-livers; empty: it is not saved",
        pattern=f"^$|^{NAME}$",
    )


EVERYTHING = Question()
"""The question that the form opens with: the newest night of every cohort."""


@flow(name="query-reports", validate_parameters=True)
def query_reports(question: Question = EVERYTHING) -> State[Any]:
    """Answer with a table of the volumes that pass every filter, and a picture of them.

    They are the artifacts `query-reports` and `query-reports-plot`.

    Args:
        question: what to look for; as it stands: everything of the newest night of every cohort
    """
    root = open_session().root
    asked = to_query(root, question)
    answer = query(root, replace(asked, limit=min(asked.limit or TABLE_ROWS, TABLE_ROWS)))
    if question.save_as:
        save_question(root, question.save_as, asked)
    number = f"the first {len(answer.rows)} rows" if answer.more else f"{len(answer.rows)} rows"
    found = one_line(f"{number} ({describe(asked)})")
    create_table_artifact(table=answer_table(answer), key=KEY, description=markdown.text(found))
    create_markdown_artifact(
        answer_markdown(root, asked, answer, found), key=PLOT_KEY, description=markdown.text(found)
    )
    refresh_form(root)
    return Completed(message=found, data={"rows": len(answer.rows)})


def to_query(root: Root, question: Question) -> Query:
    """What a filled-in form asks: the saved question, if one is chosen, with what differs from an untouched form.

    Raises ConfigError ``query.unknown-question`` and those of :class:`workers.reports.query.Query`.
    """
    start = Query(nights=question.nights) if question.saved == NONE else load_question(root, question.saved)
    names = {field.name for field in fields(Query)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in question.model_dump().items()
        if name in names and value != getattr(EVERYTHING, name)
    }
    return replace(start, **given)


def answer_table(answer: Answer) -> list[dict[str, Any]]:
    """Rows of the table artifact: figures rounded, texts on one line, nothing empty as None."""
    by_filters = set(TABLE_COLUMNS) <= set(answer.columns)
    columns = TABLE_COLUMNS if by_filters else answer.columns
    return [{one_line(name): _cell(row[name]) for name in columns} for row in answer.rows]


def answer_markdown(root: Root, asked: Query, answer: Answer, found: str) -> str:
    """The page with the picture of an answer, or why it has none."""
    few = asked.sql or 0 < asked.limit < TABLE_ROWS
    rows = answer.rows if few else query(root, replace(asked, limit=PLOT_ROWS), PLOT_COLUMNS).rows
    drawn = answer_picture([row | {"name": one_line(row.get("name") or "")} for row in rows])
    parts = ["# Answer", f"{markdown.text(found)}. The table is `{KEY}`."]
    if drawn is None:
        parts.append("No picture: no row has a night, a name and a volume.")
    else:
        png, words = drawn
        newest = f" of the newest {PLOT_ROWS:,} rows" if len(rows) == PLOT_ROWS else ""
        parts += [markdown.picture(words, png), f"*{markdown.text(words[0].upper() + words[1:])}{newest}.*"]
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return round(value, 3)
    return value if isinstance(value, bool | int) else one_line(value)


def offer_choices(deployment: RunnerDeployment, root: Root) -> None:
    """Give a deployment of the flow, before it is made, a form that offers what the root holds.

    Its parameters are then checked by the flow alone and not by the server, so that what is not on the form, such as a
    cohort that has come since, is answered too.
    """
    deployment.enforce_parameter_schema = False
    deployment._parameter_openapi_schema = form_schema(root)


def form_schema(root: Root) -> ParameterSchema:
    """The flow's parameters for the form, with choices where the root has any."""
    from prefect.utilities.callables import parameter_schema

    found = choices(root)
    saved = [NONE, *question_names(root)]
    offered: dict[str, Any] = {"saved": (_one_of(saved), Question.model_fields["saved"])}
    for name, values in (("cohorts", found.cohorts), ("labels", found.labels), ("models", found.models)):
        if values:
            offered[name] = (list[_one_of(values)], Question.model_fields[name])  # type: ignore[misc]
    form = create_model("Question", __base__=Question, __doc__=Question.__doc__, **offered)

    def asking(question: Any) -> None:
        """Stands for the flow, with the form in place of its parameter."""

    asking.__doc__ = query_reports.fn.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameter = inspect.Parameter("question", kind, default=form(), annotation=form)
    asking.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return parameter_schema(asking)


def _one_of(values: Sequence[str]) -> Any:
    # a Literal of one value would be a constant in the schema, which a form does not show as a choice
    return Annotated[str, WithJsonSchema({"type": "string", "enum": list(values)[:FORM_CHOICES]})]


def refresh_form(root: Root) -> None:
    """Give the deployment in the server the choices that the root has now; nothing where there is no deployment."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{query_reports.name}/{FORM}")
        except ObjectNotFound:
            return
        schema = form_schema(root).model_dump_for_openapi()
        if deployment.parameter_openapi_schema != schema:
            client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
