"""What the next night makes of one whose process died."""

from datetime import UTC, datetime

import pytest
from prefect.logging import disable_run_logger

from flows.nights.night import close_abandoned
from flows.session import Session
from tests.files import file_of
from tests.workers.small_root import COHORT, PLAN, add_case, add_model
from workers.cohort import Cohort, save_cohort
from workers.nights.attempts import Failure, add_failure
from workers.nights.record import Night, abandoned, begin, load_night
from workers.reports.report import read_rows
from workers.settings.site import Site
from workers.storage.store import Root

STARTED = datetime(2026, 11, 22, 1, tzinfo=UTC)


@pytest.mark.parametrize("lost", ["gone", "damaged"])
def test_a_dead_night_whose_model_cannot_be_used_is_closed_and_keeps_nobody_waiting(tmp_path, lost: str) -> None:
    root = Root(tmp_path / "root")
    save_cohort(root, Cohort(COHORT, ("/scans",), ("image",), PLAN.labels))
    for name in ("a", "b"):
        add_case(root, name)
    model = add_model(root)
    night = begin(root, Night("", COHORT, model.reference, "", run="dead"), STARTED)
    add_failure(root, COHORT, "b", Failure("key", night.id, "", "segment", ("engine.memory",), "no memory"))
    if lost == "gone":
        root.delete(model.prefix)
    else:
        file_of(root, f"{model.prefix}/model.json").write_bytes(b"{}")
    (dead,) = abandoned(root, COHORT)
    with disable_run_logger():
        close_abandoned(Session(root, Site()), dead)
    assert abandoned(root, COHORT) == []
    assert load_night(root, COHORT, night.id).stopped == "died"
    states = {row["case"]: (row["state"], row["codes"]) for row in read_rows(root, COHORT, night.id)}
    assert states == {"a": ("carried-over", "night.died"), "b": ("failed", "engine.memory")}
