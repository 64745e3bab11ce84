"""What ``vnet segment`` and ``vnet nightly`` say of a night, from what lies in the storage root."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from flows.commands.segmentation import night_result
from flows.session import Session
from vnet_core.report import LabelReport, flags, to_row
from workers.cohort import Case, Entry, Verdict
from workers.ledger import Outcome
from workers.nights.record import Night, begin
from workers.reports.report import write_night
from workers.settings.site import Site
from workers.storage.store import Root

ORGAN = LabelReport(1, "organ", 8, 1.0, 1, 2, (0.0, 0.0, 0.0), (9.0, 9.0, 9.0), (4.0, 4.0, 4.0), 1, False)
WHOLE = replace(ORGAN, label=None, name="whole", voxels=12, volume_ml=1.5, slice_last=3)


def rows(*reports: LabelReport) -> list[dict[str, object]]:
    return [{**to_row(report), "flags": list(flags(report))} for report in reports]


@pytest.fixture
def session(tmp_path) -> Session:
    return Session(Root(str(tmp_path / "root")), Site())


def night(session: Session, *outcomes: Outcome) -> dict[str, object]:
    """A night with these outcomes, as it lies in the root."""
    begun = begin(session.root, Night("", "glioma", "glioma@v1", ""), datetime(2026, 11, 22, 1, tzinfo=UTC))
    entries = [Entry(Case(outcome.case, ()), Verdict("accepted")) for outcome in outcomes]
    write_night(session.root, begun, outcomes, entries)
    return {"outcomes": outcomes, "cohort": "glioma", "night": begun.id}


def result(session: Session, case: str, **parts: object) -> Outcome:
    key = f"results/glioma/{case}/1"
    session.root.put(f"{key}/mask.nii.gz", b"mask")
    session.root.put_json(f"{key}/report.json", {"case": case, "mask": "mask.nii.gz", **parts})
    session.root.seal(key, {"case_digest": "", "model_digest": ""})
    return Outcome(case, "segment", "computed", key=key)


def test_regions_stand_beside_the_labels(session: Session) -> None:
    found = night_result(session, night(session, result(session, "a", labels=rows(ORGAN), regions=rows(WHOLE))), None)
    (case,) = found.cases
    assert [(row["label"], row["name"], row["volume_ml"]) for row in case["labels"]] == [(1, "organ", 1.0)]
    (region,) = case["regions"]
    assert region == {
        "label": None,
        "name": "whole",
        "volume_ml": 1.5,
        "voxels": 12,
        "slices": [1, 3],
        "touches_border": False,
    }
    table = [line.split() for line in found.text.splitlines() if line.startswith("a ")]
    assert table == [["a", "computed", "organ", "1.000", "1"], ["a", "computed", "whole", "1.500", "1"]]


def test_without_regions_nothing_is_said_of_them(session: Session) -> None:
    refused = Outcome("b", "ingest", "refused", ("scan.truncated",), "cut short; copy it again")
    found = night_result(session, night(session, result(session, "a", labels=rows(ORGAN)), refused), None)
    assert ["regions" in case for case in found.cases] == [False, False]
    assert "labels" not in found.cases[1]
    assert "b     refused  scan.truncated  cut short" in found.text


def test_masks_are_copied_under_the_names_of_their_cases(session: Session, tmp_path) -> None:
    found = night_result(session, night(session, result(session, "a", labels=rows(ORGAN))), str(tmp_path / "masks"))
    assert found.cases[0]["mask"] == str(tmp_path / "masks" / "a.nii.gz")
    assert (tmp_path / "masks" / "a.nii.gz").read_bytes() == b"mask"
