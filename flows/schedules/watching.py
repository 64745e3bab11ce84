"""The new-file trigger: looks at the sources of watched cohorts and starts a night for what has arrived."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass
from uuid import uuid4

from flows.schedules.starting import start_night
from vnet_core.errors import VnetError
from workers.cohort import load_cohort
from workers.settings.site import Nightly
from workers.sources.arrivals import Debounce, snapshot
from workers.storage.store import Root

LOOKS = 6
"""How often a cohort's sources are looked at within its ``watch_quiet_s``."""
MOST_S, LEAST_S = 30.0, 0.25
"""Bounds of the time between two looks."""
END_S = 2.0
"""How long the end of the thread is waited for."""
_log = logging.getLogger("vnet")


@dataclass(slots=True)
class _Cohort:
    """A watched cohort."""

    name: str
    settled: Debounce
    pause_s: float
    next_s: float = 0.0
    due: str = ""
    """Key of the run that is to be started; empty when there is none."""
    troubled: bool = False
    """The last look or start failed, and that was said."""


class Watch:
    """A thread that watches cohorts for the time of the block."""

    def __init__(self, root: Root, nightlies: Sequence[Nightly]) -> None:
        self._root = root
        self._cohorts = [
            _Cohort(
                entry.cohort,
                Debounce(entry.watch_quiet_s),
                min(MOST_S, max(LEAST_S, entry.watch_quiet_s / LOOKS)),
            )
            for entry in nightlies
        ]
        self._over = threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="vnet-watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._cohorts:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._cohorts:
            # it may be waiting for an answer, and ends with the process
            self._thread.join(END_S)

    def _run(self) -> None:
        for cohort in self._cohorts:
            self._look(cohort)
            _log.info("watching the sources of cohort %s", cohort.name)
        pause_s = min(cohort.pause_s for cohort in self._cohorts)
        while not self._over.wait(pause_s):
            for cohort in self._cohorts:
                if time.monotonic() >= cohort.next_s:
                    self._look(cohort)
                    cohort.next_s = time.monotonic() + cohort.pause_s - pause_s / 2

    def _look(self, cohort: _Cohort) -> None:
        """Look at the sources, and start a night when what is there has rested and no other night is under way."""
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.exceptions import PrefectException

        try:
            sources = load_cohort(self._root, cohort.name).sources
            if cohort.settled(snapshot(sources, self._root.home), time.monotonic()):
                cohort.due = f"arrival {cohort.name} {uuid4()}"
            if cohort.due:
                # a run that is under way may have looked before the files came: its end is waited for
                with get_client(sync_client=True) as client:
                    if start_night(client, cohort.name, "arrival", cohort.due):
                        cohort.due = ""
            cohort.troubled = False
        except (VnetError, OSError, httpx.HTTPError, PrefectException) as error:
            if not cohort.troubled:
                _log.warning("watching cohort %s: %s; trying again", cohort.name, type(error).__name__)
            cohort.troubled = True
