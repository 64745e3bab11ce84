"""The storage root: bytes under keys, written whole or not at all, and the receipts that say what is finished.

A key is a relative path with forward slashes. A root is a folder or a prefix of an S3 bucket; what uses it does not
know which. A result of several files exists if and only if its ``receipt.json`` does, which is written last and holds
the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from vnet_core.errors import ConfigError, StorageError
from workers.storage.buckets import Bucket
from workers.storage.folders import Folder
from workers.storage.objects import Place, Stored

RECEIPT = "receipt.json"
FETCHED_AT_ONCE = 8
"""Objects that are fetched side by side."""
HOME_VARIABLE = "VNET_HOME"
"""Names the folder of this machine for what belongs to a root and cannot lie in a bucket."""
_SILENT = ("store.denied", "store.no-bucket", "store.unavailable", "store.short", "store.full")
_PART = re.compile(r"[A-Za-z0-9._@+=-]+")


class Root:
    """A storage root."""

    def __init__(self, url: str | Path) -> None:
        """``url`` is a folder, a ``file://`` URL or ``s3://bucket/prefix``; nothing is created or asked yet.

        Raises ConfigError ``store.scheme`` for other schemes and ``store.bucket`` for what is no bucket's name.
        """
        text = str(url)
        parts = urlsplit(text)
        if parts.scheme == "s3":
            bucket = Bucket(parts.netloc, unquote(parts.path))
            self.place: Place = bucket
            self.home = _home() / f"{bucket.bucket}-{hashlib.sha256(bucket.url.encode()).hexdigest()[:12]}"
        elif parts.scheme in ("", "file"):
            folder = Path(unquote(parts.path) if parts.scheme else text).expanduser().resolve()
            self.place = Folder(folder)
            self.home = folder
        else:
            raise ConfigError(
                "store.scheme",
                f"storage root {text} has scheme {parts.scheme}; use a folder, file:// or s3://bucket/prefix",
            )

    home: Path
    """This machine's folder for what belongs to the root and cannot be an object: Prefect's database, logs, unpacked
    archives. Of a root in a folder it is that folder."""

    @property
    def url(self) -> str:
        """The root as a URL, by which other processes open it."""
        return self.place.url

    @property
    def shown(self) -> str:
        """The root as people write it: the folder, or the URL of the bucket."""
        return str(self.place.folder) if isinstance(self.place, Folder) else self.url

    @property
    def is_here(self) -> bool:
        """Whether objects are files below :attr:`home`."""
        return isinstance(self.place, Folder)

    def where(self, key: str) -> str:
        """An object or prefix as people write it."""
        return f"{self.shown}/{_checked(key)}"

    def probe(self) -> None:
        """Write, read, look for, refuse to overwrite and delete one small object.

        StorageError ``store.unwritable``, ``store.full``, ``store.denied``, ``store.unavailable`` or
        ``store.no-bucket`` says what failed, and ``store.overwrites`` that exclusive writes do not exist there.
        """
        key = f".probe-{uuid4().hex}"
        try:
            self.put(key, b"probe")
            exclusive = not self.create(key, b"other")
            kept = self.get(key) == b"probe" or not exclusive
            self.exists(f"{key}-none")  # a listing
            self.delete(key)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                "store.unwritable",
                f"the storage root {self.shown} cannot be written ({error.strerror or error}); choose another with"
                " --root or VNET_ROOT, or mend its permissions",
            ) from error
        if not kept:
            raise StorageError(
                "store.unwritable",
                f"the storage root {self.shown} does not give back what was written; check what lies between, or choose"
                " another with --root or VNET_ROOT",
            )
        if not exclusive:
            raise StorageError(
                "store.overwrites",
                f"the object store of {self.url} overwrites what it is asked to create only once (it ignores"
                " If-None-Match), so that two runs could do the same case; use one that keeps to it, or a folder",
            )

    def put(self, key: str, content: bytes) -> None:
        """Write an object whole; an existing one is replaced. StorageError ``store.full`` when no space is left."""
        self.place.put(_checked(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Write an object whole, and only where there is none; whether it was written.

        Of several writers at once exactly one is told True. StorageError ``store.full`` as for :meth:`put`.
        """
        return self.place.create(_checked(key), content)

    def get(self, key: str) -> bytes:
        """An object's bytes; StorageError ``store.missing`` names the key."""
        with self._found(key):
            return self.place.get(_checked(key))

    def open(self, key: str) -> BinaryIO:
        """An object to read from, seekable, to be closed; StorageError ``store.missing`` names the key."""
        with self._found(key):
            return self.place.open(_checked(key))

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
        """Whether an object or anything below a prefix is there."""
        return self.place.exists(_checked(key))

    def is_object(self, key: str) -> bool:
        """Whether an object of this very key is there: one question, also where listing costs more."""
        return self.place.is_object(_checked(key))

    def names(self, prefix: str) -> list[str]:
        """Sorted names directly under a prefix; empty when there is none. Unfinished writes are left out; a bucket may
        still name a prefix for a while after its last object was deleted."""
        return self.place.names(_checked(prefix))

    def walk(self, prefix: str) -> Iterator[Stored]:
        """Every object of this key or below it, by key; ``""`` for the whole root. Unfinished writes are left out."""
        return self.place.walk(_checked(prefix) if prefix else "")

    def delete(self, prefix: str) -> None:
        """Remove an object or everything under a prefix, receipts first; nothing happens when it is not there."""
        try:
            for stored in self.walk(prefix):
                if stored.key.rpartition("/")[2] == RECEIPT:
                    self.place.delete(stored.key)
        except StorageError as error:
            if error.code != "store.outside":
                raise
        # of a link out of the root the link goes, and what is behind a link on the way is refused here
        self.place.delete(_checked(prefix))

    @contextmanager
    def at_hand(self, key: str) -> Iterator[Path]:
        """An object, or all that lies below a prefix, as a file or folder of this machine, to be read only, and only
        within the block. StorageError ``store.missing`` names the key."""
        with ExitStack() as stack:
            with self._found(key):
                path = stack.enter_context(self.place.at_hand(_checked(key)))
            yield path

    @contextmanager
    def all_at_hand(self, keys: Sequence[str]) -> Iterator[list[Path]]:
        """Several objects as :meth:`at_hand` gives one, fetched side by side."""
        with ExitStack() as stack:
            with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
                paths = list(threads.map(lambda key: stack.enter_context(self.at_hand(key)), keys))
            yield paths

    @contextmanager
    def written(self, key: str) -> Iterator[Path]:
        """A path of this machine, named like the key's last part, for the block to write a file or folder at; at the
        end of the block it is stored under the key. Not atomic: a receipt comes after it."""
        with self.place.written(_checked(key)) as path:
            yield path

    @contextmanager
    def room(self) -> Iterator[None]:
        """For writers that write by themselves: what goes wrong in the block is told as by :meth:`put`."""
        with self.place.room():
            yield

    def receipt(self, prefix: str) -> dict[str, Any] | None:
        """The receipt of a finished result, or None when it is not finished, or lies behind a link out of the root.

        A receipt that is damaged finishes nothing: the result is made again, and :meth:`damaged` names it.
        """
        try:
            found = self.get_json(f"{prefix}/{RECEIPT}")
        except StorageError as error:
            if error.code not in ("store.missing", "store.outside", "store.corrupt"):
                raise
            return None
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None

    def seal(self, prefix: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Make every file under ``prefix`` durable and publish the result by writing its receipt.

        The receipt is ``facts`` and ``files``: SHA-256, of the bytes read back, by path relative to the prefix.
        """
        self.place.sync(_checked(prefix))
        names = (stored.key.removeprefix(f"{prefix}/") for stored in self.walk(prefix))
        files = {name: self.digest(f"{prefix}/{name}") for name in names if name != RECEIPT}
        receipt = {**facts, "files": files}
        self.put_json(f"{prefix}/{RECEIPT}", receipt)
        return receipt

    def digest(self, key: str) -> str:
        """SHA-256 (hex) of an object's bytes; FileNotFoundError when there is none."""
        digest = hashlib.sha256()
        for some in self.place.pieces(_checked(key)):
            digest.update(some)
        return digest.hexdigest()

    def damaged(self, prefix: str) -> list[str]:
        """Files of a finished result that are missing, lie outside of it, or whose SHA-256 is not the receipt's."""
        receipt = self.receipt(prefix)
        if receipt is None:
            return [RECEIPT]
        bad = []
        for name, digest in receipt["files"].items():
            try:
                same = self.digest(f"{prefix}/{name}") == digest
            except (FileNotFoundError, IsADirectoryError):
                same = False
            except StorageError as error:
                if error.code not in ("store.key", "store.outside"):
                    raise
                same = False
            if not same:
                bad.append(name)
        return bad

    @contextmanager
    def _found(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise StorageError("store.missing", f"{key} is not in the storage root {self.shown}") from None


def raise_if_silent(error: OSError) -> None:
    """Raise it again where the store refuses or does not answer: nothing is known then of what lies there, so that
    nothing may be called missing, dead or damaged."""
    if isinstance(error, StorageError) and error.code in _SILENT:
        raise error


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(key: str) -> str:
    """The key, unless it could leave the root: StorageError ``store.key``."""
    if any(part in ("", ".", "..") or not _PART.fullmatch(part) for part in key.split("/")):
        raise StorageError("store.key", f"key {key!r} has an empty, relative or unusual part; use [A-Za-z0-9._-]")
    return key


def _home() -> Path:
    """Where the folders of roots in buckets lie: VNET_HOME, else below XDG_DATA_HOME or ~/.local/share."""
    named = os.environ.get(HOME_VARIABLE)
    shared = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(named or f"{shared}/vnet-cohort").expanduser().resolve()
