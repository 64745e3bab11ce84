"""What is done beside the work: again and again, whatever it raises, and no longer than the work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from vnet_core.errors import StorageError
from workers.beside import repeating

EVERY_S = 0.01


def called(times: int, act: Callable[[int], bool | None]) -> int:
    """How often ``act`` is called in a block that lasts so many calls; it is given the number of the call."""
    number, enough = 0, threading.Event()

    def count() -> bool | None:
        nonlocal number
        number += 1
        if number == times:
            enough.set()
        return act(number)

    with repeating("test", EVERY_S, count):
        assert enough.wait(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "vnet-test"], "it ends with the block"
    return number


def test_it_is_done_again_until_the_block_ends() -> None:
    assert called(5, lambda number: None) >= 5


def test_or_until_it_says_that_it_is_enough() -> None:
    assert called(3, lambda number: number == 3) == 3


def test_a_failure_is_told_once_without_its_text_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vnet"), "propagate", True)

    def act(number: int) -> bool:
        if number in (2, 3):
            raise PermissionError(13, "Permission denied", "/scans/Jane Doe.nii")
        if number == 5:
            raise StorageError("store.full", "no space is left")
        return number == 6

    with caplog.at_level(logging.WARNING, logger="vnet"):
        assert called(6, act) == 6
    # threads that other tests have left behind may have something to say meanwhile
    told = [message for message in caplog.messages if message.startswith("test failed")]
    assert len(told) == 2, told
    first, second = told
    assert first.startswith("test failed, and is tried again every 0.01 s: PermissionError (Permission denied) at ")
    assert second.endswith(": store.full")
    assert "Jane" not in caplog.text
