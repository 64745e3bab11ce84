"""Segmenting what is larger than memory: portion by portion, from a stored volume to a stored label map.

The label map lies in the storage root below the key of the result until that is published. Its shards are the portions,
so that each has one writer, and several processes may do some of them each: :func:`divide`, then :func:`do_portion` of
each by anybody, then :func:`finish`.

    labels/             label values on the scan's own grid
    own/<n>/            of several passes: what portion n decides on the network's grid, the mean and each pass alone
    done/<n>.json       portion n is there, and how long it took
    maps/               the parts of own/ put together, at the end
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from vnet_core.blocks import Region
from vnet_core.ensemble import number_of_passes, predict
from vnet_core.errors import MemoryLimitError
from vnet_core.geometry import Geometry, Shape
from vnet_core.plan import Plan
from vnet_core.portions import EDGE, Portions, Segmented, divided, restore_portion, segment_portion, undivided
from vnet_core.slabs import planes_of
from vnet_core.spread import Spread, class_cleanings, spread_of_slabs
from workers.ledger import memory_refused
from workers.segmentation.large_masks import clean_map
from workers.segmentation.masks import label_values
from workers.segmentation.shares import Division
from workers.storage.arrays import StoredArray, create_array, read_array, write_arrays
from workers.storage.store import Root

if TYPE_CHECKING:
    from torch import nn

IN_PORTIONS = "segment.in-portions"
"""Noted where memory ran out on the whole scan, so that it was segmented in portions; that changes no voxel."""
SMALLER_TILE = "segment.smaller-tile"
"""Noted where memory ran out on the plan's tile, so that smaller ones were taken; that changes single voxels."""
LABELS = "labels"
SHARE_OF_FREE = 0.8
"""Of the free memory that portions may take where that is less than the plan allows."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One case to be segmented in portions."""

    root: Root
    scratch: str
    """Prefix of the root for the label map."""
    networks: Sequence[nn.Module]
    """As :func:`vnet_core.inference.prepare` made them."""
    device: torch.device
    plan: Plan
    image: StoredArray
    """(C, Z, Y, X), float32."""
    grids: tuple[Geometry, Geometry]
    """The network's and the scan's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Large:
    """A case that was segmented in portions."""

    values: StoredArray
    """Label values (Z, Y, X) on the scan's own grid, cleaned."""
    spread: Spread | None
    portions: Portions
    smaller_tile: bool = False
    """Whether the tile is not the plan's."""

    def facts(self) -> dict[str, Any]:
        """For the receipt: number of portions, the tile (none: one pass), and the memory that was foretold."""
        tile = self.portions.tile
        count = len(self.portions.regions())
        foretold = self.portions.peak_bytes
        return {"portions": count, "tile": list(tile) if tile else None, "predicted_bytes": foretold}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of a GPU, or that it is too little."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, MemoryLimitError):
        return error.code in ("segment.memory", "memory.portion")
    return memory_refused(error)


def segment_in_portions(work: Work, tile: Shape | None) -> Large:
    """Segment a case in tiles of one shape, or in one pass, and clean its label map.

    Raises MemoryLimitError ``memory.portion`` where the smallest portion is too much for the plan or what is free.
    """
    portions = divide(work, tile)
    values = StoredArray(work.root, work.scratch, LABELS)
    for number, (portion, found) in enumerate(segmented(work, portions, portions.regions())):
        _store(work, values, number, portion, found)
    return finish(work, portions)


def divide(work: Work, tile: Shape | None) -> Portions:
    """The portions of a case within the plan's limit and what is free here, and an empty label map for them.

    Raises MemoryLimitError as :func:`segment_in_portions`.
    """
    plan = work.plan
    itemsize = next(work.networks[0].parameters()).element_size()
    limit = min(int(plan.inference.memory_limit_gib * 2**30), int(SHARE_OF_FREE * psutil.virtual_memory().available))
    portions = divided(plan, work.grids, tile, _passes(work), itemsize, limit)
    work.root.delete(work.scratch)
    label_map(work, portions)
    return portions


def do_portion(work: Work, division: Division, number: int) -> None:
    """One portion of a case that was divided, unless it is there already.

    MemoryLimitError ``memory.portion`` where less is free here than it takes.
    """
    if work.root.is_object(_done_key(work, number)):
        return
    free = psutil.virtual_memory().available
    if division.peak_bytes > free:
        raise MemoryLimitError(
            "memory.portion",
            f"a portion needs {division.peak_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; free memory, or"
            " lower inference.memory_limit_gib",
        )
    began = time.perf_counter()
    portions = _portions(work, division)
    values = StoredArray(work.root, work.scratch, LABELS)
    ((portion, found),) = segmented(work, portions, [portions.regions()[number]])
    _store(work, values, number, portion, found)
    work.root.put_json(_done_key(work, number), {"seconds": round(time.perf_counter() - began, 4)})


