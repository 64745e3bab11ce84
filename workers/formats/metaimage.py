"""MetaImage files ``.mha`` and ``.mhd`` (ITK MetaIO): the header, checked before a voxel is trusted.

A data file named by a header is one plain name in the header's own folder: the stock reader would follow a path to any
file of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vnet_core.errors import ScanError
from workers.formats.blocks import Layout
from workers.formats.fields import HEADER_BYTES, beside, fields_of, first_bytes
from workers.formats.headers import declared_grid, grid_shape, not_a, voxel_dtype

META_SUFFIXES = (".mha", ".mhd")

_TYPES = {
    "MET_CHAR": "i1", "MET_ASCII_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
"""MetaImage ElementType to numpy code."""


def meta_layout(path: Path) -> Layout:
    """Layout of a MetaImage file, voxels raw or in a zlib stream.

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.not-3d``, ``scan.dtype``, ``scan.empty``,
    ``scan.too-large``, ``scan.path-escape``, ``geometry.nonfinite``.
    """
    head = first_bytes(path, HEADER_BYTES)
    lines = list(_lines(head))
    values = fields_of((key, value) for key, value, _ in lines)
    end = lines[-1][2]
    ndim = values.integers("NDims")[0]
    sizes = values.integers("DimSize")
    if ndim != len(sizes):
        raise ScanError("scan.header", f"NDims is {ndim} but DimSize has {len(sizes)} numbers; correct the header")
    shape = grid_shape(sizes)
    channels = values.integers("ElementNumberOfChannels", "1")[0]
    kind = values.fields.get("ElementType", "")
    order = ">" if values.flag("BinaryDataByteOrderMSB", "ElementByteOrderMSB") else "<"
    dtype = voxel_dtype(_TYPES.get(kind) if channels == 1 else None, "this ElementType or number of channels", order)
    if not values.flag("BinaryData", default="true"):
        raise ScanError("scan.unreadable", "the voxels are stored as text; rewrite the file with BinaryData = True")
    compressed = values.flag("CompressedData")
    spacing = values.reals(ndim, "ElementSpacing", "ElementSize")
    matrix = values.reals(ndim * ndim, "TransformMatrix", "Rotation", "Orientation", default=np.eye(ndim).ravel())
    origin = values.reals(ndim, "Offset", "Position", "Origin", default=np.zeros(ndim))
    grid = declared_grid(shape, origin[:3], spacing[:3], matrix.reshape(ndim, ndim)[:3, :3].T)
    skip = values.integers("HeaderSize", "0")[0]
    name = values.fields["ElementDataFile"]
    local = name.lower() == "local"
    if skip < -1 or (skip and (local or compressed)):
        raise ScanError("scan.header", f"HeaderSize {skip} cannot be used here; rewrite the file as .mha")
    data_file = path if local else beside(path, name)
    return Layout(grid, dtype, data_file, end if local else skip, "deflate" if compressed else "raw")


def _lines(head: bytes) -> Iterator[tuple[str, str, int]]:
    """Key, value and the place behind it of each line, to the one that names the data."""
    at, key = 0, ""
    while key != "ElementDataFile":
        newline = head.find(b"\n", at)
        stop = newline if newline >= 0 else len(head)
        key, equals, value = (part.strip() for part in head[at:stop].decode("latin-1").partition("="))
        if not equals:
            raise not_a("MetaImage file", head)
        at = min(stop + 1, len(head))
        yield key, value, at
