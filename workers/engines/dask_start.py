"""What a worker of a Dask of our own does as it starts. Dask imports it there by its name."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Ctrl-C reaches all processes of a terminal: it is for the command, which ends its workers without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
