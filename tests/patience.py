"""How tests wait: for what happens, and longer on a busy machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def slowness() -> float:
    """How many times as long things may take as on a quiet machine: 1, or the processes per core that want to run."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def until(condition: Callable[[], T], timeout_s: float = 120) -> T:
    """The first true value of ``condition()``, within ``timeout_s`` of a quiet machine."""
    end = time.monotonic() + timeout_s * slowness()
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
    return value
