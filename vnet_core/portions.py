"""Volumes whose logits are more than memory: the mask portion by portion of the scan's own grid.

A portion takes the tiles that reach it, blends them with the weights and in the order of the whole volume, and is
brought onto the scan's grid alone. So neither the order of the portions nor who computes them changes a voxel, and the
logits are those of :func:`vnet_core.ensemble.predict` to the last bit. What it costs are tiles that reach more than one
portion.

K output, C input channel, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
from torch import Tensor, nn

from vnet_core.blocks import Region, tile_starts
from vnet_core.decide import decision
from vnet_core.ensemble import Prediction, decide_on_grid, held_bytes, mirrors
from vnet_core.errors import MemoryLimitError
from vnet_core.geometry import Geometry, Reorientation, Shape, to_canonical
from vnet_core.inference import GIB, choose_tile, computed_shape, predicted_peak_bytes, region_logits
from vnet_core.plan import Plan
from vnet_core.resample import SLAB_VALUES, Coordinates, coordinates, decided_part, reach
from vnet_core.slabs import working_bytes

EDGE = 32
"""A portion's edges are multiples of so many voxels of the scan's grid, which is a chunk of the stored label map."""
RESTORING_COPIES = 5
"""Slabs of probabilities that are held at once while they are interpolated along three axes."""
PUBLISHING_BYTES = 10
"""Per voxel of the scan, while a mask is published that is in memory: the scan, the mask as computed, cleaned and
written, what is read back, and the places of its voxels."""


def whole_bytes(plan: Plan, network_shape: Shape, scan_shape: Shape, passes: int) -> int:
    """Bytes of host memory that a case which is segmented and published whole holds beside its pass.

    Image and logits on the network's grid, what several passes hold, and the scan's own grid while the mask is made and
    published.
    """
    held = prod(network_shape) * 4 * (len(plan.channels) + plan.outputs) + held_bytes(plan, network_shape, passes)
    return held + prod(scan_shape) * PUBLISHING_BYTES + RESTORING_COPIES * SLAB_VALUES * 4


def tile_of_portions(plan: Plan, network_shape: Shape, bytes_per_value: int) -> Shape | None:
    """The tile (z, y, x) of a volume that is segmented in portions; None where its pass goes through whole.

    It is that of :func:`vnet_core.inference.choose_tile`, except that the training patch is taken where the bands of
    the whole volume would leave room for less than that: portions do not hold bands.

    Raises MemoryLimitError ``memory.tile``.
    """
    shape = computed_shape(plan, network_shape)
    z, y, x = (min(n, p) for n, p in zip(shape, plan.training.patch_size, strict=True))
    patch: Shape = (z, y, x)
    peak = predicted_peak_bytes(plan.network, len(plan.channels), plan.outputs, patch, bytes_per_value)
    patch_fits = 2 * (peak + prod(patch) * 4 * plan.outputs) <= plan.inference.memory_limit_gib * GIB
    try:
        tile = choose_tile(plan, shape, bytes_per_value)
    except MemoryLimitError:
        if not patch_fits:
            raise
        return patch
    if tile is not None and patch_fits and any(a < b for a, b in zip(tile, patch, strict=True)):
        return patch
    return tile


@dataclass(frozen=True, slots=True, eq=False)
class Portions:
    """How a scan is divided, and where each portion lies on the network's grid."""

    plan: Plan
    shape: Shape
    """Voxels (z, y, x) of the network's grid."""
    scan_shape: Shape
    """Voxels (z, y, x) of the scan's own grid."""
    at: Coordinates
    """Places on the network's grid of the scan's voxels, axes in canonical order."""
    turn: Reorientation
    """From the scan's own axes to the canonical ones."""
    tile: Shape | None
    passes: int
    edges: Shape = (EDGE, EDGE, EDGE)
    """Voxels of a portion along the scan's own axes; the last along an axis may be shorter."""
    peak_bytes: int = 0
    """Most memory that is held at once, by a portion or by a slab of the finished map; without the libraries."""

    def regions(self) -> list[Region]:
        """All portions, on the scan's own grid; x fastest."""
        axes = [_cuts(n, edge) for n, edge in zip(self.scan_shape, self.edges, strict=True)]
        return [Region((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in product(*axes)]

    def turned(self, portion: Region) -> Region:
        """The portion along the canonical axes."""
        start, stop = [], []
        for axis, flip in zip(self.turn.source_axis, self.turn.flip, strict=True):
            a, b, n = portion.start[axis], portion.stop[axis], self.scan_shape[axis]
            start.append(n - b if flip else a)
            stop.append(n - a if flip else b)
        return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def own(self, portion: Region) -> Region | None:
        """The voxels of the network's grid that are nearest to this portion and no other; together all of them."""
        turned = self.turned(portion)
        start = [_cut(c, n, a) for c, n, a in zip(self.at, self.shape, turned.start, strict=True)]
        stop = [_cut(c, n, b) for c, n, b in zip(self.at, self.shape, turned.stop, strict=True)]
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def needed(self, portion: Region) -> Region | None:
        """The voxels of the network's grid whose logits decide the portion and, of several passes, its own there."""
        deciding = reach(self.at, self.shape, self.turned(portion))
        own = self.own(portion) if self.passes > 1 else None
        if deciding is None or own is None:
            return deciding or own
        a, b, c = (min(pair) for pair in zip(deciding.start, own.start, strict=True))
        z, y, x = (max(pair) for pair in zip(deciding.stop, own.stop, strict=True))
        return Region((a, b, c), (z, y, x))

    def around(self, region: Region) -> Region:
        """The voxels of the image that tiles which reach a region of the network's grid can need."""
        assert self.tile is not None, "without tiles the image is needed whole"
        a, b, c = (max(0, s - t + 1) for s, t in zip(region.start, self.tile, strict=True))
        z, y, x = (min(n, s + t - 1) for s, t, n in zip(region.stop, self.tile, self.shape, strict=True))
        return Region((a, b, c), (z, y, x))


def undivided(plan: Plan, grids: tuple[Geometry, Geometry], tile: Shape | None, passes: int) -> Portions:
    """A scan as :func:`divided` has it, without the edges of its portions and what they take."""
    network_grid, scan_grid = grids
    turn, canonical_grid = to_canonical(scan_grid)
    at = coordinates(network_grid, canonical_grid)
    return Portions(plan, network_grid.shape, scan_grid.shape, at, turn, tile, passes)


def divided(
    plan: Plan,
    grids: tuple[Geometry, Geometry],
    tile: Shape | None,
    passes: int,
    bytes_per_value: int,
    limit_bytes: int,
) -> Portions:
    """The portions within a limit of memory that make the fewest tiles be computed more than once.

    ``grids``: the network's and the scan's own; ``tile``: of :func:`tile_of_portions`. The limit may differ from
    machine to machine, since portions decide no voxel. Raises MemoryLimitError ``memory.portion`` where the smallest is
    too much.
    """
    whole = undivided(plan, grids, tile, passes)
    turn, scan_shape = whole.turn, whole.scan_shape
    choices = [_choices(whole, axis) for axis in range(3)]
    best: tuple[int, int, Shape] | None = None
    least = 0
    for z, y, x in product(*choices):
        region: Shape = (z.voxels, y.voxels, x.voxels)
        edges = [0, 0, 0]
        for axis, choice in zip(turn.source_axis, (z, y, x), strict=True):
            edges[axis] = choice.edge
        needed = _portion_bytes(whole, region, prod(edges), bytes_per_value)
        least = min(least or needed, needed)
        cost = z.tiles * y.tiles * x.tiles
        if needed <= limit_bytes and (best is None or (cost, needed) < best[:2]):
            best = cost, needed, (edges[0], edges[1], edges[2])
    if best is None:
        raise MemoryLimitError(
            "memory.portion",
            f"the smallest portion of a scan of {scan_shape} voxels, {plan.outputs} outputs, needs"
            f" {least / GIB:.2f} GiB, {limit_bytes / GIB:.2f} GiB are allowed; raise inference.memory_limit_gib,"
            " or free memory",
        )
    return replace(whole, edges=best[2], peak_bytes=max(best[1], working_bytes(scan_shape)))


@dataclass(frozen=True, slots=True)
class _Choice:
    """One length of the portions along one canonical axis."""

    edge: int
    voxels: int
    """Most that any of them needs of the network's grid."""
    tiles: int
    """Layers of tiles over all of them, those that reach several counted for each."""


def _choices(whole: Portions, axis: int) -> list[_Choice]:
    """Every multiple of ``EDGE`` along a canonical axis, and the whole of it."""
    scan = len(whole.at[axis])
    n = computed_shape(whole.plan, whole.shape)[axis]
    margin = (n - whole.shape[axis]) // 2
    tile = min(whole.tile[axis], n) if whole.tile else n
    starts = np.array(tile_starts(n, tile, whole.plan.inference.overlap))
    found = []
    for edge in sorted({*range(EDGE, scan, EDGE), scan}):
        most, layers = 1, 0
        for a, b in _cuts(scan, edge):
            # the two ends of the last cut: portions are counted from either side, by the axis's direction
            first, last = _cut(whole.at[axis], whole.shape[axis], a), _cut(whole.at[axis], whole.shape[axis], b)
            low, high = max(0, first - 1) + margin, min(whole.shape[axis], last + 1) + margin
            most = max(most, high - low)
            layers += int(np.count_nonzero((starts < high) & (starts + tile > low)))
        found.append(_Choice(edge, min(most + 1, whole.shape[axis]), layers))
    return found


def _portion_bytes(whole: Portions, region: Shape, scan_voxels: int, bytes_per_value: int) -> int:
    plan, tile, voxels = whole.plan, whole.tile, prod(region)
    channels, outputs = len(plan.channels), plan.outputs
    plane = region[1] * region[2]
    slab = max(SLAB_VALUES, outputs * plane)
    restoring = RESTORING_COPIES * min(slab, outputs * max(voxels, scan_voxels)) * 4
    labels = 4 * scan_voxels
    if tile is None:
        image = prod(whole.shape) * 4 * channels
        one_pass = predicted_peak_bytes(
            plan.network, channels, outputs, computed_shape(plan, whole.shape), bytes_per_value
        )
        logits = prod(whole.shape) * 4 * outputs
        return image + held_bytes(plan, whole.shape, whole.passes) + max(one_pass, logits + restoring + labels)
    sums = voxels * 4 * (outputs + 1)
    if whole.passes > 1:
        sums += held_bytes(plan, region, whole.passes) + voxels * 4 * outputs * bool(plan.inference.mirror_axes)
    around = [min(n, r + 2 * (t - 1)) for r, t, n in zip(region, tile, whole.shape, strict=True)]
    image = 2 * 4 * channels * prod(around)
    one_pass = predicted_peak_bytes(plan.network, channels, outputs, tile, bytes_per_value) + prod(tile) * 4
    return sums + max(image + one_pass, restoring) + labels


def _cuts(voxels: int, edge: int) -> list[tuple[int, int]]:
    return [(start, min(start + edge, voxels)) for start in range(0, voxels, edge)]


def _cut(places: np.ndarray, voxels: int, index: int) -> int:
    """The first voxel of the network's axis that is nearer to target ``index`` than to the one before."""
    if index == 0:
        return 0
    if index == len(places):
        return voxels
    return int(np.clip(np.ceil((places[index - 1] + places[index]) / 2), 0, voxels))


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """One portion, finished."""

    classes: np.ndarray
    """(Z, Y, X) uint8 or uint16, axes as the scan has them."""
    own: Region | None = None
    """Of several passes: the part of the network's grid that the following hold."""
    mean: np.ndarray | None = None
    """Classes (Z, Y, X) that the mean decides there."""
    alone: tuple[np.ndarray, ...] = ()
    """Classes that each pass alone decides there."""


def segment_portion(
    networks: Sequence[nn.Module], read: Callable[[Region], Tensor], portions: Portions, portion: Region
) -> Segmented:
    """The classes of one portion of a scan that is segmented in tiles.

    ``read`` gives the preprocessed image (C, Z, Y, X), float32, of a region of the network's grid; it is asked once.
    Networks as :func:`vnet_core.inference.prepare` made them.
    """
    plan, turned = portions.plan, portions.turned(portion)
    region = portions.needed(portion)
    if region is None:
        dtype = np.uint8 if plan.classes <= 256 else np.uint16
        return Segmented(np.zeros(portion.shape, dtype))
    logits, alone = _mean(networks, read, portions, region)
    classes = decided_part(logits, region, portions.shape, portions.at, turned, decision(plan))
    classes = np.ascontiguousarray(portions.turn.undo(classes))
    own = portions.own(portion) if portions.passes > 1 else None
    if own is None:
        return Segmented(classes)
    inner = tuple(slice(a - s, b - s) for a, b, s in zip(own.start, own.stop, region.start, strict=True))
    mean = decide_on_grid(logits, plan)[inner]
    return Segmented(classes, own, mean, tuple(one[inner] for one in alone))


def restore_portion(said: Prediction, portions: Portions, portion: Region) -> Segmented:
    """One portion of a scan whose logits are there whole."""
    held = Region((0, 0, 0), portions.shape)
    turned, plan = portions.turned(portion), portions.plan
    classes = decided_part(said.logits, held, portions.shape, portions.at, turned, decision(plan))
    classes = np.ascontiguousarray(portions.turn.undo(classes))
    own = portions.own(portion) if portions.passes > 1 else None
    if own is None:
        return Segmented(classes)
    mean = decide_on_grid(said.logits[(slice(None), *own.slices)], plan)
    return Segmented(classes, own, mean, tuple(one[own.slices] for one in said.passes))


def smaller_tile(tile: Shape, divisor: int) -> Shape | None:
    """Half the edges, in multiples of the network's divisor and at least two of them; None: it is the smallest."""
    z, y, x = (min(edge, max(2 * divisor, edge // 2 // divisor * divisor)) for edge in tile)
    return None if (z, y, x) == tile else (z, y, x)


def _mean(
    networks: Sequence[nn.Module], read: Callable[[Region], Tensor], portions: Portions, region: Region
) -> tuple[Tensor, list[np.ndarray]]:
    """Logits of a region, the mean that :func:`vnet_core.ensemble.predict` forms, and what each pass decides."""
    assert portions.tile is not None, "a volume without tiles has its logits whole"
    plan, around = portions.plan, portions.around(region)
    image = read(around)
    total: Tensor | None = None
    alone: list[np.ndarray] = []
    for network in networks:
        for axes in mirrors(plan.inference.mirror_axes):
            spatial = [axis - 1 for axis in axes]
            held = _Held(image, around, portions.shape, spatial)
            flipped = region_logits(
                network, held, plan, portions.shape, portions.tile, _mirrored(region, portions.shape, spatial)
            )
            logits = flipped.flip(axes) if axes else flipped
            if portions.passes > 1:
                alone.append(decide_on_grid(logits, plan))
            total = logits if total is None else total.add_(logits)
    assert total is not None, "an ensemble has a network"
    return total if portions.passes == 1 else total.div_(portions.passes), alone


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A part of an image, asked for by regions of the whole image after it was mirrored."""

    image_CZYX: Tensor
    around: Region
    shape: Shape
    mirrored: list[int]
    """Axes, 0 z, 1 y, 2 x."""

    def __call__(self, region: Region) -> Tensor:
        back = _mirrored(region, self.shape, self.mirrored)
        window = [slice(a - s, b - s) for a, b, s in zip(back.start, back.stop, self.around.start, strict=True)]
        part = self.image_CZYX[(slice(None), *window)]
        return part.flip([axis + 1 for axis in self.mirrored]) if self.mirrored else part


def _mirrored(region: Region, shape: Shape, axes: Sequence[int]) -> Region:
    start, stop = list(region.start), list(region.stop)
    for axis in axes:
        start[axis], stop[axis] = shape[axis] - region.stop[axis], shape[axis] - region.start[axis]
    return Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
