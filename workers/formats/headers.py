"""The headers of NIfTI, MetaImage and NRRD files, checked before a voxel is trusted.

The stock readers return truncated, damaged or foreign data as success, so each header is parsed here once into a
:class:`Layout`; a data file named by a header never leaves the header's folder. Messages name no file and quote no
header text, because both may identify a patient.

Formats: NIfTI-1 (nifti1.h), MetaImage (ITK MetaIO), NRRD 1-5 (teem). File axes are x, y, z with x fastest, which is
C order (z, y, x); :func:`grid_of_file` and :func:`file_axes` are the one pair of functions that turn the axes round.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Shape, matrix_of
from workers.formats.blocks import Layout, inflated_pieces, open_regular

MAX_VOXELS = 2**31
"""Largest grid that is read."""
_HEADER_BYTES = 1 << 20
_PIXDIM_TOLERANCE = 1e-4
"""Relative difference of NIfTI pixdim from the length of the sform column that counts as rounding."""
_QUATERNION_TOLERANCE = 3 * float(np.finfo(np.float32).eps)
_LPS_FROM_RAS = np.array([-1.0, -1.0, 1.0])
"""Signs of the world axes: NIfTI grows to the right and front, we to the left and back."""

_NIFTI_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""NIfTI datatype to numpy code."""
_META_TYPES = {
    "MET_CHAR": "i1", "MET_ASCII_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
"""MetaImage ElementType to numpy code."""
_NRRD_TYPES = {
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
_NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
"""Signs that turn the axes of a NRRD space into LPS."""

_LOOKS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "an HTML or XML page; download the scan again"),
    (b"\x1f\x8b", "a gzip file; give it the suffix .nii.gz or unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x5c\x01\0\0", "an uncompressed NIfTI-1 or Analyze file; give it the suffix .nii or convert it"),
    (b"\0\0\x01\x5c", "a big-endian NIfTI-1 or Analyze file; give it the suffix .nii or convert it"),
    (b"\x1c\x02\0\0", "a NIfTI-2 file; convert it to NIfTI-1"),
    (b"\0\0\x02\x1c", "a big-endian NIfTI-2 file; convert it to NIfTI-1"),
    (b"NRRD", "a NRRD file; give it the suffix .nrrd"),
    (b"ObjectType", "a MetaImage file; give it the suffix .mha"),
)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The text fields of a MetaImage or NRRD header."""

    fields: dict[str, str]

    def word(self, *names: str, default: str = "") -> str:
        return next((self.fields[n] for n in names if n in self.fields), default).lower()

    def flag(self, *names: str, default: str = "false") -> bool:
        word = self.word(*names, default=default)
        if word not in ("true", "false"):
            raise ScanError("scan.header", f"the header field {names[0]!r} is neither True nor False; rewrite the file")
        return word == "true"

    def integers(self, name: str, default: str = "") -> tuple[int, ...]:
        return tuple(int(n) for n in _numbers(self.fields.get(name, default), None, name, int))

    def reals(self, count: int, *names: str, default: np.ndarray | None = None) -> np.ndarray:
        name = next((n for n in names if n in self.fields), "")
        if not name and default is not None:
            return default
        return _reals(self.fields.get(name, ""), count, name or names[0])


def grid_of_file(shape: Shape, origin_mm: np.ndarray, spacing_xyz: np.ndarray, direction_xyz: np.ndarray) -> Geometry:
    """Geometry from what a file says by its own axes x, y, z; the world is LPS, ``direction_xyz`` (3, 3) by columns.

    ``ScanError``: ``geometry.nonfinite``, ``geometry.spacing``, ``geometry.not-orthonormal`` (sheared or singular).
    """
    if not (np.isfinite(direction_xyz).all() and np.isfinite(spacing_xyz).all()):
        raise ScanError("geometry.nonfinite", "the header's direction or spacing holds NaN or Inf; correct the header")
    z, y, x = (float(s) for s in spacing_xyz[::-1])
    a, b, c = (float(v) for v in origin_mm)
    return Geometry(shape, (z, y, x), (a, b, c), matrix_of(direction_xyz[:, ::-1]))


def file_axes(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Spacing (3,) and direction (3, 3) by file axes x, y, z, world LPS: what ITK calls spacing and direction."""
    return np.asarray(geometry.spacing_mm)[::-1], np.asarray(geometry.direction)[:, ::-1]


