"""A storage root with nights over phantoms: scans, masks with their pictures, rows; nothing is computed by a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vnet_core.phantoms import LABELS, PhantomSpec, phantom
from vnet_core.plan import Plan
from vnet_core.reporting import DEFAULT_REPORTING
from workers.cohort import Case, Cohort, Entry, Verdict, save_cohort, save_entry
from workers.dicom.derived import Algorithm
from workers.nights.record import Night
from workers.reports.columns import SCHEMA, to_parquet
from workers.segmentation.masks import Mask, load_report, publish_mask
from workers.sources.scans import write_volume
from workers.storage.store import Root

COHORT = "liver"
PLAN = Plan.from_mapping({"labels": [label.model_dump() for label in LABELS]})
FIRST, SECOND = "2026-11-22_010000", "2026-11-23_010000"


def night_of(rows: Sequence[dict[str, Any]], night: str = SECOND, **facts: Any) -> Night:
    """The record of a night with these rows."""
    states = {row["case"]: row["state"] for row in rows}
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    started = f"{night[:10]}T{night[11:13]}:00:00+00:00"
    return Night(night, COHORT, "organs@v2", started, 754.0, counts, ended=started, **facts)


def blank(case: str, night: str = SECOND, **columns: Any) -> dict[str, Any]:
    """A row with every column."""
    known = {"night": night, "cohort": COHORT, "case": case, "model": "organs@v2", "codes": "", "message": ""}
    return dict.fromkeys(SCHEMA.names) | known | columns


def labelled(case: str, name: str = "organ", volume_ml: float = 10.0, **columns: Any) -> dict[str, Any]:
    """A row of a label of a case that has a mask."""
    place = {"label": 1, "components": 1, "touches_border": False, "slice_first": 3, "slice_last": 9, "flags": ""}
    found = {"state": "computed", "name": name, "volume_ml": volume_ml, "result": f"results/{COHORT}/{case}/x"}
    return blank(case, **(place | found | columns))


def save_night(root: Root, rows: Sequence[dict[str, Any]], night: str) -> None:
    """The table of a night, without its report."""
    root.put(f"reports/{COHORT}/{night}.parquet", to_parquet(rows, DEFAULT_REPORTING))


def new_root(folder: Path) -> Root:
    """A root with an empty cohort."""
    root = Root(folder / "root")
    save_cohort(root, Cohort(COHORT, (str(folder / "scans"),), ("image",), LABELS))
    return root


def segmented(
    root: Root, case: str, spec: PhantomSpec, state: str = "computed", **columns: Any
) -> list[dict[str, Any]]:
    """Write a phantom as a scan and its truth as its mask; the rows of its labels."""
    image, label = phantom(spec)
    scan = root.home.parent / "scans" / f"{case}.nii.gz"
    scan.parent.mkdir(exist_ok=True)
    write_volume(scan, image)
    known = Case(case, (str(scan),), digest=f"bytes of {case}", geometry=image.geometry)
    save_entry(root, COHORT, Entry(known, Verdict("accepted")))
    key = f"results/{COHORT}/{case}/x"
    publish_mask(
        root, key, Mask(known, label.labels, PLAN, "nifti", Algorithm("organs@v2", "abc"), {"model": "organs"})
    )
    return [
        blank(case, state=state, result=key, seconds=7.0 + len(case))
        | {name: value for name, value in part.items() if name in SCHEMA.names}
        | {"flags": " ".join(part["flags"])}
        | columns
        for part in load_report(root, key)["labels"]
    ]
