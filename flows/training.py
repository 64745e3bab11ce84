"""The flow that trains a model."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field, model_validator

from flows.models import publish_model
from flows.plans import PlanSource, make_plan
from flows.session import open_session
from flows.stages import preprocess_cases, usable
from flows.tasks import Progress
from flows.ui.artifacts import artifact_key, validation_page
from flows.ui.fields import DEFAULT_MINUTES, CohortName
from workers.cohort import load_cohort, load_entries
from workers.engines.clusters import Engines, ray_session
from workers.harmless import one_line
from workers.registry.models import Model
from workers.storage.store import Root
from workers.training import train as train_stage
from workers.training.run import Budget, Run, TrainingProgress
from workers.training.train import Training, Watch
from workers.training.validations import Validation

ModelName = Annotated[str, Field(min_length=1)]


class TrainingSettings(BaseModel):
    """How long and on what to train."""

    minutes: float = Field(
        default=0.0,
        title="Minutes",
        description=f"Training time, without preprocessing; 0: {DEFAULT_MINUTES:g}, or as before when resuming",
        ge=0,
    )
    steps: int | None = Field(
        default=None, title="Steps", description="Optimiser steps instead of minutes; None: the minutes decide", gt=0
    )
    plan: str = Field(
        default="auto",
        title="Plan",
        description="auto, or the path of a TOML file on the machine that runs the flow",
        min_length=1,
    )
    workers: int | None = Field(
        default=None, title="Workers", description="Ray workers that train together; None: as the site file says", ge=1
    )
    workers_max: int | None = Field(
        default=None,
        title="Most workers",
        description="With Workers as the fewest: as many up to this as the Ray cluster has room for; None: no range",
        ge=1,
    )
    preset: Literal["", "paper", "caffe", "vnet-pytorch", "vnet-tf", "compact"] = Field(
        default="", title="Preset", description="A named network instead of the plan's; empty: the plan's"
    )
    folds: int = Field(
        default=1,
        title="Folds",
        description="Above 1: cross-validation, one network per fold at once; together they are the model",
        ge=1,
        le=20,
    )
    start: str = Field(
        default="",
        title="Start from",
        description="A model whose weights and plan the training starts from, such as liver@v2; empty: from nothing",
    )
    resume: bool = Field(
        default=False,
        title="Resume",
        description="Go on with the newest unfinished training of this model, with its own plan, folds and start",
    )

    @model_validator(mode="after")
    def _range_of_workers(self) -> TrainingSettings:
        if self.workers_max is not None and self.workers_max < (self.workers or self.workers_max + 1):
            raise ValueError(
                f"workers_max {self.workers_max} needs workers of at most as many, the fewest; got {self.workers}"
            )
        return self


DEFAULTS = TrainingSettings()
"""What the form opens with."""


@flow(name="train-model", flow_run_name="train {model} on {cohort}", validate_parameters=True)
def train_model(cohort: CohortName, model: ModelName, settings: TrainingSettings = DEFAULTS) -> State[Any]:
    """Train a V-Net on the labelled cases of a cohort and publish it as the next version of a model.

    Args:
        cohort: cases to learn from; the name that was given at vnet ingest, such as liver
        model: name of the model, such as liver; every training publishes its next version
        settings: how long and with which plan
    """
    session = open_session()
    engines = session.site.engines
    if settings.workers:
        engines = replace(engines, train_workers=settings.workers, train_workers_max=settings.workers_max)
    loaded = load_cohort(session.root, cohort)
    budget = asked_budget(settings)
    if settings.resume:
        trained = fit(session.root, engines, Going(model, budget))
    else:
        entries = load_entries(session.root, loaded.name)
        source = PlanSource(settings.plan, settings.preset or None, settings.start or None)
        chosen = make_plan(session.root, loaded, entries, source, engines)
        labelled = [entry for entry in entries if entry.verdict.usable and entry.case.label]
        preprocess_cases(session, cohort, usable(labelled), chosen)
        budget = budget or Budget(minutes=DEFAULT_MINUTES)
        training = Training(model, entries, chosen, budget, settings.folds, settings.start or None)
        trained = fit(session.root, engines, training)
    publish_model(session.root, trained.name, f"Model {trained.reference}")
    scores = trained.facts["metrics"]["validation_dice"]
    dice = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or "no validation cases"
    return Completed(message=f"{trained.reference}, validation Dice: {dice}", data={"model": trained.reference})


def asked_budget(settings: TrainingSettings) -> Budget | None:
    """The budget that was asked for, None where nothing was."""
    if settings.steps:
        return Budget(steps=settings.steps)
    return Budget(minutes=settings.minutes) if settings.minutes else None


@dataclass(frozen=True, slots=True)
class Going:
    """The newest unfinished training of a model, to go on with."""

    name: str
    budget: Budget | None
    """None: as before."""


@task(name="train", cache_policy=NO_CACHE)
def fit(root: Root, engines: Engines, asked: Training | Going) -> Model:
    """Train on Ray, from the start or from where it stands."""
    log = get_run_logger()
    bar = Progress(f"train {asked.name}", 1, f"Training of model {asked.name}")

    def show(progress: TrainingProgress) -> None:
        dice = "" if progress.dice is None else f", validation Dice {progress.dice:.3f}"
        workers = f", {progress.workers} workers" if progress.workers > 1 else ""
        text = (
            f"step {progress.step}, loss {progress.loss:.4f}, {progress.seconds_per_step:.2f} s a step,"
            f" {progress.seconds_left / 60:.1f} min left{dice}{workers}"
        )
        bar.show(progress.share, f"{asked.name}: {text}")
        log.info(text)

    # artifacts belong to the run whose context they are made in
    context = copy_context()

    def tell(run: Run, validation: Validation) -> None:
        try:
            context.run(publish_validation, root, asked.name, run, validation)
        except Exception as error:  # noqa: BLE001  a page that cannot be shown is not worth a training
            log.warning("validation at step %d cannot be shown (%s)", validation.step, type(error).__name__)

    watch = Watch(show, tell)
    with ray_session(engines.ray_address, engines.ray_cpus):
        if isinstance(asked, Going):
            return train_stage.resume(root, asked.name, asked.budget, engines, watch)
        return train_stage.train(root, asked, engines, watch)


def publish_validation(root: Root, model: str, run: Run, validation: Validation) -> None:
    """Put what whole volumes say of the training's present weights into the UI as `validation-<model>`."""
    create_markdown_artifact(
        markdown=validation_page(root, model, run, validation),
        key=artifact_key("validation", model),
        description=one_line(f"Validation of model {model} at step {validation.step}"),
    )
