"""Tables of nights, written by hand."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.reports.columns import SCHEMA
from workers.storage.store import Root

OLD_COLUMNS = SCHEMA.names[: SCHEMA.names.index("seconds") + 1]
"""Those of version 0.3."""


def put_night(
    root: Root, cohort: str, night: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = SCHEMA.names
) -> None:
    """The table of a night; what a row does not say is None."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    whole = [dict.fromkeys(columns) | {"night": night, "cohort": cohort} | row for row in rows]
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(whole, schema=schema), sink)
    root.put(f"reports/{cohort}/{night}.parquet", sink.getvalue())


def organ(case: str, volume_ml: float, **more: Any) -> dict[str, Any]:
    """A row of a finished case's organ."""
    common = {"case": case, "label": 1, "name": "organ", "state": "cached", "flags": "", "model": "m@v1", "review": ""}
    return common | {"volume_ml": volume_ml} | more


def refused(case: str) -> dict[str, Any]:
    """The row of a case without a result."""
    return {"case": case, "state": "refused", "codes": "scan.truncated", "message": "cut short", "model": "m@v1"}
