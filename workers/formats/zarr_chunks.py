"""The array of a Zarr folder, version 2 or 3, judged before Zarr sees it: metadata, codecs, every chunk in its place.

Only plain numbers pass, and only codecs that neither run code nor change values. A blosc chunk is held against its own
header, because its decoder reads on behind the end of one that was cut off. By the Zarr specification an absent chunk
reads as the fill value; here it is a lost one, since nothing tells it from an empty one.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vnet_core.errors import ScanError
from workers.formats.blocks import open_regular, refuse_bomb
from workers.formats.headers import grid_shape, voxel_dtype

_METADATA_BYTES = 1 << 22
_CHUNK_BYTES = 1 << 30
"""Largest chunk that is decoded."""
_CODECS = {"bytes", "transpose", "gzip", "zstd", "blosc", "crc32c", "sharding_indexed"}
_COMPRESSORS = {"blosc", "zstd", "gzip", "zlib", "bz2", "lz4", "lzma"}
_CHECKSUM_BYTES = {"crc32": 4, "crc32c": 4, "adler32": 4, "fletcher32": 4, "shuffle": 0}
_ABSENT = 2**64 - 1
"""Offset of a chunk that a shard does not hold."""


class Part(BaseModel):
    """A part of Zarr metadata; unknown keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Codec(Part):
    name: str
    configuration: dict[str, Any] = {}


class _Named(Part):
    name: str = "default"
    configuration: dict[str, Any] = {}


Sizes = tuple[Annotated[int, Field(ge=0)], ...]
"""Voxels along each axis."""


class _ArrayV3(Part):
    shape: Sizes
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named = _Named()
    codecs: tuple[_Codec, ...]
    storage_transformers: tuple[Any, ...] = Field(default=(), max_length=0)


class _Chunked(Part):
    chunk_shape: tuple[Annotated[int, Field(ge=1)], ...]


class _Sharded(_Chunked):
    codecs: tuple[_Codec, ...]
    index_codecs: tuple[_Codec, ...]
    index_location: Literal["start", "end"] = "end"


class _Id(Part):
    id: str


class _ArrayV2(Part):
    shape: Sizes
    chunks: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: str
    compressor: _Id | None = None
    filters: tuple[_Id, ...] | None = None
    separator: Literal[".", "/"] = Field(default=".", alias="dimension_separator")


P = TypeVar("P", bound=Part)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array whose chunks are all there."""

    shape: Sizes
    dtype: np.dtype
    """In native byte order; Booleans are uint8."""
    files: tuple[Path, ...]
    """Metadata and chunks."""


@dataclass(frozen=True, slots=True)
class _Blosc:
    """What stands in a file around a chunk in blosc, in bytes."""

    within: int
    """Checksums that are compressed with the voxels."""
    behind: int
    """Checksums of the compressed chunk."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an array is cut into files."""

    shape: Sizes
    dtype: np.dtype
    chunks: Sizes
    """Voxels of one file."""
    prefix: str
    separator: str
    shard: _Sharded | None = None
    blosc: _Blosc | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Files along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


