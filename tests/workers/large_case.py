"""A case that is segmented whole or in portions, as its plan's limit of memory says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from vnet_core.geometry import Geometry, matrix_of
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.cohort import Case, source_digest
from workers.preprocess import preprocess_case
from workers.registry.models import Target, publish
from workers.segmentation.segment import Segmenter
from workers.sources.scans import write_volume
from workers.storage.store import Root

ROOMY_GIB, TIGHT_GIB = 6.0, 0.5
"""What a plan allows so that a small case is segmented whole, and in portions."""
SAGITTAL = matrix_of([[1, 0, 0], [0, 0, -1], [0, -1, 0]])
GRID = Geometry((18, 27, 25), (1.0, 0.7, 1.2), (5.0, -3.0, 8.0), SAGITTAL)


def plan_of(limit_gib: float, **sections) -> Plan:
    labels = [{"value": 1, "name": "one"}, {"value": 4, "name": "four"}, {"value": 300, "name": "large"}]
    return Plan.from_mapping(
        {
            "labels": labels,
            "head": "sigmoid",
            "regions": [
                {"name": "all", "values": [1, 4, 300], "paints": 1},
                {"name": "four", "values": [4], "paints": 4},
                {"name": "large", "values": [300], "paints": 300},
            ],
            "preprocess": {"spacing_mm": [1.1, 1.0, 0.8]},
            "network": {"kernel_size": 3, "width": 2, "convolutions": [1, 1], "normalisation": "instance"},
            "training": {"patch_size": [8, 8, 8]},
            "inference": {"precision": "float32", "memory_limit_gib": limit_gib, **sections.pop("inference", {})},
            **sections,
        }
    )


def scan_in(folder: Path, grid: Geometry) -> Case:
    noise = torch.randn((1, 1, 6, 7, 6), generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, size=grid.shape, mode="trilinear")[0, 0].numpy()
    voxels = (300 * smooth + np.random.default_rng(0).normal(0, 20, grid.shape)).astype(np.int16)
    folder.mkdir(exist_ok=True)
    write_volume(folder / "a.nii.gz", Volume(voxels[None], grid))
    return Case("a", (str(folder / "a.nii.gz"),), digest="", geometry=grid)


def segmenter(root: Root, plan: Plan, version: str, networks: int = 1) -> Segmenter:
    weights = []
    for seed in range(networks):
        torch.manual_seed(seed)
        weights.append(safetensors.torch.save(build_vnet(plan.network, 1, plan.outputs).state_dict()))
    publish(root, Target("organs", version, plan), weights, {}, {})
    return Segmenter(root.url, f"organs@{version}", 1)


def ready(root: Root, plan: Plan, folder: Path, grid: Geometry = GRID) -> Case:
    case = scan_in(folder, grid)
    case = replace(case, digest=source_digest(case.channels))
    assert preprocess_case(root.url, case, plan).done
    return case
