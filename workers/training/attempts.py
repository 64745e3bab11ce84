"""The record of a training's attempts: from which step, by how many workers, and what the one before was lost to."""

from __future__ import annotations

from typing import Any

from workers.storage.store import Root
from workers.training.run import Run


def begin_attempt(root: Root, run: Run, step: int, workers: int) -> None:
    """Note that ``workers`` go on from ``step``; the first attempt goes on from step 0."""
    known = attempts(root, run)
    # without a loss it was a person who stopped the attempt before
    known.append({"from_step": step, "workers": workers, "after": last_loss(root, run.prefix)})
    root.put_json(f"{run.prefix}/attempts.json", known)
    root.delete(_loss(run.prefix))


def note_loss(root: Root, prefix: str, lost: str) -> None:
    """Note what the present attempt was lost to, for the record of the next one."""
    root.put_json(_loss(prefix), {"lost": lost})


def last_loss(root: Root, prefix: str) -> str:
    """What the present attempt was lost to; empty where it was not."""
    key = _loss(prefix)
    return str(root.get_json(key)["lost"]) if root.is_object(key) else ""


def _loss(prefix: str) -> str:
    return f"{prefix}/loss.json"


def attempts(root: Root, run: Run) -> list[dict[str, Any]]:
    """The attempts so far, the first one first."""
    key = f"{run.prefix}/attempts.json"
    found: list[dict[str, Any]] = root.get_json(key) if root.is_object(key) else []
    return found
