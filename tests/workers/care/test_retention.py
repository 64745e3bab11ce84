"""What goes by the rules, and that nothing goes that anything refers to, whatever the rules are."""

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.files import file_of
from tests.workers.small_root import (
    COHORT,
    PLAN,
    add_model,
    add_night,
    add_result,
    age,
    case_of,
    small_root,
)
from vnet_core.errors import StorageError
from workers.care.fsck import fsck, results_of
from workers.care.retention import Spare, collect, spares
from workers.cohort import remove_entry, result_key, volume_key
from workers.leases import process_table
from workers.ledger import Outcome
from workers.nights.decisions import Decision, record
from workers.registry.aliases import promote
from workers.registry.models import load_model
from workers.settings.retention_rules import KEEP_EVERYTHING, Retention
from workers.sources.archives import unpacked
from workers.sources.mirrors import mirror_key
from workers.storage.store import RECEIPT, Root

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
STRICT = Retention(nights_days=1, results_days=1, spares_days=1)


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def night_of(days: float) -> str:
    return f"{ago(days):%Y-%m-%d_%H%M%S}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """Nights 90, 60, 30 and 3 days ago. Model v1 made the first two, v2, the champion, the others.

    Case ``a`` was there all the time; ``gone`` left its cohort after the second night.
    """
    root = small_root(tmp_path_factory.mktemp("pristine") / "root", ago(90), ("a", "gone"))
    first = load_model(root, "organs@v1")
    done = [
        Outcome(c, "segment", "cached", key=result_key(COHORT, case_of(c), PLAN, first.digest)) for c in ("a", "gone")
    ]
    add_night(root, ago(60), done)
    remove_entry(root, COHORT, "gone")
    add_model(root, "v2")
    promote(root, "organs", "v2", "Ada", "better")
    second = load_model(root, "organs@v2")
    later = Outcome("a", "segment", "computed", key=add_result(root, case_of("a"), second))
    for days in (30, 3):
        add_night(root, ago(days), [later], "organs@v2")
    age(root, "", ago(90))
    return root


@pytest.fixture
def root(pristine: Root, tmp_path: Path) -> Root:
    shutil.copytree(pristine.home, tmp_path / "root")
    return Root(tmp_path / "root")


def kinds(found: Sequence[Spare]) -> list[tuple[str, str]]:
    return [(spare.kind, spare.key) for spare in found]


def result(root: Root, case: str, version: str) -> str:
    return result_key(COHORT, case_of(case), PLAN, load_model(root, f"organs@{version}").digest)


def everything(root: Root) -> set[str]:
    return {p.relative_to(root.home).as_posix() for p in root.home.rglob("*") if p.is_file()}


# --- rules


def test_without_rules_everything_stays(root: Root) -> None:
    assert spares(root, KEEP_EVERYTHING, NOW + timedelta(days=10_000)) == []


def test_old_nights_go_and_the_newest_stays(root: Root) -> None:
    for part in ("logs", "shadows"):
        root.put(f"{part}/{COHORT}/{night_of(60)}.jsonl", b"x")
    found = spares(root, Retention(nights_days=31), NOW)
    assert kinds(found) == [("night", f"nights/{COHORT}/{night_of(days)}") for days in (90, 60)]
    assert kinds(spares(root, Retention(nights_days=30), NOW)) == kinds(found), (
        "30 days and 0 seconds are not more than 30"
    )
    assert len(spares(root, Retention(nights_days=1), NOW)) == 3
    assert len(spares(root, Retention(nights_days=1), NOW + timedelta(days=10_000))) == 3
    before, sizes = everything(root), {name: file_of(root, name).stat().st_size for name in everything(root)}
    removed = collect(root, found)
    assert removed == found
    gone = before - everything(root)
    assert {Path(name).name.partition(".")[0] for name in gone} == {night_of(90), night_of(60)}
    assert {name.split("/")[0] for name in gone} == {"nights", "reports", "logs", "shadows"}
    assert sum(spare.bytes for spare in found) == sum(sizes[name] for name in gone)


def test_results_go_when_no_kept_night_names_them(root: Root) -> None:
    assert spares(root, Retention(results_days=1), NOW) == [], "the nights that name them are kept"
    found = spares(root, Retention(nights_days=31, results_days=1), NOW)
    # of v1, which neither a champion nor the newest version, the results of both cases
    assert sorted(s.key for s in found if s.kind == "result") == sorted(result(root, c, "v1") for c in ("a", "gone"))
    collect(root, found)
    assert root.damaged(result(root, "a", "v2")) == []
    assert root.names(f"results/{COHORT}") == ["a"], "a folder that is empty goes too"
    assert fsck(root, NOW).findings == ()


def test_results_of_a_scheduled_model_stay(root: Root) -> None:
    found = spares(root, Retention(nights_days=31, results_days=1), NOW, ["organs@v1", "nothing@v9"])
    assert [s.key for s in found if s.kind == "result"] == [result(root, "gone", "v1")]


def test_a_result_in_another_format_is_used_by_the_next_night_too(root: Root) -> None:
    key = result(root, "a", "v2") + "-mha"
    root.put(f"{key}/mask.mha", b"x")
    root.seal(key, {})
    root.put(f"{result(root, 'a', 'v1')}-mha/mask.mha", b"x")
    root.seal(f"{result(root, 'a', 'v1')}-mha", {})
    age(root, "results", ago(90))
    found = spares(root, Retention(results_days=1), NOW)
    assert kinds(found) == [("result", f"{result(root, 'a', 'v1')}-mha")]


def test_a_result_that_was_compared_stays_as_long_as_its_night(root: Root) -> None:
    key = result(root, "gone", "v1")
    table = pa.table({"champion_key": pa.array([None], pa.string()), "challenger_key": [key]})
    pq.write_table(table, file_of(root, f"reports/{COHORT}/shadow"))
    root.put(f"shadows/{COHORT}/{night_of(30)}.parquet", root.get(f"reports/{COHORT}/shadow"))
    rules = Retention(nights_days=31, results_days=1)
    assert [s.key for s in spares(root, rules, NOW) if s.kind == "result"] == [result(root, "a", "v1")]
    assert len([s for s in spares(root, STRICT, NOW) if s.kind == "result"]) == 2


def test_a_result_that_somebody_has_decided_about_stays(root: Root) -> None:
    key = result(root, "gone", "v1")
    record(root, COHORT, Decision("gone", key, "reject", "Ada", "2026-09-01T00:00:00+00:00", night_of(60)))
    found = spares(root, STRICT, NOW)
    assert key not in {s.key for s in found}
    assert result(root, "a", "v1") in {s.key for s in found}


def test_what_is_young_stays(root: Root) -> None:
    key = result(root, "gone", "v1")
    os.utime(file_of(root, f"{key}/{RECEIPT}"), (ago(1.5).timestamp(),) * 2)
    assert key in {s.key for s in spares(root, STRICT, NOW)}
    longer = STRICT.model_copy(update={"grace_hours": 48.0})
    assert key not in {s.key for s in spares(root, longer, NOW)}


def test_volumes_go_that_no_case_and_model_of_today_need(root: Root) -> None:
    gone = volume_key(case_of("gone"), PLAN)
    found = spares(root, Retention(spares_days=1), NOW)
    assert kinds(found) == [("volume", gone)]
    root.put_json("training/organs/v3/fold-0/run.json", {"training": {"gone": gone}, "validation": {}})
    assert spares(root, Retention(spares_days=1), NOW) == [], "an unfinished training goes on with it"


def test_checkpoints_of_finished_trainings_go(root: Root) -> None:
    for version in ("v1", "v3"):
        prefix = f"training/organs/{version}"
        root.put(f"{prefix}/checkpoints/000000001/state.safetensors", b"weights")
        root.seal(f"{prefix}/checkpoints/000000001", {})
        root.put_json(f"{prefix}/run.json", {"training": {}, "validation": {}})
    age(root, "training", ago(90))
    found = [s for s in spares(root, Retention(spares_days=1), NOW) if s.kind == "checkpoints"]
    assert [s.key for s in found] == ["training/organs/v1/checkpoints"]
    collect(root, found)
    assert root.names("training/organs/v1") == ["run.json"]
    assert root.names("training/organs/v3") == ["checkpoints", "run.json"]


def test_archives_go_that_no_cohort_names(root: Root, tmp_path: Path) -> None:
    private = Root(root.home / "private")
    for name in ("used", "unused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / name)
        unpacked(private, tmp_path / f"{name}.zip")
    used, unused = sorted(
        private.names("archives"), key=lambda n: not list(file_of(private, f"archives/{n}").rglob("used*"))
    )
    cohort = root.get_json(f"cohorts/{COHORT}/cohort.json")
    root.put_json(f"cohorts/{COHORT}/cohort.json", cohort | {"archives": [f"archives/{used}"]})
    age(root, "private/archives", ago(90))
    found = [s for s in spares(root, Retention(spares_days=1), NOW) if s.kind == "archive"]
    assert kinds(found) == [("archive", f"archives/{unused}")]
    collect(root, found)
    assert private.names("archives") == [used]


def test_copies_of_buckets_go_that_no_cohort_is_read_from(root: Root) -> None:
    private, source = Root(root.home / "private"), "s3://pacs-export/liver"
    for name in (mirror_key(source).partition("/")[2], "other"):
        (private.home / "mirrors" / name).mkdir(parents=True)
        (private.home / "mirrors" / name / "a b.nii").write_bytes(b"scan")
    key = f"cohorts/{COHORT}/cohort.json"
    private.put_json(key, {"sources": [*private.get_json(key)["sources"], f"{source}/"]})
    age(root, "private/mirrors", ago(90))
    found = [s for s in spares(root, Retention(spares_days=1), NOW) if s.kind == "archive"]
    assert kinds(found) == [("archive", "mirrors/other")]
    assert found[0].bytes == 4
    collect(root, found)
    assert private.names("mirrors") == [mirror_key(source).partition("/")[2]]


def test_what_died_runs_left_goes_without_a_rule(root: Root) -> None:
    root.put("results/liver/c/unfinished/mask.nii.gz", b"half")
    (root.home / "nights/liver/.put-abc").write_bytes(b"half")
    (root.home / "private/archives/x/.unpacking-y").mkdir(parents=True)
    process = psutil.Process()
    dead = {"host": process_table(), "pid": process.pid, "born": 0.0, "beat": NOW.isoformat()}
    root.put_json("runs/dead.json", dead)
    root.put_json("leases/work-00000001.json", {"run": "dead"})
    shutil.copytree(file_of(root, "models/organs/v1"), file_of(root, "models/organs/v9"))
    file_of(root, f"models/organs/v9/{RECEIPT}").unlink()
    for prefix in ("results", "nights", "private", "runs", "leases", "models"):
        age(root, prefix, ago(0.9))
    assert spares(root, KEEP_EVERYTHING, NOW) == []
    before = everything(root)
    found = spares(root, KEEP_EVERYTHING, NOW + timedelta(hours=6))
    assert {s.kind for s in found} == {"unfinished"}
    collect(root, found)
    assert before - everything(root) == {
        "results/liver/c/unfinished/mask.nii.gz",
        "nights/liver/.put-abc",
        "runs/dead.json",
        "leases/work-00000001.json",
    }
    assert not (root.home / "private/archives/x").exists()
    assert not (root.home / "results/liver/c").exists()


# --- care


def test_what_a_run_has_finished_since_it_was_found_stays(root: Root) -> None:
    root.put("results/liver/c/late/mask.nii.gz", b"half")
    age(root, "results/liver/c", ago(90))
    found = spares(root, KEEP_EVERYTHING, NOW)
    assert kinds(found) == [("unfinished", "results/liver/c/late")]
    root.seal("results/liver/c/late", {})
    assert collect(root, found) == []
    assert root.damaged("results/liver/c/late") == []


def test_nothing_goes_while_a_run_is_at_work(root: Root) -> None:
    process = psutil.Process()
    beat = datetime.now(UTC).isoformat()
    facts = {"host": process_table(), "pid": process.pid, "born": process.create_time(), "beat": beat}
    root.put_json("runs/alive.json", facts)
    before = everything(root)
    found = spares(root, STRICT, NOW)
    assert found
    with pytest.raises(StorageError) as caught:
        collect(root, found)
    assert caught.value.code == "gc.running"
    assert everything(root) == before


@pytest.mark.parametrize(
    "key",
    [
        f"reports/{COHORT}/{night_of(3)}.parquet",
        f"nights/{COHORT}/{night_of(3)}.json",
        f"cohorts/{COHORT}/cases/a.json",
        f"private/cohorts/{COHORT}/cases/a.json",
        "models/organs/v2/model.json",
        "models/organs/history/000001.json",
        f"decisions/{COHORT}/a/000001.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"{}"])
def test_nothing_goes_when_what_refers_to_others_cannot_be_read(root: Root, key: str, content: bytes) -> None:
    root.put(key, content)
    before = everything(root)
    with pytest.raises(StorageError) as caught:
        spares(root, STRICT, NOW)
    assert caught.value.code == "gc.unreadable"
    assert everything(root) == before


rules = st.builds(
    Retention,
    nights_days=st.none() | st.integers(1, 120),
    results_days=st.none() | st.integers(1, 120),
    spares_days=st.none() | st.integers(1, 120),
    grace_hours=st.floats(1, 72),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(first=rules, second=rules, days=st.floats(0, 400), stop=st.integers(0, 12))
def test_whatever_the_rules_every_result_of_a_kept_night_still_verifies(
    pristine: Root, tmp_path: Path, first: Retention, second: Retention, days: float, stop: int
) -> None:
    """Also when the first of two collections is killed half way."""
    shutil.rmtree(tmp_path / "root", ignore_errors=True)
    shutil.copytree(pristine.home, tmp_path / "root")
    root = Root(tmp_path / "root")
    collect(root, spares(root, first, NOW)[:stop])
    collect(root, spares(root, second, NOW + timedelta(days=days)))
    nights = [name.removesuffix(".parquet") for name in root.names(f"reports/{COHORT}") if name.endswith(".parquet")]
    assert night_of(3) in nights
    for night in nights:
        for key in results_of(root, COHORT, night):
            assert root.damaged(key) == []
    assert root.damaged(result(root, "a", "v2")) == []
    assert root.damaged(volume_key(case_of("a"), PLAN)) == []
    assert root.damaged("models/organs/v1") == root.damaged("models/organs/v2") == []
    assert [f for f in fsck(root, NOW).findings if f.code != "fsck.night"] == []
