"""An object store that fails, and the way to it: what is acknowledged is there, what is not is said, nothing hangs."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fault_proxy import Fault, FaultProxy, Request, fault_proxy
from tests.flows.command import until
from tests.object_store import WRITER, ObjectStore, forget_connections, start_object_store, use_identity
from tests.walkthrough import REPOSITORY
from vnet_core.errors import StorageError
from workers.leases import Run
from workers.storage import buckets
from workers.storage.store import Root

pytestmark = pytest.mark.faults

PATIENCE_S = 6.0
"""How long a request is tried again here; 45 s in the program."""
OBJECTS = 300
CONTENT = bytes(range(256)) * 800
"""200 kB."""


def first(number: int, fault: Fault, method: str, part: str = "") -> Callable[[Request], Fault | None]:
    """A fault for the first so many requests of a method whose target has a part."""
    left = [number]

    def choose(request: Request) -> Fault | None:
        if request.method == method and part in request.target and left[0]:
            left[0] -= 1
            return fault
        return None

    return choose


@pytest.fixture
def proxied(writable_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultProxy, Root]]:
    """A root in the store behind a proxy that does nothing yet."""
    url = writable_store.new_root()
    with fault_proxy(writable_store.endpoint) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        monkeypatch.setattr(buckets, "RETRY_S", PATIENCE_S)
        forget_connections()
        yield proxy, Root(url)
        forget_connections()


@pytest.mark.fault("F16")
@pytest.mark.parametrize("status", ["500", "503"])
def test_one_answer_in_a_hundred_is_an_error_and_nobody_notices(proxied, status, record_property) -> None:
    proxy, root = proxied
    dice = random.Random(1)
    proxy.choose = lambda request: status if dice.random() < 0.01 else None
    for number in range(OBJECTS):
        root.put(f"a/{number:04d}", b"%d" % number)
    assert [root.get(f"a/{number:04d}") for number in range(OBJECTS)] == [b"%d" % n for n in range(OBJECTS)]
    assert len(root.names("a")) == OBJECTS
    root.seal("a", {})
    assert root.damaged("a") == []
    assert len(proxy.faults) > 5
    record_property("seen", f"{len(proxy.faults)} of {len(proxy.requests)} requests failed and were asked again")


@pytest.mark.fault("F16")
@pytest.mark.parametrize("status", ["500", "503"])
def test_a_store_that_only_errs_is_named_after_a_bounded_time(proxied, status, record_property) -> None:
    proxy, root = proxied
    root.put("a", b"before")
    proxy.choose = lambda request: status
    for act in (lambda: root.put("a", b"x"), lambda: root.get("a"), lambda: list(root.walk("a"))):
        began = time.monotonic()
        with pytest.raises(StorageError) as told:
            act()
        seconds = time.monotonic() - began
        assert told.value.code == "store.unavailable"
        assert "run again" in told.value.message
        assert PATIENCE_S / 3 < seconds < PATIENCE_S + 6
    assert 4 < len(proxy.faults) < 100
    proxy.choose = lambda request: None
    assert root.get("a") == b"before"
    record_property("seen", f"store.unavailable after {seconds:.1f} s of {PATIENCE_S:.0f} s")
    record_property("seconds", seconds)


@pytest.mark.fault("F17")
@pytest.mark.parametrize("fault", ["reset", "short"])
def test_a_body_that_ends_early_is_never_taken_for_the_whole(proxied, fault, record_property) -> None:
    proxy, root = proxied
    root.put("a/b", CONTENT)

    def file() -> bytes:
        with root.at_hand("a/b") as path:
            return path.read_bytes()

    seen = []
    for read in (lambda: root.get("a/b"), file):
        proxy.choose = first(1, fault, "GET", "a/b")
        try:
            assert read() == CONTENT
            seen.append("fetched again")
        except StorageError as error:
            seen.append(error.code)
        assert read() == CONTENT
    assert set(seen) <= {"fetched again", "store.unavailable", "store.short"}
    assert len(proxy.faults) == 2
    record_property("seen", f"object: {seen[0]}, file: {seen[1]}; the next read has all of it")


@pytest.mark.fault("F17")
def test_half_a_body_with_a_length_that_agrees_is_found_by_its_digest(proxied, record_property) -> None:
    proxy, root = proxied
    root.put_json("r/report.json", {"labels": list(range(2000))})
    root.seal("r", {})
    proxy.choose = first(1, "wrong-length", "GET", "report.json")
    assert root.damaged("r") == ["report.json"]
    proxy.choose = first(1, "wrong-length", "GET", "report.json")
    with pytest.raises(StorageError) as told:
        root.get_json("r/report.json")
    assert told.value.code == "store.corrupt"
    assert root.damaged("r") == []
    record_property("seen", "the digest of the receipt does not agree; JSON is store.corrupt")


@pytest.mark.fault("F17")
def test_a_byte_that_changes_on_its_way_is_not_stored(proxied, record_property) -> None:
    proxy, root = proxied
    root.put("a", b"before")
    proxy.choose = lambda request: "flipped" if request.method == "PUT" else None
    with pytest.raises(StorageError) as told:
        root.put("a", CONTENT)
    assert told.value.code in ("store.denied", "store.unavailable")
    proxy.choose = lambda request: None
    assert root.get("a") == b"before"
    record_property("seen", f"the store refuses it: {told.value.code}")


@pytest.mark.fault("F17")
def test_a_request_that_hangs_is_given_up_and_asked_again(proxied, monkeypatch, record_property) -> None:
    proxy, root = proxied
    monkeypatch.setattr(buckets, "ANSWER_S", 1.5)
    forget_connections()
    began = time.monotonic()
    proxy.choose = first(1, "hang", "PUT")
    root.put("a", b"1")
    proxy.choose = first(1, "hang", "GET")
    assert root.get("a") == b"1"
    seconds = time.monotonic() - began
    assert 3 <= seconds < 15
    proxy.choose = lambda request: "hang"
    began = time.monotonic()
    with pytest.raises(StorageError) as told:
        root.get("a")
    assert told.value.code == "store.unavailable"
    assert time.monotonic() - began < PATIENCE_S + 6
    record_property("seen", "asked again; where all hang, store.unavailable")
    record_property("seconds", time.monotonic() - began)


@pytest.mark.fault("F18")
def test_an_answer_that_is_lost_leaves_one_object_and_one_winner(proxied, record_property) -> None:
    proxy, root = proxied
    proxy.choose = first(1, "lost", "PUT")
    root.put("a", CONTENT)
    assert root.get("a") == CONTENT
    proxy.choose = first(1, "lost", "PUT")
    assert root.create("b", b"mine"), "it was this writer's first try that was answered by nobody"
    assert not root.create("b", b"other's")
    assert root.get("b") == b"mine"
    # the same for the right to do a case
    for run_id in ("one", "two"):
        root.put_json(
            f"runs/{run_id}.json", {"host": "elsewhere", "pid": 1, "born": 0, "beat": "2999-01-01T00:00+00:00"}
        )
    proxy.choose = first(1, "lost", "PUT", "leases")
    claim = Run(root, "one").claim("results/liver/a/1")
    assert claim is not None
    assert claim.number == 1
    assert Run(root, "two").claim("results/liver/a/1") is None
    assert root.names("leases") == [claim.key.partition("/")[2]]
    assert [fault for _, fault in proxy.faults] == ["lost"] * 3
    record_property("seen", "the second try finds its own object: one object, one winner")


UPLOAD = """
import os, sys
from pathlib import Path
from workers.storage.store import Root
with Root(sys.argv[1]).written("r/large") as path:
    path.write_bytes(os.urandom(1 << 20) * 40)
