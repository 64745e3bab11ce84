"""Every check of the doctor with the fault that it is for; none of them raises."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.workers.storage.test_store import tmpfs
from workers.care import doctor
from workers.care.doctor import Check, examine, examined
from workers.settings.site import Site
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_a_machine_that_is_well(root: Root) -> None:
    checks = examine(root, Site(), datetime.now(UTC))
    names = {"python", "packages", "root", "clock", "private folder", "memory", "cores", "shared memory", "gpu", "dask"}
    assert names | {"ray", "ray token", "listeners", "free space", "durable writes"} == {check.name for check in checks}
    found = states(checks)
    for name in ("python", "packages", "root", "private folder", "dask", "ray"):
        assert found[name] == "ok", [check for check in checks if check.name == name]
    assert all(bool(check.remedy) == (check.state != "ok") for check in checks)
    assert list(root.home.iterdir()) == []


def test_an_error_of_a_check_is_bad_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Check:
        raise RuntimeError("DOE JOHN")

    (found,) = examined("engine", broken)
    assert (found.name, found.state) == ("engine", "bad")
    assert found.found.startswith("RuntimeError at ")
    assert "DOE" not in found.found + caplog.text


# --- packages


@contextmanager
def distribution(
    folder: Path, monkeypatch: pytest.MonkeyPatch, requires: list[str], python: str = ">=3.11"
) -> Iterator[None]:
    """A distribution ``planted`` with these requirements."""
    info = folder / "planted-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: planted", "Version: 1.0", f"Requires-Python: {python}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(folder)
        yield


def test_packages_are_held_against_what_the_distribution_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = importlib.metadata.version("numpy")
    wanted = [
        "numpy>=1",
        f"scipy!={importlib.metadata.version('scipy')}",
        "no-such-package>=2",
        'pytest<1; extra == "test"',
    ]
    with distribution(tmp_path, monkeypatch, [*wanted, 'torch<1; python_version < "3"']):
        found = doctor.packages("planted")
    assert states(found) == {"python": "ok", "scipy": "bad", "no-such-package": "bad"}
    assert "numpy" not in str(found), numpy
    assert [check.remedy for check in found[1:]] == [
        f'pip install "scipy!={importlib.metadata.version("scipy")}", or all from requirements.lock',
        'pip install "no-such-package>=2", or all from requirements.lock',
    ]


def test_python_is_held_against_what_the_distribution_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with distribution(tmp_path, monkeypatch, [], python=">=9"):
        assert states(doctor.packages("planted")) == {"python": "bad", "packages": "ok"}


def test_sources_without_an_installation_are_a_warning() -> None:
    assert states(doctor.packages("never-installed")) == {"packages": "warning"}


# --- storage


def test_a_root_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (found,) = examined("root", lambda: doctor.storage(Root(tmp_path / "file" / "root")))
    assert (found.state, "cannot be written" in found.found) == ("bad", True)


def test_little_space_is_told(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=1m") as small:
        assert states(doctor.storage(small))["free space"] == "bad"
        assert doctor.shared_memory(str(small.home)).state == "bad"
    assert doctor.graded("x", 1.5, (1, 2), "found", "do").state == "warning"
    assert doctor.graded("x", 2, (1, 2), "found", "do") == Check("x", "ok", "found")


def test_slow_writes_are_a_warning(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.06)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    assert states(doctor.storage(root))["durable writes"] == "warning"


def private_is_open(root: Root) -> None:
    (root.home / "private").chmod(0o750)


def secret_is_open(root: Root) -> None:
    (root.home / "private" / "secret").write_bytes(bytes(32))
    (root.home / "private" / "secret").chmod(0o604)


def private_is_gone(root: Root) -> None:
    root.put_json("cohorts/liver/cohort.json", {})
    (root.home / "private").rmdir()


@pytest.mark.parametrize(
    ("fault", "part"),
    [(private_is_open, "mode 0750"), (secret_is_open, "mode 0604"), (private_is_gone, "is not there")],
)
def test_a_private_folder_that_others_can_read_is_bad(root: Root, fault: Callable[[Root], None], part: str) -> None:
    (root.home / "private").mkdir(mode=0o700, parents=True)
    assert doctor.private(root).state == "ok"
    fault(root)
    found = doctor.private(root)
    assert (found.state, part in found.found) == ("bad", True)


# --- machine


def test_more_workers_than_cores_are_a_warning() -> None:
    assert states(doctor.memory(Site(segment_workers=10_000)))["cores"] == "warning"


def test_gpus_that_are_asked_for_and_not_there_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.gpu(Site(gpus_per_worker=1)).state == "bad"
    assert doctor.gpu(Site(gpus_per_worker=1, ray_address="10.0.0.5:6379")).state != "bad", "they are elsewhere"


def test_gpus_that_the_driver_sees_and_torch_does_not_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.gpu(Site())
    assert (found.state, "the driver 580.1 sees 2" in found.found) == ("warning", True)


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_an_engine_that_does_not_answer_is_bad_and_named(engine: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    site = Site(**{f"{engine}_address": address})
    (found,) = examined(engine, lambda: getattr(doctor, engine)(site))
    assert (found.state, address in found.found) == ("bad", True)


# --- clock


@pytest.mark.parametrize(("seconds", "state"), [(0, "ok"), (-30, "warning"), (30, "warning"), (3600, "bad")])
def test_a_clock_that_differs_from_the_storages_is_told(root: Root, seconds: float, state: str) -> None:
    now = datetime.now(UTC) + timedelta(seconds=seconds)
    found = doctor.clock(root, Site(timezone="Europe/Berlin"), now)
    assert (found.state, "Europe/Berlin" in found.found) == (state, True)


# --- network

LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@contextmanager
def listening(address: str, word: str) -> Iterator[int]:
    command = [sys.executable, "-c", LISTEN, address, word]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate("")


def test_what_listens_beyond_this_machine_is_bad_and_on_it_is_not() -> None:
    word = "planted-by-a-test"
    assert [check.state for check in doctor.listeners((word,))] == ["ok"]
    with listening("127.0.0.1", word):
        assert [check.state for check in doctor.listeners((word,))] == ["ok"]
    with listening("0.0.0.0", word) as port:
        (found,) = doctor.listeners((word,))
    assert (found.state, str(port) in found.found, word in found.found) == ("bad", True, True)


def test_what_a_process_of_ours_has_started_is_looked_at_too() -> None:
    """As a worker of Dask, whose own command line says nothing."""
    word = "planted-by-a-test"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '0.0.0.0'])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent, LISTEN, word], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        (found,) = doctor.listeners((word,))
        process.communicate("")
    assert (found.state, port in found.found) == ("bad", True)


def test_a_token_that_others_can_read_is_bad(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert doctor.ray_token(token).state == "ok"
    token.write_text("0" * 64)
    for mode, state in ((0o600, "ok"), (0o640, "bad"), (0o604, "bad")):
        token.chmod(mode)
        assert doctor.ray_token(token).state == state


def test_ray_may_listen_while_it_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with listening("0.0.0.0", "raylet"):
        assert [check.state for check in doctor.listeners(("raylet",))] == ["warning"]
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert [check.state for check in doctor.listeners(("raylet",))] == ["bad"]
