"""Files of a storage root in a folder, for tests that look behind the program's back."""

from pathlib import Path

from workers.storage.store import Root


def file_of(root: Root, key: str) -> Path:
    """The file or folder of a key."""
    assert root.is_here
    return root.home / key
