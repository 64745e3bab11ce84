"""Write small labelled scans, made from a seed, as folders that the documentation's commands use.

python examples/make_scans.py FOLDER
"""

import sys
from pathlib import Path

from vnet_core.phantoms import demo_cohort, phantom
from workers.sources.scans import write_volume

TRAINING_CASES = 6
NEW_CASES = 3


def main(folder: Path) -> None:
    """Write ``train/images``, ``train/labels``, ``night`` and ``truth``; one scan of the night is cut short."""
    for name in ("train/images", "train/labels", "night", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (case, spec) in enumerate(demo_cohort(seed=7, cases=TRAINING_CASES + NEW_CASES)):
        image, label = phantom(spec)
        images, labels = ("train/images", "train/labels") if number < TRAINING_CASES else ("night", "truth")
        write_volume(folder / images / f"{case}.nii.gz", image)
        write_volume(folder / labels / f"{case}.nii.gz", label)
    whole = (folder / "night" / f"{case}.nii.gz").read_bytes()
    (folder / "night" / "cut-short.nii.gz").write_bytes(whole[: len(whole) // 2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
