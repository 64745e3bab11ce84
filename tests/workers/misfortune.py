"""Scans that bring misfortune on the worker that reads them, and a log of every case that is begun.

What befalls the worker follows from the name of the scan's file: ``poison`` makes it crash each time, ``unlucky`` once,
``hog`` makes it take memory until it is ended, ``slow`` waits until a file ``go`` lies beside the log.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import workers.preprocess
from tests.workers.through import Through
from workers.cohort import read_channels
from workers.engines.dask_engine import DaskExecutor


class Watched(Through):
    """A Dask cluster on which misfortune happens."""

    def __init__(self, executor: DaskExecutor, log: Path) -> None:
        super().__init__(executor)
        self._log = log

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(with_misfortune, str(self._log), fn, *args, **kwargs)


def with_misfortune(log: str, fn: Callable[..., Any], *args: Any) -> Any:
    """On the worker: do it, reading the unhappy way from now on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def read(channels: tuple[str, ...], *rest: Any) -> Any:
        name = Path(channels[0]).name.partition(".")[0]
        write_line(log, f"{name} {os.getpid()}")
        befall(name, Path(log).parent)
        return read_channels(channels, *rest)

    workers.preprocess.read_channels = read
    return fn(*args)


def befall(name: str, folder: Path) -> None:
    kind = name.partition("-")[0]
    if kind == "poison":
        ctypes.string_at(0)
    elif kind == "unlucky" and not (folder / name).exists():
        (folder / name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hog":
        held = []
        while True:
            held.append(b"\1" * (16 << 20))
            time.sleep(0.02)
    elif kind == "slow":
        while not (folder / "go").exists():
            time.sleep(0.05)


def write_line(log: str, text: str) -> None:
    """Appended whole, also when it is the last thing that the process does."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, f"{text}\n".encode())
    os.fsync(handle)
    os.close(handle)


def begun(log: Path) -> Counter[str]:
    """How often each case was begun."""
    return Counter(line.split()[0] for line in log.read_text("utf-8").splitlines()) if log.exists() else Counter()


def pids(log: Path, name: str) -> list[int]:
    """The processes that began a case, in order."""
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.split()[0] == name]
