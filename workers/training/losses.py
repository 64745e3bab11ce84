"""What becomes of a group of Ray Train when one of its workers is lost or told to end."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchConfig

from workers.storage.store import Root
from workers.training.attempts import note_loss
from workers.training.run import Run
from workers.training.seats import leave_with_notice


class NamedError(Exception):
    """A worker has left a named error in the root."""


class Losses(UserCallback):
    """Notes what a group was lost to; a named error of a worker ends the training, anything else Ray tries again.

    Runs in Ray Train's controller, which tries again after errors of workers but not after one of its own.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called before it is decided whether to try again."""
        root = Root(self.run.root_url)
        if root.is_object(self.run.error):
            raise NamedError(self.run.error)
        kinds = {rank: _kind(error) for rank, error in sorted(worker_exceptions.items())}
        note_loss(root, self.run.prefix, ", ".join(f"worker {rank}: {kind}" for rank, kind in kinds.items()))


def _kind(error: Exception) -> str:
    """The name of what became of a worker; messages would name machines and paths."""
    # of a worker that does not answer any more this is why
    return type(getattr(error, "health_check_failure", None) or error).__name__


class NoticedTorchConfig(TorchConfig):
    """Torch's process group, in processes that do not end before there is a checkpoint."""

    @property
    def backend_cls(self) -> type:
        """What sets the workers up."""
        return _NoticedBackend


class _NoticedBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # the class has no public name
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called right before the training, with the workers' main threads at hand."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(leave_with_notice)
