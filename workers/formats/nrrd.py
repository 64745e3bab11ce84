"""NRRD files ``.nrrd`` and ``.nhdr``, versions 1 to 5 (teem): the header, checked before a voxel is trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Shape
from workers.formats.blocks import Layout, Packing
from workers.formats.fields import HEADER_BYTES, Fields, beside, fields_of, first_bytes, reals
from workers.formats.headers import FileGrid, declared_grid, grid_shape, not_a, per_step, voxel_dtype

NRRD_SUFFIXES = (".nrrd", ".nhdr")

_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
"""Signs that turn the axes of a NRRD space into LPS."""
_PACKINGS: dict[str, Packing] = {
    "raw": "raw", "gzip": "deflate", "gz": "deflate", "bzip2": "bzip2", "bz2": "bzip2",
}  # fmt: skip


def nrrd_layout(path: Path) -> Layout:
    """Layout of a NRRD file, raw, gzip or bzip2, attached or with one data file beside its header.

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.not-3d``, ``scan.dtype``, ``scan.empty``,
    ``scan.too-large``, ``scan.path-escape``, ``geometry.nonfinite``, ``geometry.missing``, ``geometry.ambiguous``.
    """
    head = first_bytes(path, HEADER_BYTES)
    if not head.startswith(b"NRRD000"):
        raise not_a("NRRD file", head)
    lines: list[str] = []
    end = 0
    while end < len(head) and (not lines or lines[-1]):  # an empty line ends the header
        newline = head.find(b"\n", end)
        newline = newline if newline >= 0 else len(head)
        lines.append(head[end:newline].decode("latin-1").strip())
        end = newline + 1
    parts = (line.partition(": ") for line in lines[1:] if not line.startswith("#") and ":=" not in line)
    values = fields_of((key.strip().lower().replace(" ", ""), value.strip()) for key, _, value in parts if key)
    shape = grid_shape(values.integers("sizes"))
    if values.integers("dimension", "3")[0] != len(values.integers("sizes")):
        raise ScanError("scan.header", "the header's dimension is not the number of its sizes; correct the header")
    order = {"little": "<", "big": ">"}.get(values.word("endian"))
    dtype = voxel_dtype(_TYPES.get(values.word("type")), "this NRRD type", order or "<")
    if order is None and dtype.itemsize > 1:
        raise ScanError("scan.header", "the header does not say endian: little or big; correct the header")
    packing = _PACKINGS.get(values.word("encoding"))
    if packing is None:
        raise ScanError("scan.unreadable", "only the NRRD encodings raw, gzip and bzip2 are read; rewrite the file")
    byte_skip, line_skip = values.integers("byteskip", "0")[0], values.integers("lineskip", "0")[0]
    if line_skip or byte_skip < -1 or (byte_skip and packing != "raw"):
        raise ScanError("scan.header", f"line skip {line_skip}, byte skip {byte_skip} are not read; rewrite the file")
    name = values.fields.get("datafile", "")
    if byte_skip and not name:
        raise ScanError("scan.header", f"byte skip {byte_skip} makes no sense without a data file; rewrite the file")
    if not name and lines[-1]:
        raise ScanError("scan.header", f"no empty line ends the header within {HEADER_BYTES} bytes; rewrite the file")
    grid = _grid(values, shape)
    return Layout(grid, dtype, beside(path, name) if name else path, byte_skip if name else end, packing)


def _grid(values: Fields, shape: Shape) -> FileGrid:
    signs = _SPACES.get(values.word("space"))
    if signs is None:
        raise ScanError(
            "geometry.missing",
            "the space is not LPS, RAS or LAS, so left and right are unknown; convert the scan again",
        )
    if any(unit not in ('"mm"', '""') for unit in values.word("spaceunits").split()):
        raise ScanError("geometry.ambiguous", "the space units are not mm, which readers ignore; rewrite it in mm")
    vectors = values.fields.get("spacedirections", "").replace(" ", "").replace(")", ") ").split()[:3]
    if len(vectors) < 3 or any(not v.startswith("(") for v in vectors):
        raise ScanError("geometry.missing", "the first three axes lack space directions; convert the scan again")
    steps = np.stack([reals(v.strip("()").replace(",", " "), 3, "space directions") for v in vectors], axis=1)
    origin = reals(values.fields.get("spaceorigin", "").strip("()").replace(",", " "), 3, "space origin")
    steps *= np.array(signs)[:, None]
    spacing = np.linalg.norm(steps, axis=0)
    return declared_grid(shape, origin * signs, spacing, per_step(steps, spacing))
