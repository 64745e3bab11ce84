"""Rows 87 to 90: archives, cohorts, labels, and things that are no regular files."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from tests.bad_inputs import nifti
from tests.bad_inputs.circumstances import rewritten, rights_of_a_user
from tests.bad_inputs.inputs import BadInput, Kind, Truth, random
from vnet_core.plan import Label

LABELS = (Label(value=1, name="organ"), Label(value=2, name="lesion"))
MEMBERS = 1_000_000
BOMB_BYTES = 1 << 30


def image_truth() -> Truth:
    return Truth(random(nifti.SHAPE), nifti.GEOMETRY)


def zipped(name: str) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker of scans.zip with one scan under ``name``."""

    def make(folder: Path) -> tuple[Truth, ...]:
        with zipfile.ZipFile(folder / "scans.zip", "w") as archive:
            archive.writestr("good.nii", nifti.stored())
            archive.writestr(name, nifti.stored())
        return ()

    return make


def sound_zip(folder: Path) -> tuple[Truth, ...]:
    with zipfile.ZipFile(folder / "scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cohort/scan.nii.gz", nifti.packed())
    return (image_truth(),)


def tar_with_link(folder: Path) -> tuple[Truth, ...]:
    """A link to the root of the file system, and a scan that would be written through it."""
    with tarfile.open(folder / "scans.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("a")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "outside")
        archive.addfile(link)
        scan = tarfile.TarInfo("a/scan.nii")
        content = nifti.stored()
        scan.size = len(content)
        archive.addfile(scan, io.BytesIO(content))
    return ()


def zip_of_many(folder: Path) -> tuple[Truth, ...]:
    """A directory of a million empty files, without the files."""
    entry = np.dtype([("fixed", "V28"), ("name_bytes", "<u2"), ("rest", "V16"), ("name", "S11")])
    entries = np.zeros(MEMBERS, entry)
    entries["fixed"] = np.void(struct.pack("<4s6H3I", b"PK\1\2", 20, 20, 0, 0, 0, 0x21, 0, 0, 0))
    entries["name_bytes"] = 11
    digits = np.arange(MEMBERS)[:, None] // 10 ** np.arange(6, -1, -1) % 10 + ord("0")
    names = np.concatenate([digits, np.broadcast_to(list(b".nii"), (MEMBERS, 4))], 1).astype(np.uint8)
    entries["name"] = names.view("S11")[:, 0]
    central = entries.tobytes()
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, MEMBERS, MEMBERS, len(central), 0)
    where = struct.pack("<4sIQI", b"PK\6\7", 0, len(central), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (folder / "scans.zip").write_bytes(central + wide + where + end)
    return ()


def zip_bomb(folder: Path) -> tuple[Truth, ...]:
    """One file of a gigabyte of zeros in a megabyte."""
    piece = bytes(BOMB_BYTES // 64)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    whole = packed * 64 + packer.flush()
    crc = 0
    for _ in range(64):
        crc = zlib.crc32(piece, crc)
    (folder / "scans.zip").write_bytes(_zip_file([(b"scan.nii", whole, crc, BOMB_BYTES)]))
    return ()


def overlapping(folder: Path) -> tuple[Truth, ...]:
    """A thousand names in the directory for one packed piece of 16 MiB: 16 GiB out of 100 kB."""
    content = bytes(1 << 24)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content) + packer.flush()
    names = [f"{number:04d}.nii".encode() for number in range(1000)]
    one = (packed, zlib.crc32(content), len(content))
    (folder / "scans.zip").write_bytes(_zip_file([(name, *one) for name in names]))
    return ()


def _zip_file(members: Sequence[tuple[bytes, bytes, int, int]]) -> bytes:
    """A zip file of the first of its members (name, deflated bytes, CRC, size), to which all names point."""
    name, packed, crc, size = members[0]
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0x21, crc, len(packed), size, len(name), 0) + name + packed
    central = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0x21, c, len(p), s, len(n), 0, 0, 0, 0, 0, 0) + n
        for n, p, c, s in members
    )
    count = len(members)
    return local + central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(central), len(local), 0)


def nested(folder: Path) -> tuple[Truth, ...]:
    """Archives within archives, twenty deep, as a quine has them without an end."""
    content, name = nifti.stored(), "scan.nii"
    for _ in range(20):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        content, name = file.getvalue(), "scans.zip"
    (folder / "scans.zip").write_bytes(content)
    return ()