print("sent", flush=True)
"""


@pytest.mark.fault("F19")
def test_a_kill_in_an_upload_of_many_parts_shows_nothing_and_what_it_left_is_found(proxied, record_property) -> None:
    proxy, root = proxied
    seen = threading.Event()

    def third_part(request: Request) -> Fault | None:
        if "partNumber=3" in request.target:
            seen.set()
            return "hang"
        return None

    proxy.choose = third_part
    with subprocess.Popen([sys.executable, "-c", UPLOAD, root.url], cwd=REPOSITORY, stdout=subprocess.PIPE) as child:
        assert seen.wait(60)
        child.send_signal(signal.SIGKILL)
        assert child.communicate()[0] == b""
    assert not root.exists("r")
    assert root.names("r") == []
    (leftover,) = list(root.place.leftovers())
    assert leftover.key.startswith("r/large?uploadId=")
    root.place.discard(leftover)
    until(lambda: not list(root.place.leftovers()), 10)
    # and again, whole
    proxy.choose = lambda request: None
    subprocess.run([sys.executable, "-c", UPLOAD, root.url], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert next(root.walk("r")).size == 40 << 20
    assert list(root.place.leftovers()) == []
    record_property("seen", "no object; one unfinished upload, found and removed")


@pytest.mark.fault("F20")
@pytest.mark.timeout(600)
def test_a_store_that_is_killed_and_comes_back_has_lost_nothing_and_stops_nobody(
    tmp_path, monkeypatch, record_property
) -> None:
    """Of the machine's own server: the program's own patience, 45 s, must span its restart."""
    store = start_object_store(tmp_path / "store")
    over = threading.Event()
    acknowledged: dict[str, bytes] = {}
    longest = [0.0]
    failed: list[Exception] = []

    def write(root: Root, writer: int) -> None:
        number = 0
        try:
            while not over.is_set():
                key, content = f"w{writer}/{number:06d}", os.urandom(3000)
                began = time.monotonic()
                root.put(key, content)
                longest[0] = max(longest[0], time.monotonic() - began)
                acknowledged[key] = content
                number += 1
        except StorageError as error:
            failed.append(error)

    try:
        use_identity(store, monkeypatch, WRITER)
        root = Root(store.new_root())
        threads = [threading.Thread(target=write, args=(root, writer)) for writer in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: len(acknowledged) > 200)
        store.kill()
        before, began = len(acknowledged), time.monotonic()
        time.sleep(3)  # so long the store is away, beside its start
        store.start()
        down_s = time.monotonic() - began
        until(lambda: failed or len(acknowledged) > before + 200)
        over.set()
        for thread in threads:
            thread.join(60)
        assert failed == []
        lost = [key for key, content in acknowledged.items() if root.get(key) != content]
        assert lost == []
        record_property(
            "seen",
            f"{len(acknowledged)} of {len(acknowledged)} acknowledged objects are there; the store was away"
            f" {down_s:.0f} s, the longest write took {longest[0]:.0f} s",
        )
        record_property("seconds", longest[0])
    finally:
        over.set()
        store.kill()
        forget_connections()
