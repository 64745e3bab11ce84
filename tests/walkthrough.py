"""The commands of the documentation, run as they stand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    page: str
    language: str
    text: str
    excused: bool
    """Preceded by a comment that says why it is not run."""


def fences(page: Path) -> list[Fence]:
    name = page.relative_to(REPOSITORY).as_posix()
    return [Fence(name, match[2], match[3], bool(match[1])) for match in FENCE.finditer(page.read_text("utf-8"))]


def environment() -> dict[str, str]:
    """The process's environment with this virtual environment's commands first on PATH and no setting of VNET."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VNET_", "PREFECT_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def take_ctrl_c() -> None:
    """For a child before it starts: a shell that started these tests in the background has them ignore Ctrl-C, and they
    would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_page(page: Path, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run every bash fence of a page in ``folder``, in order, stopping at the first command that fails."""
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    runs = []
    for fence in fences(page):
        if fence.language == "bash" and not fence.excused:
            command = ["bash", "-euo", "pipefail", "-c", fence.text]
            runs.append(
                subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
            )
            if runs[-1].returncode != 0:
                break
    return runs
