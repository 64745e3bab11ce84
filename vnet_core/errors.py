"""Every error that the software raises on purpose, as one tree.

    VnetError
    |-- ScanError       a scan or label cannot be used; the case is refused, the others go on
    |-- ConfigError     a plan, site file, parameter or command line cannot work; nothing was started
    |-- StorageError    the storage root cannot be read or written, or holds damaged objects
    |-- EngineError     Dask, Ray or Prefect cannot be reached, or lost a worker
    |-- MemoryLimitError  the predicted peak does not fit the memory at hand
    `-- TrainingError   training cannot start or has diverged

Each carries a stable ``code`` (``scan.unreadable``, ``plan.unknown-key``) that tables and tests rely on, and a
message that says what was found, both numbers where there are two, and the remedy.
"""

from __future__ import annotations


class VnetError(Exception):
    """Base of the tree. ``str(error)`` is the message; ``error.code`` is stable across versions."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class ScanError(VnetError, ValueError):
    """A scan, label or manifest row that cannot be used."""


class ConfigError(VnetError, ValueError):
    """A setting that cannot work, found before anything was started."""


class StorageError(VnetError, OSError):
    """The storage root cannot be used, or one of its objects is damaged."""


class EngineError(VnetError, RuntimeError):
    """Dask, Ray or Prefect did not answer, or a worker died."""


class MemoryLimitError(VnetError, MemoryError):
    """The predicted peak is above the memory at hand."""


class TrainingError(VnetError, RuntimeError):
    """Training cannot start, or its loss is no longer finite."""
