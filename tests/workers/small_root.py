"""A small storage root with everything that a large one has: cases, volumes, results, models, nights with rows."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch

from tests.workers.known_model import known_network, known_plan
from vnet_core.geometry import Geometry, to_mapping
from workers.cohort import Case, Cohort, Entry, Verdict, result_key, save_cohort, save_entry, volume_key
from workers.ledger import Outcome
from workers.registry.models import Model, Target, publish
from workers.storage.arrays import write_arrays
from workers.storage.store import Root

COHORT = "liver"
PLAN = known_plan((1.0, 1.0, 1.0))
GRID = Geometry((4, 5, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
ROWS = pa.schema(
    [
        ("night", pa.string()),
        ("cohort", pa.string()),
        ("case", pa.string()),
        ("state", pa.string()),
        ("codes", pa.string()),
        ("name", pa.string()),
        ("flags", pa.string()),
        ("model", pa.string()),
        ("result", pa.string()),
        ("seconds", pa.float64()),
        ("stage", pa.string()),
        ("peak_bytes", pa.int64()),
    ]
)
"""The columns of a night's table that care reads."""


def case_of(name: str) -> Case:
    return Case(name, (f"/scans/{name}.nii.gz",), digest=f"bytes of {name}", geometry=GRID)


def add_case(root: Root, name: str, cohort: str = COHORT) -> Case:
    case = case_of(name)
    save_entry(root, cohort, Entry(case, Verdict("accepted")))
    return case


def add_model(root: Root, version: str = "v1", name: str = "organs") -> Model:
    weights = safetensors.torch.save(known_network(PLAN).state_dict(), {"version": version})
    return publish(root, Target(name, version, PLAN), [weights], {}, {"loss.png": version.encode()})


def add_volume(root: Root, case: Case) -> str:
    key = volume_key(case, PLAN)
    image = np.arange(GRID.shape[0] * GRID.shape[1] * GRID.shape[2], dtype=np.float32).reshape(1, *GRID.shape)
    write_arrays(root, key, {"image": image}, {})
    root.seal(key, {"stage": "preprocess", "case_digest": case.digest, "geometry": to_mapping(GRID)})
    return key


def add_result(root: Root, case: Case, model: Model, cohort: str = COHORT) -> str:
    """A sealed result under the key that a night of this model would give it."""
    key = result_key(cohort, case, model.plan, model.digest)
    facts = {"model": model.reference, "volume": volume_key(case, model.plan)}
    root.put(f"{key}/mask.nii.gz", f"{key} mask".encode() * 20)
    root.put(f"{key}/mask.ome.zarr/0/c/0/0/0", key.encode())
    root.put_json(f"{key}/report.json", facts)
    root.seal(key, {"stage": "segment", "case_digest": case.digest, **facts})
    return key


def add_night(
    root: Root,
    night: datetime,
    outcomes: Sequence[Outcome],
    model: str = "organs@v1",
    cohort: str = COHORT,
    **facts: Any,
) -> str:
    """Rows and record of a night that took a minute."""
    name = night.strftime("%Y-%m-%d_%H%M%S")
    rows = [
        dict.fromkeys(ROWS.names)
        | {"night": name, "cohort": cohort, "case": o.case, "state": o.state, "codes": " ".join(o.codes)}
        | {"model": model, "result": o.key, "seconds": o.seconds, "stage": o.stage, "peak_bytes": o.peak_bytes}
        | ({"name": "grey", "flags": "empty" if "empty" in o.message else ""} if o.done else {})
        for o in outcomes
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), sink)
    root.put(f"reports/{cohort}/{name}.parquet", sink.getvalue())
    root.put(f"reports/{cohort}/{name}.csv", b"night\n")
    states = [o.state for o in outcomes]
    record = {
        "id": name,
        "cohort": cohort,
        "model": model,
        "started": night.isoformat(),
        "seconds": 60.0,
        "counts": {state: states.count(state) for state in dict.fromkeys(states)},
        "ended": (night + timedelta(minutes=1)).isoformat(),
        "stopped": "",
    }
    root.put_json(f"nights/{cohort}/{name}.json", record | facts)
    return name


def small_root(folder: Path | str, night: datetime, cases: Sequence[str] = ("a", "b")) -> Root:
    """One cohort, one model, one night in which all cases were computed."""
    root = Root(folder)
    save_cohort(root, Cohort(COHORT, ("/scans",), ("image",), PLAN.labels))
    model, outcomes = add_model(root), []
    for name in cases:
        case = add_case(root, name)
        add_volume(root, case)
        outcomes.append(Outcome(name, "segment", "computed", key=add_result(root, case, model), seconds=1.5))
    add_night(root, night, outcomes)
    return root


def age(root: Root, prefix: str, moment: datetime) -> None:
    """Let everything under a prefix have been written at a moment."""
    folder = root.home / prefix
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (moment.timestamp(), moment.timestamp()))
