"""MONAI's VNet, trained as its tutorials do, for some minutes, and its prediction of the held-out cases.

    python -m benchmarks.peers.monai_vnet TRAINING.csv HELD-OUT.csv WORK MINUTES...

Cached cases, z-scores over non-zero voxels, crops balanced between labels and background, flips and intensity changes,
Dice + cross-entropy, AdamW with a cosine fall over the minutes, sliding windows. In float32: under bfloat16 autocast
the gradients of its bottom stage, whose grid is smaller than the kernel, are wrong on processors (torch 2.13), and
after five minutes its masks were empty. For every number of minutes a training of its own; masks go to
WORK/monai-<minutes>.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

ROI = (48, 64, 48)
"""Patch: the median case rounded up to what the network needs, multiples of 16."""


def rows_of(manifest: Path) -> list[dict[str, str]]:
    return [{"image": row["image"], "label": row["label"], "case": row["case"]} for row in _read(manifest)]


def _read(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def cached(rows: list[dict[str, str]]) -> Any:
    """The training cases in memory, and the random part of the transforms for each sample."""
    from monai.data import CacheDataset, DataLoader, list_data_collate
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        RandCropByPosNegLabeld,
        RandFlipd,
        RandScaleIntensityd,
        RandShiftIntensityd,
        Spacingd,
        SpatialPadd,
    )

    both = ["image", "label"]
    steps = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, "RAS", labels=None),
            Spacingd(both, (1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            SpatialPadd(both, ROI),
            RandCropByPosNegLabeld(both, "label", ROI, pos=1, neg=1, num_samples=2),
            RandFlipd(both, 0.5, 0),
            RandScaleIntensityd("image", 0.1, 0.5),
            RandShiftIntensityd("image", 0.1, 0.5),
        ]
    )
    data = CacheDataset(rows, steps, cache_rate=1.0, num_workers=2, progress=False)
    return DataLoader(data, batch_size=1, shuffle=True, num_workers=0, collate_fn=list_data_collate)


def train(loader: Any, minutes: float) -> tuple[Any, int]:
    """The network after so many minutes, or their steps where STEPS_PER_MINUTE says how many a minute has."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import VNet
    from monai.utils import set_determinism

    set_determinism(0)
    network = VNet(spatial_dims=3, in_channels=1, out_channels=3)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    peak = 1e-3
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak)
    started, steps, batches = time.monotonic(), 0, iter(loader)
    pace = float(os.environ.get("STEPS_PER_MINUTE", 0))

    def used() -> float:
        return steps / (pace * minutes) if pace else (time.monotonic() - started) / (60 * minutes)

    while (share := used()) < 1:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * share))
        optimiser.zero_grad()
        loss = loss_of(network(batch["image"].as_tensor()), batch["label"].as_tensor().round())
        loss.backward()
        optimiser.step()
        steps += 1
    return network.eval(), steps


def predict(network: Any, rows: list[dict[str, str]], target: Path) -> None:
    """Masks on the scans' own grids, which are 1 mm already."""
    from monai.inferers import sliding_window_inference

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for row in rows:
        image = nibabel.load(row["image"])
        voxels = np.asarray(image.dataobj, np.float32)
        closest = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, image.affine))
        values = np.asarray(closest.dataobj, np.float32)
        inside = values != 0
        values[inside] = (values[inside] - values[inside].mean()) / values[inside].std()
        with torch.no_grad():
            logits = sliding_window_inference(torch.from_numpy(values)[None, None], ROI, 2, network, overlap=0.5)
        classes = logits.argmax(1)[0].numpy().astype(np.uint8)
        back = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(closest.affine), nibabel.io_orientation(image.affine)
        )
        mask = nibabel.orientations.apply_orientation(classes, back).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), target / f"{row['case']}.nii.gz")


def main() -> int:
    training, held, work = (Path(argument).resolve() for argument in sys.argv[1:4])
    torch.set_num_threads(2)
    rows = rows_of(training)
    loader = cached(rows)
    for minutes in map(float, sys.argv[4:]):
        network, steps = train(loader, minutes)
        predict(network, rows_of(held), work / f"monai-{minutes:g}")
        print(json.dumps({"minutes": minutes, "steps": steps}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
