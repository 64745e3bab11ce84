"""A scan too large for one worker's memory, prepared by several: stretches of planes along z, each of whole shards.

The first worker reads the scan, finds what must be known of all of it, and stores it as it came (``divide``). Whoever
is free prepares a stretch from there (``prepare_stretch``), and when all are done one publishes the volume (``join``).
The volume's files are those that one worker writes, to the last bit. What lies beside the volume meanwhile is sealed
too, so that a run that was killed goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vnet_core import geometry as geo
from vnet_core.drift import Profile, Sample
from vnet_core.errors import StorageError
from vnet_core.plan import Plan
from vnet_core.preprocess import Preparation
from vnet_core.volume import Voxels
from workers.cohort import Case, scan_key, volume_key
from workers.failpoints import fail_point
from workers.ledger import Costs, Outcome, State, settle
from workers.storage.arrays import InSlabs, StoredArray, create_arrays, shard_planes, write_in_slabs, write_planes
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root

STAGE = "preprocess"


def stretch_key(volume: str, number: int) -> str:
    """What is left by a stretch when it is done."""
    return f"{volume}.stretch-{number}"


def count_of(root: Root, volume: str) -> int:
    """Stretches of a volume whose scan is stored."""
    return int(_scan_receipt(root, volume)["stretches"])


def planes_at_once(preparation: Preparation, plan: Plan) -> int:
    """Planes of the volume that are prepared at a time, within the plan's limit of memory."""
    return preparation.planes_within(int(plan.inference.memory_limit_gib * 2**30))


def is_divided(preparation: Preparation, plan: Plan) -> bool:
    """Whether stretches of a volume are worth their own turns: it does not fit at once, and has several shards along z.
    The plan and the grids alone decide it."""
    depth = preparation.geometry.shape[0]
    return planes_at_once(preparation, plan) < depth and shard_planes(preparation.geometry.shape) < depth


