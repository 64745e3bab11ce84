"""Stage segment: a model loaded once takes case after case. :mod:`workers.segmentation.pool` has many of them at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from vnet_core.errors import EngineError, MemoryLimitError, ScanError, StorageError
from vnet_core.geometry import Shape
from vnet_core.gpu_faults import sticky_fault
from vnet_core.plan import Plan
from workers.cohort import Case, result_key, source_digest, volume_geometry, volume_key
from workers.failpoints import fail_point
from workers.leases import Claim, check
from workers.ledger import Costs, Outcome, State, settle
from workers.registry.models import Model, load_model, load_networks
from workers.registry.profiles import drift_of
from workers.segmentation.masks import Mask, MaskFormat, check_format, label_values, mask_file, publish_mask
from workers.segmentation.shares import Division, Step
from workers.storage.arrays import StoredArray, read_array
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from vnet_core.geometry import Geometry
    from vnet_core.spread import Spread
    from workers.segmentation.large import Large, Work

STAGE = "segment"
OUT_OF_MEMORY = "segment.out-of-memory"
GPU_LOST = "engine.gpu-lost"
"""Code of a case whose process can use its GPU no more."""


@dataclass(frozen=True, slots=True)
class Job:
    """One case for one model."""

    cohort: str
    case: Case
    mask_format: MaskFormat
    mirror_axes: tuple[int, ...] | None = None
    """Axes to mirror along instead of those of the model's plan."""
    claim: Claim | None = None
    """Leave to publish the result; asked once more right before."""
    divide: bool = False
    """Whether others may do a part of it, where it goes through in portions."""
    step: Step | None = None
    """What is to be done about a case that is divided."""


