"""The flow that answers questions over all nights from its form."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.artifacts import volume_table
from flows.session import open_session
from workers.query import Query, query

KEY = "query-reports"
"""Key of the table artifact; its history in the UI holds the earlier answers."""


class Question(BaseModel):
    """Volumes over all nights; every field that is left empty does not restrict."""

    cohort: str | None = Field(default=None, title="Cohort")
    label: str | None = Field(default=None, title="Label", description="Name of a structure")
    case: str | None = Field(default=None, title="Case")
    nights: int | None = Field(default=1, title="Newest nights", description="Of each cohort; None: all", ge=1)
    volume_min_ml: float | None = Field(default=None, title="Smallest volume (mL)", ge=0)
    volume_max_ml: float | None = Field(default=None, title="Largest volume (mL)", ge=0)
    change_min_percent: float | None = Field(
        default=None, title="Smallest change (%)", description="Since the night before, up or down", ge=0
    )
    flag: Literal["any", "empty", "touches-border", "many-components"] = Field(default="any", title="Flag")


EVERYTHING = Question()
"""The question that the form opens with: the newest night of every cohort."""


@flow(name="query-reports", validate_parameters=True)
def query_reports(question: Question = EVERYTHING) -> State[Any]:
    """Answer with a table of the volumes that pass every filter; it is the artifact `query-reports`.

    Args:
        question: what to look for
    """
    session = open_session()
    asked = question.model_dump()
    for name in ("cohort", "label", "case"):
        asked[name] = asked[name] or None
    asked["flag"] = None if question.flag == "any" else question.flag
    rows = query(session.root, Query(**asked))
    create_table_artifact(table=volume_table(rows), key=KEY, description=f"{len(rows)} rows")
    return Completed(message=f"{len(rows)} rows", data={"rows": len(rows)})
