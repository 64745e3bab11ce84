"""Many tiny scans whose masks are known, a model that finds them, and a root to put them in."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch

from tests.workers.known_model import known_network, known_plan, scan_of
from vnet_core.geometry import Geometry
from vnet_core.volume import Volume
from workers.ingest import Names, ingest
from workers.ledger import Outcome
from workers.registry.models import Model, Target, publish
from workers.sources.scans import write_volume
from workers.storage.store import Root

SIDE = 8
SPACING_MM = (2.0, 2.0, 2.0)
"""A voxel is 0.008 mL."""
MODEL = "known"
TRAINED = """
[preprocess]
spacing_mm = [2.0, 2.0, 2.0]
[network]
kernel_size = 3
width = 2
convolutions = [1, 1]
[training]
patch_size = [8, 8, 8]
batch_size = 2
"""
"""A plan of steps that take next to nothing; further settings of the training may follow."""


def write_scan(folder: Path, case: str, seed: int, voxels: int = 8) -> Path:
    """A scan in which the model finds a cuboid of ``voxels`` voxels of label 2 in the middle, 0.008 mL each."""
    return _write(folder / f"{case}.nii", scan_of(_cuboid(voxels), seed))


def write_labelled(folder: Path, case: str, seed: int) -> None:
    """A scan with its label map, in the folders of a training set."""
    _write(folder / "imagesTr" / f"{case}.nii", scan_of(_cuboid(8), seed))
    _write(folder / "labelsTr" / f"{case}.nii", _cuboid(8))


def _cuboid(voxels: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE, SIDE), np.uint8)
    depth, rest = divmod(voxels, 4)
    assert rest == 0, "whole layers of 2 x 2"
    mask[2 : 2 + depth, 3:5, 3:5] = 2
    return mask


def _write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    geometry = Geometry((SIDE, SIDE, SIDE), SPACING_MM, (0.0, 0.0, 0.0))
    write_volume(path, Volume(values[None], geometry))
    return path


def publish_model(root: Root, version: str = "v1", **inference: object) -> Model:
    """The model that finds grey values above 250 as label 2."""
    plan = known_plan(SPACING_MM, crop=False, **inference)
    weights = safetensors.torch.save(known_network(plan).state_dict())
    return publish(root, Target(MODEL, version, plan), [weights], {"metrics": {"validation_dice": {}}}, {})


def take_in(root: Root, cohort: str, sources: Sequence[Path]) -> list[Outcome]:
    """Ingest."""
    with ThreadPoolExecutor(2) as executor:
        return ingest(root, cohort, [str(source) for source in sources], executor, Names())[1]
