"""Rows 1 to 40: NIfTI files, written by nibabel and then changed byte by byte at the offsets of nifti1.h."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.bad_inputs.inputs import OBLIQUE, BadInput, Kind, Truth, grid, random
from vnet_core.geometry import Geometry

SHAPE = (10, 9, 12)
GEOMETRY = grid(SHAPE, (2.5, 1.1, 0.9), direction=OBLIQUE)
CANARY = "Canary^Norwegian"
"""Stands for a patient's name."""

DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, INTERCEPT = 40, 70, 72, 76, 108, 112, 116
UNITS, DESCRIP, AUX_FILE, QFORM_CODE, SFORM_CODE, QOFFSET, SROW, INTENT_NAME, MAGIC = (
    123, 148, 228, 252, 254, 268, 280, 328, 344,
)  # fmt: skip
"""Byte offsets of header fields."""


def ras_affine(geometry: Geometry) -> np.ndarray:
    """(4, 4) of nibabel: index x, y, z to RAS mm."""
    matrix = geometry.matrix
    affine = np.eye(4)
    affine[:3, :3] = matrix[:3, 2::-1]
    affine[:3, 3] = matrix[:3, 3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def image(voxels: np.ndarray, geometry: Geometry = GEOMETRY, kind: type = nib.Nifti1Image) -> nib.Nifti1Image:
    """Voxels (..., Z, Y, X) as an image of nibabel with sform and qform, both coded 1."""
    result = kind(voxels.T, ras_affine(geometry))
    result.set_sform(ras_affine(geometry), code=1)
    result.set_qform(ras_affine(geometry), code=1)
    result.header.set_xyzt_units("mm")
    return result


def stored(edit: Callable[[bytearray], object] = lambda head: None, voxels: np.ndarray | None = None) -> bytes:
    """One file, edited in place."""
    content = bytearray(image(random(SHAPE) if voxels is None else voxels).to_bytes())
    edit(content)
    return bytes(content)


def put(form: str, *fields: tuple[int, tuple]) -> Callable[[bytearray], None]:
    """An edit that packs values at offsets."""

    def edit(content: bytearray) -> None:
        for offset, values in fields:
            struct.pack_into("<" + str(len(values)) + form, content, offset, *values)

    return edit


def refused(content: Callable[[], bytes], name: str = "scan.nii") -> Callable[[Path], tuple[Truth, ...]]:
    """A maker that writes one file and has no truth."""

    def make(folder: Path) -> tuple[Truth, ...]:
        (folder / name).write_bytes(content())
        return ()

    return make


def sound(
    content: Callable[[], bytes], name: str = "scan.nii", voxels: Callable[[], np.ndarray] = lambda: random(SHAPE)
) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker that writes one file with the usual geometry."""

    def make(folder: Path) -> tuple[Truth, ...]:
        (folder / name).write_bytes(content())
        return (Truth(voxels(), GEOMETRY),)

    return make


def edited(edit: Callable[[bytearray], object]) -> Callable[[], bytes]:
    return lambda: stored(edit)


def packed() -> bytes:
    return gzip.compress(stored(), mtime=0)


def set_magic(content: bytearray) -> None:
    content[MAGIC : MAGIC + 4] = b"XXXX"


def without_transforms(content: bytearray) -> None:
    put("h", (QFORM_CODE, (0, 0)))(content)
    put("f", (PIXDIM + 4, (0.0, 0.0, 0.0)))(content)


def sheared() -> bytes:
    return stored(only_sform((1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)))


def other_qform(content: bytearray) -> None:
    put("f", (QOFFSET, (40.0, -15.0, 7.0)), (QOFFSET - 12, (0.0, 0.0, 0.7071)))(content)


def only_sform(numbers: tuple[float, ...]) -> Callable[[bytearray], None]:
    """An edit that leaves the qform out and begins the sform with ``numbers``."""

    def edit(content: bytearray) -> None:
        put("h", (QFORM_CODE, (0, 1)))(content)
        put("f", (SROW, numbers))(content)

    return edit


def with_extension(size: int, voxels_at: float) -> bytes:
    """32 bytes of an extension that says that it is ``size`` bytes long, and then the voxels."""
    content = bytearray(stored())
    put("f", (VOX_OFFSET, (voxels_at,)))(content)
    extension = b"\1\0\0\0" + struct.pack("<Ii", size, 6) + b"note".ljust(24, b"\0")
    return bytes(content[:348]) + extension + bytes(content[352:])


def telling() -> bytes:
    """A name in every free text of the header, and a DICOM header as an extension."""
    content = bytearray(stored())
    name = CANARY.encode()
    for offset in (4, 14, DESCRIP, AUX_FILE, INTENT_NAME):  # data_type and db_name are the first two
        content[offset : offset + 10] = name[:10]
    content[DESCRIP : DESCRIP + len(name)] = name
    put("f", (VOX_OFFSET, (384.0,)))(content)
    extension = b"\1\0\0\0" + struct.pack("<ii", 32, 2) + name.ljust(24, b"\0")
    return bytes(content[:348]) + extension + bytes(content[352:])


def bomb(shape: tuple[int, int, int], content_bytes: int) -> bytes:
    """A gzip file of a header for ``shape`` and ``content_bytes`` of zeros: one packed piece again and again."""
    header = stored(put("h", (DIM, (3, *shape[::-1]))))[:352]
    piece_bytes = 1 << 24
    piece = gzip.compress(bytes(piece_bytes), compresslevel=1, mtime=0)
    return gzip.compress(header, mtime=0) + piece * (content_bytes // piece_bytes)


def of_type(dtype: str, shape: tuple[int, ...] = SHAPE) -> Callable[[], bytes]:
    """A file of another type or number of axes; ``shape`` ends with z, y, x."""
    return lambda: stored(voxels=random(shape).astype(dtype))


def colour() -> bytes:
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    voxels = np.zeros(SHAPE, rgb)
    for channel in "RGB":
        voxels[channel] = random(SHAPE, 0, 255)
    return stored(voxels=voxels)


def not_finite() -> bytes:
    voxels = random(SHAPE).astype(np.float32)
    voxels[3, 4, 5], voxels[2, 1, 0] = np.nan, np.inf
    return stored(voxels=voxels)


def big_endian() -> bytes:
    header = nib.Nifti1Header(endianness=">")
    source = image(random(SHAPE))
    swapped = nib.Nifti1Image(random(SHAPE).T, source.affine, header)
    swapped.set_sform(source.affine, 1)
    swapped.set_qform(source.affine, 1)
    swapped.header.set_xyzt_units("mm")
    content: bytes = swapped.to_bytes()
    return content


def members() -> bytes:
    content = stored()
    return gzip.compress(content[:1000], mtime=0) + gzip.compress(content[1000:], mtime=0)


def flat() -> bytes:
    return stored(voxels=random(SHAPE)[0])


def _row(
    number: int | str,
    title: str,
    what: str,
    verdict: str,
    make: Callable[[Path], tuple[Truth, ...]],
    kind: Kind | None = None,
    suffix: str = ".nii",
) -> BadInput:
    usual: Kind = "bad" if verdict.startswith("refused") else "sound"
    return BadInput(str(number), title, what, kind or usual, (verdict,), make, opens="scan" + suffix)


def _bad(number: int | str, title: str, what: str, code: str, edit: Callable[[bytearray], object]) -> BadInput:
    return _row(number, title, what, f"refused:{code}", refused(edited(edit)))


def _packed(number: int | str, title: str, what: str, code: str, content: Callable[[], bytes]) -> BadInput:
    return _row(number, title, what, f"refused:{code}", refused(content, "scan.nii.gz"), suffix=".nii.gz")


def _other(number: int | str, title: str, what: str, code: str, content: Callable[[], bytes]) -> BadInput:
    return _row(number, title, what, f"refused:{code}", refused(content), kind="unsuitable")


LIMIT = 2**31 - 2**25
"""Bytes of zeros in a bomb."""

INPUTS = (
    _row(1, "empty file", "0 bytes", "refused:scan.unreadable", refused(lambda: b"")),
    _packed(2, "gzip stream cut", "the last 200 bytes are lost", "scan.truncated", lambda: packed()[:-200]),
    _packed(
        3, "gzip checksum wrong", "CRC and length at the end are zeros", "scan.checksum",
        lambda: packed()[:-8] + bytes(8),
    ),
    _row(4, "voxels cut", "the last 500 bytes are lost", "refused:scan.truncated", refused(lambda: stored()[:-500])),
    _row(5, "header cut", "200 of 348 bytes", "refused:scan.truncated", refused(lambda: stored()[:200])),
    _packed(6, "name promises gzip", "a plain file named .nii.gz", "scan.unreadable", stored),
    _row(
        7, "web page", "an HTML error page named .nii", "refused:scan.unreadable",
        refused(lambda: b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>\n" * 8),
    ),
    _bad(8, "64 TiB declared", "dim 32767 x 32767 x 32767", "scan.too-large",
         put("h", (DIM, (3, 32767, 32767, 32767)))),
    _bad(9, "negative size", "dim[1] is -16", "scan.empty", put("h", (DIM, (3, -16)))),
    _bad(10, "no voxel", "dim[1] is 0", "scan.empty", put("h", (DIM, (3, 0)))),
    _bad(11, "no axis", "dim[0] is 0", "scan.header", put("h", (DIM, (0,)))),
    _bad(12, "nine axes", "dim[0] is 9, the standard has 7", "scan.header", put("h", (DIM, (9,)))),
    _bad(13, "unknown voxel type", "datatype 9999", "scan.dtype", put("h", (DATATYPE, (9999,)))),
    _bad(14, "bits contradict the type", "bitpix 64 for int16", "scan.header", put("h", (BITPIX, (64,)))),
    _row(
        15, "slope 0", "scl_slope 0, which the standard defines as not scaled", "accepted",
        sound(edited(put("f", (SLOPE, (0.0, 0.0))))),
    ),
    _row(
        16, "slope NaN", "scl_slope and scl_inter are NaN: not scaled, by custom", "warned:scan.unscaled",
        sound(edited(put("f", (SLOPE, (float("nan"), float("nan")))))),
    ),
    _bad(17, "slope infinite", "scl_slope Inf", "scan.header", put("f", (SLOPE, (float("inf"), 0.0)))),
    _bad(
        18, "negative spacing", "pixdim[1] is -0.9 and contradicts the sform", "geometry.ambiguous",
        put("f", (PIXDIM + 4, (-0.9,))),
    ),
    _bad(19, "no geometry", "pixdim 0, neither sform nor qform", "geometry.missing", without_transforms),
    _bad(20, "sform NaN", "its first row", "geometry.nonfinite", only_sform((float("nan"),) * 4)),
    _bad(21, "sform singular", "all of the sform is 0", "geometry.spacing", only_sform((0.0,) * 12)),
    _other(22, "sheared", "sform axes at 63 degrees", "geometry.not-orthonormal", sheared),
    _bad(23, "wrong magic", "XXXX in place of n+1", "scan.unreadable", set_magic),
    _bad(24, "wrong header size", "sizeof_hdr 999 in place of 348", "scan.unreadable", put("i", (0, (999,)))),
    _bad(25, "voxels beyond the end", "vox_offset 10^9", "scan.truncated", put("f", (VOX_OFFSET, (1e9,)))),
    _bad(26, "vox_offset NaN", "where the voxels begin is NaN", "scan.header", put("f", (VOX_OFFSET, (float("nan"),)))),
    _other(27, "four axes", "five volumes in one file", "scan.not-3d", of_type("i2", (5, *SHAPE))),
    _other(28, "complex voxels", "complex64", "scan.dtype", of_type("c8")),
    _other(29, "colour voxels", "RGB24", "scan.dtype", colour),
    _other(30, "NaN and Inf among the voxels", "one voxel each", "scan.nonfinite", not_finite),
    _other(31, "two axes", "one plane", "scan.not-3d", flat),
    _row(
        32, "fourth axis of one", "one volume in a file of four axes", "accepted",
        sound(of_type("i2", (1, *SHAPE)), voxels=lambda: random((1, *SHAPE))[0]),
    ),
    _row(
        33, "a patient's name in the header", "in every free text, and a DICOM header as an extension", "accepted",
        sound(telling),
    ),
    _row(34, "big-endian", "the other byte order, header and voxels", "accepted", sound(big_endian)),
    _packed(
        "35a", "gzip bomb", "a grid of 10 x 9 x 12 is declared, 2 GiB come out of 9 MB", "scan.header",
        lambda: bomb(SHAPE, LIMIT),
    ),
    _row(
        "35b", "2 GiB of zeros", "declared as such, in 9 MB: nothing to segment", "refused:scan.bomb",
        refused(lambda: bomb((1000, 1024, 1024), 2 * 1000 * 1024 * 1024), "scan.nii.gz"), kind="unsuitable",
        suffix=".nii.gz",
    ),
    _row(
        36, "junk after the gzip stream", "12 bytes that belong to nothing", "warned:scan.trailing-bytes",
        sound(lambda: packed() + b"JUNKJUNKJUNK", "scan.nii.gz"), suffix=".nii.gz",
    ),
    _row(37, "gzip of two members", "as parallel gzip writes it", "accepted", sound(members, "scan.nii.gz"),
         suffix=".nii.gz"),
    _bad(38, "qform and sform disagree", "by a turn of 90 degrees and 70 mm", "geometry.ambiguous", other_qform),
    _row(
        39, "units of metres", "xyzt_units 1: voxels of 2.5 m", "refused:geometry.ambiguous",
        refused(lambda: stored(lambda head: head.__setitem__(UNITS, 1))), kind="unsuitable",
    ),
    _row(
        "40a", "endless extension", "an extension of 2^31 bytes before the voxels", "refused:scan.header",
        refused(lambda: with_extension(2**31, 384.0)),
    ),
    _row(
        "40b", "extension within the voxels", "vox_offset is 352, where the extension of 2^31 bytes begins",
        "refused:scan.header", refused(lambda: with_extension(2**31, 352.0)),
    ),
)  # fmt: skip
