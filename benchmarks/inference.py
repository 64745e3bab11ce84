"""One pass over the whole volume beside MONAI's sliding window: seconds, memory and agreement in one run.

    python -m benchmarks.inference --output benchmarks/results/inference_<hardware>_<yyyymm>.md

Every timing is made in a fresh process, the arms in turn, with the same weights (the published V-Net from a seed) and
the same volume. `--small` does the same with a tiny network in a few seconds, to see that the script runs.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import provenance, tell
from vnet_core.geometry import Shape
from vnet_core.inference import precision, predict_logits, prepare
from vnet_core.networks.layout import count_macs
from vnet_core.networks.vnet import VNet, build_vnet, count_parameters
from vnet_core.plan import Plan
from vnet_core.preprocess import prepare as prepare_case
from workers.cohort import read_channels
from workers.registry.models import load_model, load_networks
from workers.sources.discover import discover
from workers.sources.scans import read_label
from workers.storage.store import Root

CPU = torch.device("cpu")
OURS, PEER, PEER_BFLOAT16 = "one pass", "MONAI sliding window", "MONAI sliding window, our bfloat16 weights"
ROI: Shape = (64, 128, 128)
"""Window (z, y, x) of the peer."""
ROI_OVERLAP = 0.5


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    plan: Plan
    shape: Shape
    """Voxels (z, y, x) of the volume."""
    roi: Shape
    runs: int


@dataclass(frozen=True)
class Measurement:
    """One run of one arm."""

    seconds: float
    peak_bytes: int
    """Largest resident size of the process."""
    start_bytes: int
    """Resident size with the libraries and the float32 weights loaded, before anything is computed."""
    labels: np.ndarray
    """uint8 (Z, Y, X)."""


@dataclass(frozen=True)
class Agreement:
    """Dice of one label of one case."""

    label: str
    between: float
    """Ours against the peer's."""
    ours: float
    """Ours against the truth."""
    peer: float
    """The peer's against the truth."""


def published(runs: int) -> Setting:
    """The published network on a typical volume."""
    return Setting(Plan.from_mapping({"labels": [{"value": 1, "name": "structure"}]}), (128, 160, 160), ROI, runs)


def small(runs: int) -> Setting:
    """The same in miniature."""
    plan = Plan.from_mapping(
        {
            "labels": [{"value": 1, "name": "structure"}],
            "network": {"kernel_size": 3, "width": 4, "convolutions": [1, 1, 1]},
            "training": {"patch_size": [8, 16, 16]},
        }
    )
    return Setting(plan, (24, 32, 32), (16, 16, 16), runs)


def synthetic_image(shape: Shape) -> Tensor:
    """Smooth random shapes with a little noise, float32 (1, Z, Y, X), mean 0 and standard deviation about 1."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn((1, 1, *(max(2, n // 12) for n in shape)), generator=generator)
    image = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]
    image += 0.2 * torch.randn(image.shape, generator=generator)
    return (image - image.mean()) / image.std()


def sliding_window(network: nn.Module, image_CZYX: Tensor, roi: Shape) -> Tensor:
    """Logits (K, Z, Y, X) as MONAI gives them, in the dtype of the network's weights."""
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=1, overlap=ROI_OVERLAP, mode="gaussian")
    dtype = next(network.parameters()).dtype
    with torch.inference_mode():
        return inferer(image_CZYX[None].to(dtype), network)[0]


def measure(arm: str, setting: Setting) -> Measurement:
    """Time one arm once; to be called in a process of its own."""
    plan = setting.plan
    network: nn.Module = build_vnet(plan.network, len(plan.channels), plan.outputs).eval()
    image = synthetic_image(setting.shape)
    if arm == OURS:
        network = prepare(network, CPU, precision(plan.inference, CPU))
    elif arm == PEER_BFLOAT16:
        network = prepare(network, CPU, torch.bfloat16)
    with torch.inference_mode():
        network(torch.zeros(1, 1, 16, 16, 16, dtype=next(network.parameters()).dtype))
    start_bytes = psutil.Process().memory_info().rss
    began = time.perf_counter()
    logits = predict_logits(network, image, plan) if arm == OURS else sliding_window(network, image, setting.roi)
    seconds = time.perf_counter() - began
    # Linux counts ru_maxrss in KiB.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(seconds, peak_bytes, start_bytes, logits.argmax(0).to(torch.uint8).numpy())


def measure_all(setting: Setting) -> dict[str, list[Measurement]]:
    """Every arm ``setting.runs`` times, in turn."""
    measurements: dict[str, list[Measurement]] = {OURS: [], PEER: [], PEER_BFLOAT16: []}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh_processes:
        for _ in range(setting.runs):
            for arm, made in measurements.items():
                made.append(fresh_processes.submit(measure, arm, setting).result())
    return measurements


