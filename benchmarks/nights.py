"""A night that is killed with -9, run again, and run once more; beside a night that nothing disturbed.

    python -m benchmarks.nights --root ROOT --model benchmark MANIFEST

MANIFEST names the night's scans. The root's model and volumes are used as they are; masks are made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, provenance, tell

VNET = str(Path(sys.executable).with_name("vnet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kill-after", type=int, default=10, help="published masks before the kill")
    parser.add_argument("--output", type=Path, default=RESULTS / f"nights_{datetime.now(UTC):%Y%m}.md")
    options = parser.parse_args()
    for cohort in ("undisturbed", "killed"):
        shutil.rmtree(options.root / "results" / cohort, ignore_errors=True)
        subprocess.run(
            [VNET, "ingest", str(options.manifest), "--cohort", cohort, "--root", str(options.root)], check=True
        )
    command = [VNET, "nightly", "--model", options.model, "--root", str(options.root), "--json", "--cohort"]
    rows = [run("undisturbed", [*command, "undisturbed"])]
    published = kill([*command, "killed"], options.root / "results" / "killed", options.kill_after)
    rows.append(run(f"after kill -9 at {published} masks", [*command, "killed"]))
    rows.append(run("once more", [*command, "killed"]))
    same = masks(options.root, "undisturbed") == masks(options.root, "killed")
    lines = [
        "# A night killed and repeated",
        "",
        "| run | computed | cached | failed or refused | seconds, start-up included |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, seconds, counts in rows:
        undone = counts["failed"] + counts["refused"]
        lines.append(f"| {name} | {counts['computed']} | {counts['cached']} | {undone} | {seconds:.1f} |")
    lines += [
        "",
        f"{len(masks(options.root, 'killed'))} masks, byte for byte those of the undisturbed night:"
        f" **{'yes' if same else 'no'}**.",
        "",
        *provenance("prefect", "ray", "dask"),
    ]
    tell(lines, options.output)


def run(name: str, command: list[str]) -> tuple[str, float, Counter[str]]:
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    return name, time.monotonic() - started, Counter(document["counts"])


def kill(command: list[str], results: Path, masks_before: int) -> int:
    """End a night with SIGKILL once so many masks are published; how many there are when it is dead."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    while process.poll() is None and len(list(results.glob("*/*/receipt.json"))) < masks_before:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # the actors notice that their driver is gone
    return len(list(results.glob("*/*/receipt.json")))


def masks(root: Path, cohort: str) -> dict[str, str]:
    """SHA-256 of every published mask, by case."""
    return {
        receipt.parent.parent.name: hashlib.sha256((receipt.parent / "mask.nii.gz").read_bytes()).hexdigest()
        for receipt in (root / "results" / cohort).glob("*/*/receipt.json")
    }


if __name__ == "__main__":
    main()