def nifti_layout(path: Path) -> Layout:
    """Layout of a NIfTI-1 file ``.nii`` or ``.nii.gz``: geometry by sform if coded, else by qform (as nibabel).

    ``ScanError``: ``scan.unreadable``, ``scan.header``, ``scan.truncated``, ``scan.checksum``, ``scan.not-3d``,
    ``scan.dtype``, ``scan.empty``, ``scan.too-large``, ``geometry.*``.
    """
    wrapped = path.name.lower().endswith(".gz")
    head = _first_bytes(path, 348)
    if wrapped and head[:2] != b"\x1f\x8b":
        raise not_a("gzip file", head)
    if wrapped:
        with open_regular(path) as file:
            head = b"".join(inflated_pieces(file, 348))[:348]
    order = {b"\x5c\x01\0\0": "<", b"\0\0\x01\x5c": ">"}.get(head[:4])
    if order is None or (len(head) == 348 and head[344:] != b"n+1\0"):
        raise not_a("NIfTI-1 file with one-file magic n+1", head)
    if len(head) < 348:
        raise ScanError(
            "scan.truncated", f"the file ends after {len(head)} of 348 header bytes; copy it again from its source"
        )
    ndim, *sizes = struct.unpack_from(order + "8h", head, 40)
    code, bits = struct.unpack_from(order + "2h", head, 70)
    offset, slope, intercept = struct.unpack_from(order + "3f", head, 108)
    if not 1 <= ndim <= 7:
        raise ScanError("scan.header", f"dim[0] is {ndim}, must be 1 to 7; the header is damaged")
    shape = _grid_shape(tuple(sizes[:ndim]))
    dtype = _dtype(_NIFTI_TYPES.get(code), f"NIfTI datatype {code}", order)
    if bits != 8 * dtype.itemsize:
        raise ScanError("scan.header", f"bitpix {bits} contradicts datatype {code} ({8 * dtype.itemsize} bits)")
    if not (math.isfinite(offset) and offset >= 352 and offset == int(offset)):
        raise ScanError("scan.header", f"vox_offset {offset} is not a whole number of at least 352 bytes")
    if math.isnan(slope) or slope == 0:  # both mean: not scaled
        slope, intercept = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ScanError("scan.header", f"scl_slope {slope}, scl_inter {intercept} are not finite; correct the header")
    geometry = _nifti_geometry(head, order, shape)
    if wrapped:
        return Layout(geometry, dtype, path, 0, True, int(offset), slope, intercept)
    return Layout(geometry, dtype, path, int(offset), False, 0, slope, intercept)


def _nifti_geometry(head: bytes, order: str, shape: Shape) -> Geometry:
    pixdim = np.frombuffer(head, order + "f4", 8, 76).astype(float)
    qform, sform = struct.unpack_from(order + "2h", head, 252)
    if not (0 <= qform <= 5 and 0 <= sform <= 5):
        raise ScanError("scan.header", f"qform_code {qform} or sform_code {sform} is not 0 to 5; the header is damaged")
    if sform > 0:
        srow = np.frombuffer(head, order + "f4", 12, 280).astype(float).reshape(3, 4)
        lengths = np.linalg.norm(srow[:, :3], axis=0)
        # Keeping pixdim as the spacing lets a mask carry both header fields of its source unchanged.
        spacing = pixdim[1:4] if np.allclose(pixdim[1:4], lengths, _PIXDIM_TOLERANCE, 0) else lengths
        srow *= _LPS_FROM_RAS[:, None]
        return grid_of_file(shape, srow[:, 3], spacing, _per_step(srow[:, :3], spacing))
    if qform > 0:
        b, c, d, *origin = np.frombuffer(head, order + "f4", 6, 256).astype(float)
        rest = 1.0 - b * b - c * c - d * d
        if not rest >= -_QUATERNION_TOLERANCE:
            raise ScanError(
                "geometry.not-orthonormal", f"the qform quaternion ({b}, {c}, {d}) is longer than 1; correct the header"
            )
        a = math.sqrt(rest) if rest > _QUATERNION_TOLERANCE else 0.0  # the threshold of nibabel
        axes = Rotation.from_quat([b, c, d, a]).as_matrix()
        axes[:, 2] *= -1.0 if pixdim[0] < 0 else 1.0
        return grid_of_file(shape, _LPS_FROM_RAS * origin, pixdim[1:4], _LPS_FROM_RAS[:, None] * axes)
    raise ScanError(
        "geometry.missing",
        "neither sform nor qform is set, so left and right are unknown; convert the scan again from its source",
    )


