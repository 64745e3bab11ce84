"""One multichannel case with overlapping regions, learnt by heart, and segmented back on its own grid.

    python -m benchmarks.overfit ../shared/data/multichannel --steps 1200

FOLDER has ``images/`` with one case in the channels ``_fla _t1 _t1c _t2`` and ``labels/`` with its label map of the
values 1 and 2. What is shown is that channels, regions, sampling, painting and the way back to the scan's grid fit
together: a network that has seen nothing else must give the label map back.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cohort import emptied, vnet
from benchmarks.machine import RESULTS, provenance, tell

CHANNELS = ("fla", "t1", "t1c", "t2")
LABELS = ("1=necrosis", "2=oedema")
REGIONS = ("1,2=whole", "1=core")
AIM = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--patch", type=int, default=64, help="edge of the patch")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--foreground", type=float, default=0.9, help="share of patches centred on a labelled voxel")
    parser.add_argument("--work", type=Path, default=Path("vnet-data/overfit"), help="scratch folder")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/overfit_...)")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    plan = work / "plan.toml"
    plan.write_text(by_heart(options))
    channels = [f"--channel={name}" for name in CHANNELS]
    labels = [f"--label={label}" for label in LABELS]
    root, masks = work / "root", work / "masks"
    vnet(["ingest", str(options.folder.resolve()), "--cohort", "glioma", *channels, *labels], root)
    arguments = ["train", "--cohort", "glioma", "--model", "glioma", "--plan", str(plan), "--steps", str(options.steps)]
    trained = vnet(arguments, root)
    segmented = vnet(["segment", "--cohort", "glioma", "--model", "glioma", "--output", str(masks)], root)
    truth = emptied(work / "truth")
    (label,) = [path for path in (options.folder / "labels").iterdir() if path.name.endswith(".nii.gz")]
    shutil.copy(label, truth / f"{segmented['cases'][0]['case']}.nii.gz")
    regions = [f"--label={region}" for region in REGIONS]
    scores = vnet(["evaluate", str(masks), str(truth), *regions], root)
    report(options, trained, scores)
    return 0


def by_heart(options: argparse.Namespace) -> str:
    """The glioma recipe's channels and regions, as far as the case has them, without random changes of samples.

    Patches are shifted by up to a third of their edge: were every patch centred on the tumour, the network could
    learn that what lies in the middle is tumour, and find it too large in tiles that lie anywhere.
    """
    edge = options.patch
    return f"""
channels = {list(CHANNELS)}
head = "sigmoid"

[[labels]]
value = 1
name = "necrosis"

[[labels]]
value = 2
name = "oedema"

[[regions]]
name = "whole"
values = [1, 2]
paints = 2

[[regions]]
name = "core"
values = [1]
paints = 1

[preprocess]
spacing_mm = [1.0, 1.0, 1.0]

[network]
kernel_size = 3
width = {options.width}
convolutions = [2, 2, 2, 2]
activation = "leaky-relu"
normalisation = "instance"
decoder = "narrow"

[training]
patch_size = [{edge}, {edge}, {edge}]
batch_size = 2
foreground_fraction = {options.foreground}

[training.augmentation]
flip_axes = []
shift_voxels = {edge // 3}
rotation_degrees = 0
scaling = 0
contrast = 0
brightness = 0
noise = 0
"""


def report(options: argparse.Namespace, trained: dict, scores: dict) -> None:
    target = options.output or RESULTS / f"overfit_{datetime.now(UTC):%Y%m}.md"
    (case,) = scores["cases"]
    training = trained["training"]
    lines = [
        "# One four-channel case learnt by heart",
        "",
        f"{training['steps']} steps in {training['minutes']:.1f} minutes, {training['parameters']:,} parameters,"
        f" {training['precision']}, patches of {options.patch}^3 voxels. Evaluated on the scan's own grid.",
        "",
        "| region | Dice | HD95 mm | volume mL | truth mL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in case["labels"]:
        lines.append(
            f"| {row['name']} | {row['dice']:.4f} | {row['hd95_mm']:.2f} | {row['volume_ml']:.2f} |"
            f" {row['truth_volume_ml']:.2f} |"
        )
    reached = min(row["dice"] for row in case["labels"]) >= AIM
    lines += [
        "",
        f"Dice of {AIM} in every region: {'reached' if reached else 'not reached'}.",
        "",
        *provenance("torch"),
    ]
    tell(lines, target)


if __name__ == "__main__":
    sys.exit(main())
