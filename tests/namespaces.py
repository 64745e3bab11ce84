"""Machines within this one, for tests: Linux namespaces, each with an address, a name, processes and a /tmp of its own.

They are joined by a bridge, as by a switch, at which this machine has an address too. What one writes to its /tmp, its
home or its loopback the others do not see; this checkout, the interpreter and one folder are mounted on all of them.
Needs root and iproute2 and util-linux. Every process of such a machine dies with it, and all of them with this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.walkthrough import REPOSITORY, environment

PROGRAMS = ("ip", "nsenter", "unshare")
APART = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
SWITCH = "vnsw"
"""Begins the names of bridges; the process that made them follows. Interfaces may have fifteen letters."""
PR_SET_PDEATHSIG = 1
_made = itertools.count()
BOOT = """
hostname "$1"; folder="$2"; shift 2
ip link set lo up
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs none /dev/shm
for seen in "$@"; do
  case "$seen" in /tmp/*) mkdir -p "$folder$seen"; mount --bind "$seen" "$folder$seen";; esac
done
mount --rbind "$folder/tmp" /tmp
echo up
while :; do sleep 3600 & wait; done
"""
"""First process of a machine: name, folder, and what it sees of this one's /tmp. It takes in the orphans of others."""


@dataclass
class Host:
    """A machine; :func:`machines` makes it and takes it away."""

    name: str
    address: str
    folder: Path
    """Its files, as this machine sees them: ``tmp`` is its /tmp, ``logs`` what its programs said."""
    _life: subprocess.Popen[str]
    _cable: str
    """This machine's end of it."""

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    def start(self, log: str, *command: str | Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a program in its /tmp; what it says is in ``logs/<log>.out`` and ``.err``."""
        with (self.folder / "logs" / f"{log}.out").open("wb") as out, self.errors(log).open("wb") as err:
            return subprocess.Popen(
                ["nsenter", "--all", f"--target={self._first}", "--wd=/tmp", *map(str, command)],
                env=_environment() | variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def run(self, log: str, *command: str | Path, timeout_s: float = 300, **variables: str) -> str:
        """Run a program to its end, which must be a good one; its standard output."""
        code = self.start(log, *command, **variables).wait(timeout_s)
        assert code == 0, f"{command} on {self.name} ended with {code}: {self.said(log)}"
        return self.output(log)

    def output(self, log: str) -> str:
        return (self.folder / "logs" / f"{log}.out").read_text("utf-8")

    def errors(self, log: str) -> Path:
        return self.folder / "logs" / f"{log}.err"

    def said(self, log: str) -> str:
        return self.output(log) + self.errors(log).read_text("utf-8")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it, as this machine sees it."""
        if self._life.poll() is not None:
            return []
        space = _space(psutil.Process(self._first))
        return [process for process in psutil.process_iter() if _space(process) == space]

    def named(self, part: str) -> list[psutil.Process]:
        """Its processes whose name has this part."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if part in process.name():
                    found.append(process)
        return found

    def pull_cable(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self._cable, "up")

    def cut_power(self) -> None:
        """SIGKILL to all that runs on it, and its address is gone."""
        running = self.processes()
        if self._life.poll() is None:
            self._life.kill()
        self._life.wait(30)
        psutil.wait_procs(running, timeout=30)

    @property
    def _first(self) -> int:
        """Its first process, by this machine's number."""
        (first,) = psutil.Process(self._life.pid).children()
        return int(first.pid)


@dataclass(frozen=True)
class Machines:
    """Machines at one switch."""

    address: str
    """This machine's own there."""
    hosts: tuple[Host, ...]


def why_not() -> str:
    """Why no such machine can be made here; empty where it can."""
    if os.geteuid():
        return "namespaces want root"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"no {', '.join(missing)} here"
    tried = subprocess.run(["unshare", *APART, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def machines(folder: Path, names: Sequence[str], shared: Path) -> Iterator[Machines]:
    """So many machines, with their files in ``folder``; ``shared`` is a folder that all of them see.

    Names of interfaces hold this process's number, and addresses are of a network that no other interface is in.
    """
    _sweep()
    network = _free_network()
    *addresses, own = [str(network[number]) for number in (*range(1, len(names) + 1), 254)]
    mark = f"{os.getpid()}-{next(_made)}"
    switch = f"{SWITCH}{mark}"
    _ip("link", "add", switch, "type", "bridge")
    hosts: list[Host] = []
    try:
        _ip("address", "add", f"{own}/{network.prefixlen}", "dev", switch)
        _ip("link", "set", switch, "up")
        known = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(addresses, names, strict=True))]
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            hosts.append(_host(folder / name, (name, address), shared, known, f"vn{mark}{number}"))
            _plug(hosts[-1], switch, network, own)
        yield Machines(own, tuple(hosts))
    finally:
        for host in hosts:
            host.cut_power()
        _ip("link", "delete", switch)


def _host(folder: Path, called: tuple[str, str], shared: Path, known: Sequence[str], cable: str) -> Host:
    name, address = called
    for part in ("tmp/home", "logs"):
        (folder / part).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    (folder / "hosts").write_text("\n".join([*known, ""]), "utf-8")
    seen = dict.fromkeys(str(path) for path in (REPOSITORY, sys.prefix, sys.base_prefix, shared.resolve()))
    life = subprocess.Popen(
        ["unshare", *APART, "bash", "-euc", BOOT, "machine", name, folder, *seen],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_die_with_parent,
    )
    assert life.stdout
    if life.stdout.readline() != "up\n":
        life.kill()
        raise AssertionError(f"machine {name} did not come up: {life.wait()}")
    return Host(name, address, folder, life, cable)


def _plug(host: Host, switch: str, network: ipaddress.IPv4Network, gateway: str) -> None:
    """A cable from the switch to the machine."""
    cable, inner = host._cable, f"{host._cable}i"
    _ip("link", "add", cable, "type", "veth", "peer", "name", inner)
    _ip("link", "set", inner, "netns", str(host._life.pid))
    _ip("link", "set", cable, "master", switch, "up")
    host.run("link", "ip", "link", "set", inner, "name", "eth0")
    host.run("link", "ip", "address", "add", f"{host.address}/{network.prefixlen}", "dev", "eth0")
    host.run("link", "ip", "link", "set", "eth0", "up")
    # by it programs find out which of their addresses others see
    host.run("link", "ip", "route", "add", "default", "via", gateway)


def _environment() -> Mapping[str, str]:
    """For programs on a machine: nothing that this process was told of services, proxies and folders."""
    foreign = ("AWS_", "RAY_ADDRESS", "RAY_AUTH_", "TMPDIR", "XDG_")
    kept = {
        name: value
        for name, value in environment().items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    return kept | {"PYTHONPATH": str(REPOSITORY), "HOME": "/tmp/home"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _space(process: psutil.Process) -> int:
    try:
        return os.stat(f"/proc/{process.pid}/ns/pid").st_ino
    except OSError:
        return 0


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _free_network() -> ipaddress.IPv4Network:
    """One of 10.77.0.0/16 that nothing here has an address in; where to begin looking differs between processes."""
    taken = {
        ipaddress.ip_interface(f"{address.address}/24").network
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name == "AF_INET"
    }
    candidates = (ipaddress.IPv4Network(f"10.77.{(os.getpid() + n) % 256}.0/24") for n in range(256))
    return next(network for network in candidates if network not in taken)


def _sweep() -> None:
    """Take away switches of processes that were killed; their machines have died with them."""
    for name in psutil.net_if_addrs():
        pid = name.removeprefix(SWITCH).partition("-")[0]
        if name.startswith(SWITCH) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _ip("link", "delete", name)
