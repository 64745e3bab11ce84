"""What the headers of all formats have in common: the grid that they declare, its limits, what a file looks like.

File axes are x, y, z with x fastest, which is C order (z, y, x); :func:`declared_grid` and :func:`file_axes` are the
one pair of functions that turn the axes round. Messages name no file and quote no header text, because both may
identify a patient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import ORTHONORMAL_TOLERANCE, Geometry, Shape, matrix_of

MAX_VOXELS = 2**31
"""Largest grid that is read."""
KEPT_TOLERANCE = 1e-4
"""Largest deviation of ``direction.T @ direction`` from the identity that is kept as it is stored: what float32 and six
decimals leave, and what ITK accepts in a NIfTI header."""

_LOOKS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "an HTML or XML page; download the scan again"),
    (b"\x1f\x8b", "a gzip file; give it the suffix .nii.gz or unpack it"),
    (b"BZh", "a bzip2 file; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x5c\x01\0\0", "an uncompressed NIfTI-1 or Analyze file; give it the suffix .nii or convert it"),
    (b"\0\0\x01\x5c", "a big-endian NIfTI-1 or Analyze file; give it the suffix .nii or convert it"),
    (b"\x1c\x02\0\0", "a NIfTI-2 file; give it the suffix .nii"),
    (b"\0\0\x02\x1c", "a big-endian NIfTI-2 file; give it the suffix .nii"),
    (b"NRRD", "a NRRD file; give it the suffix .nrrd"),
    (b"ObjectType", "a MetaImage file; give it the suffix .mha"),
)


@dataclass(frozen=True, slots=True, eq=False)
class FileGrid:
    """Where a header puts the voxels. All is finite; spacings may be absurd and axes sheared until it is settled."""

    shape: Shape
    """Voxels along (z, y, x)."""
    origin_mm: np.ndarray
    """World LPS (x, y, z) of the centre of the first voxel."""
    spacing_mm: np.ndarray
    """Along (z, y, x)."""
    direction: np.ndarray
    """(3, 3), columns along z, y, x."""

    @property
    def steps_mm(self) -> np.ndarray:
        """(3, 3), columns: the way in the world from one voxel to the next along z, y, x."""
        return self.direction * self.spacing_mm

    @property
    def skew(self) -> float:
        """Largest deviation of ``direction.T @ direction`` from the identity."""
        return float(np.abs(self.direction.T @ self.direction - np.eye(3)).max())


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """The grid that is used for what a header declares."""

    geometry: Geometry
    sheared: bool
    """Whether the voxels must be resampled for it."""
    warnings: tuple[str, ...]


def settled(grid: FileGrid, sheared_axes: Literal["refuse", "resample"]) -> Settled:
    """The rule for axes that do not stand at right angles, by the deviation of ``direction.T @ direction`` from 1.

    Up to ``KEPT_TOLERANCE`` they are kept as stored. Up to ``ORTHONORMAL_TOLERANCE`` they are repaired: turned into the
    nearest orthonormal axes, about the centre of the grid, with the warning ``geometry.repaired``. Beyond it they are
    refused or, by ``sheared_axes``, resampled (:mod:`vnet_core.straighten`) with the warning ``geometry.straightened``.

    ``ScanError``: ``geometry.spacing``, ``geometry.not-orthonormal`` (sheared, or too far to be resampled),
    ``scan.too-large``.
    """
    origin = matrix_of([grid.origin_mm] * 3)[0]
    z, y, x = (float(s) for s in grid.spacing_mm)
    if grid.skew > ORTHONORMAL_TOLERANCE and sheared_axes == "resample" and min(z, y, x) > 0:
        from vnet_core.straighten import straight_grid  # brings torch, which few scans need

        straight = straight_grid(grid.shape, grid.origin_mm, grid.steps_mm)
        if math.prod(straight.shape) > MAX_VOXELS:
            raise _too_large(math.prod(straight.shape))
        return Settled(straight, True, ("geometry.straightened",))
    if not KEPT_TOLERANCE < grid.skew <= ORTHONORMAL_TOLERANCE:  # what is sheared is refused by the constructor
        return Settled(Geometry(grid.shape, (z, y, x), origin, matrix_of(grid.direction)), False, ())
    left, _, right = np.linalg.svd(grid.direction)
    upright = left @ right
    half_mm = (np.array(grid.shape) - 1) / 2 * grid.spacing_mm
    origin = matrix_of([grid.origin_mm + (grid.direction - upright) @ half_mm] * 3)[0]
    return Settled(Geometry(grid.shape, (z, y, x), origin, matrix_of(upright)), False, ("geometry.repaired",))


def declared_grid(shape: Shape, origin_mm: np.ndarray, spacing_xyz: np.ndarray, direction_xyz: np.ndarray) -> FileGrid:
    """The grid from what a file says by its own axes x, y, z; the world is LPS, ``direction_xyz`` (3, 3) by columns.

    ``ScanError`` ``geometry.nonfinite``.
    """
    if not all(np.isfinite(part).all() for part in (origin_mm, spacing_xyz, direction_xyz)):
        raise ScanError(
            "geometry.nonfinite", "the header's origin, direction or spacing holds NaN or Inf; correct the header"
        )
    return FileGrid(
        shape, np.asarray(origin_mm, float), np.asarray(spacing_xyz, float)[::-1], np.asarray(direction_xyz)[:, ::-1]
    )


def file_axes(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Spacing (3,) and direction (3, 3) by file axes x, y, z, world LPS: what ITK calls spacing and direction."""
    return np.asarray(geometry.spacing_mm)[::-1], np.asarray(geometry.direction)[:, ::-1]


