"""The stage on real engines: each case once, and what dead workers had in hand again, until its case is to blame."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.known_model import known_plan
from tests.workers.misfortune import Watched, begun
from tests.workers.through import Through
from tests.workers.tiny_cohort import SPACING_MM, take_in, write_scan
from vnet_core.errors import StorageError
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.cohort import Case, load_entries, scan_key, volume_key
from workers.engines.dask_engine import DaskExecutor, dask_executor
from workers.engines.tries import Work
from workers.ledger import Outcome
from workers.preprocess import preprocess, preprocess_case
from workers.sources.scans import write_volume
from workers.storage.arrays import StoredArray
from workers.storage.store import Root
from workers.stretches import count_of, join, prepare_stretch, stretch_key

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


LITTLE_GIB = 1e-5


def in_memory_of(gib: float, **preprocess: str) -> Plan:
    return PLAN.model_copy(
        update={
            "inference": PLAN.inference.model_copy(update={"memory_limit_gib": gib}),
            "preprocess": PLAN.preprocess.model_copy(update=preprocess),
        }
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small scan has several: in this process and its threads."""
    monkeypatch.setattr("workers.storage.arrays.CHUNK_EDGE", 2)
    monkeypatch.setattr("workers.storage.arrays.SHARD_EDGE", 4)


@pytest.mark.parametrize("bias_field", ["none", "n4"])
def test_a_volume_has_the_same_files_in_stretches_as_whole(
    scans, small_shards, tmp_path: Path, bias_field: str
) -> None:
    found = []
    for limit_gib in (4.0, LITTLE_GIB):
        plan, root = in_memory_of(limit_gib, bias_field=bias_field), Root(tmp_path / f"{limit_gib}")
        told: list[Outcome] = []
        with ThreadPoolExecutor(2) as executor:
            outcomes = preprocess(root, scans[:2], plan, executor, told.append)
        assert [(outcome.case, outcome.state) for outcome in outcomes] == [(c.id, "computed") for c in scans[:2]]
        assert sorted(outcome.case for outcome in told) == [case.id for case in scans[:2]], "each is told once"
        assert sorted(volumes(root)) == sorted(volume_key(c, plan).partition("/")[2] for c in scans[:2])
        found.append([root.receipt(volume_key(case, plan)) for case in scans[:2]])
    for whole, joined in zip(*found, strict=True):
        differing = {name for name in whole if whole[name] != joined[name]}
        assert whole.keys() == joined.keys()
        assert differing <= {"seconds", "peak_bytes", "finished"}


