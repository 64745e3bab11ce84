"""Zip and tar archives: judged before and while they are unpacked, each into a folder of its own.

An archive that is a source of scans lies unpacked under ``archives/<first 40 digits of the SHA-256 of its bytes>`` in
the private folder and appears there whole or not at all, so the same archive is unpacked once. Archives within an
archive stay closed. Messages name no member, because a name may identify a patient.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vnet_core.errors import ScanError
from workers.storage.store import Root, file_digest

PREFIX = "archives"
"""Where in the private folder unpacked archives lie."""
FOLDER = "scans"
"""Name of the folder that holds what an archive holds."""
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
"""Names of archives, in any case; a ``.nii.gz`` is none."""
_CHUNK_BYTES = 1 << 20
_MAX_READ_BYTES = 1 << 24
"""Taken from a compressed stream at once: no header of a member is that long."""
_DIRECTORY_ENTRY_BYTES = 400
"""Of a zip file's list of members, per file that may be in it."""
_MAX_PADDING_BYTES = 1 << 24
_BLOCK_BYTES = 512
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    struct.error,
    ValueError,
)
"""What the standard library raises on archives that are none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is unpacked; an archive that holds more is refused."""

    files: int = 200_000
    total_bytes: int = 1 << 40
    """Unpacked; the largest public data sets have 30 GB."""
    growth: int = 100
    """Unpacked bytes per byte of the archive; scans grow by 2 to 10, label maps by more."""
    slack_bytes: int = 1 << 28
    """That small archives may hold more than ``growth`` times their size."""

    def unpacked_bytes(self, archive_bytes: int) -> int:
        """The most that an archive of so many bytes may hold."""
        return min(self.total_bytes, self.slack_bytes + self.growth * archive_bytes)


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    kind: str
    """`file`, `folder` or `other`."""
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that is read."""
    return path.name.lower().endswith(SUFFIXES)


def archive_stem(path: Path) -> str:
    """The name without its suffix."""
    return re.sub(r"(\.tar\.gz|\.tgz|\.tar|\.zip)$", "", path.name, flags=re.IGNORECASE)


def unpacked(private: Root, archive: Path, limits: Limits = LIMITS) -> Path:
    """The folder that holds what the archive holds; an archive that was unpacked before is not again.

    Where the archive has one single folder at its top, that folder's content is what it holds. ``ScanError``:
    ``scan.unreadable``, ``archive.unsafe``, ``archive.too-large``, ``archive.encrypted``, ``archive.damaged``.
    StorageError ``store.full``.
    """
    try:
        if not stat.S_ISREG(archive.stat().st_mode):
            raise ScanError("scan.unreadable", "this is no regular file; give an archive of scans")
        digest = file_digest(archive)
    except OSError as error:
        raise ScanError("scan.unreadable", f"the archive cannot be opened: {error.strerror}") from None
    key = f"{PREFIX}/{digest[:40]}"
    parent = private.home / key
    folder = parent / FOLDER
    if folder.is_dir():
        return folder
    with private.room():
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=parent))
        try:
            unpack(archive, staging, limits)
            _publish(content_of(staging), folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _publish(whole: Path, folder: Path) -> None:
    whole.chmod(0o700)
    try:
        whole.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run has just unpacked the same archive
            raise


def content_of(folder: Path) -> Path:
    """Where the content of an archive is that was unpacked here: in the single folder at its top, or else here."""
    top = list(folder.iterdir())
    return top[0] if len(top) == 1 and top[0].is_dir() else folder


def unpack(archive: Path, folder: Path, limits: Limits = LIMITS) -> None:
    """Write every file of the archive below ``folder``; resource forks of macOS (``._name``) are left out.

    ``ScanError``: ``archive.unsafe``, ``archive.too-large``, ``archive.encrypted``, ``archive.damaged``; what was
    written until then stays.
    """
    try:
        with _members(archive, limits) as members:
            _write(members, folder, limits, limits.unpacked_bytes(archive.stat().st_size))
    except ScanError:
        raise
    except _DAMAGE as error:
        raise ScanError(
            "archive.damaged", f"the archive is damaged ({type(error).__name__}); copy it again from its source"
        ) from None


def _write(members: Iterator[_Member], folder: Path, limits: Limits, most_bytes: int) -> None:
    files = declared = 0
    for member in members:
        parts = _safe_parts(member)
        files, declared = files + 1, declared + member.size
        if files > limits.files or declared > most_bytes:
            raise _too_large(f"the archive holds at least {files} files and {declared} bytes", limits, most_bytes)
        if not parts or parts[-1].startswith("._"):
            continue
        target = folder.joinpath(*parts)
        try:
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ScanError("archive.unsafe", "the archive holds two members of one name; unpack it by hand") from None
        if target.stat().st_size != member.size:
            raise ScanError(
                "archive.damaged",
                f"a member has {target.stat().st_size} of {member.size} bytes; copy the archive from its source again",
            )


def _too_large(found: str, limits: Limits, most_bytes: int) -> ScanError:
    return ScanError(
        "archive.too-large",
        f"{found}, at most {limits.files} files and {most_bytes} bytes are unpacked; look into it, unpack it yourself"
        " and give the folder",
    )


def _safe_parts(member: _Member) -> tuple[str, ...]:
    """The member's path, part by part, below the folder that it is unpacked to; () for that folder itself."""
    if member.kind == "other":
        raise ScanError("archive.unsafe", "a member of the archive is a link or a device; unpack it by hand")
    path = PurePosixPath(member.name)
    parts = tuple(part for part in path.parts if part != ".")
    odd = any(c in "\\" or ord(c) < 32 for c in member.name) or re.match(r"[A-Za-z]:", member.name)
    if path.is_absolute() or ".." in parts or odd:
        raise ScanError("archive.unsafe", "a member of the archive would lie outside its folder; do not unpack it")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts) or len(member.name) > 2000:
        raise ScanError("archive.unsafe", "a member of the archive has a name that is too long; unpack it by hand")
    return parts


