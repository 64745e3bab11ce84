"""OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3) images and label maps: level 0 as a volume.

Axes are z, y, x, after c and t of one voxel. Units of length are scaled to mm; without one the scan is refused. The
format has no direction cosines: axes are taken to grow to the head, back and left (as ITK does), with the warning
``geometry.assumed-axes``, unless the axes carry that orientation, or the attribute ``vnet`` of our own masks a grid.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import zarr
import zarr.errors
from pydantic import Field

from vnet_core.errors import ScanError
from vnet_core.geometry import CANONICAL_DIRECTION, from_mapping
from workers.formats.blocks import unchanged
from workers.formats.headers import FileGrid, declared_grid, grid_shape
from workers.formats.zarr_chunks import Part, Sizes, judged_array, parsed, read_json

_MM = {
    "meter": 1e3, "decimeter": 1e2, "centimeter": 10.0, "millimeter": 1.0, "micrometer": 1e-3, "nanometer": 1e-6,
}  # fmt: skip
_LPS = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}
_DECODING = (
    zarr.errors.BaseZarrError, ValueError, TypeError, KeyError, RuntimeError, OSError, EOFError, zlib.error,
)  # fmt: skip
"""What Zarr and its codecs raise for damaged chunks."""


class _Axis(Part):
    name: str
    unit: str = ""
    orientation: Any = None


class _Transform(Part):
    type: Literal["scale", "translation", "identity"]
    scale: tuple[float, ...] = ()
    translation: tuple[float, ...] = ()


class _Dataset(Part):
    path: str
    transforms: tuple[_Transform, ...] = Field(alias="coordinateTransformations", min_length=1, max_length=2)


class _Multiscale(Part):
    axes: tuple[_Axis, ...]
    datasets: tuple[_Dataset, ...] = Field(min_length=1)
    transforms: tuple[_Transform, ...] = Field(default=(), alias="coordinateTransformations", max_length=2)


@dataclass(frozen=True, slots=True)
class Image:
    """Level 0 of an image, judged by its metadata and the files that are there."""

    grid: FileGrid
    array: Path
    """Folder of the array."""
    dtype: np.dtype
    """Native byte order; Booleans are uint8."""
    files: tuple[Path, ...]
    """Metadata and chunks, sorted."""
    warnings: tuple[str, ...]


def is_ome_zarr(path: Path) -> bool:
    """Whether the path is a Zarr folder."""
    names = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
    return os.path.isdir(path) and any(os.path.isfile(path / name) for name in names)


def ome_zarr_files(path: Path) -> list[Path]:
    """Metadata files and chunks of level 0, sorted; errors as :func:`ome_zarr_layout`."""
    return list(ome_zarr_layout(path).files)


def read_ome_zarr(path: Path) -> tuple[np.ndarray, Image]:
    """Voxels (Z, Y, X) in native byte order, and what their metadata say.

    ``ScanError``: those of :func:`ome_zarr_layout`, ``scan.checksum``, ``scan.changed``.
    """
    image = ome_zarr_layout(path)
    with unchanged(*image.files):
        try:
            array = np.asarray(zarr.open_array(image.array, mode="r")[...])
        except _DECODING:  # their text names files
            raise ScanError(
                "scan.checksum", "a chunk of the array is damaged or cannot be decoded; copy the folder from its source"
            ) from None
    voxels = array.reshape(image.grid.shape)
    return voxels.astype(image.dtype, copy=False), image


def ome_zarr_layout(path: Path) -> Image:
    """The image in a Zarr folder.

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.truncated`` (chunks absent), ``scan.not-3d``,
    ``scan.dtype``, ``scan.empty``, ``scan.too-large``, ``scan.bomb``, ``scan.path-escape``, ``geometry.*``.
    """
    version: Literal[2, 3] = 3 if (path / "zarr.json").exists() else 2
    group = path / ("zarr.json" if version == 3 else ".zattrs")
    content = read_json(group)
    attributes = content.get("attributes") if version == 3 else content
    attributes = attributes if isinstance(attributes, dict) else {}
    found = attributes.get("ome") if version == 3 else attributes
    multiscales = found.get("multiscales") if isinstance(found, dict) else None
    if not isinstance(multiscales, list) or len(multiscales) != 1:
        raise ScanError(
            "scan.unreadable",
            "the Zarr folder holds no OME-Zarr 0.4 or 0.5 image (multiscales); give the folder of one image",
        )
    multiscale = parsed(_Multiscale, multiscales[0])
    array = _inside(path, multiscale.datasets[0].path)
    stored = judged_array(array, version)
    grid, warnings = _placed(multiscale, stored.shape, attributes.get("vnet"))
    marks = [path / ".zgroup"] if (path / ".zgroup").exists() else []
    return Image(grid, array, stored.dtype, tuple(sorted([group, *marks, *stored.files])), warnings)


# --- where it lies


def _placed(multiscale: _Multiscale, shape: Sizes, ours: object) -> tuple[FileGrid, tuple[str, ...]]:
    names = "".join(axis.name for axis in multiscale.axes)
    lead = len(names) - 3
    if len(multiscale.axes) != len(shape) or not re.fullmatch("t?c?zyx", names) or any(n != 1 for n in shape[:lead]):
        raise ScanError(
            "scan.not-3d",
            f"the axes of {shape} voxels are not z, y, x after t and c of one; split the image into volumes",
        )
    scale, shift = np.ones(len(shape)), np.zeros(len(shape))
    for transform in (*multiscale.datasets[0].transforms, *multiscale.transforms):
        numbers = transform.scale or transform.translation
        if transform.type != "identity" and len(numbers) != len(shape):
            raise ScanError("scan.header", f"a coordinate transformation has {len(numbers)} of {len(shape)} numbers")
        if transform.type == "scale":
            scale, shift = scale * numbers, shift * numbers
        elif transform.type == "translation":
            shift = shift + numbers
    space = multiscale.axes[lead:]
    if any(axis.unit not in _MM for axis in space):
        raise ScanError(
            "geometry.missing",
            f"the axes do not each name a unit of length among {', '.join(_MM)}; correct the metadata",
        )
    mm = np.array([_MM[axis.unit] for axis in space])
    scale, shift = scale[lead:] * mm, shift[lead:] * mm
    z, y, x = shape[lead:]
    grid = declared_grid(grid_shape((x, y, z)), shift[::-1], scale[::-1], np.array(CANONICAL_DIRECTION)[:, ::-1])
    if ours is not None:
        return _with_direction(grid, ours), ()
    known = [axis.orientation for axis in space if axis.orientation is not None]
    values = [o.get("value") if isinstance(o, dict) else o for o in known]
    if known and values != [_LPS[axis.name] for axis in space]:
        raise ScanError(
            "geometry.ambiguous", "the axes do not grow to the head, back and left; reorient the image, or convert it"
        )
    return grid, () if known else ("geometry.assumed-axes",)


def _with_direction(along_axes: FileGrid, ours: object) -> FileGrid:
    """The grid that our own masks carry, where it says the same as scale and translation."""
    try:
        geometry = from_mapping(ours["geometry"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise ScanError("scan.header", "the attribute 'vnet' holds no geometry; take it out or correct it") from None
    origin, direction = np.array(geometry.origin_mm), np.array(geometry.direction)
    spacing = np.array(geometry.spacing_mm)
    translation = along_axes.origin_mm @ along_axes.direction
    agree = geometry.shape == along_axes.shape and np.allclose(spacing, along_axes.spacing_mm, 1e-6, 0)
    if not (agree and np.allclose(origin @ direction, translation, 1e-6, 1e-3)):
        raise ScanError(
            "geometry.ambiguous", "scale or translation differ from the grid in the attribute 'vnet'; correct one"
        )
    return FileGrid(geometry.shape, origin, spacing, direction)


def _inside(folder: Path, name: str) -> Path:
    """The folder of the array, which must lie in the image's folder and be reached through no link."""
    parts = PurePosixPath(name).parts
    steps = [folder.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    if not parts or ".." in parts or name.startswith("/") or set(name) & set("\\\0") or any(map(os.path.islink, steps)):
        raise ScanError("scan.path-escape", "the metadata name the array by a path out of the folder, or by a link")
    if not os.path.isdir(steps[-1]):
        raise ScanError("scan.unreadable", "the array that the metadata name is missing; copy the folder again")
    return steps[-1]
