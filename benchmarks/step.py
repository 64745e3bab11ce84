"""Milliseconds per training step and per inference of the published V-Net, beside MONAI's VNet in the same run.

    python -m benchmarks.step

With CUDA: preset `paper`, batch 2, 128 x 128 x 64 voxels, bfloat16, channels last, compiled; the share of the matrix
peak is that of a large bfloat16 matrix product measured in the same run. MONAI's VNet has 366 GMAC where the published
network has 502, so the ratio is also given per multiply-accumulate. Without CUDA it says so, and runs width 4 and
32 x 32 x 32 voxels on the processor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import RESULTS, provenance, tell
from vnet_core.fitting import StepSettings, build_optimiser, train_step
from vnet_core.inference import prepare, processor_precision
from vnet_core.losses import build_loss
from vnet_core.networks.layout import count_macs
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan

PASSES = 3.0
"""A training step is one pass forward and two backward: gradients of values and of weights."""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    width: int
    batch: int
    shape: tuple[int, int, int]
    runs: int


ON_GPU = Size(16, 2, (64, 128, 128), 20)
ON_CPU = Size(4, 2, (32, 32, 32), 5)


@dataclass(frozen=True)
class Timed:
    """One row of the table."""

    who: str
    training_ms: float
    inference_ms: float
    gmacs: float
    """Of one forward pass of the batch."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/step_...)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = ON_GPU if device.type == "cuda" else ON_CPU
    rows = [ours(size, device), *monai(size, device)]
    report(options.output, size, device, rows, peak_tmacs(device))
    return 0


def milliseconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median of so many runs, after three that warm up."""
    seconds = []
    for number in range(runs + 3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def peak_tmacs(device: torch.device) -> float:
    """Multiply-accumulates (10^12) a second of a square matrix product in the device's own precision."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=processor_precision(device)) for _ in range(2))
    return n**3 / (milliseconds(lambda: a @ b, device, 20) / 1000) / 1e12


def plan_of(size: Size) -> Plan:
    labels = [{"value": 1, "name": "prostate"}]
    network = {"preset": "paper", "width": size.width}
    training = {"patch_size": size.shape, "batch_size": size.batch}
    return Plan.from_mapping({"labels": labels, "network": network, "training": training})


def batch_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size.batch, 1, *size.shape, generator=generator).to(device)
    return images, (images[:, 0] > 1).long()


def ours(size: Size, device: torch.device) -> Timed:
    plan = plan_of(size)
    network = build_vnet(plan.network, 1, 2).to(device)
    compiled: nn.Module = network
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        compiled = torch.compile(network)
    optimiser = build_optimiser(network, plan.training)
    settings = StepSettings(build_loss(plan, [9, 1]), processor_precision(device), 1.0)
    batch = batch_of(size, device)
    training = milliseconds(lambda: train_step(compiled, optimiser, [batch], 0.5, settings), device, size.runs)
    still = prepare(network, device, processor_precision(device))
    image = batch[0][:1].to(processor_precision(device), memory_format=torch.channels_last_3d)
    gmacs = size.batch * count_macs(plan.network, 1, 2, size.shape) / 1e9
    return Timed("vnet, preset paper", training, milliseconds(lambda: infer(still, image), device, size.runs), gmacs)


def infer(network: nn.Module, image: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(image)


def monai(size: Size, device: torch.device) -> list[Timed]:
    """MONAI's VNet with its DiceCELoss, under autocast and in float32. It has no width, so it is the whole network."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import VNet

    images, classes = batch_of(size, device)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    rows = []
    for precision in (processor_precision(device), torch.float32):
        network = VNet(spatial_dims=3, in_channels=1, out_channels=2).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)

        def cast(precision: torch.dtype = precision) -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=precision != torch.float32)

        def step(network: nn.Module = network, optimiser: torch.optim.Optimizer = optimiser) -> None:
            optimiser.zero_grad()
            with cast():
                logits = network(images)
                loss = loss_of(logits, classes[:, None])
            loss.backward()
            optimiser.step()

        def look(network: nn.Module = network) -> Tensor:
            with cast():
                return infer(network, images[:1])

        training = milliseconds(step, device, size.runs)
        network.eval()
        name = "float32" if precision == torch.float32 else "autocast bfloat16"
        gmacs = size.batch * 366.0 * size.shape[0] * size.shape[1] * size.shape[2] / (128 * 128 * 64)
        rows.append(Timed(f"MONAI VNet, {name}", training, milliseconds(look, device, size.runs), gmacs))
    return rows


def report(output: Path | None, size: Size, device: torch.device, rows: list[Timed], peak: float) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    target = output or RESULTS / f"step-{device.type}_{datetime.now(UTC):%Y%m}.md"
    note = "" if device.type == "cuda" else " No CUDA device was at hand: this is a small size on the processor."
    shape = " x ".join(map(str, size.shape))
    lines = [
        f"# One step of the published V-Net on {name}",
        "",
        f"Width {size.width}, batch {size.batch}, {shape} voxels (z, y, x).{note} A square matrix product reaches"
        f" {peak:.2f} TMAC/s here.",
        "",
        "| who | training ms | inference of one ms | GMAC forward | share of the matrix peak in training |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = PASSES * row.gmacs / 1e3 / (row.training_ms / 1e3) / peak
        lines.append(
            f"| {row.who} | {row.training_ms:.1f} | {row.inference_ms:.1f} | {row.gmacs:.1f} | {100 * share:.0f} % |"
        )
    lines += ["", *provenance("torch", "monai")]
    tell(lines, target)


if __name__ == "__main__":
    sys.exit(main())
