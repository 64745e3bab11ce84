"""What people have decided about masks: one object per decision, kept for ever, never changed.

decisions/<cohort>/<case>/<number>.json

A decision holds for one result key, so for exactly these bytes of the scan, this plan and this model: anything new asks
again. Of several decisions about one result the last one counts; the earlier ones stay to be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from vnet_core.errors import ConfigError, StorageError
from workers.harmless import one_line
from workers.storage.store import Root

Choice = Literal["accept", "reject", "mirror", "train"]
"""``accept``: the mask is right; ``reject``: it is wrong; ``mirror``: compute it again, averaged over mirror images;
``train``: it has to be corrected, and the model is to learn from that."""
Review = Literal["", "awaiting", "accepted", "rejected", "training"]
"""What the column ``review`` of a night's rows says."""

LONGEST_NAME = 100
LONGEST_NOTE = 2_000


@dataclass(frozen=True, slots=True)
class Decision:
    """Who decided what about which result, and when."""

    case: str
    key: str
    """Of the result that was looked at."""
    choice: Choice
    by: str
    """The reviewer's name, as the reviewer gave it."""
    at: str
    """ISO 8601."""
    night: str
    """The night whose report was looked at."""
    note: str = ""
    as_is: bool = False
    """``train`` only: the mask is right as it is and may be learned from, so it counts as accepted too."""

    @property
    def review(self) -> Review:
        """What it makes of the result; a result that is to be computed again still waits."""
        if self.choice == "mirror":
            return "awaiting"
        if self.choice == "train":
            return "accepted" if self.as_is else "training"
        return "accepted" if self.choice == "accept" else "rejected"


def published(review: str | None) -> bool:
    """Whether masks with this value of the column ``review`` may leave the storage root."""
    return review in (None, "", "accepted")


def record(root: Root, cohort: str, decision: Decision) -> None:
    """Add a decision; several writers at once lose nothing. ConfigError: see :func:`checked`."""
    _add(root, _folder(cohort, decision.case), asdict(checked(decision)))


def checked(decision: Decision) -> Decision:
    """The decision, its texts without what is around them.

    ConfigError ``review.name`` without a reviewer's name, ``review.choice`` for an unknown choice, ``review.long`` when
    a text is too long.
    """
    by, note = one_line(decision.by).strip(), decision.note.strip()
    if not by:
        raise ConfigError("review.name", "the decision has no reviewer's name; say who decides")
    if decision.choice not in get_args(Choice):
        raise ConfigError(
            "review.choice", f"choice {one_line(decision.choice)[:40]!r} is not one of {', '.join(get_args(Choice))}"
        )
    for text, most, what in ((by, LONGEST_NAME, "name"), (note, LONGEST_NOTE, "note")):
        if len(text) > most:
            raise ConfigError("review.long", f"the {what} has {len(text)} characters; {most} are the most")
    return replace(decision, by=by, note=note)


def _add(root: Root, folder: str, facts: dict[str, Any]) -> None:
    """Write an object under the next number; where another writer was first, under the one after."""
    content = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
    number = 1 + max(_numbers(root, folder), default=0)
    while not root.create(f"{folder}/{number:06d}.json", content):
        number += 1


def decisions(root: Root, cohort: str, case: str) -> list[Decision]:
    """All decisions about a case, oldest first. StorageError ``store.corrupt`` when one cannot be read."""
    folder = _folder(cohort, case)
    return [_decision(root, f"{folder}/{number:06d}.json") for number in _numbers(root, folder)]


def all_decisions(root: Root, cohort: str) -> dict[str, list[Decision]]:
    """The decisions of every case of a cohort that has any, oldest first."""
    return {case: found for case in root.names(f"decisions/{cohort}") if (found := decisions(root, cohort, case))}


def latest(root: Root, cohort: str, case: str, key: str) -> Decision | None:
    """The decision that counts for a result, or None when nobody has decided about it."""
    return _last(decisions(root, cohort, case), key)


def review_of(root: Root, cohort: str, case: str, key: str, asked: bool) -> tuple[Review, str, str]:
    """The columns ``review``, ``reviewed_by`` and ``reviewed_at`` of a result.

    ``asked``: the night asks for a review of it. A decision counts also where none was asked for.
    """
    decision = latest(root, cohort, case, key)
    if decision is not None:
        return decision.review, decision.by, decision.at
    return ("awaiting" if asked else ""), "", ""


def mirrored(root: Root, cohort: str) -> set[str]:
    """Keys of the results that shall be computed again with mirroring; their own keys, so without it."""
    wanted = set()
    for found in all_decisions(root, cohort).values():
        keys = {decision.key for decision in found}
        wanted |= {key for key in keys if (last := _last(found, key)) and last.choice == "mirror"}
    return wanted


def _last(found: Iterable[Decision], key: str) -> Decision | None:
    return next((decision for decision in reversed(list(found)) if decision.key == key), None)


def _folder(cohort: str, case: str) -> str:
    return f"decisions/{cohort}/{case}"


def _numbers(root: Root, folder: str) -> list[int]:
    return sorted(int(name.removesuffix(".json")) for name in root.names(folder))


def _decision(root: Root, key: str) -> Decision:
    facts = root.get_json(key)
    try:
        return Decision(**facts)
    except TypeError:
        raise StorageError("store.corrupt", f"{key} is no decision; restore it from a backup") from None
