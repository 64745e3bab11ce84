"""Where, when and how something was measured, and the file that says so."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
"""Where results files lie unless ``--output`` names another place."""


def write_lines(target: Path, lines: Sequence[str]) -> None:
    """A results file, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


def tell(lines: Sequence[str], target: Path | None) -> None:
    """Print what was measured, and write it as a results file where one is named."""
    print("\n".join(lines))
    if target:
        write_lines(target, lines)


def provenance(*packages: str) -> list[str]:
    """Lines of a results file: processor, memory, load, date, commit, versions and command."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    flags = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    cores = psutil.cpu_count()
    # folders of this machine say nothing to others
    told = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *told])
    return [
        f"- processor: {processor()}, {cores} cores; native bfloat16: {', '.join(flags) or 'none'}",
        f"- memory: {psutil.virtual_memory().total / 2**30:.0f} GiB; load over the last minute when done: "
        f"{psutil.getloadavg()[0]:.1f}",
        f"- date: {datetime.now(UTC).date()}; commit: {commit()}",
        f"- versions: Python {platform.python_version()}, {versions}, {platform.system()}",
        f"- command: `{command}`",
    ]


def processor() -> str:
    """The processor's own name, and its family and model where the system tells them."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text("utf-8").splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines}
        model = f"{facts.get('model name', model)} (family {facts.get('cpu family')}, model {facts.get('model')})"
    return model


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        return "none"
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True).stdout
    return head.stdout.strip()[:12] + (" with changes" if changed.strip() else "")
