"""The flow that lets a model learn from what is new, and proposes the result as its challenger."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.models import publish_model
from flows.session import open_session
from flows.stages import preprocess_cases, usable
from flows.tasks import refresh_cohort
from flows.training import fit
from flows.ui.fields import DEFAULT_MINUTES, PersonName, Reason
from vnet_core.errors import TrainingError
from workers.cohort import Cohort, Entry, check_reading, load_cohort, load_entries, volume_key
from workers.delivery.corrections import training_manifest
from workers.engines.clusters import processors
from workers.ingest import Names, ingest
from workers.ledger import Outcome, counts, nameless
from workers.registry.aliases import aliases, challenge, promote
from workers.registry.models import Model, load_model
from workers.storage.store import Root
from workers.training.run import Budget
from workers.training.train import Training


class Retraining(BaseModel):
    """Which model learns from what, for how long, and who asks for it."""

    name: str = Field(
        title="Model",
        description="Such as liver, whose champion is trained further, or one version, such as liver@v2",
        min_length=1,
    )
    cohort: str = Field(
        title="Cohort",
        description="Its labelled cases, and those sent to training from the review with their corrections",
        min_length=1,
    )
    by: PersonName
    why: Reason = ""
    minutes: float = Field(default=DEFAULT_MINUTES, title="Minutes", description="Training time of each network", gt=0)
    # a plain type: a form shows a field that may be None as a choice between types
    steps: int = Field(default=0, title="Steps", description="Optimiser steps instead; 0: the minutes decide", ge=0)


@flow(name="retrain-model", flow_run_name="retrain {request.name} on {request.cohort}", validate_parameters=True)
def retrain_model(request: Retraining) -> State[Any]:
    """Train a model further on new labelled cases and corrections, with its own plan, as its new challenger.

    Args:
        request: which model and cohort, how long, and who asks for it
    """
    session = open_session()
    root = session.root
    start = load_model(root, request.name)
    cohort = load_cohort(root, request.cohort)
    check_reading(cohort, start.plan)
    refresh_cohort(root, cohort.name)
    entries = with_corrections(load_entries(root, cohort.name), ingest_corrections(root, cohort, start))
    learnable = [entry for entry in entries if entry.verdict.usable and entry.case.label]
    check_something_new(start, learnable)
    if "champion" not in aliases(root, start.name):
        # without one the name would mean the version that is about to be trained
        promote(root, start.name, start.version, request.by, "was in use when a challenger was trained")
    preprocess_cases(session, cohort.name, usable(learnable), start.plan)
    budget = Budget(steps=request.steps) if request.steps else Budget(minutes=request.minutes)
    folds = len(start.facts["weights"])
    training = Training(start.name, learnable, start.plan, budget, folds, start.reference)
    trained = fit(root, session.site.engines, training)
    reason = request.why or f"trained further from {start.version} on cohort {cohort.name}"
    challenge(root, start.name, trained.version, request.by, reason)
    what = f"{trained.reference} is the challenger of {start.reference}"
    publish_model(root, start.name, what)
    return Completed(message=what, data={"model": trained.reference, "champion": start.reference})


@task(name="corrections", cache_policy=NO_CACHE)
def ingest_corrections(root: Root, cohort: Cohort, model: Model) -> list[Entry]:
    """Entries of the cases with a corrected mask, of cohort `<cohort>-corrections`; none without any."""
    log = get_run_logger()
    manifest = training_manifest(root, cohort.name)
    for case in manifest.outdated:
        log.warning("%s: the scan has changed since its mask was corrected; correct it again", case)
    if manifest.path is None:
        return []
    with nameless(f"ingest of the corrections of cohort {cohort.name}"):
        entries, outcomes = read_corrections(root, cohort, model, str(manifest.path))
    log.info("corrections: %s", counts(outcomes))
    for outcome in outcomes:
        if not outcome.done:
            log.warning("%s: %s %s", outcome.case, ",".join(outcome.codes), outcome.message)
    return entries


def read_corrections(root: Root, cohort: Cohort, model: Model, manifest: str) -> tuple[list[Entry], list[Outcome]]:
    """Ingest a manifest of corrected masks, whose values are those of the model's plan."""
    name = f"{cohort.name}-corrections"
    names = Names(cohort.channels, model.plan.labels, cohort.reading)
    with ThreadPoolExecutor(processors()) as executor:
        _, outcomes = ingest(root, name, [manifest], executor, names)
    return load_entries(root, name), outcomes


def with_corrections(entries: Sequence[Entry], corrected: Sequence[Entry]) -> list[Entry]:
    """The cohort's entries, those with corrected masks under their own ids with the corrected label instead.

    A scan is known by its bytes, so a correction of other bytes than the cohort's changes nothing.
    """
    labels = {entry.case.digest: entry for entry in corrected if entry.verdict.usable and entry.case.label}
    found = []
    for entry in entries:
        better = labels.get(entry.case.digest) if entry.verdict.usable else None
        if better is not None:
            case = replace(entry.case, label=better.case.label, label_digest=better.case.label_digest)
            entry = replace(entry, case=case, fingerprint=better.fingerprint)
        found.append(entry)
    return found


def check_something_new(start: Model, learnable: Sequence[Entry]) -> None:
    """TrainingError ``train.nothing-new`` when the model has learnt from or was judged by all of the cases already."""
    known = set(start.facts.get("training", {}).get("volumes", ()))
    if known and all(volume_key(entry.case, start.plan) in known for entry in learnable):
        raise TrainingError(
            "train.nothing-new",
            f"model {start.reference} knows all {len(learnable)} labelled cases already; add labelled cases to the"
            " cohort, or send some to training from the review",
        )
