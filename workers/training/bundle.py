"""From fitted networks to a model bundle: figures over all folds, curves, and how its masks are cleaned."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from vnet_core.pictures.curves import curve_picture
from vnet_core.plan import Plan
from vnet_core.postprocess import choose
from vnet_core.sections import Cleaning
from vnet_core.structures import structures
from workers.harmless import sheet_cell
from workers.registry.models import Model, Target, publish
from workers.registry.profiles import training_profile
from workers.storage.store import Root
from workers.training.run import Run
from workers.training.validations import best, snapshot_weights, validations

NOTED = ("steps", "minutes", "workers", "attempts", "precision", "parameters", "torch", "platform", "loader_wait_share")
"""Facts of a fitted network that its model keeps as they are."""


def publish_fitted(root: Root, target: Target, runs: Sequence[Run]) -> Model:
    """The bundle of what the runs have fitted; the first run's facts stand for all where they must agree.

    Of a cross-validation the cleaning of each label is chosen by the Dice of cases that their network has not seen,
    only where it helps.
    """
    found, weights = zip(*(_fitted(root, run, target.plan) for run in runs), strict=True)
    names = [structure.name for structure in structures(target.plan)]
    prefix = f"training/{target.name}/{target.version}"
    patients = root.get_json(f"{prefix}/training.json")["patients"]
    plan, reasons = target.plan, []
    if len(runs) > 1:
        scores = {case: row for facts in found for case, row in facts["cleaning_scores"].items()}
        choices = choose(
            [
                dict(zip((Cleaning(**c) for c in runs[0].candidates), row, strict=True))
                for _, row in sorted(scores.items())
            ],
            [patients.get(case, f"case {case}") for case in sorted(scores)],
            plan.training.seed,
        )
        reasons = [choice.reason for choice in choices]
        chosen = tuple(choice.cleaning for choice in choices if choice.cleaning is not None)
        plan = plan.model_copy(update={"inference": plan.inference.model_copy(update={"cleaning": chosen})})
    volumes = sorted({key for run in runs for key in (run.training | run.validation).values()})
    case_dice = {case: row for facts in found for case, row in sorted(facts["case_dice"].items())}
    facts = {
        "metrics": {"validation_dice": mean_dice(case_dice, names), "case_dice": case_dice, "structures": names},
        "training": {
            **{name: found[0][name] for name in NOTED if name in found[0]},
            "folds": len(runs),
            "started_from": runs[0].start,
            "training_cases": sorted(runs[0].training if len(runs) == 1 else runs[0].training | runs[0].validation),
            "validation_cases": sorted(case for run in runs for case in run.validation),
            "volumes": volumes,
        },
        "cleaning": reasons,
        "loss": found[0]["losses"],
    }
    profile = training_profile(root, volumes, plan)
    if profile is not None:
        facts["profile"] = profile
    title = f"{target.name} {target.version}"
    files = _curves(title, names, found)
    return publish(root, Target(target.name, target.version, plan), weights, facts, files)


def _fitted(root: Root, run: Run, plan: Plan) -> tuple[dict[str, Any], bytes]:
    """Facts and weights of a run, with what validations beside it have found; the best of them may be its weights."""
    facts = root.get_json(f"{run.fitted}/facts.json")
    weights = root.get(f"{run.fitted}/weights.safetensors")
    done = validations(root, run)
    facts["dice"] = [[v.minutes, *v.means] for v in done if v.means] + facts["dice"]
    found = best(done)
    if plan.training.publish == "best" and found and found.score > (facts["best_dice"] or -1):
        facts |= {"best_dice": found.score, "case_dice": found.case_dice, "best_step": found.step}
        weights = snapshot_weights(root, run, found.step)
    return facts, weights


def mean_dice(case_dice: dict[str, list[float | None]], names: Sequence[str]) -> dict[str, float]:
    """Mean Dice of each structure over the cases that have one; structures without a case are left out."""
    means = {}
    for column, name in enumerate(names):
        scores = [score for row in case_dice.values() if (score := row[column]) is not None]
        if scores:
            means[name] = sum(scores) / len(scores)
    return means


def _curves(title: str, names: Sequence[str], found: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Pictures of loss and validation Dice against minutes, and the latter as a table, one line per fold."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["fold", "minutes", *(sheet_cell(f"dice_{name}") for name in names)])
    losses, dice = {}, {}
    for fold, facts in enumerate(found):
        suffix = f" fold {fold}" if len(found) > 1 else ""
        losses[f"loss{suffix}"] = [(minutes, loss) for minutes, loss in facts["losses"]]
        writer.writerows([fold, *row] for row in facts["dice"])
        if len(found) > 1:
            dice[f"mean{suffix}"] = [(row[0], sum(row[1:]) / len(names)) for row in facts["dice"]]
        else:
            dice |= {name: [(row[0], row[i + 1]) for row in facts["dice"]] for i, name in enumerate(names)}
    files = {
        "dice.csv": table.getvalue().encode(),
        "loss.png": curve_picture(losses, "minutes", "loss", f"{title}: training loss"),
    }
    if any(dice.values()):
        files["dice.png"] = curve_picture(dice, "minutes", "Dice", f"{title}: validation Dice")
    return files
