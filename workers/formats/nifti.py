"""NIfTI-1 and NIfTI-2 in one file: header checks, and which of its transforms counts.

Fields are at the byte offsets of nifti1.h and nifti2.h. SimpleITK gives a second opinion on where a NIfTI-1 header
puts the scan; it reads no NIfTI-2.

Units: millimetres and unknown ones are millimetres, as every reader takes them. Metres and micrometres are refused,
because ITK scales them and nibabel and FSL do not, so that scan and mask would part in one of them.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.spatial.transform import Rotation

from vnet_core.errors import ScanError
from vnet_core.geometry import Shape
from workers.formats.blocks import Layout, inflated_pieces, open_regular
from workers.formats.headers import (
    KEPT_TOLERANCE,
    FileGrid,
    declared_grid,
    grid_shape,
    not_a,
    per_step,
    voxel_dtype,
)
from workers.formats.itk import itk_reader

NIFTI_SUFFIXES = (".nii.gz", ".nii")

Transform = Literal["agreeing", "sform", "qform"]

READERS_AGREE_VOXELS = 0.1
"""Largest distance, in the smallest spacing, of one voxel as placed by two transforms or two readers that agree."""
_PIXDIM_TOLERANCE = 1e-4
"""Relative difference of pixdim from the length of the sform column that counts as rounding."""
_EXTENSIONS_READ_BYTES = 1 << 20
_LPS_FROM_RAS = np.array([-1.0, -1.0, 1.0])
"""Signs of the world axes: NIfTI grows to the right and front, we to the left and back."""
_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""NIfTI datatype to numpy code."""


def _header(size: int, **fields: tuple[object, int]) -> np.dtype:
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype({"names": list(fields), "formats": list(formats), "offsets": list(offsets), "itemsize": size})


_ONE = _header(
    348, dim=(("<i2", 8), 40), datatype=("<i2", 70), bitpix=("<i2", 72), pixdim=(("<f4", 8), 76), offset=("<f4", 108),
    slope=("<f4", 112), intercept=("<f4", 116), units=("u1", 123), qform=("<i2", 252), sform=("<i2", 254),
    quaternion=(("<f4", 3), 256), q_origin=(("<f4", 3), 268), rows=(("<f4", (3, 4)), 280), magic=("S4", 344),
)  # fmt: skip
_TWO = _header(
    540, magic=("S8", 4), datatype=("<i2", 12), bitpix=("<i2", 14), dim=(("<i8", 8), 16), pixdim=(("<f8", 8), 104),
    offset=("<i8", 168), slope=("<f8", 176), intercept=("<f8", 184), qform=("<i4", 344), sform=("<i4", 348),
    quaternion=(("<f8", 3), 352), q_origin=(("<f8", 3), 376), rows=(("<f8", (3, 4)), 400), units=("<i4", 500),
)  # fmt: skip
_STARTS: dict[bytes, tuple[Literal["<", ">"], int]] = {
    b"\x5c\x01\0\0": ("<", 348), b"\0\0\x01\x5c": (">", 348),
    b"\x1c\x02\0\0": ("<", 540), b"\0\0\x02\x1c": (">", 540),
}  # fmt: skip
"""Byte order and size of the header, which it tells by its own size."""
_MAGIC = {348: b"n+1", 540: b"n+2\0\r\n\x1a\n"}


