"""Python's garbage collector, out of the way while a large library is imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage is collected within the block.

    Importing Prefect makes hundreds of thousands of objects that all stay; the collector goes through them many times
    and finds nothing, which takes a tenth of the processor time of the imports.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
