"""Files that a command writes where a person has said: whole or not at all; a place that cannot be is told first."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vnet_core.errors import ConfigError


def write_output(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, in a folder that is made. ConfigError ``output.unwritable``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from None


def output_folder(path: Path) -> Path:
    """A folder into which files can be written, made where there is none. ConfigError ``output.unwritable``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """What to tell of a place that cannot be written."""
    return ConfigError(
        "output.unwritable",
        f"{path} cannot be written ({error.strerror or type(error).__name__}); mend its permissions or its disk, or"
        " name another place",
    )
