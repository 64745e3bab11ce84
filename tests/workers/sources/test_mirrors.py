"""Sources in a bucket of a real S3 server: brought once, kept in step, and never beyond their folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.object_store import ObjectStore
from tests.workers.tiny_cohort import take_in, write_scan
from vnet_core.errors import ConfigError
from workers.cohort import load_entries
from workers.sources.arrivals import snapshot
from workers.sources.mirrors import mirrored
from workers.storage.store import Root


@pytest.fixture
def bucket(writable_store: ObjectStore) -> Root:
    """A prefix in which scans arrive."""
    return Root(writable_store.new_root())


@pytest.fixture
def private(tmp_path: Path) -> Root:
    return Root(tmp_path / "private")


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_follows_its_prefix(bucket: Root, private: Root) -> None:
    bucket.put("day/a.nii", b"one")
    bucket.put("day/deep/b.nii", b"two")
    bucket.put("daylight/c.nii", b"of another prefix")
    folder = mirrored(private, f"{bucket.url}/day/")
    assert files(folder) == {"a.nii": b"one", "deep/b.nii": b"two"}
    assert folder.stat().st_mode & 0o777 == 0o700
    stamps = {name: (folder / name).stat().st_ctime_ns for name in files(folder)}
    bucket.put("day/deep/b.nii", b"changed")
    bucket.put("day/new.nii", b"three")
    assert mirrored(private, f"{bucket.url}/day") == folder
    assert files(folder) == {"a.nii": b"one", "deep/b.nii": b"changed", "new.nii": b"three"}
    assert (folder / "a.nii").stat().st_ctime_ns == stamps["a.nii"], "what is there already is not fetched again"
    bucket.delete("day/deep/b.nii")
    (folder / ".part-left").write_bytes(b"half")
    mirrored(private, f"{bucket.url}/day")
    assert files(folder) == {"a.nii": b"one", "new.nii": b"three"}
    assert not (folder / "deep").exists()


def test_folders_that_a_console_has_made_are_no_scans(bucket: Root, private: Root, writable_store: ObjectStore) -> None:
    client, prefix = writable_store.client(), bucket.url.removeprefix("s3://tests/")
    made = {"day/": b"", "day/deep/": b"", "day/empty/": b"", "day/a b#1%20é~.nii": b"odd"}
    bucket.put("day/deep/b.nii", b"two")
    bucket.put("day/nothing.nii", b"")
    for name, content in made.items():
        client.put_object(Bucket="tests", Key=f"{prefix}/{name}", Body=content)
    try:
        folder = mirrored(private, f"{bucket.url}/day")
    finally:  # others empty the bucket by keys of ours
        for name in reversed(made):
            client.delete_object(Bucket="tests", Key=f"{prefix}/{name}")
    assert files(folder) == {"deep/b.nii": b"two", "nothing.nii": b"", "a b#1%20é~.nii": b"odd"}


def test_two_that_look_at_once_do_not_disturb_each_other(bucket: Root, private: Root) -> None:
    for number in range(12):
        bucket.put(f"day/{number}.nii", bytes([number]) * 3_000_000)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: mirrored(private, f"{bucket.url}/day"), range(3)))
    assert len(set(found)) == 1
    assert files(found[0]) == {f"{number}.nii": bytes([number]) * 3_000_000 for number in range(12)}
    assert private.names("mirrors") == [found[0].name]


def test_one_object_is_a_file(bucket: Root, private: Root) -> None:
    bucket.put("day/a.nii", b"one")
    path = mirrored(private, f"{bucket.url}/day/a.nii")
    assert path.name == "a.nii"
    assert path.read_bytes() == b"one"


def test_what_is_not_there_is_named(bucket: Root, private: Root) -> None:
    with pytest.raises(ConfigError, match=f"nothing lies at {bucket.url}/none") as told:
        mirrored(private, f"{bucket.url}/none")
    assert told.value.code == "source.missing"


def test_arrivals_and_changes_are_seen(bucket: Root) -> None:
    source = [f"{bucket.url}/day"]
    states = [snapshot(source)]
    for key, content in (("day/a", b"1"), ("day/b", b"1"), ("day/a", b"22")):
        bucket.put(key, content)
        states.append(snapshot(source))
    assert len(set(states)) == 4
    assert snapshot(source) == states[-1]


def test_a_cohort_is_taken_in_from_a_bucket_and_kept_in_step(bucket: Root, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "made", "case0", 0)
    bucket.put("scans/case0.nii", scan.read_bytes())
    bucket.put("scans/case1.nii", write_scan(tmp_path / "made", "case1", 1).read_bytes())
    root = Root(tmp_path / "root")
    source = f"{bucket.url}/scans"
    assert [o.state for o in take_in(root, "many", [source])] == ["accepted", "accepted"]
    first = load_entries(root, "many")
    bucket.put("scans/case2.nii", write_scan(tmp_path / "made", "case2", 2).read_bytes())
    bucket.delete("scans/case0.nii")
    assert [o.case for o in take_in(root, "many", [source])] == ["case1", "case2"]
    (kept,) = (entry for entry in load_entries(root, "many") if entry.case.id == "case1")
    assert kept in first, "a case that has not changed is not read again"
