"""What keeps Dice from rising: do several trainings err alike, and where, or would more of them average it away?

    python -m benchmarks.agreement TRUTH MASKS MASKS MASKS --output FILE

TRUTH and every MASKS are folders of label maps with the same file names on the same grids, each MASKS of another
training (`python -m benchmarks.accuracy` leaves them in its scratch folder). A case counts as much as any other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.machine import provenance, tell
from vnet_core.metrics import dice
from workers.sources.scans import read_label

_FACES = ndimage.generate_binary_structure(3, 1)


@dataclass(frozen=True)
class Agreement:
    """Of several series of label maps with the truth, and with each other."""

    dice: list[float]
    """Of every series against the truth: mean over labels and cases."""
    standard_error: float
    """Of the first series' Dice, over cases: what another draw of as many cases would change."""
    between: float
    """Mean Dice of any two series."""
    shared: float
    """Share of the first series' wrong voxels that are wrong in all others too."""
    at_boundary: float
    """Share of the first series' wrong voxels that touch the boundary of a true label by a face."""
    volume_ratio: list[float]
    """Of every series: mean over cases of found volume by true volume, all labels together."""
    volume_correlation: float
    """Mean correlation of the case by case volume ratios of any two series."""


def agreement(truth: Sequence[np.ndarray], series: Sequence[Sequence[np.ndarray]], labels: Sequence[int]) -> Agreement:
    """``truth``: label maps (Z, Y, X), one per case, every one with some label; ``series``: at least two, in the same
    order of cases."""

    def scores(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
        """Dice (case,), mean over labels."""
        return np.array(
            [np.mean([dice(a == label, b == label) for label in labels]) for a, b in zip(first, second, strict=True)]
        )

    pairs = list(itertools.combinations(range(len(series)), 2))
    against = [scores(masks, truth) for masks in series]
    wrong = [[mask != true for mask, true in zip(masks, truth, strict=True)] for masks in series]
    everywhere = sum(int(np.logical_and.reduce(case).sum()) for case in zip(*wrong, strict=True))
    edge = sum(int((bad & boundary(true)).sum()) for bad, true in zip(wrong[0], truth, strict=True))
    count = max(1, sum(int(bad.sum()) for bad in wrong[0]))
    ratios = np.array([[(m > 0).sum() / (t > 0).sum() for m, t in zip(s, truth, strict=True)] for s in series])
    return Agreement(
        dice=[float(values.mean()) for values in against],
        standard_error=float(against[0].std(ddof=1) / np.sqrt(len(truth))),
        between=float(np.mean([scores(series[a], series[b]).mean() for a, b in pairs])),
        shared=everywhere / count,
        at_boundary=edge / count,
        volume_ratio=[float(values.mean()) for values in ratios],
        volume_correlation=float(np.mean([np.corrcoef(ratios[a], ratios[b])[0, 1] for a, b in pairs])),
    )


def boundary(labels_ZYX: np.ndarray) -> np.ndarray:
    """Voxels, bool (Z, Y, X), with a neighbour across a face that has another value."""
    low = ndimage.minimum_filter(labels_ZYX, footprint=_FACES, mode="nearest")
    return np.asarray(
        (low != labels_ZYX) | (ndimage.maximum_filter(labels_ZYX, footprint=_FACES, mode="nearest") != labels_ZYX)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path)
    parser.add_argument("masks", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="results file (default: none)")
    options = parser.parse_args()
    if len(options.masks) < 2:
        parser.error("1 folder of masks agrees with nobody; name two or more")
    names = sorted(path.name for path in options.truth.iterdir())
    truth, *series = (
        [read_label(folder / name).labels for name in names] for folder in (options.truth, *options.masks)
    )
    values = sorted({int(value) for labels in truth for value in np.unique(labels)} - {0})
    tell(lines(agreement(truth, series, values), len(names)), options.output)
    return 0


def lines(found: Agreement, cases: int) -> list[str]:
    """The results file."""
    return [
        "# How far trainings agree with each other and with the truth",
        "",
        f"{len(found.dice)} trainings, {cases} cases.",
        "",
        "| what | figure |",
        "| --- | --- |",
        f"| Dice against the truth, one by one | {', '.join(f'{value:.4f}' for value in found.dice)} |",
        f"| standard error of the first, over cases | {found.standard_error:.4f} |",
        f"| Dice of one training against another | {found.between:.4f} |",
        f"| wrong voxels of the first that are wrong in all others too | {100 * found.shared:.0f} % |",
        f"| wrong voxels of the first at the boundary of a true label | {100 * found.at_boundary:.0f} % |",
        f"| found volume by true volume, one by one | {', '.join(f'{value:.3f}' for value in found.volume_ratio)} |",
        f"| correlation of that ratio between two trainings, over cases | {found.volume_correlation:.2f} |",
        "",
        *provenance("torch", "numpy", "scipy"),
    ]


if __name__ == "__main__":
    sys.exit(main())