def test_a_case_in_stretches_goes_on_from_those_that_are_done(
    scans, small_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, root, case = in_memory_of(LITTLE_GIB), Root(tmp_path / "root"), scans[0]
    volume = volume_key(case, plan)
    assert preprocess_case(root.url, case, plan).key == scan_key(volume)
    assert count_of(root, volume) == 2
    assert prepare_stretch(root.url, case, plan, 1).key == stretch_key(volume, 1)
    before = root.receipt(stretch_key(volume, 1))
    again: dict[str, int] = {}
    made = StoredArray.write

    def counted(self: StoredArray, values: np.ndarray, *region: slice) -> None:
        again[self.prefix] = again.get(self.prefix, 0) + 1
        made(self, values, *region)

    monkeypatch.setattr(StoredArray, "write", counted)
    with ThreadPoolExecutor(1) as executor:
        (outcome,) = preprocess(root, [case], plan, executor)
    assert (outcome.state, outcome.key) == ("computed", volume)
    assert before is not None
    assert again.keys() == {volume}, "the scan is not read again"
    assert volumes(root).keys() == {volume.partition("/")[2]}


def lose_a_stretch(root: Root, volume: str) -> None:
    root.delete(stretch_key(volume, 0))


def lose_a_file_of_the_volume(root: Root, volume: str) -> None:
    root.delete(f"{volume}/image/c/0/0/0/0")


def damage_the_scan(root: Root, volume: str) -> None:
    root.delete(stretch_key(volume, 0))
    root.put(f"{scan_key(volume)}/image/c/0/0/0/0", b"no shard")


@pytest.mark.fault("F32")
@pytest.mark.parametrize("misfortune", [lose_a_stretch, lose_a_file_of_the_volume, damage_the_scan])
def test_what_is_not_whole_any_more_fails_once_and_is_made_anew_from_the_scan(
    scans, small_shards, tmp_path: Path, misfortune: Callable[[Root, str], None]
) -> None:
    plan, root, case = in_memory_of(LITTLE_GIB), Root(tmp_path / "root"), scans[0]
    volume = volume_key(case, plan)
    preprocess_case(root.url, case, plan)
    for number in range(count_of(root, volume)):
        prepare_stretch(root.url, case, plan, number)
    misfortune(root, volume)
    again = misfortune is damage_the_scan
    failed = prepare_stretch(root.url, case, plan, 0) if again else join(root.url, case, plan)
    assert failed.state == "failed"
    assert failed.codes[0] in ("store.missing", "store.corrupt")
    with ThreadPoolExecutor(1) as executor:
        (outcome,) = preprocess(root, [case], plan, executor)
    assert (outcome.state, outcome.key) == ("computed", volume)
    assert volumes(root).keys() == {volume.partition("/")[2]}
    assert root.damaged(volume) == []


def test_a_stretch_that_fails_fails_its_case_alone(
    scans, small_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, root = in_memory_of(LITTLE_GIB), Root(tmp_path / "root")
    bad = volume_key(scans[0], plan)
    whole = StoredArray.whole

    def damaged(self: StoredArray) -> StoredArray:
        if self.prefix == scan_key(bad):
            raise StorageError("store.corrupt", "damaged on purpose")
        return whole(self)

    monkeypatch.setattr(StoredArray, "whole", damaged)
    told: list[Outcome] = []
    # one after the other: what is damaged is taken away, so that a second stretch finds it missing
    with ThreadPoolExecutor(1) as executor:
        outcomes = preprocess(root, scans[:2], plan, executor, told.append)
    assert [(outcome.state, outcome.codes) for outcome in outcomes] == [
        ("failed", ("store.corrupt",)),
        ("computed", ()),
    ]
    assert len(told) == 2, "a case is told once, however many of its stretches fail"


class Mortal(Through):
    """A Dask cluster of which a worker dies over the second stretch, once."""

    def __init__(self, executor: DaskExecutor, dead: Path) -> None:
        super().__init__(executor)
        self._dead = dead

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(dying_once, str(self._dead), fn, *args, **kwargs)


def dying_once(dead: str, fn: Callable[..., Any], root_url: str, mark: str, work: Work, *rest: Any) -> Any:
    """On the worker."""
    if work.key.endswith(".stretch-1") and not Path(dead).exists():
        Path(dead).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return fn(root_url, mark, work, *rest)


@pytest.mark.fault("F5")
def test_stretches_of_a_tall_scan_are_shared_among_workers_of_which_one_dies(cluster, tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 300, (1, 600, 8, 8)).astype(np.int16)
    (tmp_path / "scans").mkdir()
    write_volume(tmp_path / "scans" / "tall.nii", Volume(values, Geometry((600, 8, 8), SPACING_MM, (0.0, 0.0, 0.0))))
    found = []
    for name, gib in (("whole", 4.0), ("shared", LITTLE_GIB)):
        root, plan = Root(tmp_path / name), in_memory_of(gib)
        take_in(root, "all", [tmp_path / "scans"])
        cases = [entry.case for entry in load_entries(root, "all")]
        (outcome,) = preprocess(root, cases, plan, Mortal(cluster, tmp_path / "dead"))
        assert outcome.state == "computed"
        found.append(volumes(root))
    assert found[0] == found[1]
    assert (tmp_path / "dead").exists(), "a worker died over a stretch"
    assert len([name for files in found[1].values() for name in files if "/c/" in name]) == 3, "files along z"


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
