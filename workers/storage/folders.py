"""A local or mounted folder as a place for objects."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from vnet_core.errors import StorageError
from workers.storage.objects import Stored

UNFINISHED = ".put-"
"""How the names of half-written objects begin."""
_PIECE_BYTES = 1 << 20
_TRIES = 100


class Folder:
    """Objects are files. A write is atomic and durable: temporary file, fsync, rename, fsync of the folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is created yet."""
        self.folder = folder
        self.url = folder.as_uri()

    def _path(self, key: str) -> Path:
        """The file or folder of a key. StorageError ``store.outside`` when a link on the way to it leads out."""
        place = str(self.folder)
        for part in key.split("/"):
            place = f"{place}/{part}"
            if os.path.islink(place):
                self._refuse_if_outside(place)
        return self.folder / key

    def _refuse_if_outside(self, link: str) -> None:
        if not Path(os.path.realpath(link)).is_relative_to(self.folder):
            key = Path(link).relative_to(self.folder).as_posix()
            raise StorageError(
                "store.outside",
                f"{key} in the storage root is a link out of it, which is not followed; put the file or folder itself"
                " there, or mount it there",
            )

    def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        with self._written_beside(path, content) as temporary:
            os.replace(temporary, path)

    def create(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        with self._written_beside(path, content) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # also what NFS says to a writer whose first answer got lost on the way; then the file has two names
                return temporary.stat().st_nlink > 1
        return True

    @contextmanager
    def _written_beside(self, path: Path, content: bytes) -> Iterator[Path]:
        """A durable file with the content beside ``path``, for the block to give it its name; the folder is synced."""
        with self.room():
            handle, temporary = _unfinished(path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        return self._path(key).open("rb")

    def pieces(self, key: str) -> Iterator[bytes]:
        with self.open(key) as file:
            while some := file.read(_PIECE_BYTES):
                yield some

    def is_object(self, key: str) -> bool:
        return self._path(key).is_file()

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def names(self, prefix: str) -> list[str]:
        try:
            names = os.listdir(self._path(prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if not name.startswith("."))

    def walk(self, prefix: str) -> Iterator[Stored]:
        start = self._path(prefix)
        if start.is_file():
            yield self._stored(start)
            return
        for path in sorted(path for path in _files(start) if not path.name.startswith(UNFINISHED)):
            try:
                yield self._stored(path)
            except FileNotFoundError:
                continue  # somebody works on it

    def links(self, prefix: str) -> list[str]:
        start = self.folder / prefix
        if start.is_symlink():
            return [prefix]
        found = (Path(place, name) for place, folders, names in _walk(start) for name in (*folders, *names))
        return sorted(path.relative_to(self.folder).as_posix() for path in found if path.is_symlink())

    def leftovers(self) -> Iterator[Stored]:
        for path in _files(self.folder):
            if path.name.startswith(UNFINISHED):
                try:
                    yield self._stored(path)
                except FileNotFoundError:
                    continue

    def discard(self, leftover: Stored) -> None:
        (self.folder / leftover.key).unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        # a link itself goes, whatever it points to
        parent, _, name = key.rpartition("/")
        path = self._path(parent) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_raise_unless_gone)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    def tidy(self, prefix: str) -> None:
        with suppress(OSError):
            (self.folder / prefix).rmdir()

    def sync(self, prefix: str) -> None:
        places: set[Path] = set()
        for path in _files(self.folder / prefix):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            # the names of the folders above it too, up to the root
            places.update(place for place in path.parents if place.is_relative_to(self.folder))
        for place in sorted(places, reverse=True):
            _sync_folder(place)

    @contextmanager
    def at_hand(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        if not path.exists():
            raise FileNotFoundError(key)
        for link in self.links(key) if path.is_dir() else ():
            self._refuse_if_outside(str(self.folder / link))
        yield path

    @contextmanager
    def written(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with self.room():
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    def space(self) -> tuple[int, int] | None:
        usage = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists()))
        return usage.free, usage.total

    @contextmanager
    def room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise_if_full(error, self.folder)
            raise

    def _stored(self, path: Path) -> Stored:
        facts = path.stat()
        key = path.relative_to(self.folder).as_posix()
        return Stored(key, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))


def raise_if_full(error: OSError, folder: Path) -> None:
    """Turn an operating system's "no space left" into StorageError ``store.full``; others pass."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free >> 20
        raise StorageError(
            "store.full", f"no space is left in {folder} ({free} MiB free); free some and run again"
        ) from error


def _files(start: Path) -> Iterator[Path]:
    """Regular files below a folder; links are not followed."""
    for place, _, names in _walk(start):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _walk(start: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As :func:`os.walk`, but a folder that cannot be looked into is an error: what it holds is not nothing."""

    def told(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    yield from os.walk(start, onerror=told)


def _raise_unless_gone(_: object, path: str, reason: tuple[type, BaseException, object]) -> None:
    """Of two that delete at once each may find something gone."""
    if not isinstance(reason[1], FileNotFoundError):
        raise reason[1]


def _unfinished(folder: Path) -> tuple[int, Path]:
    """A new file in a folder, which is made."""
    for tries_left in reversed(range(_TRIES)):
        try:
            _make(folder)
            handle, name = tempfile.mkstemp(dir=folder, prefix=UNFINISHED)
        except (FileNotFoundError, FileExistsError):  # somebody who tidies up takes the empty folder away in between
            if not tries_left:
                raise
        else:
            break
    return handle, Path(name)


def _make(folder: Path) -> None:
    """A folder with those above it; the names of new ones survive a power cut."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in new:
        _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
