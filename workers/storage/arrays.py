"""Arrays in the storage root as Zarr v3: the only place that knows Zarr.

Arrays are sharded; every chunk carries the zstd frame's checksum and a CRC32C, empty chunks are written, and one
writer writes a whole shard, so a lost or damaged chunk is an error and never reads as background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
import zarr.abc.store
import zarr.errors
import zarr.storage
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfigParams

from vnet_core.colours import rgb
from vnet_core.errors import StorageError
from vnet_core.geometry import Geometry, Shape, to_mapping
from vnet_core.plan import Label
from workers.storage.buckets import Bucket
from workers.storage.store import Root

CHUNK_EDGE = 64
"""Voxels along each edge of a chunk, the unit of reading."""
SHARD_EDGE = 256
"""Voxels along each edge of a shard, the unit of writing: one file."""
_ZYX = ("z", "y", "x")
_WRITING: ArrayConfigParams = {"write_empty_chunks": True}
"""How arrays are written; Zarr keeps it nowhere, so whoever opens one says it again."""


def write_arrays(root: Root, prefix: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """A Zarr group under ``prefix`` with arrays (..., Z, Y, X) and attributes; what was there is replaced."""
    root.delete(prefix)
    with root.room():
        group = zarr.open_group(zarr_store(root, prefix), mode="w", zarr_format=3, attributes=attributes)
        for name, array in arrays.items():
            _write(group, name, array)


@dataclass(frozen=True, slots=True)
class InSlabs:
    """An array (..., Z, Y, X) of which some planes are made at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    planes: Callable[[slice], np.ndarray]
    """Makes planes along z."""


def write_in_slabs(
    root: Root, prefix: str, arrays: Mapping[str, InSlabs], attributes: dict[str, Any], planes: int
) -> None:
    """As :func:`write_arrays`, so many planes along z at a time; the files are the same."""
    create_arrays(root, prefix, arrays, attributes)
    for name, array in arrays.items():
        write_planes(StoredArray(root, prefix, name), array, slice(0, array.shape[-3]), planes)


def create_arrays(root: Root, prefix: str, arrays: Mapping[str, InSlabs], attributes: dict[str, Any]) -> None:
    """The group of :func:`write_in_slabs` with arrays whose planes are still to be written."""
    root.delete(prefix)
    with root.room():
        group = zarr.open_group(zarr_store(root, prefix), mode="w", zarr_format=3, attributes=attributes)
        for name, array in arrays.items():
            _create(group, name, array.shape, array.dtype, _usual(array.shape))


def write_planes(target: StoredArray, array: InSlabs, wanted: slice, planes: int) -> None:
    """The ``wanted`` planes of an array that was created, so many at a time. They begin and end with a shard."""
    step = planes // CHUNK_EDGE * CHUNK_EDGE or planes  # else chunks would be written twice
    for start in range(wanted.start, wanted.stop, step):
        part = slice(start, min(start + step, wanted.stop))
        target.write(array.planes(part), ..., part, slice(None), slice(None))


def _write(group: zarr.Group, name: str, array: np.ndarray, dimension_names: Sequence[str] | None = None) -> None:
    _create(group, name, array.shape, array.dtype, _usual(array.shape), dimension_names)[...] = array


