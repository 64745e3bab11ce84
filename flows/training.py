"""The flow that trains a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.artifacts import artifact_key, training_markdown
from flows.cohorts import CohortName, PlanSource, preprocess_cases, usable
from flows.plans import make_plan
from flows.session import open_session
from flows.tasks import Progress
from vnet_core.plan import Plan
from workers import train as train_stage
from workers.clusters import Engines, ray_session
from workers.cohort import Entry, load_cohort, load_entries
from workers.models import Model
from workers.store import Root
from workers.training_run import Budget, TrainingProgress

ModelName = Annotated[str, Field(title="Model", description="Name of the model; every training is a version of it")]
Minutes = Annotated[float | None, Field(title="Minutes", description="Training time, without preprocessing", gt=0)]
Steps = Annotated[int | None, Field(title="Steps", description="Optimiser steps, instead of minutes", gt=0)]
Workers = Annotated[int | None, Field(title="Workers", description="Ray workers that train together", ge=1)]
Resume = Annotated[bool, Field(title="Resume", description="Go on with the newest unfinished training of this model")]


@flow(name="train-model", flow_run_name="train {model} on {cohort}", validate_parameters=True)
def train_model(
    cohort: CohortName,
    model: ModelName,
    minutes: Minutes = 10.0,
    steps: Steps = None,
    plan: PlanSource = "auto",
    workers: Workers = None,
    resume: Resume = False,
) -> State[Any]:
    """Train a V-Net on the labelled cases of a cohort and publish it as the next version of a model.

    Args:
        cohort: cases to learn from
        model: name of the model
        minutes: training time
        steps: optimiser steps; where given, minutes are not used
        plan: auto, or a TOML file whose settings replace those of the derived plan
        workers: Ray workers that train together; empty: as the site file says
        resume: go on with the newest unfinished training, with its own plan
    """
    session = open_session()
    engines = session.site.engines
    if workers:
        engines = replace(engines, train_workers=workers)
    loaded = load_cohort(session.root, cohort)
    budget = Budget(steps=steps) if steps else Budget(minutes=minutes)
    entries = load_entries(session.root, loaded.name)
    if not resume:
        chosen = make_plan(session.root, loaded, entries, plan, engines)
        labelled = [entry for entry in entries if entry.verdict.usable and entry.case.label]
        preprocess_cases(session, cohort, usable(labelled), chosen)
        trained = fit(session.root, engines, model, budget, Learning(entries, chosen))
    else:
        trained = fit(session.root, engines, model, budget, None)
    curves = {
        name: session.root.get(f"{trained.prefix}/{name}")
        for name in ("loss.png", "dice.png")
        if session.root.exists(f"{trained.prefix}/{name}")
    }
    create_markdown_artifact(
        markdown=training_markdown(trained.facts, curves),
        key=artifact_key("model", trained.name),
        description=f"Model {trained.reference}",
    )
    return Completed(message=f"{trained.reference}: {trained.facts['metrics']}", data={"model": trained.reference})


@dataclass(frozen=True, slots=True)
class Learning:
    """What a new training starts from."""

    entries: list[Entry]
    plan: Plan


@task(name="train", cache_policy=NO_CACHE)
def fit(root: Root, engines: Engines, name: str, budget: Budget, learning: Learning | None) -> Model:
    """Train on Ray; without ``learning`` the newest unfinished training goes on."""
    log = get_run_logger()
    bar = Progress(f"train {name}", 1, f"Training of model {name}")

    def show(progress: TrainingProgress) -> None:
        bar.show(progress.share)
        log.info(
            "step %d, loss %.4f, %.2f s a step, %.1f min left%s",
            progress.step,
            progress.loss,
            progress.seconds_per_step,
            progress.seconds_left / 60,
            "" if progress.dice is None else f", validation Dice {progress.dice:.3f}",
        )

    with ray_session(engines.ray_address, engines.cpus):
        if learning is None:
            return train_stage.resume(root, name, budget, engines, show)
        return train_stage.train(root, name, learning.entries, learning.plan, budget, engines, show)
