"""A whole storage root in a bucket: what checks, cleans, asks and reports does there what it does in a folder."""

import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from tests.object_store import ObjectStore
from tests.workers.nights_of_rows import organ, put_night
from tests.workers.small_root import COHORT, PLAN, case_of, small_root
from vnet_core.errors import StorageError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label
from workers.care.fsck import fsck, repair
from workers.care.retention import collect, spares
from workers.cohort import volume_key
from workers.leases import check, run
from workers.ledger import Outcome
from workers.nights.events_log import EventLog, keep_events, read_events
from workers.registry.models import load_model, load_networks
from workers.reports.metrics_text import metrics_text
from workers.reports.query import Query, query
from workers.reports.report import read_rows, settings_of
from workers.settings.retention_rules import KEEP_EVERYTHING, Retention
from workers.sources.scans import read_label
from workers.storage.arrays import read_array, write_arrays, write_ome_labels
from workers.storage.store import RECEIPT, Root

STARTED = datetime(2026, 11, 20, 1, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(days=2)


@pytest.fixture
def root(writable_store: ObjectStore) -> Root:
    return Root(writable_store.new_root())


def result(root: Root, case: str = "a") -> str:
    """With its receipt: a bucket may name what was deleted for a while."""
    (name,) = (n for n in root.names(f"results/{COHORT}/{case}") if root.exists(f"results/{COHORT}/{case}/{n}"))
    return f"results/{COHORT}/{case}/{name}"


def test_arrays_are_whole_or_damaged(root: Root) -> None:
    image = np.arange(2 * 5 * 70 * 9, dtype=np.float32).reshape(2, 5, 70, 9)
    write_arrays(root, "v", {"image": image}, {"a": 1})
    np.testing.assert_array_equal(read_array(root, "v", "image"), image)
    shards = [stored.key for stored in root.walk("v/image/c")]
    assert shards == ["v/image/c/0/0/0/0", "v/image/c/1/0/0/0"]
    content = bytearray(root.get(shards[0]))
    content[len(content) // 2] ^= 1
    root.put(shards[0], bytes(content))
    with pytest.raises(StorageError) as told:
        read_array(root, "v", "image")
    assert told.value.code == "store.corrupt"
    root.delete(shards[0])
    with pytest.raises(StorageError, match="lacks 1 shards") as told:
        read_array(root, "v", "image")
    assert told.value.code == "store.corrupt"


def test_a_mask_is_read_back_on_its_grid(root: Root) -> None:
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1, 2, 3] = 7
    geometry = Geometry((4, 5, 6), (3.0, 1.0, 2.0), (1.0, -2.0, 3.0))
    write_ome_labels(root, "r/mask.ome.zarr", mask, geometry, [Label(value=7, name="lesion")])
    with root.at_hand("r/mask.ome.zarr") as path:
        found = read_label(path)
    np.testing.assert_array_equal(found.labels, mask)
    assert found.geometry == geometry


def test_every_planted_fault_is_found_and_mended(root: Root) -> None:
    small_root(root.url, STARTED)
    assert fsck(root, LATER).findings == ()
    key, other = result(root), result(root, "b")
    root.put(f"{key}/mask.nii.gz", b"flipped")
    root.delete(f"{key}/mask.ome.zarr")
    root.put(f"{key}/beside.txt", b"x")
    root.delete(f"{other}/{RECEIPT}")
    root.put("models/organs/v1/weights.safetensors", b"no weights")
    found = fsck(root, LATER).findings
    assert [(f.key, f.code) for f in found if f.key == key] == [
        (key, code) for code in ("fsck.changed", "fsck.extra", "fsck.missing")
    ]
    assert [f.code for f in found if f.key == other] == ["fsck.orphan"]
    assert [f.code for f in found if f.key == "models/organs/v1"] == ["fsck.changed"]
    done = {f.key: f.done for f in repair(root, found, LATER) if f.done}
    assert set(done) == {key, other}
    assert not root.exists(key)
    assert not root.exists(other)


def test_what_nothing_needs_goes_and_what_is_needed_stays(root: Root) -> None:
    small_root(root.url, STARTED)
    root.put("volumes/spare/image", b"x" * 100)
    root.seal("volumes/spare", {})
    root.put("results/liver/c/half/mask.nii.gz", b"half")
    before = {stored.key for stored in root.walk("")}
    assert spares(root, KEEP_EVERYTHING, datetime.now(UTC)) == []
    rules = Retention(spares_days=1, results_days=1, nights_days=1)
    found = spares(root, rules, LATER)
    assert [(s.key, s.kind, s.bytes) for s in found] == [
        ("volumes/spare", "volume", 100 + len(root.get(f"volumes/spare/{RECEIPT}"))),
        ("results/liver/c/half", "unfinished", 4),
    ]
    collect(root, found)
    gone = {"volumes/spare/image", f"volumes/spare/{RECEIPT}", "results/liver/c/half/mask.nii.gz"}
    assert before - {stored.key for stored in root.walk("")} == gone


def test_uploads_that_a_kill_left_open_are_collected(root: Root, writable_store: ObjectStore) -> None:
    small_root(root.url, STARTED)
    bucket, _, prefix = root.url.removeprefix("s3://").partition("/")
    client = writable_store.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/volumes/large/c/0")["UploadId"]
    client.upload_part(
        Bucket=bucket, Key=f"{prefix}/volumes/large/c/0", UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20)
    )
    assert not root.exists("volumes/large"), "nothing of it is visible"
    assert spares(root, KEEP_EVERYTHING, datetime.now(UTC)) == []
    assert [f.code for f in fsck(root, LATER).findings] == ["fsck.leftover"]
    (found,) = spares(root, KEEP_EVERYTHING, LATER)
    assert found.why == "half written"
    collect(root, [found])
    assert not client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")
    assert spares(root, KEEP_EVERYTHING, LATER) == []


