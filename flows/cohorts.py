"""Flows over a cohort: preprocess it, segment it, do both every night, and say before what that would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.nights.closing import close_night
from flows.nights.night import Order, checked_model, expected, run_night
from flows.plans import PlanSource, make_plan
from flows.review import answered, apply
from flows.session import open_session
from flows.stages import preprocess_cases, refusals, usable
from flows.tasks import refresh_cohort
from flows.ui.artifacts import artifact_key
from flows.ui.fields import CohortName
from workers.cohort import load_cohort, load_entries
from workers.harmless import one_line
from workers.ledger import Outcome, counts
from workers.segmentation.masks import MaskFormat
from workers.settings.rules import DEFAULT_RULES, NightRules

# The form takes its texts from the docstrings of the flows.
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
def segment_cohort(
    cohort: CohortName, model: ModelReference, mask_format: MaskFormat = "nifti", rules: NightRules = DEFAULT_RULES
) -> State[Any]:
    """Segment every case of a cohort that has no mask of this model yet, and report on all.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        model: name for its champion or else its newest version, such as liver, or one version, such as liver@v2
        mask_format: file format of the masks: NIfTI (.nii.gz), MetaImage (.mha), NRRD (.nrrd), OME-Zarr (.ome.zarr),
            DICOM segmentation (.seg.dcm) or RT structure set (.rtstruct.dcm)
        rules: when it stops, how often it tries, and whom it asks
    """
    return _night(Order(cohort, model, mask_format, rules), refresh=())


@flow(name="nightly", flow_run_name="nightly {cohort}", validate_parameters=True)
def nightly(
    cohort: CohortName, model: ModelReference, mask_format: MaskFormat = "nifti", rules: NightRules = DEFAULT_RULES
) -> State[Any]:
    """Look for new and changed scans in the cohort's sources, segment what has no mask yet, and report on all.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        model: name for its champion or else its newest version, such as liver, or one version, such as liver@v2
        mask_format: file format of the masks: NIfTI (.nii.gz), MetaImage (.mha), NRRD (.nrrd), OME-Zarr (.ome.zarr),
            DICOM segmentation (.seg.dcm) or RT structure set (.rtstruct.dcm)
        rules: when it stops, how often it tries, and whom it asks
    """
    return _night(Order(cohort, model, mask_format, rules), refresh=(cohort,))


@flow(name="plan-night", flow_run_name="plan {cohort}", validate_parameters=True)
def plan_night(
    cohort: CohortName, model: ModelReference, mask_format: MaskFormat = "nifti", rules: NightRules = DEFAULT_RULES
) -> State[Any]:
    """Say what a night would do and how long it would take; no scan is read and nothing is computed.

    Args:
        cohort: name that was given at vnet ingest, such as liver
        model: name for its champion or else its newest version, such as liver, or one version, such as liver@v2
        mask_format: file format of the masks
        rules: as for the night itself
    """
    session = open_session()
    found = expected(session, Order(cohort, model, mask_format, rules))
    words = one_line(f"{cohort}: {found.words}")
    create_markdown_artifact(f"# Next night of {one_line(cohort)}\n\n{words}\n", key=artifact_key("plan", cohort))
    return Completed(message=words, data={"forecast": found})


def _night(order: Order, refresh: Sequence[str]) -> State[Any]:
    """A night, or, where this run is resumed after a person's answer, what the answer asks for."""
    session = open_session()
    answer = answered(session)
    if answer is not None:
        return apply(session, answer)
    started = session.clock()
    model = checked_model(session, order)
    for cohort in refresh:
        refresh_cohort(session.root, cohort)
    result = run_night(session, order, model, started)
    close_night(session, order, result)
    data = {"night": result.night.id, "cohort": order.cohort, "outcomes": result.outcomes}
    return final_state(result.outcomes, data)


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
