"""Commands that make a model, from a plan on: ``preprocess``, ``train`` and ``plan``."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from pydantic import ValidationError

from flows.commands.command import Command, Result
from flows.commands.running import run_flow
from flows.commands.tables import case_row, summary, text_table
from flows.session import open_session
from vnet_core.errors import ConfigError
from vnet_core.plan import config_error
from vnet_core.sections import PRESETS


def _plan_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--plan", default="auto", metavar="auto|FILE", help="TOML with settings that differ")


def _absolute(plan: str) -> str:
    """What flows take for ``--plan``; they may run in another folder."""
    return plan if plan == "auto" else str(Path(plan).expanduser().resolve())


def _preprocess_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    _plan_argument(parser)


def preprocess(options: Namespace) -> Result:
    """``vnet preprocess``."""
    from flows.cohorts import preprocess_cohort

    data = run_flow(preprocess_cohort, cohort=options.cohort, plan=_absolute(options.plan))
    outcomes = data["outcomes"]
    text = f"cohort {options.cohort}: {summary(outcomes)}"
    return Result(text, [case_row(o) for o in outcomes], {"plan_digest": data["plan"]})


PREPROCESS = Command(
    "preprocess",
    "bring a cohort onto the plan's grid, as Zarr volumes, on Dask",
    "api",
    _preprocess_arguments,
    preprocess,
)


def _workers(text: str) -> tuple[int, int | None]:
    """The fewest and the most workers of ``--workers``; ArgumentTypeError where it is neither W nor MIN:MAX."""
    least, colon, most = text.partition(":")
    if not least.isdecimal() or (colon and not most.isdecimal()):
        raise ArgumentTypeError(f"{text!r} is no number of workers and no range of them; use 2, or 2:4")
    return int(least), int(most) if colon else None


def _train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--model", required=True, metavar="NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    budget.add_argument("--minutes", type=float, metavar="M", help="training time (default 10; resuming: as before)")
    _plan_argument(parser)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named network instead of the plan's")
    parser.add_argument("--folds", type=int, default=1, metavar="K", help="cross-validation: K networks, one model")
    parser.add_argument("--from", dest="start", default="", metavar="NAME[@VERSION]", help="model to go on from")
    parser.add_argument(
        "--workers",
        type=_workers,
        default=(None, None),
        metavar="W|MIN:MAX",
        help="Ray workers that train together; a range: as many as there is room for",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the model's newest unfinished training, with its own plan, folds and start",
    )


def train(options: Namespace) -> Result:
    """``vnet train``."""
    from flows.training import TrainingSettings, train_model
    from workers.registry.models import load_model

    session = open_session()
    if options.minutes == 0:
        raise ConfigError("train.value", "--minutes 0 cannot train; use more than 0")
    try:
        settings = TrainingSettings(
            minutes=options.minutes or 0.0,
            steps=options.steps,
            plan=_absolute(options.plan),
            preset=options.preset or "",
            folds=options.folds,
            start=options.start,
            workers=options.workers[0],
            workers_max=options.workers[1],
            resume=options.resume,
        )
    except ValidationError as error:
        raise config_error(error, TrainingSettings, "train") from None
    data = run_flow(
        train_model,
        cohort=options.cohort,
        model=options.model,
        settings=settings,
    )
    model = load_model(session.root, data["model"])
    training = model.facts["training"]
    scores = model.facts["metrics"]["validation_dice"]
    dice = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or "no validation cases"
    text = (
        f"model {model.reference}: {training['steps']} steps in {training['minutes']:.1f} min,"
        f" validation Dice: {dice}\n{session.root.where(model.prefix)}"
    )
    extra = {"model": model.reference, "digest": model.digest, "training": training, "metrics": model.facts["metrics"]}
    return Result(text, [], extra)


TRAIN = Command("train", "train a V-Net on a cohort's labelled cases, on Ray", "api", _train_arguments, train)


def _explain_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("explain",))
    parser.add_argument("--cohort", required=True, metavar="NAME")


def plan(options: Namespace) -> Result:
    """``vnet plan explain``."""
    from flows.plans import derived
    from workers.cohort import load_cohort, load_entries

    session = open_session()
    cohort = load_cohort(session.root, options.cohort)
    found = derived(cohort, load_entries(session.root, cohort.name), session.site.engines)
    rows = [{"key": r.key, "value": r.value, "because": r.words} for r in found.reasons]
    text = text_table(rows, ("key", "value", "because"))
    return Result(text, [], {"reasons": rows, "plan": found.plan.model_dump(mode="json")})


PLAN = Command("plan", "the plan that a cohort gets, and why", "root", _explain_arguments, plan)