def test_rows_are_asked_for_and_watched(root: Root) -> None:
    for day in (20, 21):
        put_night(root, "liver", f"2026-11-{day}_010000", [organ("a", 10.0 + day), organ("b", 1.0)])
    answer = query(root, Query(labels=("organ",), limit=10))
    assert [(row["night"][:10], row["case"], row["volume_ml"]) for row in answer.rows][:1] == [
        ("2026-11-21", "a", 31.0)
    ]
    counted = query(root, Query(sql="SELECT count(*) AS n, max(volume_ml) AS ml FROM rows"))
    assert counted.rows == [{"n": 4, "ml": 31.0}]
    assert len(read_rows(root, "liver", "2026-11-20_010000")) == 2
    assert settings_of(root, "liver", "2026-11-20_010000").names == {}
    small_root(root.url, STARTED)
    assert 'vnet_cases{cohort="liver",model="organs@v1",state="computed"} 2.0' in metrics_text(root)


def test_the_log_of_a_night_is_kept_at_its_end(root: Root) -> None:
    log = EventLog(root, "liver", "n")
    log(Outcome("a", "segment", "computed"), STARTED)
    assert [event["case"] for event in read_events(root, "liver", "n")] == ["a"]
    assert not root.exists("logs")
    keep_events(root, "liver", "n")
    (root.home / "logs/liver/n.jsonl").unlink()
    assert [event["case"] for event in read_events(root, "liver", "n")] == ["a"]


def test_of_two_runs_one_has_a_case_and_a_dead_ones_is_taken_over(root: Root) -> None:
    with run(root) as first, run(root) as second:
        claim = first.claim("results/x")
        assert claim is not None
        assert second.claim("results/x") is None
        check(root, claim)
        root.delete(f"runs/{first.id}.json")
        taken = second.claim("results/x")
        assert taken is not None
        assert taken.number == 2
        with pytest.raises(StorageError) as told:
            check(root, claim)
        assert told.value.code == "night.taken-over"


def test_many_claims_at_once_have_one_winner_each(root: Root) -> None:
    with run(root) as first, run(root) as second:
        won: dict[str, list[str]] = {"first": [], "second": []}

        def claim_all(name: str, mine) -> None:
            won[name] += [f"results/{n}" for n in range(20) if mine.claim(f"results/{n}")]

        threads = [threading.Thread(target=claim_all, args=pair) for pair in (("first", first), ("second", second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won["first"] + won["second"]) == sorted(f"results/{n}" for n in range(20))


def test_a_model_is_loaded_with_its_networks(root: Root) -> None:
    small_root(root.url, STARTED)
    assert len(load_networks(root, load_model(root, "organs"))) == 1
    assert root.receipt(volume_key(case_of("a"), PLAN)) is not None
