"""Segmenting what is larger than memory: portion by portion, from a stored volume to a stored label map.

The label map lies in the storage root below the key of the result until that is published. Its shards are the portions,
so that each has one writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from vnet_core.blocks import Region
from vnet_core.ensemble import number_of_passes, predict
from vnet_core.errors import MemoryLimitError
from vnet_core.geometry import Geometry, Shape
from vnet_core.plan import Plan
from vnet_core.portions import EDGE, Portions, Segmented, divided, restore_portion, segment_portion
from vnet_core.slabs import clean_slabs, planes_of
from vnet_core.spread import Spread, class_cleanings, spread_of_slabs
from workers.arrays import StoredArray, create_array
from workers.large_masks import clean_stored
from workers.ledger import memory_refused
from workers.masks import label_values
from workers.store import Root

if TYPE_CHECKING:
    from torch import nn

IN_PORTIONS = "segment.in-portions"
"""Noted where memory ran out on the whole scan, so that it was segmented in portions; that changes no voxel."""
SMALLER_TILE = "segment.smaller-tile"
"""Noted where memory ran out on the plan's tile, so that smaller ones were taken; that changes single voxels."""
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
    plan = work.plan
    passes = number_of_passes(len(work.networks), plan)
    itemsize = next(work.networks[0].parameters()).element_size()
    limit = min(int(plan.inference.memory_limit_gib * 2**30), int(SHARE_OF_FREE * psutil.virtual_memory().available))
    portions = divided(plan, work.grids, tile, passes, itemsize, limit)
    work.root.delete(work.scratch)
    values = label_map(work, portions)
    maps = _maps_of_passes(work, portions) if passes > 1 else []
    for portion, found in segmented(work, portions, portions.regions()):
        values.write(label_values(found.classes, plan.labels), *portion.slices)
        if found.own is not None and found.mean is not None:
            for stored, part in zip(maps, (found.mean, *found.alone), strict=True):
                stored.write(part, *found.own.slices)
    spread = _spread(maps, plan, work.grids[0]) if maps else None
    clean_stored(values, plan, work.grids[1].voxel_ml)
    return Large(values, spread, portions)


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
    return create_array(work.root, f"{work.scratch}/labels", portions.scan_shape, dtype, (z, y, x), (a, b, c))


# --- what each pass says alone


def _maps_of_passes(work: Work, portions: Portions) -> list[StoredArray]:
    """Class maps on the network's grid: of the mean, and of every pass."""
    z, y, x = (min(EDGE, n) for n in portions.shape)
    dtype = np.dtype(np.uint8 if work.plan.classes <= 256 else np.uint16)
    names = ["mean", *(f"pass-{number}" for number in range(portions.passes))]
    return [
        create_array(work.root, f"{work.scratch}/{name}", portions.shape, dtype, (z, y, x), (z, y, x)) for name in names
    ]


def _spread(maps: Sequence[StoredArray], plan: Plan, grid: Geometry) -> Spread:
    def planes(stored: StoredArray, start: int, stop: int) -> np.ndarray:
        return stored.read(slice(start, stop))

    for stored in maps:

        def read(start: int, stop: int, stored: StoredArray = stored) -> np.ndarray:
            return planes(stored, start, stop)

        def write(start: int, values: np.ndarray, stored: StoredArray = stored) -> None:
            stored.write(values, slice(start, start + len(values)))

        clean_slabs(read, write, grid.shape, grid.voxel_ml, class_cleanings(plan))
    step = planes_of(grid.shape)
    slabs = ([planes(stored, start, start + step) for stored in maps] for start in range(0, grid.shape[0], step))
    return spread_of_slabs(((mean, alone) for mean, *alone in slabs), plan, grid.voxel_ml)
