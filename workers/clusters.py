"""Where work runs, and Ray, local or by address: the only place that starts or joins it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vnet_core.errors import ConfigError, EngineError
from workers.dask_address import NO_TLS, DaskTls

CONNECT_TIMEOUT_S = 20.0
"""How long an address may take to answer."""
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client, such as gRPC, says first: the preface and an empty SETTINGS frame (RFC 9113, 3.4)."""
GPU_MEMORY_GIB = 16.0
"""Taken for a GPU that cannot be asked."""
ENCRYPTED = ("tls", "wss")
"""Schemes whose servers are silent until they are greeted in their own way."""


def processors() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    ``ray.unreachable`` naming the address when it does not answer.
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
        # tiny object store: only URLs and outcomes travel; loopback, no dashboard, token authentication as by default
        options |= {
            "num_cpus": processors,
            "object_store_memory": 128 << 20,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "address": "local",
        }
    else:
        answers("ray", address, default_port=6379, greeting=HTTP2_GREETING)
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise unreachable("ray", address or "local", str(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


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
    """Ray workers that train together."""
    cpus: int = 1
    """Processor cores of the local Ray node, shared by its workers."""
    gpus_per_worker: float = 0.0
    """GPUs of each training or segmenting worker."""

    @property
    def ray_cpus(self) -> int:
        """Cores that the local Ray node is said to have: one for each worker at least, or they would wait for ever."""
        return max(self.cpus, self.train_workers, self.segment_workers)

    @property
    def cpus_per_segment_worker(self) -> int:
        """Cores of each segmenting actor."""
        return max(1, self.cpus // self.segment_workers)

    @property
    def cpus_per_train_worker(self) -> int:
        """Cores of each training worker."""
        return max(1, self.cpus // self.train_workers)
