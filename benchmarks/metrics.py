"""All figures of a pair of masks beside surface-distance and MONAI: seconds, memory and agreement in one run.

    python -m benchmarks.metrics --output benchmarks/results/metrics_<hardware>_<yyyymm>.md

Every timing is made in a fresh process, the arms in turn, on the same masks in a grid of 300 x 512 x 512. `--small`
does the same on a small grid in a few seconds, to see that the script runs.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from benchmarks.machine import provenance, tell
from vnet_core.geometry import Shape, Triple
from vnet_core.metrics import Structure, score_labels

SPACING_MM: Triple = (1.0, 0.7, 0.7)
TOLERANCE_MM = 1.0
SHAPE: Shape = (300, 512, 512)
SMALL: Shape = (24, 40, 40)


@dataclass(frozen=True)
class Pair:
    """Two ellipsoids with wavy surfaces, in shares of the grid."""

    name: str
    truth: float
    """Radius of the truth as a share of half the grid."""
    prediction: float
    shift: float
    """Of the prediction's centre, as a share of half the grid."""


PAIRS = (
    Pair("an organ, nearly right", 0.55, 0.55, 0.01),
    Pair("the whole body, nearly right", 0.95, 0.95, 0.01),
    Pair("the whole body, half as large", 0.95, 0.48, 0.0),
)


@dataclass(frozen=True)
class Measurement:
    """One run of one arm on one pair."""

    seconds: float
    extra_bytes: int
    """Largest resident size above what was held when the clock started, the masks included in neither."""
    figures: dict[str, float]


def masks(pair: Pair, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth, bool (Z, Y, X)."""
    return wavy(shape, pair.prediction, pair.shift, waves=5), wavy(shape, pair.truth, 0.0, waves=4)


def wavy(shape: Shape, radius: float, shift: float, waves: int) -> np.ndarray:
    """One ellipsoid, bool (Z, Y, X), made plane by plane so that the clock starts with little memory held."""
    z, y, x = (np.linspace(-1, 1, n) - shift for n in shape)
    mask = np.empty(shape, bool)
    for plane, height in zip(mask, z, strict=True):
        bumps = np.sin(waves * np.pi * height) + np.sin(waves * np.pi * y)[:, None] + np.sin(waves * np.pi * x)
        plane[:] = np.sqrt(height**2 + y[:, None] ** 2 + x**2) <= radius * (1 + 0.01 * bumps)
    return mask


def ours(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    score = score_labels(
        prediction.view(np.uint8), truth.view(np.uint8), [Structure("all", (1,))], SPACING_MM, [TOLERANCE_MM]
    )[0]
    return {
        "HD mm": score.hd_mm,
        "HD95 mm": score.hd95_mm,
        "ASSD mm": score.assd_mm,
        "surface Dice": score.surface_dice[0][1],
        "Dice": score.dice,
    }


def reference(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import surface_distance as peer  # type: ignore[import-untyped]

        found = peer.compute_surface_distances(truth, prediction, SPACING_MM)
    areas = found["surfel_areas_gt"], found["surfel_areas_pred"]
    distances = found["distances_gt_to_pred"], found["distances_pred_to_gt"]
    both = sum(float(a @ d) for a, d in zip(areas, distances, strict=True))
    return {
        "HD mm": peer.compute_robust_hausdorff(found, 100),
        "HD95 mm": peer.compute_robust_hausdorff(found, 95),
        "ASSD mm": both / sum(float(a.sum()) for a in areas),
        "surface Dice": peer.compute_surface_dice_at_tolerance(found, TOLERANCE_MM),
        "Dice": peer.compute_dice_coefficient(truth, prediction),
    }


def monai(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """HD95, ASSD, surface Dice and Dice; each call computes distances anew."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import (
            compute_average_surface_distance,
            compute_dice,
            compute_hausdorff_distance,
            compute_surface_dice,
        )

        p, t = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
        hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=SPACING_MM)
        assd = compute_average_surface_distance(p, t, include_background=True, symmetric=True, spacing=SPACING_MM)
        surface = compute_surface_dice(p, t, [TOLERANCE_MM], include_background=True, spacing=SPACING_MM)
        return {
            "HD95 mm": float(hd95),
            "ASSD mm": float(assd),
            "surface Dice": float(surface),
            "Dice": float(compute_dice(p, t)),
        }


ARMS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "ours": ours,
    "surface-distance": reference,
    "MONAI": monai,
}


def measure(arm: str, pair: Pair, shape: Shape) -> Measurement:
    """Time one arm once; to be called in a process of its own."""
    work = ARMS[arm]
    work(*masks(PAIRS[0], SMALL))
    prediction, truth = masks(pair, shape)
    start_bytes = psutil.Process().memory_info().rss
    # Linux counts ru_maxrss in KiB; making the masks may have held more than they do
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    figures = work(prediction, truth)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Measurement(seconds, peak - start_bytes if peak > before else 0, figures)


def report(shape: Shape, measured: dict[Pair, dict[str, list[Measurement]]]) -> list[str]:
    """The results as Markdown, with what is needed to repeat them."""
    lines = [
        "# Figures of a pair of masks",
        "",
        f"Seconds for all surface figures and Dice of one pair in a grid of {' x '.join(map(str, shape))} voxels at"
        f" {' x '.join(map(str, SPACING_MM))} mm (z, y, x), one thread; memory is above that of the masks. Fresh"
        " process for every timing, arms in turn. MONAI computes distances anew for each of its three calls; the"
        " Hausdorff distance would be a fourth.",
        "",
        "| pair | arm | seconds | median | times ours | memory GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair, arms in measured.items():
        fastest = median(m.seconds for m in arms["ours"])
        for arm, made in arms.items():
            middle = median(m.seconds for m in made)
            peak = max(m.extra_bytes for m in made) / 2**30
            told = f"{peak:.2f}" if peak else "less than making the masks"
            lines.append(
                f"| {pair.name} | {arm} | {' · '.join(f'{m.seconds:.2f}' for m in made)} | {middle:.2f} |"
                f" {middle / fastest:.1f} | {told} |"
            )
    names = list(next(iter(measured.values()))["ours"][0].figures)
    lines += ["", f"| pair | arm | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for pair, arms in measured.items():
        for arm, made in arms.items():
            cells = [f"{made[0].figures[name]:.6f}" if name in made[0].figures else "" for name in names]
            lines.append(f"| {pair.name} | {arm} | {' | '.join(cells)} |")
    apart = max(
        abs(value - arms["surface-distance"][0].figures[name])
        for arms in measured.values()
        for name, value in arms["ours"][0].figures.items()
    )
    lines += [
        "",
        f"Largest difference between ours and surface-distance: {apart:.1e}. Where MONAI differs: docs/metrics.md.",
        "",
        *provenance("numpy", "scipy", "surface-distance", "monai", "torch"),
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args()
    shape, pairs = (SMALL, PAIRS[:1]) if options.small else (SHAPE, PAIRS)
    measured: dict[Pair, dict[str, list[Measurement]]] = {pair: {arm: [] for arm in ARMS} for pair in pairs}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh_processes:
        for pair, arms in measured.items():
            for _ in range(options.runs):
                for arm, made in arms.items():
                    made.append(fresh_processes.submit(measure, arm, pair, shape).result())
    tell(report(shape, measured), options.output)


if __name__ == "__main__":
    main()
