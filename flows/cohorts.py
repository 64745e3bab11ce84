"""Flows over a cohort: preprocess it, segment it, and do both every night."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.plans import PlanSource, make_plan
from flows.session import Session, open_session
from flows.tasks import Progress, batches, preprocess_batch, refresh_cohort, report_night, segment_batch
from vnet_core.errors import ConfigError
from vnet_core.plan import Plan
from workers.clusters import dask_executor, ray_session
from workers.cohort import Case, Entry, check_reading, load_cohort, load_entries, volume_key
from workers.ledger import Outcome, counts
from workers.masks import MaskFormat, mask_file
from workers.models import Model, load_model
from workers.segment import STAGE, Job, SegmentPool, key_of

# The form takes its texts from the docstrings of the flows.
CohortName = Annotated[str, Field(min_length=1)]
ModelReference = Annotated[str, Field(min_length=1)]
PlanFile = Annotated[str, Field(min_length=1)]


@flow(name="preprocess-cohort", flow_run_name="preprocess {cohort}", validate_parameters=True)
def preprocess_cohort(cohort: CohortName, plan: PlanFile = "auto") -> State[Any]:
    """Bring every usable case of a cohort onto the plan's grid, as Zarr volumes.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        plan: auto, or the path of a TOML file whose settings replace those of the derived plan
    """
    session = open_session()
    loaded = load_cohort(session.root, cohort)
    entries = load_entries(session.root, cohort)
    wanted = make_plan(session.root, loaded, entries, PlanSource(plan), session.site.engines)
    outcomes = [*refusals(entries), *preprocess_cases(session, cohort, usable(entries), wanted)]
    return final_state(outcomes, {"outcomes": outcomes, "plan": wanted.digest})


@flow(name="segment-cohort", flow_run_name="segment {cohort} with {model}", validate_parameters=True)
def segment_cohort(cohort: CohortName, model: ModelReference, mask_format: MaskFormat = "nifti") -> State[Any]:
    """Segment every case of a cohort that has no mask of this model yet, and report on all.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        model: name for its newest version, such as liver, or one version, such as liver@v2
        mask_format: file format of the masks: NIfTI (.nii.gz), MetaImage (.mha), NRRD (.nrrd), OME-Zarr (.ome.zarr),
            DICOM segmentation (.seg.dcm) or RT structure set (.rtstruct.dcm)
    """
    session = open_session()
    return _night(session, cohort, load_model(session.root, model), mask_format)


@flow(name="nightly", flow_run_name="nightly {cohort}", validate_parameters=True)
def nightly(cohort: CohortName, model: ModelReference, mask_format: MaskFormat = "nifti") -> State[Any]:
    """Look for new and changed scans in the cohort's sources, segment what has no mask yet, and report on all.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        model: name for its newest version, such as liver, or one version, such as liver@v2
        mask_format: file format of the masks: NIfTI (.nii.gz), MetaImage (.mha), NRRD (.nrrd), OME-Zarr (.ome.zarr),
            DICOM segmentation (.seg.dcm) or RT structure set (.rtstruct.dcm)
    """
    session = open_session()
    loaded = load_model(session.root, model)
    refresh_cohort(session.root, cohort)
    return _night(session, cohort, loaded, mask_format)


def _night(session: Session, cohort: str, model: Model, mask_format: MaskFormat) -> State[Any]:
    """Everything from the cohort's entries to the report."""
    mask_file(mask_format)
    loaded = load_cohort(session.root, cohort)
    check_reading(loaded, model.plan)
    channels = loaded.channels
    if len(channels) != len(model.plan.channels):
        raise ConfigError(
            "model.channels",
            f"cohort {cohort} has {len(channels)} channels {channels}, model {model.reference} takes"
            f" {len(model.plan.channels)} {model.plan.channels}; choose the model that was trained on these channels",
        )
    started = datetime.now(UTC)
    entries = load_entries(session.root, cohort)
    jobs = [Job(cohort, case, mask_format) for case in usable(entries)]
    outcomes = refusals(entries)
    todo = []
    for job in jobs:
        key = key_of(job, model)
        if session.root.receipt(key):
            outcomes.append(Outcome(job.case.id, STAGE, "cached", key=key))
        else:
            todo.append(job)
    if todo:
        prepared = preprocess_cases(session, cohort, [job.case for job in todo], model.plan)
        failed = [outcome for outcome in prepared if not outcome.done]
        outcomes += failed
        without = {outcome.case for outcome in failed}
        outcomes += segment_cases(session, model, [job for job in todo if job.case.id not in without])
    outcomes.sort(key=lambda outcome: outcome.case)
    night = report_night(session.root, cohort, model.reference, started, outcomes, entries)
    return final_state(outcomes, {"night": night.id, "cohort": cohort, "outcomes": outcomes})


