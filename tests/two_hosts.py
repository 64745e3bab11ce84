"""Two hosts as a site has them: one network, an object store and a Prefect server at a third address, and on each host
a node of Ray and a worker of Dask. The hosts are namespaces of this machine, see :mod:`tests.namespaces`.

Commands run on the first host, which has Ray's head and Dask's scheduler; each host has one core for either engine.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.flows.command import until
from tests.namespaces import Host, machines
from tests.object_store import ObjectStore, start_object_store
from tests.postgres import PrefectServer, postgres, prefect_server
from tests.workers.certificates import Authority
from workers.engines.dask_address import DaskTls
from workers.failpoints import LOG_VARIABLE

BIN = Path(sys.executable).parent
RAY_PORT, DASK_PORT = 6379, 8786
READY_S = 240.0
EXECUTIONS = "executions"
"""In a host's /tmp: what its engines have begun and published, from the log of the fail points."""
SITE = """\
root = "{root}"
dask_address = "tls://{head}:{dask_port}"
ray_address = "{head}:{ray_port}"
segment_workers = 2
segment_cpus = 1
ray_wait_s = 300
train_hang_s = 45

[dask_tls]
ca_file = "{tls.ca_file}"
cert_file = "{tls.cert_file}"
key_file = "{tls.key_file}"
"""


@dataclass(frozen=True)
class TwoHosts:
    """Two hosts with their engines, and what they share."""

    first: Host
    """Runs the commands."""
    second: Host
    shared: Path
    """A folder that both see under this name, as a mounted disk: scans, certificates, site files."""
    store: ObjectStore
    prefect: PrefectServer
    tls: DaskTls
    """Of the commands, as clients of Dask."""
    engine_variables: Mapping[str, str]
    """What the engines get: the object store, Ray's token, and nothing of Prefect."""

    def site(self, root: str) -> Path:
        """A site file for a storage root."""
        path = self.shared / f"site-{secrets.token_hex(4)}.toml"
        places = {"root": root, "head": self.first.address, "dask_port": DASK_PORT, "ray_port": RAY_PORT}
        path.write_text(SITE.format(**places, tls=self.tls), "utf-8")
        return path

    def vnet(self, log: str, *arguments: str | Path, site: Path) -> subprocess.Popen[bytes]:
        """Start a command on the first host."""
        variables = {**self.engine_variables, **self.prefect.variables}
        return self.first.start(log, BIN / "vnet", *arguments, "--site", site, **variables)

    def document(self, log: str, *arguments: str | Path, site: Path, timeout_s: float = 900) -> dict[str, Any]:
        """Run a command on the first host to a good end; its JSON document."""
        code = self.vnet(log, *arguments, "--json", site=site).wait(timeout_s)
        assert code == 0, f"{arguments} ended with {code}: {self.first.said(log)}"
        return dict(json.loads(self.first.output(log)))

    def executions(self, point: str) -> dict[str, Counter[str]]:
        """By host: how often a process of it passed a point of failure, by the key of what was made there."""
        return {host.name: executed(host, point) for host in (self.first, self.second)}


def executed(host: Host, point: str) -> Counter[str]:
    """How often a process of a host passed a point of failure, by key."""
    log = host.tmp / EXECUTIONS
    lines = (line.split() for line in log.read_text("utf-8").splitlines()) if log.exists() else ()
    return Counter(key for where, key, _ in lines if where == point)


def raylet(host: Host) -> psutil.Process:
    """A host's node of Ray."""
    (found,) = host.named("raylet")
    return found


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Everything started and joined; it has ended, and nothing of it is left, at the end of the block.

    Files lie in ``folder``; what is in its ``shared`` is seen by both hosts.
    """
    shared = folder / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    authority = Authority(shared / "tls")
    (folder / "prefect").mkdir()
    with ExitStack() as stack:
        network = stack.enter_context(machines(folder / "hosts", ("first", "second"), shared))
        store = start_object_store(folder / "store", network.address)
        stack.callback(store.kill)
        variables = {**store.variables(), **_ray_variables(shared), LOG_VARIABLE: f"/tmp/{EXECUTIONS}"}
        first, second = network.hosts
        # what does not need the others starts beside them
        head = _start_ray(first, first, variables)
        _start_scheduler(first, authority.signed("scheduler"), variables)
        for host in network.hosts:
            _start_dask(host, first, authority.signed(host.name), variables)
        database = stack.enter_context(postgres())
        prefect = stack.enter_context(prefect_server(database, folder / "prefect", network.address))
        assert head.wait(READY_S) == 0, first.said("ray")
        assert _start_ray(second, first, variables).wait(READY_S) == 0, second.said("ray")
        until(lambda: all("Registered to:" in host.said("dask") for host in network.hosts), READY_S)
        yield TwoHosts(first, second, shared, store, prefect, authority.signed("client"), variables)


def _ray_variables(shared: Path) -> Mapping[str, str]:
    token = shared / "ray-token"
    token.write_text(secrets.token_hex(16), "utf-8")
    token.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}


def _start_ray(host: Host, head: Host, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """``ray start``, which ends when the node is there."""
    as_head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
    joined = as_head if host is head else [f"--address={head.address}:{RAY_PORT}"]
    room = ["--num-cpus=1", f"--memory={4 << 30}", f"--object-store-memory={128 << 20}"]
    return host.start("ray", BIN / "ray", "start", *joined, f"--node-ip-address={host.address}", *room, **variables)


def _start_scheduler(host: Host, tls: DaskTls, variables: Mapping[str, str]) -> None:
    listens = ["--protocol", "tls", "--host", host.address, "--port", str(DASK_PORT)]
    quiet = ["--no-dashboard", "--no-show"]
    host.start("scheduler", BIN / "dask", "scheduler", *listens, *quiet, *_tls(tls), **variables)


def _start_dask(host: Host, head: Host, tls: DaskTls, variables: Mapping[str, str]) -> None:
    """A worker of one thread, with its nanny."""
    joined = [f"tls://{head.address}:{DASK_PORT}", "--host", host.address]
    room = ["--nthreads", "1", "--memory-limit", "3GiB", "--no-dashboard"]
    host.start("dask", BIN / "dask", "worker", *joined, *room, *_tls(tls), **variables)


def _tls(files: DaskTls) -> Sequence[str]:
    return ["--tls-ca-file", files.ca_file, "--tls-cert", files.cert_file, "--tls-key", files.key_file]
