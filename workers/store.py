"""The storage root: bytes under keys, written whole or not at all, and the receipts that say what is finished.

A key is a relative path with forward slashes. ``put`` is atomic and durable: temporary file, fsync, rename, fsync of
the folder. A result of several files exists if and only if its ``receipt.json`` does, which is written last and holds
the SHA-256 of every other file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vnet_core.errors import ConfigError, StorageError

RECEIPT = "receipt.json"
_PART = re.compile(r"[A-Za-z0-9._@+=-]+")


class Root:
    """A storage root on a local or mounted file system."""

    def __init__(self, url: str | Path) -> None:
        """``url`` is a folder or a ``file://`` URL; nothing is created yet.

        Raises ConfigError ``store.scheme`` for other schemes.
        """
        text = str(url)
        parts = urlsplit(text)
        if parts.scheme not in ("", "file"):
            raise ConfigError("store.scheme", f"storage root {text} has scheme {parts.scheme}; use a folder or file://")
        self.folder = Path(unquote(parts.path) if parts.scheme else text).expanduser().resolve()

    @property
    def url(self) -> str:
        """The root as a ``file://`` URL."""
        return self.folder.as_uri()

    def path(self, key: str) -> Path:
        """The file or folder of a key. Keys that could leave the root are refused (``store.key``)."""
        if any(part in ("", ".", "..") or not _PART.fullmatch(part) for part in key.split("/")):
            raise StorageError("store.key", f"key {key!r} has an empty, relative or unusual part; use [A-Za-z0-9._-]")
        return self.folder / key

    def probe(self) -> None:
        """Write and delete one small object; StorageError ``store.unwritable`` or ``store.full`` says what failed."""
        try:
            self.put(".probe", b"probe")
            self.path(".probe").unlink(missing_ok=True)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                "store.unwritable",
                f"the storage root {self.folder} cannot be written ({error.strerror or error}); choose another with"
                " --root or VNET_ROOT, or mend its permissions",
            ) from error

    def put(self, key: str, content: bytes) -> None:
        """Write an object whole; an existing one is replaced. StorageError ``store.full`` when no space is left."""
        path = self.path(key)
        with self._written_beside(path, content) as temporary:
            os.replace(temporary, path)

    def create(self, key: str, content: bytes) -> bool:
        """Write an object whole, and only where there is none; whether it was written.

        Of several writers at once exactly one is told True. StorageError ``store.full`` as for :meth:`put`.
        """
        path = self.path(key)
        if path.exists():
            return False
        with self._written_beside(path, content) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    @contextmanager
    def _written_beside(self, path: Path, content: bytes) -> Iterator[Path]:
        """A durable file with the content beside ``path``, for the block to give it its name; the folder is synced."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".put-")
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
        except OSError as error:
            raise_if_full(error, self.folder)
            raise

    def get(self, key: str) -> bytes:
        """An object's bytes; StorageError ``store.missing`` names the key."""
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            raise StorageError("store.missing", f"{key} is not in the storage root {self.folder}") from None

    def put_json(self, key: str, value: Any) -> None:
        """Write plain data as JSON."""
        self.put(key, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def get_json(self, key: str) -> Any:
        """Read plain data from JSON; StorageError ``store.corrupt`` when it is none."""
        try:
            return json.loads(self.get(key))
        except ValueError as error:
            raise StorageError("store.corrupt", f"{key} is not JSON ({error}); delete it and run again") from error

    def exists(self, key: str) -> bool:
        """Whether an object or folder is there."""
        return self.path(key).exists()

    def names(self, prefix: str) -> list[str]:
        """Sorted names directly under a prefix; empty when there is none. Unfinished writes are left out."""
        folder = self.path(prefix)
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []

    def delete(self, prefix: str) -> None:
        """Remove an object or everything under a prefix; nothing happens when it is not there."""
        path = self.path(prefix)
        if path.is_dir():
            for receipt in path.rglob(RECEIPT):
                receipt.unlink()
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def receipt(self, prefix: str) -> dict[str, Any] | None:
        """The receipt of a finished result, or None when it is not finished."""
        return self.get_json(f"{prefix}/{RECEIPT}") if self.exists(f"{prefix}/{RECEIPT}") else None

    def seal(self, prefix: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Make every file under ``prefix`` durable and publish the result by writing its receipt.

        The receipt is ``facts`` and ``files``: SHA-256 by path relative to the prefix.
        """
        folder = self.path(prefix)
        files = {}
        for path in _files(folder):
            name = path.relative_to(folder).as_posix()
            if name != RECEIPT:
                with path.open("rb") as file:
                    files[name] = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                _sync_folder(path.parent)
        receipt = {**facts, "files": files}
        self.put_json(f"{prefix}/{RECEIPT}", receipt)
        return receipt

    def damaged(self, prefix: str) -> list[str]:
        """Files of a finished result that are missing or whose SHA-256 is not the receipt's."""
        receipt = self.receipt(prefix)
        if receipt is None:
            return [RECEIPT]
        folder = self.path(prefix)
        bad = []
        for name, digest in receipt["files"].items():
            path = folder / name
            if not path.is_file() or file_digest(path) != digest:
                bad.append(name)
        return bad


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def raise_if_full(error: OSError, folder: Path) -> None:
    """Turn an operating system's "no space left" into StorageError ``store.full``; others pass."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free >> 20
        raise StorageError(
            "store.full", f"no space is left in the storage root {folder} ({free} MiB free); free some and run again"
        ) from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".put-"))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
