"""Engines that stand ready, as those of a site do: commands that are told of them start none of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.walkthrough import REPOSITORY, environment
from tests.workers.dask_processes import dask_processes
from workers.engines.clusters import processors
from workers.storage.modes import own_temporary_folder

TOKEN = "fedcba9876543210fedcba9876543210"
HEAD = """
import json, sys
import ray
ray.init(num_cpus=int(sys.argv[1]), address="local", include_dashboard=False, _node_ip_address="127.0.0.1",
         object_store_memory=128 << 20, log_to_driver=False, _temp_dir=sys.argv[2])
print(json.dumps(ray.get_runtime_context().gcs_address), flush=True)
sys.stdin.read()
"""


@contextmanager
def standing_engines(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray head and a Dask scheduler with two workers, or one per processor core where there are more; the variables
    that name them to a command."""
    workers = max(2, processors())
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    place = str(own_temporary_folder("ray") / "s")
    with (
        dask_processes() as dask,
        subprocess.Popen(
            [sys.executable, "-c", HEAD, str(workers), place],
            env=environment() | token | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as head,
    ):
        for _ in range(workers):
            dask.add_worker()
        site = folder / "site.toml"
        site.write_text(f'dask_address = "{dask.address}"\n')
        assert head.stdout is not None
        try:
            address = json.loads(head.stdout.readline())
            yield token | {"RAY_ADDRESS": address, "VNET_SITE": str(site)}
        finally:
            head.communicate("", timeout=60)