def cut_zip(folder: Path) -> tuple[Truth, ...]:
    sound_zip(folder)
    content = (folder / "scans.zip").read_bytes()
    (folder / "scans.zip").write_bytes(content[: len(content) // 2])
    return ()


def twice(folder: Path) -> tuple[Truth, ...]:
    for name in ("first.nii", "second.nii"):
        (folder / name).write_bytes(nifti.stored())
    return (image_truth(),)


def colliding(folder: Path) -> tuple[Truth, ...]:
    """Two scans whose names are one on a file system that knows no capitals."""
    other = random(nifti.SHAPE, 5, 900)
    (folder / "Scan.nii").write_bytes(nifti.stored())
    (folder / "scan.nii").write_bytes(nifti.stored(voxels=other))
    return image_truth(), Truth(other, nifti.GEOMETRY)


def labelled(label: Callable[[], bytes]) -> Callable[[Path], tuple[Truth, ...]]:
    """A maker of an image and its label."""

    def make(folder: Path) -> tuple[Truth, ...]:
        for name, content in (("images", nifti.stored()), ("labels", label())):
            (folder / name).mkdir()
            (folder / name / "scan.nii").write_bytes(content)
        return ()

    return make


def map_of(dtype: str = "u1") -> np.ndarray:
    """Labels 0, 1 and 2."""
    return random(nifti.SHAPE, 0, 3).astype(dtype)


def other_shape() -> bytes:
    return nifti.stored(voxels=map_of()[:, :, :-1])


def other_place() -> bytes:
    return nifti.stored(nifti.put("f", (nifti.SROW + 12, (25.0,)), (nifti.QOFFSET, (25.0,))), map_of())


def soft() -> bytes:
    return nifti.stored(voxels=map_of("f4") / 2)


def with_value(value: int) -> Callable[[], bytes]:
    def content() -> bytes:
        voxels = map_of("i2")
        voxels[4, 4, 4] = value
        return nifti.stored(voxels=voxels)

    return content


def forbidden(folder: Path) -> tuple[Truth, ...]:
    (folder / "scan.nii").write_bytes(nifti.stored())
    (folder / "scan.nii").chmod(0)
    return ()


def pipe(folder: Path) -> tuple[Truth, ...]:
    os.mkfifo(folder / "scan.nii.gz")
    return ()


def endless(folder: Path) -> tuple[Truth, ...]:
    (folder / "scan.nii").symlink_to("/dev/zero")
    return ()


def folder_named_scan(folder: Path) -> tuple[Truth, ...]:
    (folder / "images" / "scan.nii.gz").mkdir(parents=True)
    return ()


def changing(folder: Path) -> tuple[Truth, ...]:
    """A scan of some size."""
    voxels = random((80, 90, 100))
    (folder / "scan.nii").write_bytes(nifti.stored(voxels=voxels))
    return ()


def _row(
    number: str,
    title: str,
    what: str,
    verdict: str | tuple[str, ...],
    make: Callable,
    source: str,
    opens: str = "",
    during: Callable[[Path], AbstractContextManager[None]] | None = None,
) -> BadInput:
    expected = (verdict,) if isinstance(verdict, str) else verdict
    kind: Kind = "bad" if any(v.startswith("refused") for v in expected) else "sound"
    return BadInput(number, title, what, kind, expected, make, source, opens, during=during)


def _label(number: str, title: str, what: str, code: str, label: Callable[[], bytes]) -> BadInput:
    return BadInput(number, title, what, "bad", (f"refused:{code}",), labelled(label), labels=LABELS)


INPUTS = (
    _row("87a", "archive that leaves its folder", "a zip with ../../escape.nii", "refused:archive.unsafe",
         zipped("../../escape.nii"), "scans.zip"),
    _row("87b", "archive with a link", "a tar with a link, and a scan behind it", "refused:archive.unsafe",
         tar_with_link, "scans.tar.gz"),
    _row("87c", "archive of a million files", "in the directory of a zip", "refused:archive.too-large", zip_of_many,
         "scans.zip"),
    _row("87d", "archive that is a bomb", "1 GiB out of 1 MB", "refused:archive.too-large", zip_bomb, "scans.zip"),
    _row("87e", "archives within archives", "twenty deep", "refused:cohort.empty", nested, "scans.zip"),
    _row("87f", "archive cut in half", "a zip without its directory", "refused:archive.damaged", cut_zip,
         "scans.zip"),
    _row("87g", "archive of names for one piece", "16 GiB out of 100 kB", "refused:archive.damaged", overlapping,
         "scans.zip"),
    _row("87h", "sound archive", "a zip with one scan", "accepted", sound_zip, "scans.zip"),
    _row("88a", "one scan under two names", "the same bytes", ("accepted", "refused:cohort.duplicate-case"), twice,
         "."),
    _row("88b", "names that differ in capitals", "one file where capitals do not count",
         ("accepted", "warned:cohort.similar-id"), colliding, "."),
    _label("89a", "label of another shape", "a column less than the image", "label.grid", other_shape),
    _label("89b", "label at another place", "displaced by more than a voxel", "label.grid", other_place),
    _label("89c", "label of fractions", "0, 0.5 and 1", "label.not-integer", soft),
    _label("89d", "unknown label", "a voxel of 7, the cohort has 1 and 2", "label.values", with_value(7)),
    _label("89e", "negative label", "a voxel of -1", "label.negative", with_value(-1)),
    _row("90a", "file without permission", "chmod 000", "refused:scan.unreadable", forbidden, ".", "scan.nii",
         lambda folder: rights_of_a_user()),
    _row("90b", "pipe named as a scan", "a reader would wait for ever", "refused:scan.unreadable", pipe, ".",
         "scan.nii.gz"),
    _row("90c", "link to an endless device", "/dev/zero", "refused:scan.path-escape", endless, ".", "scan.nii"),
    _row("90d", "folder named as a scan", "images/scan.nii.gz is an empty folder", "refused:scan.unreadable",
         folder_named_scan, ".", "images/scan.nii.gz"),
    _row("90e", "file changed while it is read", "other voxels after the first reader", "refused:scan.changed",
         changing, ".",
         during=lambda folder: rewritten(folder / "scan.nii", start=352)),
)  # fmt: skip