def meta_layout(path: Path) -> Layout:
    """Layout of a MetaImage file ``.mha`` or ``.mhd``; codes as :func:`nifti_layout`, and ``scan.path-escape``."""
    head = _first_bytes(path, _HEADER_BYTES)
    fields: dict[str, str] = {}
    end = 0
    while "ElementDataFile" not in fields:
        newline = head.find(b"\n", end)
        line = head[end : newline if newline >= 0 else len(head)].decode("latin-1")
        key, equals, value = line.partition("=")
        if not equals:
            raise not_a("MetaImage file", head)
        fields[key.strip()] = value.strip()
        end = newline + 1 if newline >= 0 else len(head)
    values = _Fields(fields)
    ndim = values.integers("NDims")[0]
    sizes = values.integers("DimSize")
    if ndim != len(sizes):
        raise ScanError("scan.header", f"NDims is {ndim} but DimSize has {len(sizes)} numbers; correct the header")
    shape = _grid_shape(sizes)
    channels = values.integers("ElementNumberOfChannels", "1")[0]
    kind = fields.get("ElementType", "")
    order = ">" if values.flag("BinaryDataByteOrderMSB", "ElementByteOrderMSB") else "<"
    dtype = _dtype(_META_TYPES.get(kind) if channels == 1 else None, "this ElementType or number of channels", order)
    if not values.flag("BinaryData", default="true"):
        raise ScanError("scan.unreadable", "the voxels are stored as text; rewrite the file with BinaryData = True")
    compressed = values.flag("CompressedData")
    spacing = values.reals(ndim, "ElementSpacing", "ElementSize")
    matrix = values.reals(ndim * ndim, "TransformMatrix", "Rotation", "Orientation", default=np.eye(ndim))
    origin = values.reals(ndim, "Offset", "Position", "Origin", default=np.zeros(ndim))
    geometry = grid_of_file(shape, origin[:3], spacing[:3], matrix.reshape(ndim, ndim)[:3, :3].T)
    skip = values.integers("HeaderSize", "0")[0]
    local = fields["ElementDataFile"].lower() == "local"
    if skip < -1 or (skip and (local or compressed)):
        raise ScanError("scan.header", f"HeaderSize {skip} cannot be used here; rewrite the file as .mha")
    data_file = path if local else _beside(path, fields["ElementDataFile"])
    return Layout(geometry, dtype, data_file, end if local else skip, compressed)