def judged_array(array: Path, version: Literal[2, 3]) -> StoredArray:
    """The array in a folder.

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.truncated`` (chunks absent or cut off), ``scan.dtype``,
    ``scan.empty``, ``scan.too-large``, ``scan.bomb``, ``scan.path-escape``.
    """
    metadata = array / ("zarr.json" if version == 3 else ".zarray")
    plan = _plan_3(read_json(metadata)) if version == 3 else _plan_2(read_json(metadata))
    if len(plan.chunks) != len(plan.shape):
        raise ScanError(
            "scan.header", f"chunks of {len(plan.chunks)} axes do not divide {len(plan.shape)} axes; rewrite the array"
        )
    chunk_bytes = math.prod(plan.chunks) * plan.dtype.itemsize
    if chunk_bytes > _CHUNK_BYTES:
        raise ScanError(
            "scan.too-large", f"one chunk has {chunk_bytes} bytes, at most {_CHUNK_BYTES} are read; use smaller chunks"
        )
    if any(n < 1 for n in plan.shape):
        raise ScanError("scan.empty", f"the array has {plan.shape} voxels along its axes; each needs at least 1")
    grid_shape((math.prod(plan.shape), 1, 1))  # the limit, before anything is counted
    present = dict(_regular_files(array))
    expected = math.prod(plan.counts)
    files: dict[str, tuple[int, ...]] = {}
    if expected <= len(present):
        keys = ((plan.prefix + plan.separator.join(map(str, index)), index) for index in np.ndindex(*plan.counts))
        files = {key: index for key, index in keys if key in present}
    lost = expected - len(files)
    if not lost and (plan.shard or plan.blosc):
        lost = sum(_lost_in_file(array / key, plan, index) for key, index in files.items())
    if lost:
        raise ScanError(
            "scan.truncated",
            f"{lost} chunks of the array are absent or cut off ({expected} files expected); copy the folder again from"
            " its source, or write it with its empty chunks",
        )
    refuse_bomb(math.prod(plan.shape) * plan.dtype.itemsize, sum(present[key] for key in files))
    return StoredArray(plan.shape, plan.dtype, (metadata, *(array / key for key in files)))


# --- metadata


def _plan_3(content: dict[str, Any]) -> _Plan:
    three = parsed(_ArrayV3, content)
    if three.chunk_grid.name != "regular":
        raise ScanError("scan.header", "the chunks do not all have one size; rewrite the array")
    chunks = parsed(_Chunked, three.chunk_grid.configuration).chunk_shape
    dtype = _dtype(re.fullmatch("bool|(u?int|float)(8|16|32|64)", three.data_type), three.data_type)
    codecs, shard = _names(three.codecs), None
    _refuse_unknown(set(codecs), _CODECS)
    if "sharding_indexed" in codecs:
        shard = parsed(_Sharded, three.codecs[-1].configuration)
        codecs = _names(shard.codecs)
        _refuse_unknown(set(codecs), _CODECS - {"sharding_indexed"})
        if len(three.codecs) > 1 or _names(shard.index_codecs) not in (["bytes", "crc32c"], ["bytes"]):
            raise ScanError("scan.unreadable", "shards are packed in a way that is not read; rewrite the array")
        if len(shard.chunk_shape) != len(chunks) or any(o % i for o, i in zip(chunks, shard.chunk_shape, strict=True)):
            raise ScanError("scan.header", f"chunks {shard.chunk_shape} do not divide shards {chunks}; rewrite it")
    default = {"default": "/", "v2": "."}.get(three.chunk_key_encoding.name, "")
    separator = three.chunk_key_encoding.configuration.get("separator", default)
    if not default or separator not in (".", "/"):
        raise ScanError("scan.header", "the chunk key encoding is not known; rewrite the array")
    prefix = "c" + separator if three.chunk_key_encoding.name == "default" else ""
    return _Plan(three.shape, dtype, chunks, prefix, separator, shard, _blosc_among(codecs))


def _plan_2(content: dict[str, Any]) -> _Plan:
    two = parsed(_ArrayV2, content)
    dtype = _dtype(re.fullmatch(r"\|b1|[<>|][iuf][1248]", two.dtype), two.dtype)
    filters = [f.id for f in two.filters or ()]
    compressor = two.compressor.id if two.compressor else ""
    _refuse_unknown({compressor} - {""}, _COMPRESSORS)
    _refuse_unknown(set(filters), set(_CHECKSUM_BYTES))
    blosc = _Blosc(sum(_CHECKSUM_BYTES[name] for name in filters), 0) if compressor == "blosc" else None
    return _Plan(two.shape, dtype, two.chunks, "", two.separator, None, blosc)


def _blosc_among(codecs: list[str]) -> _Blosc | None:
    if "blosc" not in codecs:
        return None
    at = codecs.index("blosc")
    behind = codecs[at + 1 :]
    if codecs[at - 1 : at] != ["bytes"] or set(behind) - {"crc32c"}:
        raise ScanError("scan.unreadable", "blosc stands among other compressors, which is not read; rewrite the array")
    return _Blosc(0, 4 * len(behind))


