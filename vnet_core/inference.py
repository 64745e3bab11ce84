"""From a preprocessed image to logits, in one pass or in tiles, within a memory limit.

B batch, C input channel, K output, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain, groupby, product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet_core.blocks import Region, gaussian_weights, tile_starts, tiles
from vnet_core.errors import MemoryLimitError
from vnet_core.geometry import Shape
from vnet_core.networks.layout import padded
from vnet_core.networks.memory import predicted_peak_bytes
from vnet_core.plan import Plan
from vnet_core.sections import InferencePlan, TrainingPlan

GIB = 2**30
SEEN_SHARE = 2.0
"""How many times the voxels of the training patch a pass may have with instance or group normalisation. On a glioma
case of 155 x 240 x 240 voxels, learnt in patches of 64^3, one pass had Dice 0.75 and 0.80, such tiles 0.86 and 0.92."""


def processor_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float32 where it would only be emulated or is not known."""
    match device.type:
        case "cpu":
            has = torch.cpu.get_capabilities()
            native = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        case "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        case _:
            native = False
    return torch.bfloat16 if native else torch.float32


def precision(plan: InferencePlan | TrainingPlan, device: torch.device) -> torch.dtype:
    """The dtype that a plan asks for on a device."""
    match plan.precision:
        case "auto":
            return processor_precision(device)
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32