def nrrd_layout(path: Path) -> Layout:
    """Layout of a NRRD file ``.nrrd`` or ``.nhdr``, raw or gzip; error codes as :func:`meta_layout`."""
    head = _first_bytes(path, _HEADER_BYTES)
    if not head.startswith(b"NRRD000"):
        raise not_a("NRRD file", head)
    lines: list[str] = []
    end = 0
    while end < len(head) and (not lines or lines[-1]):  # an empty line ends the header
        newline = head.find(b"\n", end)
        newline = newline if newline >= 0 else len(head)
        lines.append(head[end:newline].decode("latin-1").strip())
        end = newline + 1
    pairs = (line.partition(": ") for line in lines[1:] if not line.startswith("#") and ":=" not in line)
    fields = {key.strip().lower().replace(" ", ""): value.strip() for key, _, value in pairs}
    values = _Fields(fields)
    sizes = values.integers("sizes")
    shape = _grid_shape(sizes)
    order = {"little": "<", "big": ">"}.get(values.word("endian"))
    dtype = _dtype(_NRRD_TYPES.get(values.word("type")), "this NRRD type", order or "<")
    if order is None and dtype.itemsize > 1:
        raise ScanError("scan.header", "the header does not say endian: little or big; correct the header")
    encoding = values.word("encoding")
    if encoding not in ("raw", "gzip", "gz"):
        raise ScanError("scan.unreadable", "only the NRRD encodings raw and gzip are read; rewrite the file")
    byte_skip, line_skip = values.integers("byteskip", "0")[0], values.integers("lineskip", "0")[0]
    if line_skip or byte_skip < -1 or (byte_skip and encoding != "raw"):
        raise ScanError("scan.header", f"line skip {line_skip}, byte skip {byte_skip} are not read; rewrite the file")
    name = fields.get("datafile", "")
    if byte_skip and not name:
        raise ScanError("scan.header", f"byte skip {byte_skip} makes no sense without a data file; rewrite the file")
    return Layout(
        _nrrd_geometry(values, shape),
        dtype,
        _beside(path, name) if name else path,
        byte_skip if name else end,
        encoding != "raw",
    )


def _nrrd_geometry(values: _Fields, shape: Shape) -> Geometry:
    signs = _NRRD_SPACES.get(values.word("space"))
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
    steps = np.stack([_reals(v.strip("()").replace(",", " "), 3, "space directions") for v in vectors], axis=1)
    origin = _reals(values.fields.get("spaceorigin", "").strip("()").replace(",", " "), 3, "space origin")
    steps *= np.array(signs)[:, None]
    spacing = np.linalg.norm(steps, axis=0)
    return grid_of_file(shape, origin * signs, spacing, _per_step(steps, spacing))


def _grid_shape(sizes_xyz: tuple[int, ...]) -> Shape:
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
        raise ScanError("scan.too-large", f"{math.prod(sizes)} voxels declared, at most {MAX_VOXELS} are read; crop it")
    x, y, z = sizes
    return (z, y, x)


def _dtype(code: str | None, found: str, order: str) -> np.dtype:
    if code is None:
        raise ScanError(
            "scan.dtype", f"{found} is not read: only one plain integer or float per voxel (no RGB, vector, complex)"
        )
    return np.dtype(order + code)


def _first_bytes(path: Path, count: int) -> bytes:
    with open_regular(path) as file:
        return file.read(count)


def _beside(header: Path, name: str) -> Path:
    """The data file that a header names, which must lie in the header's own folder and be named plainly."""
    data_file = header.parent / name
    plain = str(Path(name)) == Path(name).name and name not in ("", ".", "..") and not set(name) & set('\\"%\0')
    if not plain or name.split()[0].lower() == "list" or data_file.resolve().parent != header.parent.resolve():
        raise ScanError(
            "scan.path-escape",
            "the header names its voxels by a path, a list or a link; they must be one file beside the header",
        )
    return data_file


def not_a(kind: str, head: bytes) -> ScanError:
    """The refusal of a file that begins with ``head`` and is not the ``kind`` that its name promises."""
    text = head.lstrip()
    looks = next((what for start, what in _LOOKS if text.startswith(start)), "something else; check the source")
    if head[128:132] == b"DICM":
        looks = "a DICOM file; give the folder of the series"
    return ScanError("scan.unreadable", f"not a {kind}: {'it is empty' if not head else f'it looks like {looks}'}")


def _per_step(steps: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Columns divided by their spacing; zero and Inf are left for :func:`grid_of_file` to refuse."""
    with np.errstate(invalid="ignore"):
        return steps / np.where(spacing > 0, spacing, 1.0)


def _reals(text: str, count: int, key: str) -> np.ndarray:
    return np.array(_numbers(text, count, key, float))


def _numbers(text: str, count: int | None, key: str, kind: Callable[[str], float]) -> list:
    try:
        numbers = [kind(word) for word in text.split()]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise ScanError("scan.header", f"the header field {key!r} is absent or not {count or 'a list of'} numbers")
    return numbers
