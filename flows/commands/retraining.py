"""The command ``retrain``: a model learns from what is new and gets a challenger."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from pydantic import ValidationError

from flows.commands.command import Command, Result
from flows.commands.people import person, person_arguments
from flows.commands.running import run_flow
from flows.session import open_session
from vnet_core.plan import config_error


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME")
    parser.add_argument("--cohort", required=True, metavar="NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    budget.add_argument("--minutes", type=float, metavar="M", help="training time of each network (default 10)")
    person_arguments(parser)


def retrain(options: Namespace) -> Result:
    """``vnet retrain``."""
    from flows.retraining import Retraining, retrain_model
    from workers.registry.aliases import aliases
    from workers.registry.models import load_model

    root = open_session().root
    budget = {name: getattr(options, name) for name in ("steps", "minutes") if getattr(options, name) is not None}
    try:
        request = Retraining(name=options.model, cohort=options.cohort, by=person(options), why=options.why, **budget)
    except ValidationError as error:
        raise config_error(error, Retraining, "train") from None
    data = run_flow(retrain_model, request=request)
    model = load_model(root, data["model"])
    scores = model.facts["metrics"]["validation_dice"]
    dice = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or "no validation cases"
    text = (
        f"{model.reference} is the challenger of {data['champion']}; validation Dice: {dice}\n"
        f"vnet models promote {model.reference} makes it the champion"
    )
    return Result(text, [], {**data, "aliases": aliases(root, model.name), "metrics": model.facts["metrics"]})


RETRAIN = Command(
    "retrain",
    "train a model further on new labelled cases and corrections, as its challenger",
    "api",
    _arguments,
    retrain,
)
