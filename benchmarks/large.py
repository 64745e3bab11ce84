"""Scans larger than memory: predicted and measured memory of segmenting one in portions, and that it shows no seams.

    python -m benchmarks.large volume --output benchmarks/results/large-volume_<hardware>_<yyyymm>.md
    python -m benchmarks.large labels --output benchmarks/results/large-labels_<hardware>_<yyyymm>.md

`volume` is 1024^3 voxels with 8 labels at the scan's own spacing, `labels` a body of 800 x 512 x 512 voxels with 100
labels, brought back from a coarser grid. The scan comes from a formula, shard by shard; the network is tiny and its
weights come from a seed. What is measured is one process that segments, cleans, measures, writes and proves the mask.
`--shape` makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.machine import provenance, tell
from vnet_core.geometry import Geometry, Shape, resampled, to_mapping
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from vnet_core.portions import whole_bytes
from workers.cohort import Case, source_digest, volume_key
from workers.registry.models import Target, load_model, publish
from workers.segmentation.large import Work  # noqa: F401  a library of the process's start
from workers.segmentation.segment import Job, Segmenter
from workers.sources.scans import bring_in_readers, write_label
from workers.storage.arrays import SHARD_EDGE, create_array
from workers.storage.store import Root

MODEL = "tiny"


@dataclass(frozen=True)
class Setting:
    """What is segmented."""

    name: str
    labels: int
    scan: Geometry
    spacing_mm: tuple[float, float, float]
    """Of the network's grid."""
    limit_gib: float
    patch: int = 64


SETTINGS = {
    "volume": Setting(
        "volume", 8, Geometry((1024, 1024, 1024), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)), (0.5, 0.5, 0.5), 3.0
    ),
    "labels": Setting(
        "labels", 100, Geometry((800, 512, 512), (1.0, 0.75, 0.75), (0.0, 0.0, 0.0)), (3.0, 3.0, 3.0), 3.0
    ),
}


def plan_of(setting: Setting) -> Plan:
    """A network of two levels and two channels, instance normalisation, one cleaning."""
    return Plan.from_mapping(
        {
            "labels": [{"value": value, "name": f"label-{value}"} for value in range(1, setting.labels + 1)],
            "preprocess": {"spacing_mm": list(setting.spacing_mm), "crop_foreground": False},
            "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1], "normalisation": "instance"},
            "training": {"patch_size": [setting.patch] * 3},
            "inference": {
                "memory_limit_gib": setting.limit_gib,
                "precision": "float32",
                "overlap": 0.1,
                "cleaning": [{"label": 1, "keep": "largest", "holes": "fill"}],
            },
        }
    )