def _usual(shape: Sequence[int]) -> tuple[Shape, Shape]:
    """Chunk and shard along z, y, x of an array of this shape."""
    z, y, x = (min(CHUNK_EDGE, n) for n in shape[-3:])
    # a shard is a whole number of chunks
    a, b, c = (e * max(1, min(SHARD_EDGE // e, -(-n // e))) for e, n in zip((z, y, x), shape[-3:], strict=True))
    return (z, y, x), (a, b, c)


def shard_planes(shape: Sequence[int]) -> int:
    """Planes along z of one shard of an array of this shape."""
    return _usual(shape)[1][0]


def _create(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    dtype: np.dtype,
    edges: tuple[Shape, Shape],
    dimension_names: Sequence[str] | None = None,
) -> zarr.Array:
    """An array without values; ``edges`` of a chunk and of a shard along z, y, x."""
    lead = (1,) * (len(shape) - 3)
    inner, outer = edges
    codec = ShardingCodec(
        chunk_shape=(*lead, *inner),
        codecs=[BytesCodec(), ZstdCodec(level=3, checksum=True), Crc32cCodec()],
        index_codecs=[BytesCodec(), Crc32cCodec()],
    )
    return group.create_array(
        name,
        shape=tuple(shape),
        dtype=dtype,
        chunks=(*lead, *outer),
        serializer=codec,
        filters=None,
        compressors=None,
        dimension_names=dimension_names,
        config=_WRITING,
    )


def read_array(root: Root, prefix: str, name: str) -> np.ndarray:
    """A whole array. StorageError ``store.corrupt`` when a chunk is missing or damaged."""
    return StoredArray(root, prefix, name).whole().read(...)


def write_ome_labels(root: Root, prefix: str, mask: np.ndarray, geometry: Geometry, labels: Sequence[Label]) -> None:
    """A mask (Z, Y, X) as an OME-Zarr 0.5 image-label group under ``prefix``.

    The axes are the source scan's array axes z, y, x in millimetres; scale and translation are along them. The full
    geometry, with direction cosines, is in the attribute ``vnet``. Every label has a colour, its name and its volume.
    """
    voxels = np.zeros(int(mask.max(initial=0)) + 1, np.int64)
    for plane in mask:
        voxels += np.bincount(plane.ravel(), minlength=len(voxels))
    counts = {label.value: int(voxels[label.value : label.value + 1].sum()) for label in labels}
    group = _ome_group(root, prefix, geometry, labels, counts)
    _write(group, "0", mask, dimension_names=_ZYX)


def create_ome_labels(
    root: Root, prefix: str, dtype: np.dtype, geometry: Geometry, labels: Sequence[Label], voxels: Mapping[int, int]
) -> StoredArray:
    """The group of :func:`write_ome_labels` with its array still to be written; ``voxels`` by label value."""
    group = _ome_group(root, prefix, geometry, labels, voxels)
    _create(group, "0", geometry.shape, dtype, _usual(geometry.shape), _ZYX)
    return StoredArray(root, prefix, "0")


def _ome_group(
    root: Root, prefix: str, geometry: Geometry, labels: Sequence[Label], voxels: Mapping[int, int]
) -> zarr.Group:
    scale = {"type": "scale", "scale": list(geometry.spacing_mm)}
    along_axes = np.asarray(geometry.origin_mm) @ np.asarray(geometry.direction)
    translation = {"type": "translation", "translation": [float(v) for v in along_axes]}
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": "mask",
                "axes": [{"name": n, "type": "space", "unit": "millimeter"} for n in _ZYX],
                "datasets": [{"path": "0", "coordinateTransformations": [scale, translation]}],
            }
        ],
        "image-label": {
            "colors": [{"label-value": label.value, "rgba": [*rgb(i), 255]} for i, label in enumerate(labels)],
            "properties": [
                {
                    "label-value": label.value,
                    "name": label.name,
                    "volume_ml": voxels[label.value] * geometry.voxel_ml,
                }
                for label in labels
            ],
        },
    }
    root.delete(prefix)
    attributes: dict[str, Any] = {"ome": ome, "vnet": {"geometry": to_mapping(geometry)}}
    return zarr.open_group(zarr_store(root, prefix), mode="w", zarr_format=3, attributes=attributes)


def zarr_store(root: Root, prefix: str) -> zarr.abc.store.Store:
    """What lies below a prefix as Zarr sees it. Of its own for each: Zarr would make groups of all that lies above."""
    if isinstance(root.place, Bucket):
        return zarr.storage.ObjectStore(root.place.below(prefix))
    return zarr.storage.LocalStore(root.home / prefix)


class StoredArray:
    """An array (..., Z, Y, X) of the root that is read and written by regions, for what is larger than memory.

    A shard has one writer at a time.
    """

    def __init__(self, root: Root, prefix: str, name: str) -> None:
        """Open it. StorageError ``store.corrupt`` where it is damaged."""
        self.root, self.prefix, self.name = root, prefix, name
        with self._sound():
            # ours are of version 3: one of version 2 may name a codec that unpickles
            array = zarr.open_array(zarr_store(root, f"{prefix}/{name}"), mode="r+", zarr_format=3)
        self._array = array.with_config(_WRITING)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along every axis."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return np.dtype(self._array.dtype)

    @property
    def shards(self) -> tuple[int, ...]:
        """Voxels of a file along every axis."""
        return self._array.shards or self._array.chunks

    def whole(self) -> StoredArray:
        """The array; StorageError ``store.corrupt`` where a shard is missing, which would read as zeros."""
        start = f"{self.prefix}/{self.name}/"
        found = {stored.key.removeprefix(start) for stored in self.root.walk(f"{start}c") if stored.size}
        shards = np.ndindex(*(-(-n // s) for n, s in zip(self.shape, self.shards, strict=True)))
        missing = [index for index in shards if "/".join(["c", *map(str, index)]) not in found]
        if missing:
            raise self._damaged(f"it lacks {len(missing)} shards, first {missing[0]}")
        return self

    def read(self, *region: slice | EllipsisType) -> np.ndarray:
        """A region; StorageError ``store.corrupt`` when a chunk of it is damaged."""
        with self._sound():
            return np.asarray(self._array[region])

    def __getitem__(self, region: slice | tuple[slice, ...]) -> np.ndarray:
        """As :meth:`read`."""
        return self.read(*(region if isinstance(region, tuple) else (region,)))

    def write(self, values: np.ndarray, *region: slice | EllipsisType) -> None:
        """Replace a region; StorageError ``store.full`` when no space is left."""
        with self.root.room():
            self._array[region] = values

    @contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            with self.root.room():
                yield
        except (zarr.errors.BaseZarrError, FileNotFoundError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, reason: object) -> StorageError:
        return StorageError(
            "store.corrupt", f"{self.prefix}/{self.name} is damaged ({reason}); delete it and run again"
        )


def create_array(
    root: Root, prefix: str, shape: Sequence[int], dtype: np.dtype, chunk: Shape, shard: Shape
) -> StoredArray:
    """An array without values at ``prefix``, what was there is replaced; ``chunk`` and ``shard`` along z, y, x."""
    parent, _, name = prefix.rpartition("/")
    root.delete(prefix)
    group = zarr.open_group(zarr_store(root, parent), mode="a", zarr_format=3)
    _create(group, name, shape, dtype, (chunk, shard))
    return StoredArray(root, parent, name)