def finished(work: Work, division: Division) -> tuple[Large, float]:
    """A case of which all portions are there, cleaned, and the seconds that they took.

    StorageError ``store.corrupt`` where one is lost.
    """
    seconds = [work.root.get_json(_done_key(work, number))["seconds"] for number in range(division.count)]
    return finish(work, _portions(work, division)), sum(seconds)


def finish(work: Work, portions: Portions) -> Large:
    """Put together what the portions say, and clean their label map."""
    plan = work.plan
    values = StoredArray(work.root, work.scratch, LABELS).whole()
    spread = _spread(_maps_of_passes(work, portions), plan, work.grids[0]) if portions.passes > 1 else None
    clean_map(values, work.grids[1].voxel_ml, plan.inference.cleaning)
    return Large(values, spread, portions)


def _store(work: Work, values: StoredArray, number: int, portion: Region, found: Segmented) -> None:
    values.write(label_values(found.classes, work.plan.labels), *portion.slices)
    if found.mean is not None:
        # of its own for each portion: those of the network's grid do not end where chunks do
        told = np.stack([found.mean, *found.alone])
        write_arrays(work.root, f"{work.scratch}/own/{number}", {"classes": told}, {})


def _passes(work: Work) -> int:
    return number_of_passes(len(work.networks), work.plan)


def _portions(work: Work, division: Division) -> Portions:
    whole = undivided(work.plan, work.grids, division.tile, _passes(work))
    return replace(whole, edges=division.edges, peak_bytes=division.peak_bytes)


def _done_key(work: Work, number: int) -> str:
    return f"{work.scratch}/done/{number}.json"


def segmented(work: Work, portions: Portions, chosen: Sequence[Region]) -> Iterator[tuple[Region, Segmented]]:
    """The chosen portions, one after the other; neither their order nor who does the others changes them."""

    def read(region: Region) -> torch.Tensor:
        return torch.from_numpy(work.image.read(slice(None), *region.slices))

    if portions.tile is not None:
        for portion in chosen:
            yield portion, segment_portion(work.networks, read, portions, portion)
        return
    everything = Region((0, 0, 0), portions.shape)
    said = predict(work.networks, read(everything).to(work.device), work.plan)
    for portion in chosen:
        yield portion, restore_portion(said, portions, portion)


def label_map(work: Work, portions: Portions) -> StoredArray:
    """An array for the label values of a case on the scan's own grid, whose shards are the portions."""
    z, y, x = (min(EDGE, n) for n in portions.scan_shape)
    a, b, c = (-(-edge // chunk) * chunk for edge, chunk in zip(portions.edges, (z, y, x), strict=True))
    dtype = label_values(np.zeros(0, np.uint8), work.plan.labels).dtype
    return create_array(work.root, f"{work.scratch}/{LABELS}", portions.scan_shape, dtype, (z, y, x), (a, b, c))


# --- what each pass says alone


def _maps_of_passes(work: Work, portions: Portions) -> list[StoredArray]:
    """Class maps on the network's grid: of the mean, and of every pass."""
    z, y, x = (min(EDGE, n) for n in portions.shape)
    dtype = np.dtype(np.uint8 if work.plan.classes <= 256 else np.uint16)
    maps = [
        create_array(work.root, f"{work.scratch}/maps/{name}", portions.shape, dtype, (z, y, x), (z, y, x))
        for name in ("mean", *(f"pass-{number}" for number in range(portions.passes)))
    ]
    for number, portion in enumerate(portions.regions()):
        own = portions.own(portion)
        if own is not None:
            told = read_array(work.root, f"{work.scratch}/own/{number}", "classes")
            for stored, part in zip(maps, told, strict=True):
                stored.write(part, *own.slices)
    return maps


def _spread(maps: Sequence[StoredArray], plan: Plan, grid: Geometry) -> Spread:
    for stored in maps:
        clean_map(stored, grid.voxel_ml, class_cleanings(plan))
    step = planes_of(grid.shape)
    slabs = ([stored.read(slice(start, start + step)) for stored in maps] for start in range(0, grid.shape[0], step))
    return spread_of_slabs(((mean, alone) for mean, *alone in slabs), plan, grid.voxel_ml)
