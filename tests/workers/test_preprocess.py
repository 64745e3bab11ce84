"""The stage on real engines: each case once, and what dead workers had in hand again, until its case is to blame."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.workers.known_model import known_plan
from tests.workers.misfortune import Watched, begun
from tests.workers.tiny_cohort import SPACING_MM, take_in, write_scan
from workers.cohort import Case, load_entries, volume_key
from workers.engines.dask_engine import DaskExecutor, dask_executor
from workers.ledger import Outcome
from workers.preprocess import preprocess, preprocess_case
from workers.storage.store import Root

PLAN = known_plan(SPACING_MM, crop=False)
FINE = [f"fine-{number}" for number in range(5)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Cases by name; their scans are read where they lie."""
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate([*FINE, "poison-a", "unlucky-a"]):
        write_scan(folder / "scans", name, seed)
    root = Root(folder / "root")
    take_in(root, "all", [folder / "scans"])
    return [entry.case for entry in load_entries(root, "all")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskExecutor]:
    """Dask on this machine."""
    with dask_executor(None, 2) as executor:
        yield executor


def volumes(root: Root) -> dict[str, dict]:
    """Receipts of the finished volumes by key, without what they say of the work."""
    found = {name: root.receipt(f"volumes/{name}") for name in root.names("volumes")}
    assert all(found.values()), "nothing but finished volumes is left"
    return {name: receipt["files"] for name, receipt in found.items() if receipt}


def test_what_kills_its_worker_is_told_and_all_others_are_done_once(scans, cluster, tmp_path: Path) -> None:
    root, log = Root(tmp_path / "root"), tmp_path / "log" / "begun"
    log.parent.mkdir()
    told: list[Outcome] = []
    outcomes = preprocess(root, scans, PLAN, Watched(cluster, log), told.append)
    assert sorted(told, key=lambda outcome: outcome.case) == outcomes
    by_case = {outcome.case: outcome for outcome in outcomes}
    assert by_case.keys() == {case.id for case in scans}
    counts = begun(log)
    for name in FINE:
        # cached: Dask did it again, since the answer lay on a dead worker, and it found the receipt
        assert by_case[name].state in ("computed", "cached")
        assert counts[name] == 1, "neighbours of a dead worker are neither blamed nor done twice"
    assert (by_case["unlucky-a"].state, counts["unlucky-a"]) == ("computed", 2)
    poison = by_case["poison-a"]
    assert (poison.state, poison.codes, counts["poison-a"]) == ("failed", ("case.kills-worker",), 3)
    assert "died 3 times, the last 2 with no other case beside it" in poison.message
    # the bytes are those of a run in which nobody died, and nothing else is left
    calm = Root(tmp_path / "calm")
    good = [case for case in scans if not case.id.startswith("poison")]
    with ThreadPoolExecutor(2) as executor:
        preprocess(calm, good, PLAN, executor)
    assert volumes(root) == volumes(calm)

    # again: what was published is not begun again
    again = {o.case: o for o in preprocess(root, good, PLAN, Watched(cluster, log))}
    assert {outcome.state for outcome in again.values()} == {"cached"}
    assert begun(log) == counts


def test_a_thread_pool_does_the_same(scans, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    with ThreadPoolExecutor(1) as executor:
        outcomes = preprocess(root, scans, PLAN, executor)
    assert [(outcome.case, outcome.state) for outcome in outcomes] == [(case.id, "computed") for case in scans]
    assert len(volumes(root)) == len(scans)


def test_a_volume_has_the_same_files_however_little_memory_it_is_made_in(scans, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("workers.storage.arrays.CHUNK_EDGE", 4)
    monkeypatch.setattr("workers.storage.arrays.SHARD_EDGE", 8)
    found = []
    for limit_gib in (4.0, 1e-5):
        inference = PLAN.inference.model_copy(update={"memory_limit_gib": limit_gib})
        plan, root = PLAN.model_copy(update={"inference": inference}), Root(tmp_path / f"{limit_gib}")
        assert preprocess_case(root.url, scans[0], plan).state == "computed"
        found.append(root.receipt(volume_key(scans[0], plan)))
    assert found[0]["files"] == found[1]["files"]
    assert found[0]["profile"] == found[1]["profile"]


def test_a_case_that_is_done_again_finds_its_receipt(scans, tmp_path: Path) -> None:
    root, case = Root(tmp_path / "root"), scans[0]
    assert preprocess_case(root.url, case, PLAN).state == "computed"
    receipt = root.get(f"{volume_key(case, PLAN)}/receipt.json")
    done = preprocess_case(root.url, case, PLAN)
    assert (done.state, done.key) == ("cached", volume_key(case, PLAN))
    assert root.get(f"{volume_key(case, PLAN)}/receipt.json") == receipt


def test_a_damaged_receipt_stops_nobody_and_its_volume_is_made_again(scans, tmp_path: Path) -> None:
    root, some = Root(tmp_path / "root"), scans[:2]
    with ThreadPoolExecutor(1) as executor:
        preprocess(root, some, PLAN, executor)
        before = volumes(root)
        root.put(f"{volume_key(some[0], PLAN)}/receipt.json", b"")
        again = preprocess(root, some, PLAN, executor)
    assert [outcome.state for outcome in again] == ["computed", "cached"]
    assert volumes(root) == before


def test_no_more_is_waited_for_than_there_is_time_for(scans, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    with ThreadPoolExecutor(1) as executor:
        outcomes = preprocess(root, scans, PLAN, executor, may_go_on=lambda: False)
    assert len(outcomes) == 1
    assert len(volumes(root)) < len(scans)