def _names(codecs: tuple[_Codec, ...]) -> list[str]:
    return [codec.name for codec in codecs]


def _dtype(plain: re.Match[str] | None, name: str) -> np.dtype:
    short = {"|b1": "|u1", "bool": "uint8"}.get(name, name)
    known = plain is not None and short not in ("float8", "float16", "<f1", ">f1", "|f1", "<f2", ">f2", "|f2")
    return voxel_dtype(np.dtype(short).str[1:] if known else None, "this data type", "=")


def _refuse_unknown(found: set[str], known: set[str]) -> None:
    if found - known:
        raise ScanError(
            "scan.unreadable", f"{len(found - known)} codecs are none of {', '.join(sorted(known))}; rewrite the array"
        )


# --- files


def _lost_in_file(file: Path, plan: _Plan, index: tuple[int, ...]) -> int:
    """Chunks of the array that the file at ``index`` does not hold whole."""
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        if plan.shard is None:
            return 0 if _is_whole(stream, 0, size, plan, plan.chunks) else 1
        found = _shard_index(stream, size, plan, plan.shard, index)
        return sum(
            at + length > size  # so is the mark of an absent one
            or not _is_whole(stream, int(at), int(length), plan, plan.shard.chunk_shape)
            for at, length in found.tolist()
        )


def _shard_index(stream: BinaryIO, size: int, plan: _Plan, shard: _Sharded, index: tuple[int, ...]) -> np.ndarray:
    """Offset and length (n, 2) of the chunks of a shard that lie within the array."""
    counts = tuple(o // i for o, i in zip(plan.chunks, shard.chunk_shape, strict=True))
    count = math.prod(counts)
    packed = 16 * count + (4 if len(shard.index_codecs) == 2 else 0)
    entries = np.full((count, 2), _ABSENT, "<u8")
    if size >= packed:
        stream.seek(0 if shard.index_location == "start" else size - packed)
        entries = np.frombuffer(stream.read(16 * count), "<u8")
    edges = zip(index, plan.chunks, shard.chunk_shape, plan.shape, strict=True)
    inside = tuple(slice(-(-min(n - at * o, o) // i)) for at, o, i, n in edges)
    return entries.reshape(*counts, 2)[inside].reshape(-1, 2)


def _is_whole(stream: BinaryIO, at: int, length: int, plan: _Plan, chunk: Sizes) -> bool:
    """Whether a chunk in blosc has the length of its own header, which says the length of its voxels too."""
    if plan.blosc is None:
        return True
    stream.seek(at)
    header = stream.read(16)
    if length < 16 or len(header) < 16:
        return False
    inflated, packed = struct.unpack("<4xI4xI", header)
    wanted = math.prod(chunk) * plan.dtype.itemsize + plan.blosc.within
    return bool(inflated == wanted and packed == length - plan.blosc.behind)


def _regular_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Path within the folder and size of every file below it; ``scan.path-escape`` for links, sockets and the like."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            try:
                found = path.lstat()
            except OSError as error:
                raise ScanError("scan.unreadable", f"a chunk cannot be looked at: {error.strerror}") from None
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise ScanError("scan.path-escape", "the Zarr folder holds links or devices; copy plain files into it")
            if stat.S_ISREG(found.st_mode):
                yield path.relative_to(folder).as_posix(), found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bearable size; ``scan.header``."""
    with open_regular(path) as file:
        text = file.read(_METADATA_BYTES + 1)
    try:
        content = json.loads(text) if len(text) <= _METADATA_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ScanError("scan.header", f"Zarr metadata are no JSON object of at most {_METADATA_BYTES} bytes")
    return content


def parsed(kind: type[P], content: object) -> P:
    """``content`` as ``kind``; ``scan.header`` with the place where it is not."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
        raise ScanError(
            "scan.header", f"the Zarr metadata are absent or wrong at {where!r}; rewrite the image"
        ) from None