def prepare(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of ``network`` for inference on ``device``: weights in ``dtype``, channels last, no gradients, eval."""
    copy = deepcopy(network).eval().requires_grad_(False)
    # The stub of Module.to does not know memory_format.
    return copy.to(device=device, dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def choose_tile(plan: Plan, shape: Shape, bytes_per_value: int) -> Shape | None:
    """The tile (z, y, x) of a volume of ``shape``; None where it goes through in one pass.

    A network whose normalisation takes its statistics from the grid itself has only seen grids of the training patch:
    a volume of more than ``SEEN_SHARE`` times its voxels goes through in tiles of that patch. Else it is the largest
    tile whose pass fits ``plan.inference.memory_limit_gib``.

    Such a tile is a cube with an edge of a multiple of ``plan.network.divisor``, cut off where the volume is shorter.
    Counted with its pass are the sums of one band of tiles and a finished band that the caller holds.

    Raises MemoryLimitError ``memory.tile`` when not even an edge of two divisors fits.
    """
    limit = int(plan.inference.memory_limit_gib * GIB)
    channels, divisor = len(plan.channels), plan.network.divisor

    def peak(tile: Shape) -> int:
        return predicted_peak_bytes(plan.network, channels, plan.outputs, tile, bytes_per_value)

    def cube(edge: int) -> Shape:
        z, y, x = (min(edge, n) for n in shape)
        return z, y, x

    z, y, x = (min(n, p) for n, p in zip(shape, plan.training.patch_size, strict=True))
    patch: Shape = (z, y, x)
    if plan.network.normalisation in ("instance", "group") and prod(shape) > SEEN_SHARE * prod(patch):
        if peak(patch) + (2 * plan.outputs + 1) * patch[0] * shape[1] * shape[2] * 4 <= limit:
            return patch
    elif peak(shape) <= limit:
        return None
    needed = 0
    for edge in range(max(2 * divisor, max(padded(shape, divisor)) - divisor), divisor, -divisor):
        tile = cube(edge)
        band_bytes = (2 * plan.outputs + 1) * tile[0] * shape[1] * shape[2] * 4
        needed = peak(tile) + band_bytes
        if needed <= limit:
            return tile
    raise MemoryLimitError(
        "memory.tile",
        f"a volume of {shape} voxels in tiles of {cube(2 * divisor)}, the smallest, needs {needed / GIB:.2f} GiB; "
        f"inference.memory_limit_gib is {plan.inference.memory_limit_gib:g}; raise it to that, or use a network with "
        f"fewer levels, channels or outputs",
    )


def predict_logits(network: nn.Module, image_CZYX: Tensor, plan: Plan) -> Tensor:
    """Logits (K, Z, Y, X), float32 on the processor, of an image (C, Z, Y, X).

    An image smaller than the training patch is surrounded by zeros, as it is in training; see :func:`computed_shape`.
    ``network`` as :func:`prepare` made it. The whole result is held: of a volume in tiles it comes on top of
    ``plan.inference.memory_limit_gib``; use :func:`logit_bands` where that is too much.

    Raises MemoryLimitError ``memory.tile``, see :func:`choose_tile`.
    """
    shape: Shape = (image_CZYX.shape[1], image_CZYX.shape[2], image_CZYX.shape[3])
    before, after = _margins(plan, shape)
    if any(after):
        image_CZYX = F.pad(image_CZYX, [n for axis in (2, 1, 0) for n in (before[axis], after[axis])])
    bands = logit_bands(network, image_CZYX, plan)
    logits = next(bands)
    if logits.shape[1:] != image_CZYX.shape[1:]:
        first, logits = logits, torch.empty((plan.outputs, *image_CZYX.shape[1:]))
        done = 0
        for band in chain([first], bands):
            logits[:, done : done + band.shape[1]] = band
            done += band.shape[1]
    window = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
    return logits[(slice(None), *window)]


def computed_shape(plan: Plan, shape: Shape) -> Shape:
    """The grid on which a volume of ``shape`` is computed: along no axis shorter than the training patch.

    A network with normalisation has only seen grids of that size; a smaller one has other statistics.
    """
    z, y, x = (max(n, p) for n, p in zip(shape, plan.training.patch_size, strict=True))
    return z, y, x


def _margins(plan: Plan, shape: Shape) -> tuple[Shape, Shape]:
    """Zeros before and after each axis up to :func:`computed_shape`, as evenly as possible."""
    missing = [whole - n for whole, n in zip(computed_shape(plan, shape), shape, strict=True)]
    bz, by, bx = (m // 2 for m in missing)
    return (bz, by, bx), (missing[0] - bz, missing[1] - by, missing[2] - bx)


def logit_bands(network: nn.Module, image_CZYX: Tensor, plan: Plan) -> Iterator[Tensor]:
    """The logits of :func:`predict_logits` band after band along z, each (K, some of Z, Y, X).

    A volume that goes through in one pass is one band. Else overlapping tiles are averaged with Gaussian weights, and
    only the bands that tiles still add to are held.
    """
    shape: Shape = (image_CZYX.shape[1], image_CZYX.shape[2], image_CZYX.shape[3])
    tile = choose_tile(plan, shape, next(network.parameters()).element_size())
    regions = tiles(shape, tile or shape, plan.inference.overlap)
    if len(regions) == 1:
        yield _pass(network, image_CZYX)
    else:
        yield from _blended(network, image_CZYX, regions, plan.outputs)


def _blended(network: nn.Module, image_CZYX: Tensor, regions: list[Region], outputs: int) -> Iterator[Tensor]:
    """Bands of the weighted mean over regions of one shape; see :func:`logit_bands`."""
    _, _, height, width = image_CZYX.shape
    tile = regions[0].shape
    weights = torch.from_numpy(gaussian_weights(tile))
    sums = torch.zeros((outputs, tile[0], height, width))
    totals = torch.zeros((tile[0], height, width))
    top = 0
    for start, layer in groupby(regions, key=lambda region: region.start[0]):
        if done := start - top:
            # No later tile reaches the first slices: they leave, the rest moves up.
            yield sums[:, :done] / totals[:done]
            for held in (sums, totals):
                rest = held[..., done:, :, :].clone()
                held.zero_()
                held[..., : tile[0] - done, :, :] = rest
            top = start
        for region in layer:
            z, y, x = region.slices
            sums[..., y, x] += _pass(network, image_CZYX[:, z, y, x]).mul_(weights)
            totals[..., y, x] += weights
    yield sums.div_(totals)


def region_logits(
    network: nn.Module, read: Callable[[Region], Tensor], plan: Plan, shape: Shape, tile: Shape, region: Region
) -> Tensor:
    """The voxels of ``region`` of the logits (K, Z, Y, X) of :func:`predict_logits` in tiles of ``tile``, bit for bit.

    ``read`` gives the image (C, Z, Y, X) of a region of the volume, whose shape is ``shape``. Only the tiles that reach
    the region are computed; they are added up in the order in which those of the whole volume are.
    """
    before, _ = _margins(plan, shape)
    whole = computed_shape(plan, shape)
    z, y, x = (min(edge, n) for edge, n in zip(tile, whole, strict=True))
    edges: Shape = (z, y, x)
    starts = [tile_starts(n, edge, plan.inference.overlap) for n, edge in zip(whole, edges, strict=True)]
    start, stop = _moved(region.start, before), _moved(region.stop, before)
    reaching = [
        [s for s in axis if s < b and s + edge > a] for axis, edge, a, b in zip(starts, edges, start, stop, strict=True)
    ]
    alone = all(len(axis) == 1 for axis in starts)
    weights = torch.ones(edges) if alone else torch.from_numpy(gaussian_weights(edges))
    sums = torch.zeros((plan.outputs, *region.shape))
    totals = torch.zeros(region.shape)
    for corner in product(*reaching):
        logits = _pass(network, _padded_tile(read, corner, edges, before, shape)).mul_(weights)
        into, out_of = [], []
        for s, edge, a, b in zip(corner, edges, start, stop, strict=True):
            into.append(slice(max(s, a) - a, min(s + edge, b) - a))
            out_of.append(slice(max(s, a) - s, min(s + edge, b) - s))
        sums[(slice(None), *into)] += logits[(slice(None), *out_of)]
        totals[tuple(into)] += weights[tuple(out_of)]
    return sums.div_(totals)


def _padded_tile(
    read: Callable[[Region], Tensor], corner: tuple[int, ...], edges: Shape, before: Shape, shape: Shape
) -> Tensor:
    """The tile that begins at ``corner`` of the padded volume, with zeros where the volume, ``shape``, has no voxel."""
    start, stop, zeros = [], [], []
    for s, edge, margin, n in zip(corner, edges, before, shape, strict=True):
        start.append(max(0, s - margin))
        stop.append(min(n, s + edge - margin))
        zeros.append((start[-1] + margin - s, s + edge - margin - stop[-1]))
    tile = read(Region((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    if any(map(any, zeros)):
        tile = F.pad(tile, [n for pair in reversed(zeros) for n in pair])
    return tile


def _moved(index: Shape, by: Shape) -> Shape:
    z, y, x = (a + b for a, b in zip(index, by, strict=True))
    return z, y, x


def _pass(network: nn.Module, image_CZYX: Tensor) -> Tensor:
    """Logits (K, Z, Y, X), float32 on the processor, of one pass over an image of any size."""
    weight = next(network.parameters())
    with torch.inference_mode():
        logits = network(image_CZYX.unsqueeze(0).to(weight.device, weight.dtype, memory_format=torch.channels_last_3d))
    result = torch.empty(logits.shape[1:])
    return result.copy_(logits[0])