def waves(corner: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """float32 (Z, Y, X): smooth shapes of some 60 voxels, told by their place alone."""
    z, y, x = (np.arange(a, a + n, dtype=np.float32) / 20 for a, n in zip(corner, shape, strict=True))
    z, y, x = z[:, None, None], y[:, None], x
    return np.sin(z + np.cos(y / 2)) + np.sin(y + np.cos(x / 2)) + np.sin(x + np.cos(z / 2))


class Scan:
    """The scan's voxels, uint16, plane by plane."""

    dtype = np.dtype(np.uint16)

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __iter__(self) -> Any:
        for z in range(self.shape[0]):
            yield (1000 + 300 * waves((z, 0, 0), (1, *self.shape[1:]))[0]).astype(self.dtype)


def case_of(folder: Path, setting: Setting) -> Case:
    """The scan that lies in the folder."""
    scan = str(folder / "scan.nii")
    return Case("one", (scan,), digest=source_digest((scan,)), geometry=setting.scan)


def prepared(root: Root, folder: Path, setting: Setting) -> None:
    """A root with the model and the preprocessed volume of a case, none of it held whole."""
    plan = plan_of(setting)
    torch.manual_seed(0)
    weights = safetensors.torch.save(build_vnet(plan.network, 1, plan.outputs).state_dict())
    publish(root, Target(MODEL, "v1", plan), [weights], {}, {})
    write_label(folder / "scan.nii", Scan(setting.scan.shape), setting.scan)
    grid = resampled(setting.scan, setting.spacing_mm)
    key = volume_key(case_of(folder, setting), plan)
    edges = [min(SHARD_EDGE, -(-n // 32) * 32) for n in grid.shape]
    shard: Shape = (edges[0], edges[1], edges[2])
    stored = create_array(root, f"{key}/image", (1, *grid.shape), np.dtype(np.float32), (32, 32, 32), shard)
    for index in np.ndindex(*(-(-n // s) for n, s in zip(grid.shape, shard, strict=True))):
        corner = tuple(i * s for i, s in zip(index, shard, strict=True))
        size = tuple(min(s, n - c) for s, n, c in zip(shard, grid.shape, corner, strict=True))
        region = [slice(c, c + n) for c, n in zip(corner, size, strict=True)]
        stored.write(waves(corner, size)[None], slice(None), *region)
    root.seal(key, {"stage": "preprocess", "geometry": to_mapping(grid)})


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def segment_here(root_url: str, case: Case) -> dict[str, Any]:
    """Segment the case in this process; figures of it."""
    bring_in_readers()
    worker = Segmenter(root_url, f"{MODEL}@v1", torch.get_num_threads())
    before, began = peak_bytes(), time.perf_counter()
    outcome = worker.segment(Job("large", case, "nifti"))
    assert outcome.done, outcome
    figures = {"start": before, "peak": peak_bytes(), "seconds": time.perf_counter() - began, "key": outcome.key}
    return figures | {"threads": torch.get_num_threads()}


def measure(setting: Setting, folder: Path) -> list[str]:
    """Lines of the result: a process of its own segments the case."""
    root = Root(folder / "root")
    prepared(root, folder, setting)
    request = json.dumps({"setting": setting.name, "folder": str(folder), "shape": list(setting.scan.shape)})
    command = [sys.executable, "-m", "benchmarks.large", "--child", request]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    found = json.loads(run.stdout.splitlines()[-1])
    receipt, report = root.receipt(found["key"]), root.get_json(f"{found['key']}/report.json")
    plan, grid = load_model(root, MODEL).plan, resampled(setting.scan, setting.spacing_mm)
    assert receipt is not None
    needed = whole_bytes(plan, grid.shape, setting.scan.shape, 1)
    return [
        f"# A scan larger than memory: {setting.name}",
        "",
        f"{_by(setting.scan.shape)} voxels (z, y, x), {setting.labels} labels, network's grid {_by(grid.shape)}, tile"
        f" {_by(receipt['tile'])}, {receipt['portions']} portions, `memory_limit_gib` {setting.limit_gib:g}. Network of"
        f" two levels and width 2. {sum(row['voxels'] > 0 for row in report['labels'])} labels have voxels,"
        f" {sum(row['components'] for row in report['labels'])} pieces in all. From the stored volume to the published"
        " and proved mask, in one process.",
        "",
        "| | GiB |",
        "|---|---|",
        f"| needed whole beside the pass, predicted | {needed / 2**30:.1f} |",
        f"| in portions, predicted | {receipt['predicted_bytes'] / 2**30:.2f} |",
        f"| in portions, measured beyond the start | {(found['peak'] - found['start']) / 2**30:.2f} |",
        f"| the process at its start: libraries and weights | {found['start'] / 2**30:.2f} |",
        f"| the process at its largest | {found['peak'] / 2**30:.2f} |",
        "",
        f"{found['seconds']:.0f} seconds with {found['threads']} thread(s), on a machine that others use too.",
        "",
    ]


def _by(shape: Sequence[int] | None) -> str:
    return " x ".join(map(str, shape)) if shape else "the whole grid"


def with_shape(setting: Setting, shape: list[int] | None) -> Setting:
    """The setting with another number of voxels, and less memory and smaller patches where it is small."""
    if not shape:
        return setting
    z, y, x = shape
    small = min(shape) < 256
    smaller = replace(setting.scan, shape=(z, y, x))
    return replace(setting, scan=smaller, patch=16 if small else 64, limit_gib=0.5 if small else 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", choices=SETTINGS, default="volume")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), help="voxels of the scan")
    parser.add_argument("--scratch", type=Path, help="folder for some gigabytes (default: the system's)")
    parser.add_argument("--output", type=Path, help="Markdown file to write; it is always printed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        request = json.loads(arguments.child)
        setting, folder = with_shape(SETTINGS[request["setting"]], request["shape"]), Path(request["folder"])
        print(json.dumps(segment_here(Root(folder / "root").url, case_of(folder, setting))))
        return
    setting = with_shape(SETTINGS[arguments.setting], arguments.shape)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        lines = measure(setting, Path(folder))
    tell([*lines, *provenance("torch", "numpy", "zarr")], arguments.output)


if __name__ == "__main__":
    main()
