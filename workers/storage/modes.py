"""Who may read what is written: its owner alone, whatever the umask of the shell, the service or the cluster is."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Literal

Readers = Literal["owner", "group", "everyone"]

_MODES: dict[Readers, tuple[int, int]] = {
    "owner": (0o600, 0o700),
    "group": (0o640, 0o750),
    "everyone": (0o644, 0o755),
}
"""Of files and of folders."""


def for_the_owner_alone() -> None:
    """From now on this process, and what it starts, makes files with mode 0600 and folders with mode 0700.

    Every process of ours begins with it: what it writes, it writes through a dozen libraries, and each of them follows
    the umask.
    """
    os.umask(0o077)


def own_temporary_folder(name: str) -> Path:
    """A folder among the temporary ones, the same at each call, into which nobody else can look.

    Where somebody else has made one of this name, or has opened it, a new one is made.
    """
    folder = Path(tempfile.gettempdir(), f"{name}-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))


def mode_for(readers: Readers, folder: bool = False) -> int:
    """The mode that lets these read, and the owner alone write."""
    return _MODES[readers][folder]


def let_read(path: Path, readers: Readers) -> None:
    """Give a file or folder of ours the mode for its readers, where it has another. Links are not followed."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        wanted = mode_for(readers, stat.S_ISDIR(status.st_mode))
        if stat.S_IMODE(status.st_mode) != wanted:
            os.fchmod(handle, wanted)
    finally:
        os.close(handle)