def per_step(steps: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Columns divided by their spacing; zero and Inf are left for :func:`settled` to refuse."""
    with np.errstate(invalid="ignore"):
        return steps / np.where(spacing > 0, spacing, 1.0)


def grid_shape(sizes_xyz: tuple[int, ...]) -> Shape:
    """Voxels along (z, y, x) of the sizes in file order, trailing axes of one voxel squeezed.

    ``ScanError``: ``scan.empty``, ``scan.not-3d``, ``scan.too-large``.
    """
    sizes = list(sizes_xyz)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if any(n < 1 for n in sizes):
        raise ScanError("scan.empty", f"the header declares {sizes_xyz} voxels along its axes; each needs at least 1")
    if len(sizes) != 3:
        raise ScanError(
            "scan.not-3d", f"the image has {len(sizes)} axes {sizes_xyz}, exactly 3 are read; split or extract a volume"
        )
    if math.prod(sizes) > MAX_VOXELS:
        raise _too_large(math.prod(sizes))
    x, y, z = sizes
    return (z, y, x)


def voxel_dtype(code: str | None, found: str, order: str) -> np.dtype:
    """The numpy dtype of byte order ``order``; ``scan.dtype`` for ``code`` None, with what was ``found``."""
    if code is None:
        raise ScanError(
            "scan.dtype", f"{found} is not read: only one plain integer or float per voxel (no RGB, vector, complex)"
        )
    return np.dtype(order + code)


def not_a(kind: str, head: bytes) -> ScanError:
    """The refusal of a file that begins with ``head`` and is not the ``kind`` that its name promises."""
    text = head.lstrip()
    looks = next((what for start, what in _LOOKS if text.startswith(start)), "something else; check the source")
    if head[128:132] == b"DICM":
        looks = "a DICOM file; give the folder of the series"
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        looks = "the header of a NIfTI pair (.hdr and .img); convert it to one .nii.gz file"
    return ScanError("scan.unreadable", f"not a {kind}: {'it is empty' if not head else f'it looks like {looks}'}")


def _too_large(voxels: int) -> ScanError:
    return ScanError("scan.too-large", f"{voxels} voxels declared, at most {MAX_VOXELS} are read; crop the scan")
