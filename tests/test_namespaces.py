"""Machines that tests make within this one are apart: files, loopback and processes of one are not the other's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.flows.command import until
from tests.namespaces import SWITCH, Host, Machines, machines, why_not

LISTEN = "import socket, time; s = socket.create_server(('{}', 5000)); print('up', flush=True); time.sleep(600)"
CONNECT = "import socket; socket.create_connection(('{}', 5000), timeout=2)"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machines")
    (folder / "shared").mkdir()
    with machines(folder / "hosts", ("one", "two"), folder / "shared") as started:
        yield started
        processes = [process for host in started.hosts for process in host.processes()]
        assert len(processes) >= 4
    assert not [process for process in processes if process.is_running()], "its processes are gone with it"
    assert not [name for name in psutil.net_if_addrs() if name.startswith(f"{SWITCH}{os.getpid()}-")]


def listens(host: Host, address: str) -> None:
    log = f"listen-{address}"
    host.start(log, sys.executable, "-c", LISTEN.format(address))
    until(lambda: host.output(log) == "up\n", 60)


def reaches(host: Host, address: str) -> bool:
    return host.start("connect", sys.executable, "-c", CONNECT.format(address)).wait(60) == 0


def test_they_have_names_files_and_processes_of_their_own(pair: Machines) -> None:
    one, two = pair.hosts
    assert [host.run("name", "hostname") for host in pair.hosts] == ["one\n", "two\n"]
    one.run("write", "touch", "/tmp/only-here", "/tmp/home/only-here")
    assert (one.tmp / "only-here").exists()
    assert not Path("/tmp/only-here").exists()
    assert two.run("list", "ls", "/tmp/home") == ""
    assert "sleep 3600" in one.run("processes", "ps", "ax")
    assert str(os.getpid()) not in one.run("processes", "ps", "-e", "-o", "pid=").split()


def test_what_is_shared_is_seen_by_both(pair: Machines, tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = pair.hosts[0].folder.parent.parent / "shared"
    (shared / "scan").write_text("voxels")
    assert [host.run("shared", "cat", shared / "scan") for host in pair.hosts] == ["voxels"] * 2


def test_they_reach_each_other_by_their_addresses_until_the_cable_is_pulled(pair: Machines) -> None:
    one, two = pair.hosts
    listens(two, two.address)
    listens(two, "127.0.0.1")
    assert reaches(one, two.address)
    assert reaches(one, "two")
    assert reaches(two, "127.0.0.1")
    assert not reaches(one, "127.0.0.1")
    two.pull_cable()
    assert not reaches(one, two.address)
    two.plug_in()
    until(lambda: reaches(one, two.address), 60)


def test_a_switch_of_a_process_that_was_killed_is_taken_away(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = f"{SWITCH}{ended.pid}-0"
    subprocess.run(["ip", "link", "add", left, "type", "bridge"], check=True)
    with machines(tmp_path, (), tmp_path):
        assert left not in psutil.net_if_addrs()
