"""What a place for objects can do, whether it is a folder or a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class Stored:
    """One object that is there."""

    key: str
    size: int
    """Bytes."""
    modified: datetime
    """When it was last written, in UTC."""


class Place(Protocol):
    """Objects under keys that :class:`workers.storage.store.Root` has checked. Methods that find nothing raise
    FileNotFoundError; trouble with the place itself is a StorageError."""

    url: str
    """The place, as people and other machines name it."""

    def put(self, key: str, content: bytes) -> None:
        """Write an object whole and durably; an existing one is replaced."""

    def create(self, key: str, content: bytes) -> bool:
        """Write an object only where there is none; of several writers exactly one is told True."""

    def get(self, key: str) -> bytes:
        """An object's bytes."""

    def open(self, key: str) -> BinaryIO:
        """An object to read from, seekable."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """An object's bytes, of which only some are held at once."""

    def is_object(self, key: str) -> bool:
        """Whether there is an object of this very key."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key or below it."""

    def names(self, prefix: str) -> list[str]:
        """Sorted names directly below a prefix, without unfinished writes. A bucket may still name a prefix for a
        while after its last object was deleted."""

    def walk(self, prefix: str) -> Iterator[Stored]:
        """Every object of this key or below it, by key, without unfinished writes; ``""`` is everything."""

    def links(self, prefix: str) -> list[str]:
        """Keys at or below a prefix at which a symbolic link stands, which nothing here ever writes."""

    def leftovers(self) -> Iterator[Stored]:
        """Unfinished writes: what a killed process has left."""

    def discard(self, leftover: Stored) -> None:
        """Remove an unfinished write; nothing happens when it is gone."""

    def delete(self, key: str) -> None:
        """Remove an object or everything below a prefix; nothing happens when nothing is there."""

    def tidy(self, prefix: str) -> None:
        """Remove a prefix that holds nothing any more, where such a thing can be."""

    def sync(self, prefix: str) -> None:
        """Make everything below a prefix survive a power cut."""

    def at_hand(self, key: str) -> AbstractContextManager[Path]:
        """An object or all below a prefix as a file or folder of this machine, to be read only, for the block."""

    def written(self, key: str) -> AbstractContextManager[Path]:
        """A path of this machine for the block to write a file or folder at, which is then stored under the key."""

    def room(self) -> AbstractContextManager[None]:
        """Turns what goes wrong while the block writes into StorageErrors."""

    def space(self) -> tuple[int, int] | None:
        """Free and all bytes of the disk, where that is known."""
