"""Training on two Ray workers beside a plain torchrun script: steps in a second, in turn, in one run.

    python -m benchmarks.ddp --output benchmarks/results/ddp_<hardware>_<yyyymm>.md

Both arms have the same network, loss, optimiser and samples, on one core each. Ours also reads a clock together, keeps
the average of the weights, notes progress and writes checkpoints; the peer is benchmarks/peers/ddp.py. Each pair of
runs is ours and then the peer, or the other way round. `--small` does the same in miniature.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

from benchmarks.machine import provenance, tell
from vnet_core import geometry as geo
from vnet_core.fingerprint import Fingerprint
from vnet_core.networks.vnet import build_vnet, count_parameters
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.plan import Plan
from vnet_core.preprocess import prepare
from workers.cohort import Case, Entry, Verdict, volume_key
from workers.engines.clusters import Engines, ray_session
from workers.storage.arrays import write_arrays
from workers.storage.store import Root
from workers.training.run import Budget
from workers.training.train import Training, train

WORKERS = 2
ALLOWED = 0.05
"""Share of the peer's throughput that ours may be below it."""


def main() -> None:
    options = arguments()
    plan = plan_of(options.small)
    with tempfile.TemporaryDirectory(prefix="vnet-ddp-") as folder, ray_session(None, WORKERS):
        root = Root(folder)
        entries = [entry(root, plan, seed) for seed in range(4)]
        # the first start of either reads torch and Ray from the disk
        ours(root, plan, entries, "first", 2)
        peer(root, "first")
        pairs = []
        for number in range(options.pairs):
            name = f"pair-{number}"
            if number % 2:
                # the peer needs a run of the same kind to read
                peers = peer(root, f"pair-{number - 1}")
                pairs.append((ours(root, plan, entries, name, options.steps), peers))
            else:
                own = ours(root, plan, entries, name, options.steps)
                pairs.append((own, peer(root, name)))
    report(options, plan, pairs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def plan_of(small: bool) -> Plan:
    size = {"width": 2, "convolutions": [1, 1]} if small else {"width": 8, "convolutions": [1, 2, 3, 3]}
    return Plan.from_mapping(
        {
            "labels": [{"value": 1, "name": "organ"}, {"value": 2, "name": "lesion"}],
            "network": {"kernel_size": 3, "normalisation": "instance", **size},
            "training": {
                "patch_size": [16, 16, 16] if small else [48, 64, 48],
                "batch_size": 4,
                "validation_fraction": 0.0,
            },
        }
    )


def entry(root: Root, plan: Plan, seed: int) -> Entry:
    """A preprocessed phantom, a quarter larger than the patch."""
    z, y, x = (n * 5 // 4 for n in plan.training.patch_size)
    image, label = phantom(PhantomSpec(seed, (z, y, x), spacing_mm=(1.0, 1.0, 1.0), body_mm=0.42 * min(z, y, x)))
    prepared = prepare(image, label, plan.preprocess)
    assert prepared.label is not None
    case = Case(f"p{seed}", (f"p{seed}.nii",), f"p{seed}-label.nii", None, f"p{seed}", f"label {seed}", image.geometry)
    key, grid = volume_key(case, plan), geo.to_mapping(prepared.geometry)
    write_arrays(root, key, {"image": prepared.image, "label": prepared.label}, {"geometry": grid})
    digests = {"case_digest": case.digest, "label_digest": case.label_digest}
    root.seal(key, {"stage": "preprocess", "geometry": grid, **digests})
    values, voxels = (found.tolist() for found in np.unique(prepared.label, return_counts=True))
    counted = dict(zip(values, voxels, strict=True))
    return Entry(case, Verdict("accepted"), fingerprint(counted))


def fingerprint(voxels: dict[int, int]) -> Fingerprint:
    return Fingerprint(label_voxels=Counter(voxels), label_cases=Counter(dict.fromkeys(voxels, 1)))


def ours(root: Root, plan: Plan, entries: list[Entry], name: str, steps: int) -> float:
    """Steps in a second, checkpoints and all, from the first step to the last."""
    engines = Engines(cpus=WORKERS, train_workers=WORKERS)
    training = train(root, Training(name, entries, plan, Budget(steps=steps)), engines).facts["training"]
    return training["steps"] / (60 * training["minutes"])


def peer(root: Root, name: str) -> float:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command = [*launch, "-m", "benchmarks.peers.ddp", root.url, f"training/{name}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"the peer ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["steps_per_second"]


def report(options: argparse.Namespace, plan: Plan, pairs: list[tuple[float, float]]) -> None:
    ratios = [own / other for own, other in pairs]
    size = " x ".join(map(str, plan.training.patch_size))
    spread = f" ± {stdev(ratios):.3f}" if len(ratios) > 1 else ""
    lines = [
        "# Training on two workers beside a plain torchrun script",
        "",
        f"{options.steps} steps a run, batches of {plan.training.batch_size} patches of {size} voxels, two processes"
        " of one core each; network, loss, optimiser and samples are the same. Ours includes its checkpoints.",
        "",
        "| pair | ours, steps a second | torchrun, steps a second | ratio |",
        "| --- | --- | --- | --- |",
        *(f"| {n} | {own:.3f} | {other:.3f} | {own / other:.3f} |" for n, (own, other) in enumerate(pairs, 1)),
        "",
        f"Ratio: **median {median(ratios):.3f}**, mean {mean(ratios):.3f}{spread}; wanted: {1 - ALLOWED:g} or more.",
        "",
        f"- network: {count_parameters(build_vnet(plan.network, 1, plan.outputs)):,} parameters",
        *provenance("torch", "ray"),
    ]
    tell(lines, options.output)


if __name__ == "__main__":
    main()
