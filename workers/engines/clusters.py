"""Where work runs, and Ray, local or by address: the only place that starts or joins it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vnet_core.errors import ConfigError, EngineError
from workers.engines.dask_address import NO_TLS, DaskTls
from workers.engines.ray_admission import check_address, check_admission, refuse_open_mode
from workers.storage.modes import let_read, own_temporary_folder

CONNECT_TIMEOUT_S = 20.0
"""How long an address may take to answer."""
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client, such as gRPC, says first: the preface and an empty SETTINGS frame (RFC 9113, 3.4)."""
GPU_MEMORY_GIB = 16.0
"""Taken for a GPU that cannot be asked."""
CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")
"""What a container of Docker or Kubernetes sees of its limit of cores."""
TRAIN_HANG_S = 900.0
"""Training workers wait for one another in every step. The longest that one of them may rightly take is its share of a
validation on whole volumes, or a checkpoint into a slow storage root: minutes, not a quarter of an hour."""
ENCRYPTED = ("tls", "wss")
"""Schemes whose servers are silent until they are greeted in their own way."""


def processors() -> int:
    """Processor cores that this process may use: those it may run on, or the share of them that its container gets."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share = granted_cores(CPU_SHARE.read_text("ascii"))
    except OSError:
        share = None
    return min(allowed, share or allowed)


def granted_cores(text: str) -> int | None:
    """Whole cores that a file ``cpu.max`` of a control group grants, at least one; None: no limit.

    It holds the microseconds of work in each period, or ``max``, and the microseconds of the period.
    """
    quota, _, period = text.partition(" ")
    return None if quota == "max" else max(1, int(quota) // int(period))


def gpu_memory_gib() -> float:
    """Memory of this machine's smallest GPU; of one on another machine, where this one has none, a cautious guess."""
    import torch

    devices = range(torch.cuda.device_count())
    found = [torch.cuda.get_device_properties(device).total_memory / 2**30 for device in devices]
    return min(found, default=GPU_MEMORY_GIB)


@contextmanager
def ray_session(address: str | None, processors: int) -> Iterator[None]:
    """Ray joined at ``address`` (``host:port`` of its head), or started on this machine for the time of the block.

    A session that is already running in this process is used and left running. Raises EngineError
    ``ray.unreachable`` naming the address when it does not answer, ``ray.token`` when it refuses the token,
    ``ray.open`` when it asks for none, ``ray.versions`` for another Ray or Python; ConfigError ``ray.address``.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if address is None:
        refuse_open_mode()
        # tiny object store: only URLs and outcomes travel; loopback, no dashboard, token authentication as by default
        options |= {
            "num_cpus": processors,
            "object_store_memory": 128 << 20,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "address": "local",
            # Ray lets everybody read and write its folders, sockets and logs among them
            "_temp_dir": str(own_temporary_folder("ray") / "r"),
        }
    else:
        check_address(address)
        answers("ray", address, default_port=6379, greeting=HTTP2_GREETING)
        check_admission(address, CONNECT_TIMEOUT_S)
        options["address"] = address
    _close_token()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        ray.shutdown()
        reason = " ".join(str(error.__cause__ or error).split())
        if reason.startswith("Version mismatch"):
            raise EngineError(
                "ray.versions", f"{reason}; install the same Ray and Python here as on the cluster at {address}"
            ) from error
        raise unreachable("ray", address or "local", reason) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own ends the process while the night still has rows to write
        signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def token_path() -> Path:
    """Where the token lies by which Ray's processes know each other; Ray makes one there at its first start."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _close_token() -> None:
    """Take the token from the eyes of others: Ray makes the file for whomever the umask of that day let read it."""
    with contextlib.suppress(OSError):  # there is none yet, or it is somebody else's to close
        let_read(token_path(), "owner")


def answers(engine: str, address: str, default_port: int, greeting: bytes) -> None:
    """Wait for the address's port to accept a connection and react to a greeting; EngineError when it does not within
    the limit. The clients of Dask and Ray wait for minutes for something that takes the connection and is silent."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        host, port = parts.hostname or "", parts.port or default_port
    except ValueError as error:
        raise ConfigError(f"{engine}.address", f"{engine} address {address!r} is no host:port ({error})") from None
    end = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, end - time.monotonic()))) as peer:
                if parts.scheme not in ENCRYPTED:
                    peer.settimeout(max(0.1, end - time.monotonic()))
                    peer.sendall(greeting)
                    peer.recv(1)
            return
        except ConnectionResetError:  # it has reacted
            return
        except OSError as error:
            if isinstance(error, ConnectionRefusedError | socket.gaierror) or time.monotonic() >= end:
                raise unreachable(engine, address, str(error)) from error


def unreachable(engine: str, address: str, reason: str) -> EngineError:
    """``<engine>.unreachable``, with the address."""
    return EngineError(
        f"{engine}.unreachable",
        f"{engine.capitalize()} at {address} does not answer ({reason}); start it, correct the address in the site"
        " file, or leave it out to use this machine",
    )


@dataclass(frozen=True, slots=True)
class Engines:
    """Where work runs; the default is this machine."""

    dask_address: str | None = None
    dask_tls: DaskTls = NO_TLS
    ray_address: str | None = None
    preprocess_workers: int = 1
    """Processes of the local Dask cluster."""
    segment_workers: int = 1
    """Ray actors that segment."""
    train_workers: int = 1
    """Ray workers that train together, at least."""
    train_workers_max: int | None = None
    """At most, where there is room for them; None: never more than ``train_workers``."""
    train_hang_s: float = TRAIN_HANG_S
    """Seconds after which a training worker that others wait for counts as hung."""
    cpus: int = 1
    """Processor cores of the local Ray node, shared by its workers."""
    gpus_per_worker: float = 0.0
    """GPUs of each training or segmenting worker."""
    segment_cpus: int | None = None
    """Processor cores of each segmenting actor; None for an equal share of this machine's."""
    ray_wait_s: float = 120.0
    """How long a pool without any actor waits for the first to find a place."""
    case_limit_s: float = 3600.0
    """A case that keeps an actor longer is taken from it, unless others took as long."""

    @property
    def ray_cpus(self) -> int:
        """Cores that the local Ray node is said to have: enough for all workers at once, or they would wait."""
        return max(self.cpus, self.most_train_workers, self.segment_workers * self.cpus_per_segment_worker)

    @property
    def cpus_per_segment_worker(self) -> int:
        """Cores of each segmenting actor."""
        return self.segment_cpus or max(1, self.cpus // self.segment_workers)

    @property
    def cpus_per_train_worker(self) -> int:
        """Cores of each training worker."""
        return max(1, self.cpus // self.most_train_workers)

    @property
    def most_train_workers(self) -> int:
        """Ray workers that train together when there is room for all."""
        return self.train_workers_max or self.train_workers
