"""Our verdict on an input: the whole way from the folder to the case's entry, and the values that follow."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from tests.bad_inputs.inputs import BadInput, Finding, Truth
from vnet_core.errors import ConfigError
from vnet_core.geometry import same_grid, to_canonical
from workers.cohort import Case, load_entry
from workers.ingest import Names, ingest
from workers.sources.scans import read_volume
from workers.storage.store import Root

COHORT = "inputs"
PLACE_TOLERANCE_MM = 1e-3


def judged(item: BadInput, executor: Executor, root: Path | None = None) -> Finding:
    """Make the input, ingest it into a root of its own, and compare every usable case with the truth."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "input"
        source.mkdir()
        truths = item.make(source)
        store = Root(root or Path(work) / "root")
        during = item.during(source) if item.during else nullcontext()
        # threads have the rights of the one that starts them, so an input with circumstances has its own
        with during, ThreadPoolExecutor(1) if item.during else nullcontext(executor) as threads:
            return _ingested(item, source, store, threads, truths)


def _ingested(item: BadInput, source: Path, root: Root, executor: Executor, truths: Sequence[Truth]) -> Finding:
    names = Names(labels=item.labels)
    try:
        _, outcomes = ingest(root, COHORT, [str((source / item.source).absolute())], executor, names)
    except ConfigError as error:
        return Finding((f"refused:{error.code}",), None, error.message)
    verdicts = [":".join([o.state, ",".join(o.codes)]).removesuffix(":") for o in outcomes]
    usable = [load_entry(root, COHORT, o.case).case for o in outcomes if o.done]
    notes = [o.message for o in outcomes if o.message]
    if not usable:
        return Finding(tuple(sorted(verdicts)), None, "; ".join(notes))
    wrong = _differences(usable, truths)
    return Finding(tuple(sorted(verdicts)), not wrong, "; ".join([*wrong, *notes]))


def _differences(cases: Sequence[Case], truths: Sequence[Truth]) -> list[str]:
    """Why the cases are not the truths, in any order; [] where each is one of them."""
    if len(cases) != len(truths):
        return [f"{len(cases)} usable cases where {len(truths)} are true"]
    left, found = list(truths), []
    for case in cases:
        reasons = [_difference(case, one) for one in left]
        if "" in reasons:
            left.pop(reasons.index(""))
        else:
            found.append(reasons[0])
    return found


def _difference(case: Case, truth: Truth) -> str:
    volume = read_volume(case.channels[0])
    assert case.geometry is not None
    if not same_grid(volume.geometry, case.geometry, 0.0):
        return f"the entry says {case.geometry}, the file {volume.geometry}"
    reorientation, found = to_canonical(volume.geometry)
    turned, true = to_canonical(truth.geometry)
    if not same_grid(found, true, PLACE_TOLERANCE_MM):
        return f"the grid is {found}, in truth {true}"
    apart = float(np.abs(reorientation.apply(volume.labels).astype(float) - turned.apply(truth.voxels)).max())
    return "" if apart <= truth.tolerance else f"values are up to {apart:g} off"
