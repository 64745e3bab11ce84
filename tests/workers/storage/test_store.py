"""The storage root on a real file system, full disks and kills included."""

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.files import file_of
from vnet_core.errors import ConfigError, StorageError
from workers.storage.folders import Folder, raise_if_full
from workers.storage.store import RECEIPT, Root, file_digest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Root]:
    """A root on a file system of its own; skips where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount command'}")
    try:
        yield Root(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Any longer write of this process fails half way, as on a disk with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- addresses and keys


def test_a_root_is_a_folder_or_a_file_url(tmp_path, monkeypatch):
    folder = tmp_path / "with space and é"
    assert Root(str(folder)).home == folder
    assert Root(Root(folder).url).home == folder
    assert Root(folder).url.startswith("file:///")
    monkeypatch.chdir(tmp_path)
    assert Root("data").home == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Root("~/data").home == tmp_path / "data"
    assert not folder.exists(), "nothing is created before the first write"


@pytest.mark.parametrize("url", ["https://example.org/x"])
def test_other_schemes_are_refused_by_name(url):
    with pytest.raises(ConfigError, match=url.partition(":")[0]) as caught:
        Root(url)
    assert caught.value.code == "store.scheme"


KEYS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    ".",
    "a/./b",
    "a//b",
    "a/",
    "a\\b",
    "a b",
    "a\n",
    "é",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("call", ["get", "exists", "names", "delete", "put", "receipt", "seal", "damaged"])
def test_keys_that_could_leave_the_root_are_refused(root, key, call):
    root.put("x", b"kept")
    arguments = {"put": [key, b"x"], "seal": [key, {}]}.get(call, [key])
    with pytest.raises(StorageError) as caught:
        getattr(root, call)(*arguments)
    assert caught.value.code == "store.key"
    assert everything_under(root.home.parent) == ["root/x"]


# --- objects


def test_what_is_put_is_got(root):
    for content in (b"", b"\0\xff" * 1000, b"second"):
        root.put("a/b.c/d-e_f@g+h=i", content)
        assert root.get("a/b.c/d-e_f@g+h=i") == content
    assert everything_under(root.home) == ["a/b.c/d-e_f@g+h=i"]


def test_a_missing_object_is_named(root):
    with pytest.raises(StorageError, match=r"a/b\.json") as caught:
        root.get("a/b.json")
    assert caught.value.code == "store.missing"
    assert isinstance(caught.value, OSError)


def test_json_keeps_values_and_refuses_what_json_has_no_word_for(root):
    value = {"é": [1, 2.5, None, True, "x"], "deep": {"a": {}}}
    root.put_json("x.json", value)
    assert root.get_json("x.json") == value
    with pytest.raises(ValueError, match="JSON"):
        root.put_json("x.json", float("nan"))
    assert root.get_json("x.json") == value


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_broken_json_is_named_as_damage(root, content):
    root.put("x.json", content)
    with pytest.raises(StorageError, match=r"x\.json") as caught:
        root.get_json("x.json")
    assert caught.value.code == "store.corrupt"


def test_names_are_sorted_and_leave_out_what_is_unfinished(root):
    for name in ("b", "a", "c/d"):
        root.put(f"x/{name}", b"")
    (root.home / "x" / ".put-half").write_bytes(b"")
    assert root.names("x") == ["a", "b", "c"]
    assert root.names("nothing") == []
    assert root.names("x/a") == []


def test_delete_takes_objects_and_whole_prefixes(root):
    for key in ("a/1", "a/b/2", "c"):
        root.put(key, b"")
    root.delete("a")
    root.delete("never/there")
    assert everything_under(root.home) == ["c"]
    root.delete("c")
    assert not root.exists("c")


# --- writes that fail


def test_a_failed_put_leaves_the_old_content_and_no_temporary_file(root):
    root.put("a/x", b"old")
    with files_of_at_most(4096), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        root.put("a/x", bytes(100_000))
    assert root.get("a/x") == b"old"
    assert everything_under(root.home) == ["a/x"]
    root.put("a/x", b"new")
    assert root.get("a/x") == b"new"


def test_a_put_over_a_folder_leaves_the_folder(root):
    root.put("a/x/y", b"old")
    with pytest.raises(IsADirectoryError):
        root.put("a/x", b"new")
    assert everything_under(root.home) == ["a/x/y"]


@pytest.mark.fault("F11")
def test_a_full_disk_is_told_and_keeps_what_it_held(tmp_path):
    with tmpfs(tmp_path / "small", "size=64k") as root:
        root.put("a/x", b"old" * 100)
        with pytest.raises(StorageError) as caught:
            root.put("a/x", bytes(200_000))
        assert caught.value.code == "store.full"
        assert str(root.home) in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert root.get("a/x") == b"old" * 100
        assert everything_under(root.home) == ["a/x"]
        root.put("b", b"fits")


@pytest.mark.fault("F12")
def test_a_disk_without_room_for_the_root_itself_is_full_too(tmp_path):
    with tmpfs(tmp_path / "small", "size=64k,nr_inodes=3") as parent:
        for name in ("a", "b"):
            (parent.home / name).mkdir()
        with pytest.raises(StorageError) as caught:
            Root(parent.home / "root").put("x", b"x")
        assert caught.value.code == "store.full"


def test_only_a_full_disk_is_called_full(tmp_path):
    for number in (errno.EACCES, errno.EIO, errno.EFBIG):
        raise_if_full(OSError(number, "other"), tmp_path)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(StorageError, match="MiB free") as caught:
            raise_if_full(OSError(number, "full"), tmp_path)
        assert caught.value.code == "store.full"


def test_probe_leaves_nothing_behind(root):
    root.probe()
    assert everything_under(root.home) == []


def test_probe_finds_a_place_that_gives_back_something_else(root, monkeypatch):
    monkeypatch.setattr(Folder, "get", lambda place, key: b"")
    with pytest.raises(StorageError, match="does not give back") as caught:
        root.probe()
    assert caught.value.code == "store.unwritable"
    assert everything_under(root.home) == []


def test_probe_finds_a_root_under_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    root = Root(tmp_path / "file" / "root")
    with pytest.raises(StorageError) as caught:
        root.probe()
    assert caught.value.code == "store.unwritable"
    assert str(root.home) in str(caught.value)
    assert os.strerror(errno.ENOTDIR) in str(caught.value)
    assert "VNET_ROOT" in str(caught.value)


@pytest.mark.fault("F13")
def test_probe_finds_a_file_system_that_is_read_only(tmp_path):
    with tmpfs(tmp_path / "frozen", "size=64k,ro") as root, pytest.raises(StorageError) as caught:
        root.probe()
    assert caught.value.code == "store.unwritable"
    assert os.strerror(errno.EROFS) in str(caught.value)


def test_probe_finds_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "small", "size=64k") as root:
        with contextlib.suppress(OSError):
            (root.home / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(StorageError, match="no space"):
            root.probe()


@pytest.mark.fault("F22")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="file handles have no names on this system")
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_put_returns(root, monkeypatch):
    """The order that a power cut needs; every call goes through to the system."""
    root.put("a/x", b"old")
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        folders = {root.home / "a": "folder", root.home: "root"}
        order.append(("sync", folders.get(path, path.name[:5])))
        fsync(handle)

    def renamed(source, target) -> None:
        order.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    root.put("a/x", b"new")
    assert order == [("sync", ".put-"), ("rename", "x"), ("sync", "folder")]
    order.clear()
    root.put("b/c/x", b"new")
    assert order[:2] == [("sync", "b"), ("sync", "root")], "names of new folders first"
    order.clear()
    root.seal("a", {})
    assert order[:3] == [("sync", "x"), ("sync", "folder"), ("sync", "root")]
    assert order[3:] == [("sync", ".put-"), ("rename", RECEIPT), ("sync", "folder")]


@contextmanager
def no_more_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_that_cannot_be_looked_into_is_not_empty(root):
    """Else a receipt would name fewer files than there are."""
    root.put("results/c/1/mask", b"mask")
    for look in (
        lambda: list(root.walk("results")),
        lambda: root.seal("results/c/1", {}),
        lambda: root.names("results"),
    ):
        with no_more_open_files():
            try:
                look()
                told = 0
            except OSError as error:
                told = error.errno
        assert told == errno.EMFILE
    assert root.receipt("results/c/1") is None


def test_an_answer_that_a_server_of_files_repeats_does_not_take_the_writer_s_word_from_him(root, monkeypatch):
    """Over NFS a link that was made, and whose answer was lost, is asked for again and then told to be there."""
    link = os.link

    def linked_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", linked_twice)
    assert root.create("leases/a", b"mine")
    assert not root.create("leases/a", b"other")
    assert root.get("leases/a") == b"mine"


# --- readers and writers at the same time


def test_a_reader_never_sees_a_part_of_an_object(root):
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    root.put("x", contents[0])
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(root.get("x"))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for turn in range(60):
                root.put("x", contents[turn % 2])
        finally:
            done.set()
        reading.result()
    assert len(seen) > 5
    assert set(seen) <= set(contents)


def test_writers_of_one_key_at_once_leave_one_whole_object(root):
    contents = [bytes([i]) * 50_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: root.put("deep/er/x", content), contents))
    assert root.get("deep/er/x") in contents
    assert everything_under(root.home) == ["deep/er/x"]


@pytest.mark.fault("F7")
def test_a_kill_leaves_a_whole_object_and_no_name(root):
    program = (
        "import sys; from workers.storage.store import Root\n"
        "root = Root(sys.argv[1])\n"
        "for turn in range(10**9):\n"
        "    root.put('a/x', bytes([turn % 251]) * 3_000_000); print(turn, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(root.home)]
    for lines in (1, 2, 3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
            for _ in range(lines):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        content = root.get("a/x")
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
        assert root.names("a") == ["x"]
    assert set(root.seal("a", {})["files"]) == {"x"}


def test_two_that_delete_the_same_at_once_are_both_content(root):
    for turn in range(20):
        for number in range(60):
            root.home.joinpath("v", str(turn), str(number)).mkdir(parents=True)
        start = threading.Barrier(2)

        def delete(turn: int = turn, start: threading.Barrier = start) -> None:
            start.wait()
            root.delete(f"v/{turn}")

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(delete) for _ in range(2)]:
                done.result()
        assert not root.exists(f"v/{turn}")


def test_a_folder_that_is_tidied_away_is_made_again(root):
    done = threading.Event()

    def tidy() -> None:
        # not in a tight loop: two threads of one process would take turns at every call
        while not done.wait(0.0005):
            root.place.tidy("leases")

    with ThreadPoolExecutor(1) as pool:
        tidying = pool.submit(tidy)
        try:
            for number in range(400):
                root.put(f"leases/{number}", b"")
                root.delete(f"leases/{number}")
        finally:
            done.set()
        tidying.result()


# --- receipts


def sealed(root: Root, prefix: str = "results/c/1") -> dict:
    root.put(f"{prefix}/mask", b"mask" * 100)
    root.put(f"{prefix}/labels/c/0", b"chunk")
    root.put(f"{prefix}/empty", b"")
    return root.seal(prefix, {"stage": "segment", "seconds": 1.5})


def test_a_result_exists_once_its_receipt_does(root):
    root.put("results/c/1/mask", b"mask")
    assert root.receipt("results/c/1") is None
    assert root.damaged("results/c/1") == [RECEIPT]
    written = sealed(root)
    assert root.receipt("results/c/1") == written
    assert root.damaged("results/c/1") == []


def test_a_receipt_holds_the_facts_and_the_sha256_of_every_other_file(root):
    written = sealed(root)
    assert written["stage"] == "segment"
    assert written["seconds"] == 1.5
    assert written["files"] == {
        "mask": hashlib.sha256(b"mask" * 100).hexdigest(),
        "labels/c/0": hashlib.sha256(b"chunk").hexdigest(),
        "empty": hashlib.sha256(b"").hexdigest(),
    }
    file_of(root, "results/c/1/labels/.put-half").write_bytes(b"left by a kill")
    assert sealed(root) == written, "a second seal counts the receipt itself, or what a kill left"
    assert file_digest(file_of(root, "results/c/1/mask")) == written["files"]["mask"]


def test_the_receipt_is_written_last(root):
    sealed(root)
    paths = [file_of(root, f"results/c/1/{name}") for name in ("mask", "labels/c/0", "empty")]
    receipt = file_of(root, f"results/c/1/{RECEIPT}").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= receipt for path in paths)


def test_a_seal_that_fails_leaves_no_receipt(root):
    root.put("r/x", b"x")
    with files_of_at_most(16), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        root.seal("r", {"facts": "longer than sixteen bytes"})
    assert root.receipt("r") is None
    assert root.names("r") == ["x"]


@pytest.mark.parametrize("name", ["mask", "labels/c/0"])
def test_every_flipped_bit_is_found(root, name):
    sealed(root)
    path = file_of(root, f"results/c/1/{name}")
    content = path.read_bytes()
    for position in {0, len(content) // 2, len(content) - 1}:
        for bit in (1, 128):
            broken = bytearray(content)
            broken[position] ^= bit
            path.write_bytes(broken)
            assert root.damaged("results/c/1") == [name]
    path.write_bytes(content)
    assert root.damaged("results/c/1") == []


def test_missing_cut_and_replaced_files_are_found(root):
    sealed(root)
    file_of(root, "results/c/1/mask").unlink()
    file_of(root, "results/c/1/labels/c/0").write_bytes(b"chun")
    file_of(root, "results/c/1/empty").unlink()
    file_of(root, "results/c/1/empty").mkdir()
    assert sorted(root.damaged("results/c/1")) == ["empty", "labels/c/0", "mask"]


def test_files_beside_a_receipt_do_not_damage_a_result(root):
    sealed(root)
    root.put("results/c/1/later", b"x")
    assert root.damaged("results/c/1") == []


@pytest.mark.parametrize("prefix", ["results/c/1", "results/c", "results"])
def test_a_delete_that_is_interrupted_leaves_no_receipt_over_missing_files(root, prefix, monkeypatch):
    """Else what is half gone would count as finished for ever."""
    sealed(root)

    def interrupted(path, *arguments, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        root.delete(prefix)
    assert root.receipt("results/c/1") is None


@pytest.mark.parametrize("content", ["", '{"files": {', "[]", "null", '{"stage": "segment"}', '{"files": []}'])
def test_a_receipt_that_is_damaged_finishes_nothing_and_is_named(root, content):
    sealed(root)
    file_of(root, f"results/c/1/{RECEIPT}").write_text(content)
    assert root.receipt("results/c/1") is None
    assert root.damaged("results/c/1") == [RECEIPT]
    assert sealed(root) == root.receipt("results/c/1")
