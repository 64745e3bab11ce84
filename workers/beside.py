"""What is done every few seconds beside the work, from a thread that ends with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vnet_core.errors import VnetError
from workers.ledger import kind_and_place

log = logging.getLogger("vnet")


@contextmanager
def repeating(name: str, every_s: float, act: Callable[[], bool | None]) -> Iterator[None]:
    """Call ``act`` every ``every_s`` seconds for the time of the block, or until it returns True.

    What it raises ends neither the thread nor the block, since a full disk or a server that is away may be back at the
    next call. The first failure of a row is logged, an unexpected one without its own text.
    """
    over = threading.Event()

    def repeat() -> None:
        has_failed = False
        while not over.wait(every_s):
            try:
                if act():
                    return
                has_failed = False
            except Exception as error:  # noqa: BLE001  whatever it was, the next call may come through
                if not has_failed:
                    why = error.code if isinstance(error, VnetError) else kind_and_place(error)
                    log.warning("%s failed, and is tried again every %g s: %s", name, every_s, why)
                has_failed = True

    thread = threading.Thread(target=repeat, name=f"vnet-{name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
