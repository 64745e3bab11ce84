"""A scan and its mask made coarse and small, for looking at them in three dimensions in a page."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Triple, world_mm
from vnet_core.pictures.qc_sheet import grey_window
from vnet_core.plan import Label

LARGEST = 96
"""Most voxels along an axis of a preview."""
GREYS = 64
"""Levels of grey of a preview: more cannot be told apart in a volume rendering, and compress worse."""
MOST_LABELS = 255
"""Labels of a preview; a label map has a byte for each voxel."""


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """A scan and its mask on one coarse grid."""

    image: np.ndarray | None
    """Grey, uint8 (Z, Y, X); None where there is no scan to be shown."""
    labels: np.ndarray
    """uint8 (Z, Y, X): 0 background, i + 1 the i-th label."""
    geometry: Geometry
    centre_mm: Triple | None
    """World (x, y, z) in mm of a voxel of the largest label; None where there is none."""


def preview(
    image_ZYX: np.ndarray | None, labels_ZYX: np.ndarray, geometry: Geometry, labels: Sequence[Label]
) -> Preview:
    """At most ``LARGEST`` voxels along each axis, made of whole blocks of the grid's voxels.

    ``image_ZYX``: any real dtype (Z, Y, X), or None; ``labels_ZYX``: integers (Z, Y, X), both on ``geometry``. A voxel
    has the mean grey of its block between the 1st and 99th percentile of the scan, and the label that most of the block
    has. A label that no block has most of keeps the blocks that hold most of it, so that nothing small vanishes. The
    last block of an axis may be smaller than the others. Labels after the ``MOST_LABELS``-th are left out.
    Raises ScanError ``scan.shape`` when an array does not fit the grid.
    """
    for array in (labels_ZYX,) if image_ZYX is None else (labels_ZYX, image_ZYX):
        if array.shape != geometry.shape:
            raise ScanError("scan.shape", f"an array of shape {array.shape} does not fit the grid {geometry.shape}")
    step_z, step_y, step_x = (-(-n // LARGEST) for n in geometry.shape)
    steps = (step_z, step_y, step_x)
    coarse = _coarse_labels(labels_ZYX, steps, labels[:MOST_LABELS])
    grid = _coarse_grid(geometry, steps, coarse.shape)
    grey = None if image_ZYX is None else _coarse_grey(image_ZYX, steps)
    return Preview(grey, coarse, grid, _centre_mm(coarse, grid))


def nifti(array_ZYX: np.ndarray, geometry: Geometry) -> bytes:
    """A uint8 array (Z, Y, X) as an uncompressed NIfTI-1 file with its sform and no text.

    NIfTI-1 header of 348 bytes, four bytes that announce no extension, then the voxels, x fastest; its world is RAS.
    """
    assert array_ZYX.dtype == np.uint8
    assert array_ZYX.shape == geometry.shape
    header = bytearray(352)
    z, y, x = array_ZYX.shape
    spacing_z, spacing_y, spacing_x = geometry.spacing_mm
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, x, y, z, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<8f", header, 76, 1, spacing_x, spacing_y, spacing_z, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    # millimetres; sform to scanner coordinates
    struct.pack_into("<B", header, 123, 2)
    struct.pack_into("<2h", header, 252, 0, 1)
    columns_xyz = geometry.matrix[:3, [2, 1, 0, 3]]
    struct.pack_into("<12f", header, 280, *(np.diag((-1.0, -1.0, 1.0)) @ columns_xyz).ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + np.ascontiguousarray(array_ZYX).tobytes()


def _coarse_grid(geometry: Geometry, steps: tuple[int, int, int], shape: tuple[int, ...]) -> Geometry:
    """The grid of the blocks; the origin is the centre of the first."""
    z, y, x = (min(step, n) for step, n in zip(steps, geometry.shape, strict=True))
    first = tuple(float(v) for v in world_mm(geometry, (np.array((z, y, x)) - 1) / 2))
    spacing = tuple(s * step for s, step in zip(geometry.spacing_mm, steps, strict=True))
    return replace(
        geometry,
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        origin_mm=(first[0], first[1], first[2]),
    )


def _sums(array_ZYX: np.ndarray, steps: Sequence[int], dtype: type) -> np.ndarray:
    """Sum over each block."""
    for axis, step in enumerate(steps):
        if step > 1:
            array_ZYX = np.add.reduceat(array_ZYX, np.arange(0, array_ZYX.shape[axis], step), axis=axis, dtype=dtype)
    return array_ZYX.astype(dtype, copy=False)


def _block_sizes(shape: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """Voxels of each block."""
    z, y, x = (
        np.minimum(step, n - np.arange(0, n, step)).astype(np.float32) for n, step in zip(shape, steps, strict=True)
    )
    return z[:, None, None] * y[:, None] * x


def _coarse_grey(image_ZYX: np.ndarray, steps: tuple[int, int, int]) -> np.ndarray:
    low, high = grey_window(image_ZYX)
    slabs = []
    # slab by slab, so that a large scan is never held twice
    for start in range(0, image_ZYX.shape[0], steps[0]):
        slab = np.nan_to_num(image_ZYX[start : start + steps[0]].astype(np.float32), nan=low, posinf=high, neginf=low)
        slabs.append(_sums(np.clip(slab, low, high), steps, np.float32))
    mean = np.concatenate(slabs) / _block_sizes(image_ZYX.shape, steps)
    levels = np.rint((mean - low) / (high - low) * (GREYS - 1))
    return np.rint(levels * (255 / (GREYS - 1))).astype(np.uint8)


def _coarse_labels(labels_ZYX: np.ndarray, steps: tuple[int, int, int], labels: Sequence[Label]) -> np.ndarray:
    sizes = _block_sizes(labels_ZYX.shape, steps)
    most = np.zeros(sizes.shape, np.float32)
    coarse = np.zeros(sizes.shape, np.uint8)
    filled = np.zeros(sizes.shape, np.float32)
    boxes = ndimage.find_objects(labels_ZYX, max_label=max((label.value for label in labels), default=1))
    held = {}
    for number, label in enumerate(labels, 1):
        box = boxes[label.value - 1]
        if box is None:
            continue
        # out to whole blocks, so that the sums of the box are those of the whole
        whole = tuple(
            slice(s.start // step * step, -(-s.stop // step) * step) for s, step in zip(box, steps, strict=True)
        )
        blocks = tuple(slice(w.start // step, -(-w.stop // step)) for w, step in zip(whole, steps, strict=True))
        counts = _sums((labels_ZYX[whole] == label.value).view(np.uint8), steps, np.float32)
        over = counts > most[blocks]
        coarse[blocks][over] = number
        most[blocks][over] = counts[over]
        filled[blocks] += counts
        held[number] = (blocks, counts)
    coarse[2 * filled < sizes] = 0
    for number, (blocks, counts) in held.items():
        if not (coarse[blocks] == number).any():
            coarse[blocks][counts == counts.max()] = number
    return coarse


def _centre_mm(coarse: np.ndarray, geometry: Geometry) -> Triple | None:
    """The voxel of the largest label that lies nearest to that label's centroid."""
    counts = np.bincount(coarse.ravel())
    counts[0] = 0
    if not counts.any():
        return None
    voxels = np.argwhere(coarse == counts.argmax())
    nearest = voxels[np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()]
    x, y, z = (float(v) for v in world_mm(geometry, nearest))
    return (x, y, z)
