"""Milliseconds per training step and per inference, beside MONAI's VNet in the same run.

    python -m benchmarks.step

With CUDA: preset `paper`, batch 2, 128 x 128 x 64 voxels, bfloat16, as `vnet train` lays it out, as torch would, and
compiled, which `vnet train` does not do; the share of the matrix peak is that of a large bfloat16 matrix product
measured in the same run. MONAI's VNet has 366 GMAC where the published network has 502, so the share is given too.
Without CUDA it says so, and runs width 4 and 32 x 32 x 32 voxels on the processor. Always there too: the network that
`--plan auto` gives a cohort of small MR volumes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import RESULTS, provenance, tell
from vnet_core.fitting import StepSettings, build_optimiser, placed, train_step
from vnet_core.inference import prepare, processor_precision
from vnet_core.losses import build_loss
from vnet_core.networks.layout import count_macs
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Label, Plan
from vnet_core.planning import planned_network
from vnet_core.sections import NetworkPlan, TrainingPlan

PASSES = 3.0
"""A training step is one pass forward and two backward: gradients of values and of weights."""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    name: str
    network: NetworkPlan
    batch: int
    shape: tuple[int, int, int]
    runs: int


def paper(width: int) -> NetworkPlan:
    return NetworkPlan.model_validate({"preset": "paper", "width": width})


SMALL_MR = planned_network(width=16, levels=4)
ON_GPU = (
    Size("preset paper", paper(16), 2, (64, 128, 128), 20),
    Size("small MR volumes", SMALL_MR, 2, (40, 56, 40), 20),
)
ON_CPU = (
    Size("preset paper, width 4", paper(4), 2, (32, 32, 32), 5),
    Size("small MR volumes", SMALL_MR, 2, (40, 56, 40), 5),
)


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
    sizes = ON_GPU if device.type == "cuda" else ON_CPU
    rows = [row for size in sizes for row in ours(size, device)]
    report(options.output, sizes, device, [*rows, *monai(sizes[0], device)], peak_tmacs(device))
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
    training = TrainingPlan(patch_size=size.shape, batch_size=size.batch)
    return Plan(labels=(Label(value=1, name="organ"),), network=size.network, training=training)


def batch_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size.batch, 1, *size.shape, generator=generator).to(device)
    return images, (images[:, 0] > 1).long()


def ours(size: Size, device: torch.device) -> list[Timed]:
    """As `vnet train` steps, in torch's own layout, and with CUDA compiled."""
    plan = plan_of(size)
    precision = processor_precision(device)
    still = prepare(build_vnet(plan.network, 1, 2), device, precision)
    image = batch_of(size, device)[0][:1].to(precision, memory_format=torch.channels_last_3d)
    inference = milliseconds(lambda: infer(still, image), device, size.runs)
    gmacs = size.batch * count_macs(plan.network, 1, 2, size.shape) / 1e9

    def timed(who: str, network: nn.Module) -> Timed:
        return Timed(f"vnet, {size.name}{who}", training_ms(network, plan, size, device), inference, gmacs)

    rows = [
        timed("", placed(build_vnet(plan.network, 1, 2), device, precision)),
        timed(", torch's layout", build_vnet(plan.network, 1, 2).to(device)),
    ]
    if device.type == "cuda":
        laid_out = placed(build_vnet(plan.network, 1, 2), device, precision)
        rows.append(timed(", compiled", torch.compile(laid_out)))
    return rows


def training_ms(network: nn.Module, plan: Plan, size: Size, device: torch.device) -> float:
    optimiser = build_optimiser(network, plan.training)
    settings = StepSettings(build_loss(plan, [9, 1]), processor_precision(device), 1.0)
    batch = batch_of(size, device)
    return milliseconds(lambda: train_step(network, optimiser, [batch], 0.5, settings), device, size.runs)


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
    for precision in dict.fromkeys((processor_precision(device), torch.float32)):
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


def report(output: Path | None, sizes: Sequence[Size], device: torch.device, rows: list[Timed], peak: float) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    target = output or RESULTS / f"step-{device.type}_{datetime.now(UTC):%Y%m}.md"
    note = "" if device.type == "cuda" else "No CUDA device was at hand: these are small sizes on the processor. "
    shapes = "; ".join(
        f"{size.name}: batch {size.batch}, {' x '.join(map(str, size.shape))} voxels (z, y, x)" for size in sizes
    )
    lines = [
        f"# One step of a V-Net on {name}",
        "",
        f"{note}{shapes}. MONAI's VNet has the first size. A square matrix product reaches {peak:.2f} TMAC/s here.",
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
