"""A night on two hosts beside the same night on one: every mask by SHA-256, who did what, and the seconds.

    python -m benchmarks.hosts FOLDER --label 1=anterior --label 2=posterior --minutes 1

FOLDER has ``images/`` and ``labels/``. A model is trained for so long on a part of the cohort; the night segments all
of its images. Once on this machine: a folder as storage root, Prefect on SQLite, Dask and Ray for the time of the
command. And once on two hosts, which are namespaces of this machine with addresses, processes and temporary files of
their own: a bucket of SeaweedFS as storage root, Prefect on PostgreSQL with a login, on each host a worker of Dask with
TLS and a node of Ray with a token. Needs root. Ends with 1 where a mask differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cohort import vnet
from benchmarks.machine import RESULTS, provenance, tell
from tests.flows.command import COSTS
from tests.namespaces import why_not
from tests.two_hosts import TwoHosts, two_hosts
from tests.workers.tiny_cohort import MODEL
from tests.workers.untrained_model import publish_untrained
from vnet_core.plan import Plan
from workers.segmentation.masks import mask_file
from workers.storage.store import Root

COHORT = "night"
NIGHT = ["nightly", "--cohort", COHORT, "--model", MODEL]
NIGHT_S = 7200.0
STAGES = ("preprocess", "segment")
PLAN = {
    "labels": [{"value": 1, "name": "one"}, {"value": 2, "name": "two"}],
    "network": {"kernel_size": 3, "width": 8, "convolutions": [1, 2, 2], "normalisation": "instance"},
    "training": {"patch_size": [16, 16, 16]},
}
"""Voxels of 1 mm, and a network of which a case of a few centimetres takes a fraction of a second."""


@dataclass(frozen=True)
class Night:
    """What a night left."""

    seconds: float
    """Of the command, its start included."""
    counts: Mapping[str, int]
    masks: Mapping[str, str]
    """SHA-256 of the bytes of every mask, by case."""
    receipts: Mapping[str, Mapping[str, Any]]
    """By case, without what the work took."""


def main() -> int:
    options = arguments()
    if reason := why_not():
        raise SystemExit(f"two hosts cannot be made here: {reason}")
    with tempfile.TemporaryDirectory(prefix="vnet-hosts-") as folder:
        scratch = Path(folder)
        scans = copied(options.folder, scratch / "shared" / "scans", options.cases)
        number = len(list(scans.iterdir()))
        alone = on_one(scratch, scans)
        with two_hosts(scratch) as hosts:
            together = on_two(hosts, scans)
            done = {stage: by_host(hosts, stage) for stage in STAGES}
    output = options.output or RESULTS / f"hosts_{options.hardware}_{datetime.now(UTC):%Y%m}.md"
    tell([*lines(alone, together, done, number), *provenance("prefect", "ray", "dask", "obstore", "torch")], output)
    same = alone.masks == together.masks and alone.receipts == together.receipts
    return 0 if same and len(alone.masks) == number else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of scans")
    parser.add_argument("--cases", type=int, help="only the first so many")
    parser.add_argument("--hardware", default="this-machine", help="part of the results file's name")
    parser.add_argument("--output", type=Path, help="results file (default: one in benchmarks/results)")
    return parser.parse_args()


def copied(folder: Path, target: Path, cases: int | None) -> Path:
    """The scans, where both hosts see them."""
    target.mkdir(parents=True)
    for scan in sorted(folder.iterdir())[:cases]:
        shutil.copy(scan, target)
    return target


def on_one(scratch: Path, scans: Path) -> Night:
    """The night on this machine, in a folder."""
    root = Root(scratch / "root")
    publish_untrained(root, Plan.from_mapping(PLAN))
    vnet(["ingest", str(scans), "--cohort", COHORT], root.home)
    return night(root, vnet(NIGHT, root.home))


def on_two(hosts: TwoHosts, scans: Path) -> Night:
    """The night on two hosts, in a bucket."""
    os.environ.update(hosts.store.variables() | {"VNET_HOME": str(hosts.shared / "home")})
    root = Root(hosts.store.new_root())
    publish_untrained(root, Plan.from_mapping(PLAN))
    site = hosts.site(root.url)
    hosts.document("ingest", "ingest", scans, "--cohort", COHORT, site=site)
    return night(root, hosts.document("night", *NIGHT, site=site, timeout_s=NIGHT_S))


def night(root: Root, document: dict[str, Any]) -> Night:
    masks, receipts = {}, {}
    for case in root.names(f"results/{COHORT}"):
        (key,) = root.names(f"results/{COHORT}/{case}")
        result = f"results/{COHORT}/{case}/{key}"
        receipt = root.receipt(result) or {}
        receipts[case] = {name: value for name, value in receipt.items() if name not in COSTS}
        masks[case] = root.digest(f"{result}/{mask_file('nifti')}")
    return Night(document["seconds"], document["counts"], masks, receipts)


def by_host(hosts: TwoHosts, stage: str) -> dict[str, int]:
    """Cases that each host has published."""
    return {host: done.total() for host, done in hosts.executions(f"{stage}:sealed").items()}


def lines(alone: Night, together: Night, done: Mapping[str, Mapping[str, int]], images: int) -> list[str]:
    """The results file, but for where it was measured."""
    same = sum(alone.masks[case] == digest for case, digest in together.masks.items() if case in alone.masks)
    receipts = sum(alone.receipts[case] == found for case, found in together.receipts.items() if case in alone.receipts)
    rows = [("one host, a folder", alone, ("", "")), ("two hosts, a bucket", together, tuple(map(told, done.values())))]
    return [
        "# A night on two hosts",
        "",
        "| night | computed | failed or refused | preprocessed by first + second host"
        " | segmented by first + second host | seconds, start-up included |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {found.counts.get('computed', 0)} | {images - found.counts.get('computed', 0)} | {prepared}"
            f" | {segmented} | {found.seconds:.1f} |"
            for name, found, (prepared, segmented) in rows
        ),
        "",
        f"{same} of {images} masks have the same SHA-256 on both: **{'yes' if same == images else 'no'}**."
        f" {receipts} of {images} receipts, with the SHA-256 of every other file of a result, are the same:"
        f" **{'yes' if receipts == images else 'no'}**.",
        "",
        "The network is small and its weights are drawn from a seed: what it finds is noise, which a wrong bit would"
        " change. The two hosts are namespaces of this one machine, with addresses, processes and temporary files of"
        " their own: they share its cores, so the seconds say what the network, the bucket and PostgreSQL cost and not"
        " what a second machine brings. Each has one core for Ray and one for Dask; the one host has all of them for"
        " both.",
        "",
    ]


def told(done: Mapping[str, int]) -> str:
    return " + ".join(map(str, done.values()))


if __name__ == "__main__":
    sys.exit(main())
