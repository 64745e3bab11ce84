"""Stage preprocess: every usable case as a normalised Zarr volume on the plan's grid, one task per case on Dask.

What is too large for the memory of one task goes in stretches, one task each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from vnet_core import geometry as geo
from vnet_core.drift import Sample, profile, profile_as_it_came
from vnet_core.errors import ScanError, StorageError
from vnet_core.plan import Plan
from workers.cohort import Case, read_channels, scan_key, scan_label, source_digest, volume_key
from workers.engines.tries import Tries, Work
from workers.failpoints import fail_point
from workers.ledger import Costs, Outcome, State, settle
from workers.storage.arrays import write_in_slabs
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
    had in hand is tried again as :mod:`workers.engines.tries` says. Cases that go in stretches come last, so that all
    workers are free for them. As soon as ``may_go_on`` is false after a case, nothing more is waited for, and the cases
    without an outcome are left. EngineError where the engine cannot go on.
    """
    outcomes: list[Outcome] = []
    divided: dict[str, Case] = {}
    by_id = {case.id: case for case in cases}

    def settled(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    def settled_or_divided(outcome: Outcome) -> None:
        case = by_id[outcome.case]
        if outcome.key == scan_key(volume_key(case, plan)):
            divided[case.id] = case
        else:
            settled(outcome)

    work = []
    for case in cases:
        key = volume_key(case, plan)
        if root.receipt(key):
            settled(Outcome(case.id, STAGE, "cached", key=key))
        else:
            work.append(Work(STAGE, case.id, key, preprocess_case, (root.url, case, plan)))
    Tries(root, executor, settled_or_divided, may_go_on).work_off(work)
    if divided and may_go_on():
        _in_stretches(root, divided, plan, executor, settled, may_go_on)
    return sorted(outcomes, key=lambda outcome: outcome.case)


def _in_stretches(
    root: Root,
    cases: dict[str, Case],
    plan: Plan,
    executor: Executor,
    settled: Callable[[Outcome], None],
    may_go_on: Callable[[], bool],
) -> None:
    """Prepare what was divided, and tell what became of each case once."""
    # torch comes in with it, which a night without such a case does without
    from workers.stretches import count_of, join, prepare_stretch, stretch_key

    failed: set[str] = set()
    done: set[str] = set()

    def stretch_is_done(outcome: Outcome) -> None:
        if outcome.key:
            done.add(outcome.key)
        elif outcome.case not in failed:
            failed.add(outcome.case)
            settled(outcome)

    stretches: list[Work] = []
    for case in cases.values():
        volume = volume_key(case, plan)
        try:
            count = count_of(root, volume)
        except StorageError as error:
            failed.add(case.id)
            settled(Outcome(case.id, STAGE, "failed", (error.code,), error.message))
            continue
        for number in range(count):
            arguments = (root.url, case, plan, number)
            stretches.append(Work(STAGE, case.id, stretch_key(volume, number), prepare_stretch, arguments))
    Tries(root, executor, stretch_is_done, may_go_on).work_off(stretches)
    lacking = failed | {work.case for work in stretches if work.key not in done}
    joins = [
        Work(STAGE, case.id, volume_key(case, plan), join, (root.url, case, plan))
        for case in cases.values()
        if case.id not in lacking
    ]
    if may_go_on():
        Tries(root, executor, settled, may_go_on).work_off(joins)


def preprocess_case(root_url: str, case: Case, plan: Plan) -> Outcome:
    """Read, prepare and publish one case; runs on a worker. Its outcome says what happened, it never raises.

    A volume that is finished is `cached`: an engine may do again what it had lost the answer of. A case that goes in
    stretches is only divided here, and the key of the outcome is then that of its scan.
    """
    # bring torch in, which the process that hands out the cases does without
    from vnet_core.preprocess import planned
    from workers.stretches import arrays_of, divide, is_divided, planes_at_once, volume_facts

    for_the_owner_alone()
    root = Root(root_url)

    def compute() -> tuple[State, str, tuple[str, ...]]:
        key, costs = volume_key(case, plan), Costs()
        for finished in (key, scan_key(key)):
            if root.receipt(finished):
                return "cached", finished, ()
        image = read_channels(case.channels, plan.reading)
        label = scan_label(case.label, image.geometry, plan.labels, plan.reading).volume if case.label else None
        if source_digest(case.channels, plan.reading) != case.digest:
            raise ScanError("scan.changed", "the file's bytes are not those that were ingested; run vnet ingest again")
        fail_point("preprocess:read", key)
        preparation = planned(image, label, plan.preprocess)
        if is_divided(preparation, plan):
            return "computed", divide(root, key, preparation, profile_as_it_came(image), plan, costs), ()
        sample = Sample((len(plan.channels), *preparation.geometry.shape))
        attributes = {"geometry": geo.to_mapping(preparation.geometry)}
        write_in_slabs(root, key, arrays_of(preparation, sample), attributes, planes_at_once(preparation, plan))
        fail_point("preprocess:written")
        facts = {**volume_facts(case, plan, preparation), "profile": profile(image, sample), **costs.facts()}
        root.seal(key, facts)
        fail_point("preprocess:sealed", key)
        return "computed", key, ()

    return settle(STAGE, case.id, compute)