def agreement(
    network: VNet, plan: Plan, cases: Iterable[tuple[Tensor, np.ndarray]], roi: Shape = ROI
) -> list[Agreement]:
    """Both arms with trained weights: Dice of each label with each other and with the truth, case after case.

    ``cases`` are an image (C, Z, Y, X), float32, preprocessed, and the truth (Z, Y, X) in values of ``plan.labels``.
    """
    network = network.eval()
    prepared = prepare(network, CPU, precision(plan.inference, CPU))
    rows = []
    for image_CZYX, truth_ZYX in cases:
        ours = predict_logits(prepared, image_CZYX, plan).argmax(0).numpy()
        peer = sliding_window(network, image_CZYX, roi).argmax(0).numpy()
        for index, label in enumerate(plan.labels, start=1):
            a, b, truth = ours == index, peer == index, truth_ZYX == label.value
            rows.append(Agreement(label.name, dice(a, b), dice(a, truth), dice(b, truth)))
    return rows


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |a and b| / (|a| + |b|) of boolean arrays; 1 where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else 1.0


def report(setting: Setting, measurements: dict[str, list[Measurement]]) -> str:
    """The results as Markdown, with what is needed to repeat them."""
    plan, first = setting.plan, measurements[OURS][0].labels
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    gigamacs = count_macs(plan.network, len(plan.channels), plan.outputs, setting.shape) / 1e9
    medians = {arm: median(m.seconds for m in made) for arm, made in measurements.items()}
    rows = [
        f"| {arm} | {' · '.join(f'{m.seconds:.2f}' for m in made)} | {medians[arm]:.2f} "
        f"| {medians[arm] / medians[OURS]:.2f} | {gibibytes(made, 'peak_bytes')} | {gibibytes(made, 'start_bytes')} |"
        for arm, made in measurements.items()
    ]
    same = [
        f"| {arm} | {100 * float((made[0].labels == first).mean()):.3f} % "
        f"| {dice(made[0].labels == 1, first == 1):.4f} "
        f"| {'yes' if all(np.array_equal(m.labels, made[0].labels) for m in made) else 'no'} |"
        for arm, made in measurements.items()
    ]
    return "\n".join(
        [
            "# Inference: one pass over the volume beside a sliding window",
            "",
            f"V-Net of {count_parameters(network):,} parameters, seeded weights, one volume of "
            f"{' x '.join(map(str, setting.shape))} voxels (z, y, x), {gigamacs:.4g} GMAC. "
            f"One pass in {str(precision(plan.inference, CPU)).removeprefix('torch.')}; the sliding window in "
            f"{' x '.join(map(str, setting.roi))} windows, overlap {ROI_OVERLAP:g}, Gaussian blending, one window at a "
            "time, float32 unless it says otherwise. All arms run the same module; every run in a fresh process, the "
            "arms in turn.",
            "",
            "| arm | seconds of each run | median s | times ours | peak GiB | of that before the run |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"The sliding window in float32 takes **{medians[PEER] / medians[OURS]:.1f} times** as long as one pass.",
            "",
            "| arm | voxels with our label | Dice with ours | same in each run |",
            "|---|---|---|---|",
            *same,
            "",
            "Untrained weights have no sure answers; with trained weights on real scans the arms are compared with "
            "`--model`.",
            "",
        ]
    )


def held_out(manifest: Path, plan: Plan) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Image and truth on the network's grid for every row of a manifest with labels."""
    for case in discover([str(manifest)]).cases:
        assert case.label is not None, f"case {case.id} of the manifest has no label"
        prepared = prepare_case(read_channels(case.channels), read_label(case.label), plan.preprocess)
        assert prepared.label is not None
        yield torch.from_numpy(prepared.image), prepared.label


def report_agreement(name: str, rows: list[Agreement], roi: Shape) -> str:
    lines = [
        f"## Agreement on real scans, {name}",
        "",
        f"Windows of {' x '.join(map(str, roi))} voxels, the training patch, overlap {ROI_OVERLAP:g}; mean over cases.",
        "",
        "| label | cases | Dice between the two | worst | one pass against truth | sliding window against truth |",
        "|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row.label for row in rows):
        found = [row for row in rows if row.label == label]
        between = [row.between for row in found]
        lines.append(
            f"| {label} | {len(found)} | {mean(between):.4f} | {min(between):.4f} "
            f"| {mean(r.ours for r in found):.4f} | {mean(r.peer for r in found):.4f} |"
        )
    return "\n".join([*lines, "", ""])


def gibibytes(made: list[Measurement], field: str) -> str:
    return f"{max(getattr(m, field) for m in made) / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="runs of each arm (default 2)")
    parser.add_argument("--small", action="store_true", help="a tiny network and volume")
    parser.add_argument("--root", type=Path, default=Path("vnet-data"), help="storage root of --model")
    parser.add_argument("--model", help="a trained model, to compare the arms on real scans")
    parser.add_argument("--manifest", type=Path, help="CSV with case, image and label of the scans for --model")
    parser.add_argument("--output", type=Path, help="Markdown file to write; it is always printed")
    arguments = parser.parse_args()
    setting = small(arguments.runs) if arguments.small else published(arguments.runs)
    text = report(setting, measure_all(setting))
    if arguments.model:
        root = Root(arguments.root)
        model = load_model(root, arguments.model)
        roi = model.plan.training.patch_size
        rows = agreement(load_networks(root, model)[0], model.plan, held_out(arguments.manifest, model.plan), roi)
        text += "\n" + report_agreement(model.name, rows, roi)
    tell([*text.splitlines(), *provenance("torch", "monai", "numpy")], arguments.output)


if __name__ == "__main__":
    main()
