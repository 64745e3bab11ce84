"""Where training workers sit: in a group of Ray Train, or alone in a process; and how they are told to leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from vnet_core.errors import VnetError
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root
from workers.training.loop import Departure, Seat, Worker
from workers.training.patches import Share
from workers.training.run import Run

ALONE = Share(0, 1)
DEPARTURE_SECONDS = 20.0
"""How long a process that was told to end waits for a checkpoint; Kubernetes and Slurm kill after 30 seconds."""

_DEPARTURE = Departure()
"""That of this process, where it is a worker of Ray Train; such a process has one training in its life."""


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker; ``config`` is a Run as a mapping."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    seat = Seat(
        Share(context.get_world_rank(), context.get_world_size()),
        ray.train.torch.get_device(),
        lambda network: ray.train.torch.prepare_model(network, move_to_device=False),
        _DEPARTURE,
        lambda: ray.train.get_preemption_info() is not None,
    )
    try:
        fit(Run(**config), seat)
    finally:
        _DEPARTURE.answer()


def fit_alone(config: dict[str, Any]) -> None:
    """Fit one network in this process; ``config`` is a Run as a mapping.

    When the process is told to end by SIGTERM, it does with SystemExit, once there is a checkpoint.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _at_signal() as departure:
        fit(Run(**config), Seat(ALONE, device, lambda network: network, departure))


def fit(run: Run, seat: Seat) -> None:
    """Fit the run's network to the end of its budget, from its last checkpoint where there is one.

    A named error is also left in the root, for the process that waits, and so that nobody tries again.
    """
    for_the_owner_alone()
    root = Root(run.root_url)
    try:
        Worker(root, run, seat).fit()
    except VnetError as error:
        message = {"class": type(error).__name__, "code": error.code, "message": error.message}
        root.put_json(run.error, message)
        raise


def leave_with_notice() -> None:
    """Have SIGTERM wait for a checkpoint of this process's training before it ends the process; in the main thread.

    Ray Train runs a worker in a thread beside the main one, which cannot hear signals.
    """
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: FrameType | None) -> None:
        _DEPARTURE.asked.set()
        _DEPARTURE.answered.wait(DEPARTURE_SECONDS)
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, leave)


class _Ending(Departure):
    """Ends the training thread itself."""

    def answer(self) -> None:
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def _at_signal() -> Iterator[Departure]:
    """A departure that SIGTERM asks for, in the main thread of a process; nothing does in another thread."""
    departure = _Ending()
    if threading.current_thread() is not threading.main_thread():
        yield departure
        return
    before = signal.signal(signal.SIGTERM, lambda *_: departure.asked.set())
    try:
        yield departure
    finally:
        signal.signal(signal.SIGTERM, before)
