"""The flow that answers questions over all nights from its form."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.artifacts import ANSWER_COLUMNS, TABLE_ROWS, volume_table
from flows.session import open_session
from workers.harmless import one_line
from workers.query import Query, query

KEY = "query-reports"
"""Key of the table artifact; its history in the UI holds the earlier answers."""


class Question(BaseModel):
    """Volumes over all nights; a field that is empty or 0 does not restrict."""

    # plain types: a form shows a field that may be None as a choice between types
    cohort: str = Field(default="", title="Cohort", description="Empty: all cohorts")
    label: str = Field(default="", title="Label", description="Name of a structure, such as liver; empty: all")
    case: str = Field(default="", title="Case", description="Name of a case; empty: all")
    nights: int = Field(default=1, title="Newest nights", description="How many nights of each cohort; 0: all", ge=0)
    volume_min_ml: float = Field(default=0.0, title="Smallest volume (mL)", description="0: no limit", ge=0)
    volume_max_ml: float = Field(default=0.0, title="Largest volume (mL)", description="0: no limit", ge=0)
    change_min_percent: float = Field(
        default=0.0,
        title="Smallest change (%)",
        description="Since the night before, up or down; 0: also what did not change or is new",
        ge=0,
    )
    flag: Literal["any", "empty", "touches-border", "many-components"] = Field(
        default="any",
        title="Flag",
        description="empty: nothing found; touches-border: cut off by the scan; many-components: in many pieces",
    )


EVERYTHING = Question()
"""The question that the form opens with: the newest night of every cohort."""


@flow(name="query-reports", validate_parameters=True)
def query_reports(question: Question = EVERYTHING) -> State[Any]:
    """Answer with a table of the volumes that pass every filter; it is the artifact `query-reports`.

    Args:
        question: what to look for; as it stands: everything of the newest night of every cohort
    """
    session = open_session()
    asked: dict[str, Any] = {name: value or None for name, value in question.model_dump().items()}
    asked["flag"] = None if question.flag == "any" else question.flag
    rows = query(session.root, Query(**asked, limit=TABLE_ROWS))
    limits = [f"{name} {value}" for name, value in asked.items() if value is not None]
    number = f"the newest {TABLE_ROWS} rows" if len(rows) == TABLE_ROWS else f"{len(rows)} rows"
    found = one_line(f"{number} ({', '.join(limits) or 'no limits'})")
    create_table_artifact(table=volume_table(rows, ANSWER_COLUMNS), key=KEY, description=found)
    return Completed(message=found, data={"rows": len(rows)})
