"""Ray clusters of several nodes on this machine, with a token, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = "0123456789abcdef0123456789abcdef"
GIB = 1 << 30


@contextmanager
def ray_nodes(count: int, cpus: int = 1, memory_gib: float = 4.0) -> Iterator[Any]:
    """A ``ray.cluster_utils.Cluster`` of so many nodes; this process carries its token for the time of the block."""
    import ray
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    _reload()
    cluster = Cluster()
    try:
        for _ in range(count):
            add_node(cluster, cpus, memory_gib)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reload()


def add_node(cluster: Any, cpus: int = 1, memory_gib: float = 4.0) -> Any:
    """One more node."""
    return cluster.add_node(
        num_cpus=cpus, memory=int(memory_gib * GIB), object_store_memory=128 << 20, include_dashboard=False
    )


def _reload() -> None:
    """Ray reads mode and token once; it is to read them again."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