@contextmanager
def _members(archive: Path, limits: Limits) -> Iterator[Iterator[_Member]]:
    if archive.name.lower().endswith(".zip"):
        _check_directory(archive, limits)
        with zipfile.ZipFile(archive) as file:
            yield (_zip_member(file, info) for info in file.infolist())
        return
    with archive.open("rb") as stored:
        if archive.name.lower().endswith(("gz", "tgz")):
            with gzip.GzipFile(fileobj=stored) as stream, _tar(stream) as tar:
                yield (_tar_member(tar, info) for info in tar)
                _check_end(tar, stream)
        else:
            with _tar(stored) as tar:
                yield (_tar_member(tar, info) for info in tar)
                _check_end(tar, stored)


def _tar(stream: IO[bytes] | gzip.GzipFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast(IO[bytes], _Sparing(stream)), mode="r:")


def _check_end(tar: tarfile.TarFile, stream: IO[bytes] | gzip.GzipFile) -> None:
    """A tar file ends with a block of zeros; one that lacks it was cut off between two members. What follows is read
    too, since the checksum of a gzip stream comes last."""
    stream.seek(tar.offset)
    if stream.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise ScanError("archive.damaged", "the tar file has no end; copy it again from its source")
    if len(stream.read(_MAX_PADDING_BYTES)) == _MAX_PADDING_BYTES:
        raise ScanError("archive.damaged", f"over {_MAX_PADDING_BYTES} bytes follow the end of the tar file")


class _Sparing:
    """A stream that gives no more than ``_MAX_READ_BYTES`` at once: tarfile reads a whole extended header, however
    long it says that it is, into memory."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, which must be said."""
        if not 0 <= size <= _MAX_READ_BYTES:
            raise ScanError("archive.damaged", f"a header of the archive has {size} bytes; copy it again")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As that of the stream."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """As that of the stream."""
        return self._stream.tell()


def _check_directory(archive: Path, limits: Limits) -> None:
    """Refuse a zip file by what its end says of the list of members, before that list is read into memory."""
    with archive.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise ScanError("archive.damaged", "the end of the zip file is not there; copy it again from its source")
    files, length = struct.unpack_from("<H", tail, at + 10)[0], struct.unpack_from("<I", tail, at + 12)[0]
    wide = tail.rfind(b"PK\x06\x06", 0, at)
    if wide >= 0 and at >= wide + 56:
        files, length = struct.unpack_from("<QQ", tail, wide + 32)
    if files > limits.files or length > _DIRECTORY_ENTRY_BYTES * limits.files:
        raise _too_large(f"the zip file lists {files} files in {length} bytes", limits, limits.unpacked_bytes(size))


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    if info.flag_bits & 1:
        raise ScanError("archive.encrypted", "a member is encrypted; unpack it and give the folder")
    kind = "folder" if info.is_dir() else "file"
    plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
    # what a name holds after a NUL is cut off by zipfile, and is looked at here
    return _Member(info.orig_filename, kind if plain else "other", info.file_size, lambda: file.open(info))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    def content() -> IO[bytes]:
        source = tar.extractfile(info)
        assert source is not None, "a regular file has content"
        return source

    kind = "file" if info.isreg() and not info.issparse() else "folder" if info.isdir() else "other"
    return _Member(info.name, kind, info.size, content)
