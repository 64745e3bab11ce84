"""nnU-Net's own trainer, stopped after some minutes, and its own prediction of the held-out cases.

    PYTHON_OF_AN_ENVIRONMENT_WITH_NNUNETV2 benchmarks/peers/nnunet.py TRAINING.csv HELD-OUT.csv WORK MINUTES...

Network, plans, loader, augmentation, loss, optimiser and the shape of the learning rate's fall are nnU-Net's; only
the fall is over the minutes instead of 1000 epochs, and no time goes into its pseudo-validation. For every number of
minutes a training of its own; masks go to WORK/nnunet-<minutes>.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

DATASET = "Dataset001_Benchmark"


def prepare(training: Path, work: Path, labels: dict[str, int]) -> None:
    """nnU-Net's raw dataset, its plans and its preprocessed cases."""
    raw = work / "nnUNet_raw" / DATASET
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(training.open(newline="")))
    for row in rows:
        shutil.copy(row["image"], raw / "imagesTr" / f"{row['case']}_0000.nii.gz")
        # labels as whole numbers on the image's grid: nnU-Net refuses the few that are stored otherwise
        import nibabel
        import numpy

        image, label = nibabel.load(row["image"]), nibabel.load(row["label"])
        values = numpy.round(label.get_fdata()).astype(numpy.uint8)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), raw / "labelsTr" / f"{row['case']}.nii.gz")
    described = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, **labels},
        "numTraining": len(rows),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    command = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    subprocess.run([command, "-d", "1", "-c", "3d_fullres", "-np", "2", "-npfp", "2"], check=True)


def train(work: Path, minutes: float, held: Path) -> dict[str, float]:
    """One training of so many minutes, or of their steps where STEPS_PER_MINUTE says how many a minute has."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    home = work / "nnUNet_preprocessed" / DATASET
    plans = json.loads((home / "nnUNetPlans.json").read_text("utf-8")) | {"continue_training": False}
    dataset = json.loads((home / "dataset.json").read_text("utf-8"))
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", dataset, device=torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    trainer.network.train()
    started, steps = time.monotonic(), 0
    pace = float(os.environ.get("STEPS_PER_MINUTE", 0))

    def used() -> float:
        return steps / (pace * minutes) if pace else (time.monotonic() - started) / (60 * minutes)

    while (share := used()) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - share) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        dataset,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    target = work / f"nnunet-{minutes:g}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    rows = list(csv.DictReader(held.open(newline="")))
    predictor.predict_from_files_sequential(
        [[row["image"]] for row in rows], [str(target / f"{row['case']}.nii.gz") for row in rows]
    )
    for other in target.glob("*.json"):
        other.unlink()
    return {"minutes": minutes, "steps": steps}


def main() -> int:
    training, held, work = (Path(argument).resolve() for argument in sys.argv[1:4])
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work / name)
    # one process augments beside the one that trains
    os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112
    os.environ["nnUNet_compile"] = "f"  # noqa: SIM112
    labels = json.loads(os.environ.get("PEER_LABELS", '{"anterior": 1, "posterior": 2}'))
    if not (work / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json").exists():
        prepare(training, work, labels)
    for minutes in map(float, sys.argv[4:]):
        print(json.dumps(train(work, minutes, held)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
