"""Rows 41 to 54: MetaImage files, header text and voxels written by hand."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.bad_inputs.inputs import OBLIQUE, BadInput, Truth, grid, random

SHAPE = (10, 9, 12)
GEOMETRY = grid(SHAPE, (2.5, 1.1, 0.9), direction=OBLIQUE)
OUTSIDE = "outside"
"""Folder beside the ingested one, with voxels that no header may reach."""


def header(data_file: str = "LOCAL", **changes: str) -> bytes:
    """Header of an int16 image on the usual grid; a change of "" leaves its field out."""
    numbers = np.asarray(GEOMETRY.direction)[:, ::-1].T.ravel()  # by rows: one axis of the file after the other
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(map(repr, numbers.tolist())),
        "Offset": " ".join(map(repr, GEOMETRY.origin_mm)),
        "ElementSpacing": "0.9 1.1 2.5",
        "DimSize": "12 9 10",
        "ElementType": "MET_SHORT",
        **changes,
        "ElementDataFile": data_file,
    }
    return "".join(f"{key} = {value}\n" for key, value in fields.items() if value).encode()


def voxels() -> bytes:
    return random(SHAPE).astype("<i2").tobytes()


def one_file(ending: Callable[[], bytes] = voxels, **changes: str) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker of scan.mha with changed fields and voxels."""

    def make(folder: Path) -> tuple[Truth, ...]:
        (folder / "scan.mha").write_bytes(header(**changes) + ending())
        return ()

    return make


def pointing(data_file: Callable[[Path], str]) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker of in/scan.mhd that names its voxels; voxels of the right size lie in the folder beside it."""

    def make(folder: Path) -> tuple[Truth, ...]:
        (folder / "in").mkdir()
        (folder / OUTSIDE).mkdir()
        (folder / OUTSIDE / "voxels.raw").write_bytes(voxels())
        for z, plane in enumerate(random(SHAPE)):
            (folder / OUTSIDE / f"plane-{z}.raw").write_bytes(plane.astype("<i2").tobytes())
        (folder / "in" / "scan.mhd").write_bytes(header(data_file(folder)))
        return ()

    return make


def deflated_half() -> bytes:
    packed = zlib.compress(voxels())
    return packed[: len(packed) // 2]


def cut_and_sized(folder: Path) -> tuple[Truth, ...]:
    whole = len(zlib.compress(voxels()))
    return one_file(deflated_half, CompressedData="True", CompressedDataSize=str(whole))(folder)


def planes_outside(folder: Path) -> str:
    """A list of one file per plane, all in another folder."""
    return "\n".join(["LIST", *(f"../{OUTSIDE}/plane-{z}.raw" for z in range(SHAPE[0]))])


def _one(number: int | str, title: str, what: str, code: str, make: Callable) -> BadInput:
    return BadInput(str(number), title, what, "bad", (f"refused:{code}",), make, opens="scan.mha")


def _two(number: int | str, title: str, what: str, code: str, make: Callable) -> BadInput:
    return BadInput(str(number), title, what, "bad", (f"refused:{code}",), make, "in", "in/scan.mhd")


INPUTS = (
    _one(41, "voxels cut", "half of the voxels are lost", "scan.truncated",
         one_file(lambda: voxels()[: len(voxels()) // 2])),
    _one(42, "10^15 voxels declared", "DimSize 100000 100000 100000", "scan.too-large",
         one_file(DimSize="100000 100000 100000")),
    _one(43, "spacing 0", "ElementSpacing 0.9 1.1 0", "geometry.spacing", one_file(ElementSpacing="0.9 1.1 0")),
    _one(44, "negative spacing", "ElementSpacing -0.9 1.1 2.5", "geometry.spacing",
         one_file(ElementSpacing="-0.9 1.1 2.5")),
    _one(45, "singular matrix", "two axes are the same", "geometry.not-orthonormal",
         one_file(TransformMatrix="1 0 0 1 0 0 0 0 1")),
    BadInput("46", "sheared", "axes at 63 degrees", "unsuitable", ("refused:geometry.not-orthonormal",),
             one_file(TransformMatrix="1 0 0 0.5 1 0 0 0 1"), opens="scan.mha"),
    _two(47, "voxels in another folder", "ElementDataFile = ../outside/voxels.raw", "scan.path-escape",
         pointing(lambda folder: f"../{OUTSIDE}/voxels.raw")),
    _two(48, "voxels by an absolute path", "any file of the machine could be read so", "scan.path-escape",
         pointing(lambda folder: str(folder / OUTSIDE / "voxels.raw"))),
    _two(49, "voxels missing", "the file that the header names is not there", "scan.unreadable",
         pointing(lambda folder: "voxels.raw")),
    _one(50, "unknown voxel type", "ElementType = MET_QUATERNION", "scan.dtype",
         one_file(ElementType="MET_QUATERNION")),
    _one(51, "spacing NaN", "ElementSpacing nan 1.1 2.5", "geometry.nonfinite",
         one_file(ElementSpacing="nan 1.1 2.5")),
    _one(52, "negative size", "DimSize -12 9 10", "scan.empty", one_file(DimSize="-12 9 10")),
    _one("53a", "zlib stream cut", "half of the stream is lost", "scan.truncated",
         one_file(deflated_half, CompressedData="True")),
    _one("53b", "zlib stream shorter than declared", "half of CompressedDataSize", "scan.truncated", cut_and_sized),
    _two(54, "list of foreign files", "ElementDataFile = LIST of files in another folder", "scan.path-escape",
         pointing(planes_outside)),
)  # fmt: skip
