"""A Dask scheduler and its workers as processes of their own on 127.0.0.1, as a site has them on other machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.patience import until
from tests.walkthrough import REPOSITORY
from workers.engines.dask_address import NO_TLS, DaskTls


class Dask:
    """Processes that :func:`dask_processes` ends."""

    def __init__(self, folder: Path, tls: DaskTls) -> None:
        self._folder, self._tls = folder, tls
        self._file = folder / "scheduler.json"
        protocol = "tls" if tls.is_given else "tcp"
        arguments = ["--host", "127.0.0.1", "--port", "0", "--protocol", protocol, "--no-dashboard", "--no-show"]
        self.scheduler = self._start("dask_scheduler", *arguments, "--scheduler-file", str(self._file))
        self.workers: list[psutil.Process] = []
        """Nannies; each has one worker as its child."""
        # it is there before it is written
        until(lambda: self._file.exists() and self._file.read_text("utf-8").endswith("}"))
        self.address: str = json.loads(self._file.read_text("utf-8"))["address"]

    def add_worker(self, *arguments: str, **variables: str) -> psutil.Process:
        """The nanny of one more worker."""
        common = ["--scheduler-file", str(self._file), "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
        local = ["--local-directory", str(self._folder)]
        self.workers.append(self._start("dask_worker", *common, *local, *arguments, **variables))
        return self.workers[-1]

    def _start(self, module: str, *arguments: str, **variables: str) -> psutil.Process:
        files = self._tls
        tls = ["--tls-ca-file", files.ca_file, "--tls-cert", files.cert_file, "--tls-key", files.key_file]
        with (self._folder / f"{module}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *(tls if files.is_given else []), *arguments],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
                # where no metadata of a checkout lies
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        return psutil.Process(process.pid)

    def end(self) -> None:
        """SIGKILL for all, with their children."""
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(signal.SIGKILL)
                psutil.wait_procs(family, timeout=30)


@contextlib.contextmanager
def dask_processes(tls: DaskTls = NO_TLS) -> Iterator[Dask]:
    with tempfile.TemporaryDirectory(prefix="vnet-test-dask-") as folder:
        dask = Dask(Path(folder), tls)
        try:
            yield dask
        finally:
            dask.end()
