"""Regular files below a folder: links are not followed, pipes and devices never opened, hidden entries left alone."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vnet_core.errors import ScanError


@dataclass(frozen=True, slots=True, repr=False)
class SourceFile:
    """A regular file as it lay there."""

    path: Path
    size: int
    changed_ns: int


@dataclass(slots=True, repr=False)
class Walk:
    """What lies below a folder."""

    files: list[SourceFile] = field(default_factory=list)
    """Regular files, by their paths."""
    links: list[Path] = field(default_factory=list)
    """Links to files outside."""
    aside: Counter[str] = field(default_factory=Counter)
    """What was passed by."""

    @property
    def stamp(self) -> tuple[object, ...]:
        """Equal for two walks over a tree in which nothing has changed."""
        return (*self.files, *self.links)


def walked(folder: Path) -> Walk:
    """Regular files below ``folder`` at any depth. ``ScanError`` ``scan.unreadable`` where it cannot be listed."""
    walk = Walk()
    files, aside = walk.files, walk.aside
    root = folder.resolve()
    waiting = [folder]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if directory == folder:
                raise ScanError("scan.unreadable", f"the folder cannot be listed: {error.strerror}") from None
            aside["unreadable"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                aside["hidden"] += 1
            elif entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                inside = target.is_relative_to(root)
                aside["link" if inside else "link-outside"] += 1
                if not inside and not target.is_dir():
                    walk.links.append(Path(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    aside["unreadable"] += 1
                    continue
                if stat.S_ISREG(status.st_mode):
                    files.append(SourceFile(Path(entry.path), status.st_size, status.st_mtime_ns))
                else:
                    aside["not-regular"] += 1
    files.sort(key=lambda file: str(file.path))
    return walk