def usable(entries: Sequence[Entry]) -> list[Case]:
    """Cases that were not refused."""
    return [entry.case for entry in entries if entry.verdict.usable]


def refusals(entries: Sequence[Entry]) -> list[Outcome]:
    """The rows of the cases that ingest refused."""
    return [
        Outcome(entry.case.id, "ingest", "refused", entry.verdict.codes, entry.verdict.message)
        for entry in entries
        if not entry.verdict.usable
    ]


def preprocess_cases(session: Session, cohort: str, cases: Sequence[Case], plan: Plan) -> list[Outcome]:
    """One outcome per case; Dask is only started when there is something to do."""
    engines = session.site.engines
    with ExitStack() as stack:
        missing = [case for case in cases if not session.root.receipt(volume_key(case, plan))]
        ready = [
            Outcome(case.id, "preprocess", "cached", key=volume_key(case, plan))
            for case in cases
            if case not in missing
        ]
        if not missing:
            return ready
        workers = min(engines.preprocess_workers, len(missing))
        executor = stack.enter_context(dask_executor(engines.dask_address, workers))
        progress = Progress(f"preprocess {cohort}", len(missing), f"Preprocessing of cohort {cohort}")
        done = [
            outcome
            for batch in batches(missing, session.site.batch_cases)
            for outcome in preprocess_batch(session.root, batch, plan, executor, progress)
        ]
    return sorted([*ready, *done], key=lambda outcome: outcome.case)


def segment_cases(session: Session, model: Model, jobs: Sequence[Job]) -> list[Outcome]:
    """One outcome per job; Ray is only started when there is something to do."""
    if not jobs:
        return []
    engines = session.site.engines
    outcomes = []
    with ray_session(engines.ray_address, engines.ray_cpus):
        pool = SegmentPool(session.root, model, engines)
        try:
            progress = Progress(
                f"segment {jobs[0].cohort}", len(jobs), f"Segmentation of cohort {jobs[0].cohort} by {model.reference}"
            )
            size = session.site.batch_cases
            for start in range(0, len(jobs), size):
                outcomes += segment_batch(pool, jobs[start : start + size], progress)
        finally:
            pool.close()
    return outcomes


class NoCaseDone(Exception):
    """Every case failed or was refused; what a flow that did its work without a single result ends with."""

    def __init__(self, message: str, data: dict[str, Any]) -> None:
        super().__init__(message, data)
        self.data = data


def final_state(outcomes: Sequence[Outcome], data: dict[str, Any]) -> State[Any]:
    """`Completed`, `CompletedWithFailures` when some cases have no result, `Failed` when none has."""
    found = counts(outcomes)
    message = ", ".join(f"{number} {state}" for state, number in found.items())
    undone = [outcome for outcome in outcomes if not outcome.done]
    if not undone:
        computed = found.get("computed", 0)
        return Completed(message=message if computed else f"nothing to compute: {message}", data=data)
    if len(undone) == len(outcomes):
        why = f"no case has a result: {message}; first: {undone[0].message}"
        return Failed(message=why, data=NoCaseDone(why, data))
    return Completed(name="CompletedWithFailures", message=message, data=data)