def divide(root: Root, volume: str, preparation: Preparation, came: Profile, plan: Plan, costs: Costs) -> str:
    """Store the scan, and arrays for the volume without values; the key of the scan.

    ``came``: figures of the scan before anything was done to it.
    """
    scan = {"image": _as_stored(preparation.scan)}
    if preparation.labels is not None:
        scan["label"] = _as_stored(preparation.labels)
    key, planes = scan_key(volume), planes_at_once(preparation, plan)
    _clear(root, volume)
    write_in_slabs(root, key, scan, {}, planes)
    create_arrays(root, volume, arrays_of(preparation), {"geometry": geo.to_mapping(preparation.geometry)})
    facts = {
        "stage": STAGE,
        "stretches": -(-preparation.geometry.shape[0] // shard_planes(preparation.geometry.shape)),
        "scan_grid": geo.to_mapping(preparation.scan_grid),
        "scales": preparation.scales,
        "profile": came,
        **costs.facts(),
    }
    root.seal(key, facts)
    return key


def prepare_stretch(root_url: str, case: Case, plan: Plan, number: int) -> Outcome:
    """Prepare one stretch; runs on a worker. Its outcome says what happened, it never raises."""
    for_the_owner_alone()
    root = Root(root_url)

    def compute() -> tuple[State, str, tuple[str, ...]]:
        volume, costs = volume_key(case, plan), Costs()
        own = stretch_key(volume, number)
        if root.receipt(own):
            return "cached", own, ()
        with _begun_anew_where_damaged(root, volume):
            preparation = _stored_preparation(root, volume, plan)
            edge, depth = shard_planes(preparation.geometry.shape), preparation.geometry.shape[0]
            wanted = slice(number * edge, min((number + 1) * edge, depth))
            sample = Sample((preparation.scan.shape[0], *preparation.geometry.shape), wanted.start)
            for name, array in arrays_of(preparation, sample).items():
                write_planes(StoredArray(root, volume, name), array, wanted, planes_at_once(preparation, plan))
        lowest, taken = sample.told()
        root.put(f"{own}/sample", taken.tobytes())
        root.seal(own, {"stage": STAGE, "lowest": lowest.tolist(), **costs.facts()})
        return "computed", own, ()

    return settle(STAGE, case.id, compute)


def join(root_url: str, case: Case, plan: Plan) -> Outcome:
    """Publish the volume whose stretches are all done; runs on a worker. Its outcome says what happened, it never
    raises."""
    for_the_owner_alone()
    root = Root(root_url)

    def compute() -> tuple[State, str, tuple[str, ...]]:
        volume, costs = volume_key(case, plan), Costs()
        if root.receipt(volume):
            return "cached", volume, ()
        with _begun_anew_where_damaged(root, volume):
            stored = _scan_receipt(root, volume)
            preparation = _stored_preparation(root, volume, plan)
            sample = Sample((preparation.scan.shape[0], *preparation.geometry.shape))
            peaks = [stored["peak_bytes"]]
            costs.add(stored["seconds"])
            for number in range(stored["stretches"]):
                receipt = _receipt(root, key := stretch_key(volume, number))
                taken = np.frombuffer(root.get(f"{key}/sample"), np.float32)
                sample.join(np.array(receipt["lowest"], np.float32), taken.reshape(len(receipt["lowest"]), -1))
                costs.add(receipt["seconds"])
                peaks.append(receipt["peak_bytes"])
            for name in arrays_of(preparation):
                StoredArray(root, volume, name).whole()
        fail_point("preprocess:written")
        profile = {**stored["profile"], "normalised": sample.percentiles()}
        facts = costs.facts()
        facts["peak_bytes"] = max(facts["peak_bytes"], *peaks)
        root.seal(volume, {**volume_facts(case, plan, preparation), "profile": profile, **facts})
        fail_point("preprocess:sealed", volume)
        _clear(root, volume)
        return "computed", volume, ()

    return settle(STAGE, case.id, compute)


@contextmanager
def _begun_anew_where_damaged(root: Root, volume: str) -> Iterator[None]:
    """Where something that was sealed is not whole, take all of it away, so that the next try reads the scan again."""
    try:
        yield
    except StorageError as error:
        if error.code in ("store.corrupt", "store.missing"):
            _clear(root, volume)
        raise


def _clear(root: Root, volume: str) -> None:
    """Take away what lay beside a volume while it was made, what others are told of first."""
    folder, _, digest = volume.rpartition("/")
    root.delete(scan_key(volume))
    for name in root.names(folder):
        if name.startswith(f"{digest}.stretch-"):
            root.delete(f"{folder}/{name}")


def arrays_of(preparation: Preparation, sample: Sample | None = None) -> dict[str, InSlabs]:
    """The arrays of a volume by name; the planes of its image that are made are added to the ``sample``."""

    def image_planes(wanted: slice) -> np.ndarray:
        planes = preparation.image(wanted)
        if sample is not None:
            sample.add(planes)
        return planes

    shape = preparation.geometry.shape
    arrays = {"image": InSlabs((preparation.scan.shape[0], *shape), np.dtype(np.float32), image_planes)}
    if preparation.labels is not None:
        arrays["label"] = InSlabs(shape, preparation.labels.dtype, preparation.label)
    return arrays


def volume_facts(case: Case, plan: Plan, preparation: Preparation) -> dict[str, Any]:
    """What the receipt of a volume says of what it was made from."""
    return {
        "stage": STAGE,
        "case_digest": case.digest,
        "label_digest": case.label_digest,
        "plan_digest": plan.volume_digest,
        "geometry": geo.to_mapping(preparation.geometry),
    }


def _as_stored(voxels: Voxels) -> InSlabs:
    lead = (slice(None),) * (len(voxels.shape) - 3)
    return InSlabs(voxels.shape, voxels.dtype, lambda wanted: voxels[(*lead, wanted)])


def _stored_preparation(root: Root, volume: str, plan: Plan) -> Preparation:
    key, stored = scan_key(volume), _scan_receipt(root, volume)
    image = StoredArray(root, key, "image").whole()
    has_label = any(name.startswith("label/") for name in stored["files"])
    label = StoredArray(root, key, "label").whole() if has_label else None
    scales = tuple((float(offset), float(scale)) for offset, scale in stored["scales"])
    return Preparation(image, label, geo.from_mapping(stored["scan_grid"]), scales, plan.preprocess)


def _scan_receipt(root: Root, volume: str) -> dict[str, Any]:
    return _receipt(root, scan_key(volume))


def _receipt(root: Root, key: str) -> dict[str, Any]:
    receipt = root.receipt(key)
    if receipt is None:
        raise StorageError("store.missing", f"{key} is not finished or not there any more; run the same command again")
    return receipt
