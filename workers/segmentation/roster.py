"""Who has room for another case: those that hold least first. Every step takes the same time, whatever their number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)


class Roster(Generic[W]):
    """Workers with ``places`` places each."""

    def __init__(self, places: int) -> None:
        self._with_room: list[OrderedDict[W, None]] = [OrderedDict() for _ in range(places)]
        """By the number of places that are taken; a worker without room is in none. Who waits longest is first."""
        self._taken: dict[W, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, worker: W) -> bool:
        return worker in self._taken

    def add(self, worker: W) -> None:
        """A worker that holds nothing."""
        self._taken[worker] = 0
        self._with_room[0][worker] = None

    def remove(self, worker: W) -> None:
        """Forget a worker, and the places that are taken with it."""
        taken = self._taken.pop(worker)
        if taken < len(self._with_room):
            del self._with_room[taken][worker]

    def take(self, places: int = 1) -> W | None:
        """Take so many places with one of those that have most room; None where nobody has as many."""
        for taken, workers in enumerate(self._with_room):
            if workers and taken + places <= len(self._with_room):
                worker, _ = workers.popitem(last=False)
                self._move(worker, taken + places)
                return worker
        return None

    def free(self, worker: W, places: int = 1) -> None:
        """Free places of a worker."""
        taken = self._taken[worker]
        assert taken >= places, "only places that were taken are freed"
        if taken < len(self._with_room):
            del self._with_room[taken][worker]
        self._move(worker, taken - places)

    def _move(self, worker: W, taken: int) -> None:
        self._taken[worker] = taken
        if taken < len(self._with_room):
            self._with_room[taken][worker] = None
