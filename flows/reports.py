"""The flow that answers questions over all nights from its form."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.artifacts import volume_table
from flows.session import open_session
from workers.query import Query, query

KEY = "query-reports"
"""Key of the table artifact; its history in the UI holds the earlier answers."""


@flow(name="query-reports", validate_parameters=True)
def query_reports(
    cohort: Annotated[str | None, Field(title="Cohort", description="Empty: all cohorts")] = None,
    label: Annotated[str | None, Field(title="Label", description="Name of a structure; empty: all")] = None,
    case: Annotated[str | None, Field(title="Case", description="Case id; empty: all")] = None,
    volume_min_ml: Annotated[float | None, Field(title="Smallest volume (mL)", ge=0)] = None,
    volume_max_ml: Annotated[float | None, Field(title="Largest volume (mL)", ge=0)] = None,
    change_min_percent: Annotated[float | None, Field(title="Smallest change since the night before (%)", ge=0)] = None,
    nights: Annotated[int | None, Field(title="Newest nights", description="Empty: all nights", ge=1)] = 1,
    flag: Annotated[str | None, Field(title="Flag", description="empty, touches-border or many-components")] = None,
) -> State[Any]:
    """Answer with a table of the volumes that pass every filter; it is the artifact `query-reports`.

    Args:
        cohort: only this cohort
        label: only this structure
        case: only this case
        volume_min_ml: only volumes of at least this
        volume_max_ml: only volumes of at most this
        change_min_percent: only volumes that changed by at least this, up or down
        nights: only the newest so many nights of each cohort
        flag: only rows with this flag
    """
    session = open_session()
    wanted = Query(
        cohort=cohort or None,
        label=label or None,
        case=case or None,
        volume_min_ml=volume_min_ml,
        volume_max_ml=volume_max_ml,
        change_min_percent=change_min_percent,
        nights=nights,
        flag=flag or None,
    )
    rows = query(session.root, wanted)
    create_table_artifact(table=volume_table(rows), key=KEY, description=f"{len(rows)} rows")
    return Completed(message=f"{len(rows)} rows", data={"rows": len(rows)})