@dataclass(frozen=True, slots=True)
class _Header:
    values: np.void
    order: Literal["<", ">"]
    size: int
    """348 or 540 bytes: NIfTI-1 or NIfTI-2."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def nifti_layout(path: Path, transform: Transform, volume: int | None = None) -> Layout:
    """Layout of ``.nii`` or ``.nii.gz``; ``transform`` as :attr:`vnet_core.sections.ReadingPlan.nifti_transform`.

    ``volume`` counts along the fourth axis, from 0. A file with several volumes is refused where none is named.
    Where only one of sform and qform is set, that one counts under every ``transform``. A slope of 0 means that values
    are not scaled; NaN is taken for the same, with the warning ``scan.unscaled``. ``geometry.transforms-differ`` warns
    of a header in which ``transform`` chose between two places.

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.truncated``, ``scan.checksum``, ``scan.not-3d``,
    ``scan.dtype``, ``scan.empty``, ``scan.too-large``, ``geometry.nonfinite``, ``geometry.missing``,
    ``geometry.ambiguous``, ``geometry.not-orthonormal``.
    """
    wrapped = path.name.lower().endswith(".gz")
    header, start = _opened(path, wrapped)
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7:
        raise ScanError("scan.header", f"dim[0] is {ndim}, must be 1 to 7; the header is damaged")
    shape, volumes = _volumes(tuple(int(n) for n in header["dim"][1 : ndim + 1]), volume)
    code, bits, offset = int(header["datatype"]), int(header["bitpix"]), float(header["offset"])
    dtype = voxel_dtype(_TYPES.get(code), f"NIfTI datatype {code}", header.order)
    if bits != 8 * dtype.itemsize:
        raise ScanError("scan.header", f"bitpix {bits} contradicts datatype {code} ({8 * dtype.itemsize} bits)")
    if not (math.isfinite(offset) and offset >= header.size + 4 and offset == int(offset)):
        raise ScanError("scan.header", f"vox_offset {offset} is not a whole number of at least {header.size + 4} bytes")
    _check_extensions(start, header, int(offset))
    slope, intercept = float(header["slope"]), float(header["intercept"])
    warnings = ("scan.unscaled",) if math.isnan(slope) else ()
    if math.isnan(slope) or slope == 0:
        slope, intercept = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ScanError("scan.header", f"scl_slope {slope}, scl_inter {intercept} are not finite; correct the header")
    grid, doubts = _placed(header, shape, transform)
    begin, skip = (0, int(offset)) if wrapped else (int(offset), 0)
    packing: Literal["raw", "deflate"] = "deflate" if wrapped else "raw"
    return Layout(grid, dtype, path, begin, packing, skip, slope, intercept, (*warnings, *doubts), volumes, volume or 0)


def second_opinion(path: Path, grid: FileGrid, transform: Transform) -> tuple[str, ...]:
    """Compare with where SimpleITK puts a NIfTI-1 scan: a mask must fit its scan in every viewer.

    For ``transform`` "agreeing" another place is refused as ``geometry.ambiguous``; else it is warned of.
    """
    if _opened(path, path.name.lower().endswith(".gz"))[0].size != 348:
        return ()
    with _encodable(path) as name, itk_reader("NiftiImageIO", name) as reader:
        try:
            reader.ReadImageInformation()
        except RuntimeError:  # its text names the file
            if grid.skew > KEPT_TOLERANCE:  # which it refuses, and which is settled by our rule
                return ()
            return _differing("SimpleITK refuses sform and qform, which contradict each other", transform)
        axes = reader.GetDimension()
        direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
        origin, spacing = np.array(reader.GetOrigin())[:3], np.array(reader.GetSpacing())[:3]
    theirs = declared_grid(grid.shape, origin, spacing, direction)
    return _compared(grid, theirs, transform, "two readers place the scan")


def _opened(path: Path, wrapped: bool) -> tuple[_Header, bytes]:
    """The header, and the first bytes of the uncompressed file as far as they are needed for extensions."""
    with open_regular(path) as file:
        start = file.read(_EXTENSIONS_READ_BYTES)
        if wrapped and start[:2] != b"\x1f\x8b":
            raise not_a("gzip file", start)
        if wrapped:
            file.seek(0)
            pieces = inflated_pieces(file, "deflate", 4096)
            start = next(pieces, b"")
            while len(start) < 4096 and (piece := next(pieces, b"")):  # members may be short
                start += piece
    if start[:4] not in _STARTS:
        raise not_a("NIfTI file", start)
    order, size = _STARTS[start[:4]]
    if len(start) < size:
        raise ScanError(
            "scan.truncated", f"the file ends after {len(start)} of {size} header bytes; copy it from its source"
        )
    header = _Header(np.frombuffer(start, (_ONE if size == 348 else _TWO).newbyteorder(order), 1)[0], order, size)
    if bytes(header["magic"]) != _MAGIC[size].rstrip(b"\0"):
        raise not_a(f"NIfTI file with the one-file magic {_MAGIC[size][:3].decode()}", start)
    return header, start


def _volumes(sizes_xyz: tuple[int, ...], volume: int | None) -> tuple[Shape, int]:
    """Voxels of one volume along (z, y, x), and how many volumes follow one another along the fourth axis."""
    several = len(sizes_xyz) > 3 and sizes_xyz[3] > 1 and min(sizes_xyz) > 0 and max(sizes_xyz[4:], default=1) == 1
    count = sizes_xyz[3] if several else 1
    if several and volume is None:
        raise ScanError(
            "scan.not-3d",
            f"the image has 4 axes {sizes_xyz[:4]}, exactly 3 are read; name one of its {count} volumes, FILE[0] to"
            f" FILE[{count - 1}], or split it",
        )
    shape = grid_shape(sizes_xyz[:3] if several else sizes_xyz)
    grid_shape((math.prod(sizes_xyz), 1, 1))  # the limit holds for all volumes together
    if volume is not None and volume >= count:
        raise ScanError(
            "scan.not-3d",
            f"volume [{volume}] is named, but the last of the image's {count} volumes is [{count - 1}]; correct the"
            " number, or the channels in dataset.json",
        )
    return shape, count


def _check_extensions(start: bytes, header: _Header, offset: int) -> None:
    """Refuse header extensions that do not end before the voxels; their contents are never looked at."""
    at = header.size + 4
    if start[header.size : at][:1] in (b"", b"\0"):  # the flag of the standard: none
        return
    if at + 8 > offset:
        raise ScanError(
            "scan.header",
            f"the header announces extensions at byte {at}, the voxels are said to begin at {offset}, before the first"
            " could end; the header is damaged",
        )
    while at + 8 <= min(offset, len(start)):
        (length,) = struct.unpack_from(header.order + "i", start, at)
        if length == 0:  # padding
            return
        if length < 8 or at + length > offset:
            raise ScanError(
                "scan.header",
                f"a header extension of {length} bytes at byte {at} does not end before the voxels at {offset};"
                " the header is damaged",
            )
        at += length


def _placed(header: _Header, shape: tuple[int, int, int], transform: Transform) -> tuple[FileGrid, tuple[str, ...]]:
    """The grid by the transform that counts, and a warning where another one in the header differs."""
    units = int(header["units"]) & 7
    if units in (1, 3):
        raise ScanError(
            "geometry.ambiguous",
            f"the header gives lengths in {'metres' if units == 1 else 'micrometres'}, which some readers scale and"
            " others do not; rewrite it in millimetres",
        )
    q_code, s_code = int(header["qform"]), int(header["sform"])
    if not (0 <= q_code <= 5 and 0 <= s_code <= 5):
        raise ScanError(
            "scan.header", f"qform_code {q_code} or sform_code {s_code} is not 0 to 5; the header is damaged"
        )
    ways = [way for way, code in ((_sform, s_code), (_qform, q_code)) if code > 0]
    if not ways:
        raise ScanError(
            "geometry.missing",
            "neither sform nor qform is set, so left and right are unknown; convert the scan again from its source",
        )
    if transform == "qform":
        ways.reverse()
    grid = ways[0](header, shape)
    if len(ways) == 1:
        return grid, ()
    try:
        other = ways[1](header, shape)
    except ScanError as error:
        return grid, _differing(f"of sform and qform one is wrong ({error})", transform)
    return grid, _compared(grid, other, transform, "sform and qform place the scan")


def _sform(header: _Header, shape: tuple[int, int, int]) -> FileGrid:
    rows = header["rows"].astype(float) * _LPS_FROM_RAS[:, None]
    pixdim = header["pixdim"][1:4].astype(float)
    lengths = np.linalg.norm(rows[:, :3], axis=0)
    # Keeping pixdim as the spacing lets a mask carry both header fields of its source unchanged.
    spacing = pixdim if np.allclose(pixdim, lengths, _PIXDIM_TOLERANCE, 0) else lengths
    return declared_grid(shape, rows[:, 3], spacing, per_step(rows[:, :3], spacing))


def _qform(header: _Header, shape: tuple[int, int, int]) -> FileGrid:
    b, c, d = (float(n) for n in header["quaternion"])
    rest = 1.0 - b * b - c * c - d * d
    rounding = 3 * float(np.finfo(header["quaternion"].dtype).eps)  # the threshold of nibabel
    if not rest >= -rounding:
        raise ScanError(
            "geometry.not-orthonormal", f"the qform quaternion ({b}, {c}, {d}) is longer than 1; correct the header"
        )
    axes = Rotation.from_quat([b, c, d, math.sqrt(rest) if rest > rounding else 0.0]).as_matrix()
    pixdim = header["pixdim"].astype(float)
    axes[:, 2] *= -1.0 if pixdim[0] < 0 else 1.0
    origin = _LPS_FROM_RAS * header["q_origin"].astype(float)
    return declared_grid(shape, origin, pixdim[1:4], _LPS_FROM_RAS[:, None] * axes)


def _compared(grid: FileGrid, other: FileGrid, transform: Transform, what: str) -> tuple[str, ...]:
    reach = np.abs(grid.steps_mm - other.steps_mm) @ (np.array(grid.shape) - 1)
    apart_mm = float(np.linalg.norm(reach + np.abs(grid.origin_mm - other.origin_mm)))
    spacing_mm = float(np.abs(grid.spacing_mm).min())
    if apart_mm <= READERS_AGREE_VOXELS * spacing_mm:
        return ()
    return _differing(f"{what} up to {apart_mm:.3g} mm apart (spacing {spacing_mm:.3g} mm)", transform)


def _differing(what: str, transform: Transform) -> tuple[str, ...]:
    if transform == "agreeing":
        raise ScanError(
            "geometry.ambiguous",
            f"{what}, because sform, qform or pixdim disagree; make them agree, convert the scan again from its source,"
            " or choose one with the plan's reading.nifti_transform",
        )
    return ("geometry.transforms-differ",)


@contextmanager
def _encodable(path: Path) -> Iterator[str]:
    """A name of the file in UTF-8, without which SimpleITK ends the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "scan.nii.gz" if path.name.lower().endswith(".gz") else "scan.nii")
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)
