"""Has the snapshots of trainings judged on Ray while the trainings go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict

from workers.engines.clusters import Engines
from workers.storage.store import Root
from workers.training.full_validation import NICENESS, validate
from workers.training.run import Run
from workers.training.validations import Validation, keep_the_best, load_validation, note_failure, waiting

LOOK_SECONDS = 1.0
"""How often it is looked for new snapshots."""
GIVE_UP_SECONDS = 5.0
"""How long a validation may take to end where the training has ended by an exception."""
ATTEMPTS = 2

OnValidation = Callable[[Run, Validation], None]


@contextmanager
def validated_beside(root: Root, runs: Sequence[Run], engines: Engines, on_validation: OnValidation) -> Iterator[None]:
    """Judge the snapshots that the runs leave within the block, one at a time, and at its end those that still wait.

    Where the block is left by an exception, the rest waits for the next attempt, and so does what does not end within
    ``GIVE_UP_SECONDS``: where Ray is lost it answers no more.
    """
    over, given_up, ended = threading.Event(), threading.Event(), Future[None]()

    def watch() -> None:
        try:
            _watch(root, runs, engines, on_validation, over, given_up)
            ended.set_result(None)
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            ended.set_exception(error)

    # no thread of a pool: the interpreter would wait for it at its end
    threading.Thread(target=watch, name="vnet-validation", daemon=True).start()
    try:
        yield
    except BaseException:
        given_up.set()
        over.set()
        wait([ended], timeout=GIVE_UP_SECONDS)
        raise
    over.set()
    ended.result()


def _watch(
    root: Root,
    runs: Sequence[Run],
    engines: Engines,
    on_validation: OnValidation,
    over: threading.Event,
    given_up: threading.Event,
) -> None:
    while not given_up.is_set():
        # what was left before the end was told is found once more after it
        last = over.is_set()
        found = next(((run, step) for run in runs for step in waiting(root, run)), None)
        if found is None:
            if last:
                return
            over.wait(LOOK_SECONDS)
            continue
        run, step = found
        if _judge(root, run, step, engines, given_up):
            keep_the_best(root, run)
            on_validation(run, load_validation(root, run, step))


def _judge(root: Root, run: Run, step: int, engines: Engines, given_up: threading.Event) -> bool:
    """Have one snapshot judged by a Ray task; whether it was."""
    import ray
    from ray.exceptions import RayError

    # on this machine there is no core to spare: it takes what the training leaves, and Ray need not count it
    niceness = NICENESS if engines.ray_address is None else 0
    # a process of its own, since niceness stays with it
    task = ray.remote(
        num_cpus=0 if niceness else 1, num_gpus=engines.gpus_per_worker, max_calls=1, max_retries=ATTEMPTS - 1
    )(validate)
    job = task.remote(asdict(run), step, niceness)
    while not ray.wait([job], timeout=LOOK_SECONDS)[0]:
        if given_up.is_set():
            ray.cancel(job, force=True)
            return False
    try:
        ray.get(job)
    except RayError as error:
        note_failure(root, run, step, type(error).__name__)
    return True
