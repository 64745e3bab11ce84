"""The whole way on a cohort made from a seed, through the flows: ingest, preprocess, train, segment, evaluate."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.commands.command import Result
from flows.commands.data import ingest_sources
from flows.commands.running import run_flow
from flows.commands.segmentation import copy_mask
from flows.commands.tables import case_row, text_table
from flows.session import Session, open_session
from vnet_core.phantoms import demo_cohort, phantom
from vnet_core.plan import Label
from workers.evaluate import evaluate, masks_in
from workers.ingest import Names
from workers.ledger import counts
from workers.segmentation.masks import load_report
from workers.sources.scans import write_volume

SEED = 2016
TRAINING_CASES = 20
NEW_CASES = 6
STEPS = 160
MODEL = "demo"
LABELS = (Label(value=1, name="organ"), Label(value=2, name="lesion"))

PLAN = """\
# What the demo does differently from the plan that is derived from the cohort: coarse and small, for two cores.
[preprocess]
spacing_mm = [2.0, 2.0, 2.0]

[network]
width = 8
convolutions = [1, 2, 2, 2]
normalisation = "batch"

[training]
learning_rate = 5e-3
patch_size = [40, 40, 40]
batch_size = 4

[training.augmentation]
rotation_degrees = 0
scaling = 0
"""


def demo() -> Result:
    """``vnet demo``: make the cohort, run every stage, and say where everything lies."""
    session = open_session()
    started = time.monotonic()
    scans = session.root.home / "demo-scans"
    say(f"making {TRAINING_CASES} labelled and {NEW_CASES + 1} new scans from seed {SEED} in {scans}")
    make_scans(scans)
    names = Names(labels=LABELS)
    ingest_sources(session.root, "demo-train", [str(scans / "train")], names)
    (scans / "plan.toml").write_text(PLAN)

    say(f"training a small V-Net for {STEPS} steps: Prefect, Dask, Zarr, Ray Train")
    from flows.cohorts import nightly
    from flows.training import TrainingSettings, train_model

    settings = TrainingSettings(steps=STEPS, plan=str(scans / "plan.toml"))
    trained = run_flow(train_model, cohort="demo-train", model=MODEL, settings=settings)["model"]

    say(f"the night: segmenting {NEW_CASES + 1} new scans with {trained} on Ray actors")
    ingest_sources(session.root, "demo-night", [str(scans / "night")], names)
    night = run_flow(nightly, cohort="demo-night", model=trained)
    return _result(session, scans, night, time.monotonic() - started)


def say(text: str) -> None:
    """A line of progress for the person at the terminal."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def make_scans(folder: Path) -> None:
    """``train/`` and ``night/`` with images, labels or truth; one scan of the night is cut short on its way."""
    for name in ("train/images", "train/labels", "night", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (case, spec) in enumerate(demo_cohort(SEED, TRAINING_CASES + NEW_CASES)):
        image, label = phantom(spec)
        # the sixth phantom has no organ: it belongs to the night
        new = number == 5 or number > TRAINING_CASES
        images, labels = ("night", "truth") if new else ("train/images", "train/labels")
        write_volume(folder / images / f"{case}.nii.gz", image)
        write_volume(folder / labels / f"{case}.nii.gz", label)
    whole = next((folder / "night").glob("*.nii.gz")).read_bytes()
    (folder / "night" / "phantom-cut-short.nii.gz").write_bytes(whole[: len(whole) // 2])


def _result(session: Session, scans: Path, night: Mapping[str, Any], seconds: float) -> Result:
    masks = session.root.home / "demo-masks"
    cases = []
    for outcome in night["outcomes"]:
        if outcome.done:
            report = load_report(session.root, outcome.key)
            copy_mask(session.root, f"{outcome.key}/{report['mask']}", masks, outcome.case)
        cases.append(case_row(outcome))
    found = evaluate(masks_in(masks), masks_in(scans / "truth"), LABELS)
    rows = [{"case": e.outcome.case} | row for e in found for row in e.labels]
    means = {
        label.name: statistics.mean(r["dice"] for r in rows if r["name"] == label.name and r["truth_volume_ml"])
        for label in LABELS
    }
    undone = [f"{o.case}: {o.state}, {o.message}" for o in night["outcomes"] if not o.done]
    report_csv = session.root.where(f"reports/demo-night/{night['night']}.csv")
    port = session.site.ui_port
    lines = [
        "",
        text_table(rows, ("case", "name", "volume_ml", "truth_volume_ml", "dice")),
        "",
        f"mean Dice where the scan has the structure: {', '.join(f'{n} {v:.3f}' for n, v in means.items())}",
        f"cases: {', '.join(f'{n} {state}' for state, n in counts(night['outcomes']).items())}",
        *undone,
        "",
        f"masks:  {masks}",
        f"report: {report_csv}",
        f"UI:     .venv/bin/vnet serve --root {session.root.shown}, then http://127.0.0.1:{port}/v2/artifacts",
        "        (the night's report with its pictures is the artifact night-demo-night)",
        f"{seconds:.0f} s in all. Research software, not a medical device.",
    ]
    # the case that was cut short is part of the demo, not a failure of it
    return Result("\n".join(lines), extra={"night": night["night"], "dice": means, "cases": cases})