class Segmenter:
    """Loads a model once and segments case after case; an actor of the pool, or used as it is."""

    def __init__(self, root_url: str, model: str, cpus: int) -> None:
        import threading

        import torch

        from vnet_core.inference import precision, prepare

        for_the_owner_alone()
        self.root = Root(root_url)
        self.model = load_model(self.root, model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(cpus)
        self.precision = precision(self.model.plan.inference, self.device)
        self.networks: list[nn.Module] = [
            prepare(network, self.device, self.precision) for network in load_networks(self.root, self.model)
        ]
        self._computing = threading.Lock()

    def segment(self, job: Job) -> Outcome:
        """Publish one case's mask; its outcome says what happened, it never raises."""
        outcome = self.take(replace(job, divide=False))
        assert isinstance(outcome, Outcome), "nobody asked for a division"
        return outcome

    def take(self, job: Job) -> Outcome | Division:
        """As :meth:`segment`; how a case is divided that others may do a part of, and what became of such a part."""
        found: list[Division] = []

        def attempt() -> tuple[State, str | None, tuple[str, ...]]:
            with naming_a_lost_gpu():
                if job.step is not None and job.step.portion is not None:
                    return self._portion(job, job.step.division, job.step.portion)
                division = self._division(job) if job.divide else None
                if division is not None:
                    found.append(division)
                    return "computed", None, ()
                return self._segment(job)

        outcome = settle(STAGE, job.case.id, attempt)
        return found[0] if found else outcome

    def _segment(self, job: Job) -> tuple[State, str, tuple[str, ...]]:
        import torch

        from workers.dicom.derived import Algorithm
        from workers.segmentation.large import IN_PORTIONS, SMALLER_TILE, finished, out_of_memory
        from workers.segmentation.large_masks import publish_large_mask

        plan, case, costs = plan_of(job, self.model), job.case, Costs()
        key = key_of(job, self.model)
        volume, grid, scan_grid = self._ready(job, plan)
        check_format(case, job.mask_format)
        whole = job.step is None and self._fits_whole(plan, grid.shape, scan_grid.shape)
        with self._sound(volume):
            image = torch.from_numpy(read_array(self.root, volume, "image")) if whole else None
        fail_point("segment:read", key)
        found: tuple[np.ndarray, Spread | None] | None = None
        large: Large | None = None
        notes: list[str] = []
        with costs.waiting(self._computing):
            if image is not None:
                try:
                    found = self._whole(image, grid, scan_grid, plan)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    notes.append(IN_PORTIONS)
            image = None
            if job.step is not None:
                large, seconds = finished(self._work(job, plan), job.step.division)
                costs.add(seconds)
            elif found is None:
                with self._sound(volume):
                    large = self._in_portions(self._work(job, plan))
                notes += [SMALLER_TILE] if large.smaller_tile else []
        fail_point("segment:computed")
        if source_digest(case.channels, plan.reading) != case.digest:
            raise ScanError(
                "scan.changed",
                "the file's bytes are no longer those that the volume was made of; run vnet ingest again",
            )
        provenance: dict[str, Any] = {
            "cohort": job.cohort,
            "model": self.model.reference,
            "model_digest": self.model.digest,
            "plan_digest": plan.digest,
            "volume": volume,
            "precision": str(self.precision).removeprefix("torch."),
        }
        algorithm = Algorithm(self.model.reference, self.model.digest[:16])
        drift = drift_of(self.root, volume, self.model.facts)
        if large is not None:
            provenance |= large.facts() | ({"warnings": notes} if notes else {})
            stored = Mask(case, large.values, plan, job.mask_format, algorithm, provenance, large.spread, drift)
            publish_large_mask(self.root, key, stored, lambda: self._last_words(job, costs))
        elif found is not None:
            mask = Mask(case, found[0], plan, job.mask_format, algorithm, provenance, found[1], drift)
            publish_mask(self.root, key, mask, lambda: self._last_words(job, costs))
        fail_point("segment:sealed", key)
        return "computed", key, tuple(notes)

    def _ready(self, job: Job, plan: Plan) -> tuple[str, Geometry, Geometry]:
        """Key and grid of the case's volume, and the scan's own grid; StorageError ``segment.no-volume``."""
        volume = volume_key(job.case, plan)
        if self.root.receipt(volume) is None:
            raise StorageError(
                "segment.no-volume", f"{volume} of case {job.case.id} is not finished; preprocess it first"
            )
        assert job.case.geometry is not None, "a finished volume has a geometry"
        return volume, volume_geometry(self.root, volume), job.case.geometry

    def _work(self, job: Job, plan: Plan) -> Work:
        """What is needed to segment the case in portions."""
        from workers.segmentation.large import Work

        volume, grid, scan_grid = self._ready(job, plan)
        image = StoredArray(self.root, volume, "image").whole()
        scratch = f"{key_of(job, self.model)}/portions"
        return Work(self.root, scratch, self.networks, self.device, plan, image, (grid, scan_grid))

    def _division(self, job: Job) -> Division | None:
        """How a case is divided; None where it goes through whole, or is one portion."""
        from vnet_core.portions import tile_of_portions
        from workers.segmentation.large import divide, out_of_memory

        plan = plan_of(job, self.model)
        volume, grid, scan_grid = self._ready(job, plan)
        if self._fits_whole(plan, grid.shape, scan_grid.shape):
            return None
        tile = tile_of_portions(plan, grid.shape, self.precision.itemsize)
        if tile is None:
            return None
        check_format(job.case, job.mask_format)
        with self._sound(volume):
            work = self._work(job, plan)
        try:
            portions = divide(work, tile)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None  # alone it is tried in smaller tiles
        count = len(portions.regions())
        return Division(tile, portions.edges, portions.peak_bytes, count) if count > 1 else None

    def _portion(self, job: Job, division: Division, number: int) -> tuple[State, None, tuple[str, ...]]:
        """Do one portion; MemoryLimitError ``segment.out-of-memory`` where memory is too little for it here."""
        from workers.segmentation.large import do_portion, out_of_memory

        plan = plan_of(job, self.model)
        try:
            with self._computing, self._sound(volume_key(job.case, plan)):
                do_portion(self._work(job, plan), division, number)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise MemoryLimitError(
                OUT_OF_MEMORY,
                f"memory ran out over portion {number} of {division.count} ({type(error).__name__}); use fewer"
                " segment_workers, or machines with more memory",
            ) from error
        return "computed", None, ()

    def _fits_whole(self, plan: Plan, network_shape: Shape, scan_shape: Shape) -> bool:
        """Whether what the case holds beside its pass is within the plan's limit, so that it is done whole."""
        from vnet_core.ensemble import number_of_passes
        from vnet_core.portions import whole_bytes

        passes = number_of_passes(len(self.networks), plan)
        needed = whole_bytes(plan, network_shape, scan_shape, passes)
        return needed <= plan.inference.memory_limit_gib * 2**30

    def _whole(
        self, image: torch.Tensor, grid: Geometry, scan_grid: Geometry, plan: Plan
    ) -> tuple[np.ndarray, Spread | None]:
        """Label values (Z, Y, X) on the scan's own grid, cleaned, of an image (C, Z, Y, X) in memory."""
        from vnet_core.decide import decision
        from vnet_core.ensemble import decide_on_grid, predict
        from vnet_core.postprocess import clean
        from vnet_core.preprocess import restore
        from vnet_core.spread import spread_of

        self._check_memory(plan, grid.shape)
        said = predict(self.networks, image.to(self.device), plan)
        classes = restore(said.logits, grid, scan_grid, decision(plan))
        spread = None
        if said.passes:
            spread = spread_of(decide_on_grid(said.logits, plan), said.passes, plan, grid.voxel_ml)
        values = clean(label_values(classes, plan.labels), scan_grid.voxel_ml, plan.inference.cleaning)
        return values, spread

    def _in_portions(self, work: Work) -> Large:
        """A case's label map in the storage root, with smaller tiles where memory asks for it.

        MemoryLimitError ``segment.out-of-memory`` where even the smallest tile is too much.
        """
        from vnet_core.inference import computed_shape
        from vnet_core.portions import smaller_tile, tile_of_portions
        from workers.segmentation.large import out_of_memory, segment_in_portions

        plan, grid = work.plan, work.grids[0]
        first = tile_of_portions(plan, grid.shape, self.precision.itemsize)
        tile = first
        while True:
            try:
                return replace(segment_in_portions(work, tile), smaller_tile=tile != first)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = type(error).__name__
            smaller = smaller_tile(tile or computed_shape(plan, grid.shape), plan.network.divisor)
            if smaller is None:
                raise MemoryLimitError(
                    OUT_OF_MEMORY,
                    f"memory ran out even with tiles of {tile} voxels, the smallest ({reason}); use fewer"
                    " segment_workers, or a machine with more memory",
                )
            tile = smaller

    @contextmanager
    def _sound(self, volume: str) -> Iterator[None]:
        """A volume that turns out to be damaged is taken away, receipt first, so that the next try makes it again."""
        try:
            yield
        except StorageError as error:
            if error.code != "store.corrupt":
                raise
            self.root.delete(volume)
            raise StorageError(
                "segment.damaged-volume",
                f"{volume} was damaged ({error.message}); it was taken away, and the next try makes it again",
            ) from error

    def _last_words(self, job: Job, costs: Costs) -> dict[str, Any]:
        """What the receipt says of the work; StorageError ``night.taken-over`` where another run has the case."""
        if job.claim is None:
            return costs.facts()
        check(self.root, job.claim)
        return {**costs.facts(), "run": job.claim.run}

    def _check_memory(self, plan: Plan, shape: Any) -> None:
        """MemoryLimitError before the pass when its predicted peak is above what is free."""
        from vnet_core.ensemble import held_bytes, number_of_passes
        from vnet_core.inference import computed_shape, predicted_peak_bytes

        if self.device.type != "cpu":
            return
        predicted = predicted_peak_bytes(
            plan.network, len(plan.channels), plan.outputs, computed_shape(plan, shape), self.precision.itemsize
        )
        needed = min(predicted, int(plan.inference.memory_limit_gib * 2**30))
        needed += held_bytes(plan, shape, number_of_passes(len(self.networks), plan))
        free = psutil.virtual_memory().available
        if needed > free:
            raise MemoryLimitError(
                "segment.memory",
                f"the pass needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; lower"
                " inference.memory_limit_gib in the plan or use fewer segment_workers",
            )


@contextmanager
def naming_a_lost_gpu() -> Iterator[None]:
    """EngineError ``engine.gpu-lost`` for an error after which the process must be replaced; others pass."""
    try:
        yield
    except Exception as error:
        fault = sticky_fault(str(error))
        if fault is None:
            raise
        raise EngineError(
            GPU_LOST, f"the GPU said {fault!r}, and every further call of this process would fail; run it in another"
        ) from error


def plan_of(job: Job, model: Model) -> Plan:
    """The plan that decides the job's mask."""
    if job.mirror_axes is None:
        return model.plan
    inference = model.plan.inference.model_copy(update={"mirror_axes": job.mirror_axes})
    return model.plan.model_copy(update={"inference": inference})


def key_of(job: Job, model: Model) -> str:
    """Where the job's result lies."""
    return f"{result_key(job.cohort, job.case, plan_of(job, model), model.digest)}{_format_suffix(job.mask_format)}"


def _format_suffix(mask_format: MaskFormat) -> str:
    """Masks of another format are results of their own."""
    mask_file(mask_format)
    return "" if mask_format == "nifti" else f"-{mask_format}"
