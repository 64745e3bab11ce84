"""A mask larger than memory, published as :mod:`workers.segmentation.masks` does, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vnet_core.geometry import Geometry, same_grid, to_canonical, world_mm
from vnet_core.plan import Label, Plan
from vnet_core.sections import Cleaning
from vnet_core.slabs import Measured, clean_slabs, measure_slabs
from workers.segmentation.masks import (
    LastWords,
    Mask,
    check_places,
    facts_of,
    mask_file,
    mean_index,
    publish_mask,
    put_picture,
    put_report,
    translation,
    unproven,
    with_values,
)
from workers.sources.scans import label_planes, read_geometry, write_label
from workers.storage.arrays import CHUNK_EDGE, StoredArray, create_ome_labels
from workers.storage.store import Root

NO_LARGE_PICTURE = "none, larger than memory"
"""What ``report.json`` says of the picture of a scan that is not read whole."""
PICTURE_BYTES = 8
"""Per voxel, for scan and mask while a picture is made of them."""


def clean_map(values: StoredArray, voxel_ml: float, cleanings: Sequence[Cleaning]) -> None:
    """Clean a stored label map (Z, Y, X) in place."""
    clean_slabs(_reader(values), _writer(values), _shape(values), voxel_ml, cleanings)


def publish_large_mask(root: Root, key: str, mask: Mask[StoredArray], last_words: LastWords = dict[str, Any]) -> None:
    """As :func:`workers.segmentation.masks.publish_mask`; masks in formats of DICOM are held whole.

    The values lie below the key of the result, and are removed when that is published.
    """
    geometry = mask.case.geometry
    assert geometry is not None, "a case without geometry was refused at ingest"
    if root.receipt(key) is None and mask_file(mask.mask_format).endswith(".dcm"):
        publish_mask(root, key, with_values(mask, mask.values.read(slice(None))), last_words)
        return
    last_words()
    if root.receipt(key) is not None:
        root.delete(mask.values.prefix)
        return
    with root.room():
        _publish(root, key, mask, geometry, last_words)


def _publish(root: Root, key: str, mask: Mask[StoredArray], geometry: Geometry, last_words: LastWords) -> None:
    scratch = mask.values.prefix
    for name in root.names(key):  # what a killed process has left
        if f"{key}/{name}" != scratch:
            root.delete(f"{key}/{name}")
    measured = measure_slabs(_reader(mask.values), geometry, mask.plan.labels, mask.plan.regions)
    table, labels = translation(mask.plan.labels, mask.plan.output)
    translated = _Translated(mask.values, table)
    name, ome = mask_file(mask.mask_format), mask_file("ome-zarr")
    for file in sorted({name, ome}):
        if file == ome:
            _write_ome(root, f"{key}/{file}", translated, labels, _counted(measured, mask.plan, table), geometry)
        else:
            with root.written(f"{key}/{file}") as path:
                write_label(path, translated, geometry)
        _prove(root, f"{key}/{file}", translated, geometry)
    fits = prod(geometry.shape) * PICTURE_BYTES <= mask.plan.inference.memory_limit_gib * 2**30
    picture = put_picture(root, key, mask, mask.values.read(slice(None))) if fits else NO_LARGE_PICTURE
    put_report(root, key, mask, picture, measured.labels, measured.regions)
    root.delete(scratch)
    root.seal(key, {**facts_of(mask), **last_words()})


def _counted(measured: Measured, plan: Plan, table: np.ndarray) -> dict[int, int]:
    """Voxels by the value that they are written with."""
    counts = dict.fromkeys(map(int, table), 0)
    for label, report in zip(plan.labels, measured.labels, strict=True):
        counts[int(table[label.value])] += report.voxels
    return counts


@dataclass(frozen=True, slots=True, eq=False)
class _Translated:
    """A stored label map with its values as they are written."""

    stored: StoredArray
    table: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.table.dtype

    def read(self, *region: slice) -> np.ndarray:
        values: np.ndarray = self.table[self.stored.read(*region)]
        return values

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self.shape[0], CHUNK_EDGE):
            for plane in self.stored.read(slice(start, start + CHUNK_EDGE)):
                yield self.table[plane]


def _write_ome(
    root: Root,
    key: str,
    values: _Translated,
    labels: Sequence[Label],
    voxels: Mapping[int, int],
    geometry: Geometry,
) -> None:
    target = create_ome_labels(root, key, values.dtype, geometry, labels, voxels)
    for corner in np.ndindex(*(-(-n // s) for n, s in zip(target.shape, target.shards, strict=True))):
        region = [slice(i * s, (i + 1) * s) for i, s in zip(corner, target.shards, strict=True)]
        target.write(values.read(*region), *region)


def _prove(root: Root, key: str, values: _Translated, geometry: Geometry) -> None:
    """Read the mask back plane by plane and compare voxels, grid and, on two ways, the centroid in world mm."""
    with root.at_hand(key) as path:
        found = read_geometry(path)
        if not same_grid(found, geometry):
            raise unproven(key)
        planes = _ome_planes(root, key) if path.is_dir() else label_planes(path)
        along = [np.zeros(n, np.int64) for n in geometry.shape]
        theirs = [np.zeros(n, np.int64) for n in geometry.shape]
        # to the end of both, so that a file is read to its checksum
        for z, (plane, back) in enumerate(zip(values, planes, strict=True)):
            if not np.array_equal(plane, back):
                raise unproven(key)
            for counts, seen in ((along, plane), (theirs, back)):
                counts[0][z] = np.count_nonzero(seen)
                counts[1] += np.count_nonzero(seen, axis=1)
                counts[2] += np.count_nonzero(seen, axis=0)
    if not along[0].any():
        return
    turn, canonical = to_canonical(geometry)
    mean = mean_index(along)
    turned = [
        geometry.shape[axis] - 1 - mean[axis] if flip else mean[axis]
        for axis, flip in zip(turn.source_axis, turn.flip, strict=True)
    ]
    check_places(key, world_mm(canonical, np.array(turned)), world_mm(found, mean_index(theirs)), geometry)


def _ome_planes(root: Root, key: str) -> Iterator[np.ndarray]:
    stored = StoredArray(root, key, "0").whole()
    for start in range(0, stored.shape[0], CHUNK_EDGE):
        yield from stored.read(slice(start, start + CHUNK_EDGE))


def _shape(values: StoredArray) -> tuple[int, int, int]:
    z, y, x = values.shape
    return z, y, x


def _reader(values: StoredArray) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: values.read(slice(start, stop))


def _writer(values: StoredArray) -> Callable[[int, np.ndarray], None]:
    return lambda start, planes: values.write(planes, slice(start, start + len(planes)))
