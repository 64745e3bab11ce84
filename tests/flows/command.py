"""A ``vnet`` command as a process that tests watch, interrupt and kill, with everything that it starts."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.patience import slowness, until
from tests.walkthrough import environment, take_ctrl_c

COSTS = ("seconds", "peak_bytes", "finished", "run")
"""What a receipt says of the work rather than of its result."""
MARK = "VNET_TEST_COMMAND"
"""Environment variable that tells the processes of one command from all others."""

T = TypeVar("T")


class Command:
    """A ``vnet`` process in a process group of its own, and every process that it starts."""

    def __init__(self, *arguments: str | Path, root: Path | str, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        # files, not pipes: a process that is left over would hold a pipe open
        self._streams = tempfile.TemporaryDirectory(prefix="vnet-test-")
        self._out, self._err = (Path(self._streams.name) / name for name in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                ["vnet", *map(str, arguments), "--root", str(root)],
                env=environment() | variables | {MARK: self.mark},
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=take_ctrl_c,
            )
        self.pid = self._process.pid
        self._seen = {psutil.Process(self.pid)}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        parent = psutil.Process(self.pid)
        while not self._over.wait(0.2):
            try:
                self._seen.update(parent.children(recursive=True))
            except psutil.NoSuchProcess:
                return

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def until(self, condition: Callable[[], T]) -> T:
        """The first true value of ``condition()``, which must come while the command runs."""

        def value() -> T:
            running = self.running
            found = condition()
            assert found or running, f"the command ended first: {self.out}{self.err}"
            return found

        return until(value, 300)

    def kill(self) -> None:
        """SIGKILL to the command alone; what it has started must end by itself."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def cut_power(self) -> None:
        """SIGKILL to everything at once."""
        for process in [psutil.Process(self.pid), *self.left()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the whole group of the terminal."""
        os.killpg(self.pid, signal.SIGINT)
        return self.wait(60)

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit code, which must come within ``timeout_s`` of a quiet machine."""
        return self._process.wait(timeout_s * slowness())

    def process(self, part: str) -> psutil.Process | None:
        """A process of the command whose command line contains ``part``."""
        return next((p for p in self.left() if part in _command_line(p)), None)

    def left(self) -> list[psutil.Process]:
        """Processes of the command that still run."""
        marked = {p for p in psutil.process_iter() if _mark(p) == self.mark}
        return [p for p in marked | set(self._seen) if _alive(p)]

    def over(self) -> bool:
        """Whether nothing of the command runs, but for the two agents of a Ray node that was killed: they try for a
        minute to report the death of the node to the node, and then end."""
        return all("ray::" in _command_line(p) and "Agent" in _command_line(p) for p in self.left())

    def end(self) -> list[str]:
        """Kill what is left, and say what it was."""
        self._over.set()
        left = [f"{p.pid} {_command_line(p)}" for p in self.left()]
        for process in self.left():
            process.kill()
        self._process.wait()
        self._watcher.join()
        self._streams.cleanup()
        return left

    @property
    def out(self) -> str:
        return self._out.read_text("utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text("utf-8")

    @property
    def states(self) -> dict[str, str]:
        return {case["case"]: case["state"] for case in json.loads(self.out)["cases"]}


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def receipts(root: Path, prefix: str = "results/many") -> dict[str, Any]:
    """Receipts of the finished results of cohort ``many``, by case; they hold the SHA-256 of every file. What the work
    took, and which run did it, is left out."""
    found = {}
    for path in (root / prefix).glob("*/*/receipt.json"):
        receipt = json.loads(path.read_bytes())
        found[path.parts[-3]] = {name: value for name, value in receipt.items() if name not in COSTS}
    return found
