"""Stage preprocess: every usable case as a normalised Zarr volume on the plan's grid, one task per case on Dask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from vnet_core import geometry as geo
from vnet_core.drift import Sample, profile
from vnet_core.errors import ScanError
from vnet_core.plan import Plan
from workers.cohort import Case, read_channels, scan_label, source_digest, volume_key
from workers.engines.tries import Tries, Work
from workers.failpoints import fail_point
from workers.ledger import Costs, Outcome, State, settle
from workers.storage.arrays import InSlabs, write_in_slabs
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root

STAGE = "preprocess"


def preprocess(
    root: Root,
    cases: Sequence[Case],
    plan: Plan,
    executor: Executor,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[Outcome]:
    """One finished volume per case under :func:`workers.cohort.volume_key`; what is finished is not done again.

    The executor's workers may be on other machines; only URLs, cases and the plan travel to them. What a dead worker
    had in hand is tried again as :mod:`workers.engines.tries` says. As soon as ``may_go_on`` is false after a case,
    nothing more is waited for, and the cases without an outcome are left. EngineError where the engine cannot go on.
    """
    outcomes: list[Outcome] = []

    def settled(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    work = []
    for case in cases:
        key = volume_key(case, plan)
        if root.receipt(key):
            settled(Outcome(case.id, STAGE, "cached", key=key))
        else:
            work.append(Work(STAGE, case.id, key, preprocess_case, (root.url, case, plan)))
    Tries(root, executor, settled, may_go_on).work_off(work)
    return sorted(outcomes, key=lambda outcome: outcome.case)


def preprocess_case(root_url: str, case: Case, plan: Plan) -> Outcome:
    """Read, prepare and publish one case; runs on a worker. Its outcome says what happened, it never raises.

    A volume that is finished is `cached`: an engine may do again what it had lost the answer of.
    """
    # brings torch in, which the process that hands out the cases does without
    from vnet_core.preprocess import planned

    for_the_owner_alone()
    root = Root(root_url)

    def compute() -> tuple[State, str, tuple[str, ...]]:
        key, costs = volume_key(case, plan), Costs()
        if root.receipt(key):
            return "cached", key, ()
        image = read_channels(case.channels, plan.reading)
        label = scan_label(case.label, image.geometry, plan.labels, plan.reading).volume if case.label else None
        if source_digest(case.channels, plan.reading) != case.digest:
            raise ScanError("scan.changed", "the file's bytes are not those that were ingested; run vnet ingest again")
        fail_point("preprocess:read", key)
        prepared = planned(image, label, plan.preprocess)
        shape = (len(plan.channels), *prepared.geometry.shape)
        sample = Sample(shape)

        def image_planes(wanted: slice) -> np.ndarray:
            planes = prepared.image(wanted)
            sample.add(planes)
            return planes

        arrays = {"image": InSlabs(shape, np.dtype(np.float32), image_planes)}
        if prepared.labels is not None:
            arrays["label"] = InSlabs(shape[1:], prepared.labels.dtype, prepared.label)
        planes = prepared.planes_within(int(plan.inference.memory_limit_gib * 2**30))
        write_in_slabs(root, key, arrays, {"geometry": geo.to_mapping(prepared.geometry)}, planes)
        fail_point("preprocess:written")
        root.seal(
            key,
            {
                "stage": STAGE,
                "case_digest": case.digest,
                "label_digest": case.label_digest,
                "plan_digest": plan.volume_digest,
                "geometry": geo.to_mapping(prepared.geometry),
                "profile": profile(image, sample),
                **costs.facts(),
            },
        )
        fail_point("preprocess:sealed", key)
        return "computed", key, ()

    return settle(STAGE, case.id, compute)
