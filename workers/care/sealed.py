"""Sealed objects: where they lie, and whether their bytes are still those of their receipts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from workers.engines.clusters import processors
from workers.harmless import one_line
from workers.storage.objects import Stored
from workers.storage.store import RECEIPT, Root, raise_if_silent

UNFINISHED = timedelta(days=1)
"""Files without a receipt that are younger may belong to a run that is still at work."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"v\d+")
_RECORDED = {"volumes": 1, "results": 3, "models": 2}
"""Where folders with receipts lie: so many names below these. Those of ``training`` are found by their names."""
_MADE_AGAIN = "run vnet fsck --repair; the next night makes it again"
RESTORED = "restore it from a backup"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    key: str
    """Of the object, in the storage root."""
    code: str
    found: str
    """What was found, with the numbers that there are."""
    remedy: str
    done: str = ""
    """What :func:`workers.care.fsck.repair` did about it; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was looked at, and what was found."""

    findings: tuple[Finding, ...]
    """By key and code."""
    objects: int
    """Folders that have, or should have, a receipt."""
    files: int
    """Files whose bytes were hashed."""
    bytes: int
    """Bytes that were hashed."""
    seconds: float
    """Wall time of the hashing."""

    @property
    def megabytes_per_s(self) -> float:
        """10^6 bytes hashed per second."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one object."""

    findings: tuple[Finding, ...]
    files: int = 0
    bytes: int = 0


def check_objects(root: Root, now: datetime, cohort: str = "", threads: int | None = None) -> Checkup:
    """Hash every file of every object again and compare it with the object's receipt.

    ``now`` is aware and decides which files without a receipt are left over. With a ``cohort``: its results, and the
    volumes and models that their receipts name. Several threads hash side by side (default: one per core).
    """
    start = time.perf_counter()
    keys = objects(root) if not cohort else _of_cohort(root, cohort)
    with ThreadPoolExecutor(threads or processors()) as executor:
        checked = list(executor.map(lambda key: _check(root, key, now), keys))
    return Checkup(
        tuple(sorted((f for one in checked for f in one.findings), key=lambda f: (f.key, f.code, f.found))),
        len(keys),
        sum(one.files for one in checked),
        sum(one.bytes for one in checked),
        time.perf_counter() - start,
    )


def objects(root: Root) -> list[str]:
    """Keys of all folders in which a sealed object lies or should lie, sorted."""
    found = [key for top, depth in _RECORDED.items() for key in _folders(root, top, depth)]
    # beside its versions a model has the history of its aliases
    found = [key for key in found if not key.startswith("models/") or _VERSION.fullmatch(key.rpartition("/")[2])]
    return sorted({*found, *_in_training(root)})


def _in_training(root: Root) -> Iterator[str]:
    for stored in root.walk("training"):
        folder, _, name = stored.key.rpartition("/")
        parts = folder.split("/")
        if name == RECEIPT or parts[-1] == "fitted" or parts[-2:-1] == ["checkpoints"]:
            yield folder


def _folders(root: Root, prefix: str, depth: int) -> list[str]:
    """Keys of the folders ``depth`` names below a prefix; links are folders here, so that they are looked at."""
    length = len(prefix.split("/")) + depth
    found = {tuple(parts[:length]) for stored in root.walk(prefix) if len(parts := stored.key.split("/")) > length}
    links = {tuple(parts) for link in root.place.links(prefix) if len(parts := link.split("/")) == length}
    return sorted("/".join(parts) for parts in found | links)


def _of_cohort(root: Root, cohort: str) -> list[str]:
    results = _folders(root, f"results/{cohort}", 2)
    named: set[str] = set()
    for key in results:
        facts, _ = read_receipt(root, key)
        if facts is not None:
            model = str(facts.get("model", "")).partition("@")
            named |= {str(facts.get("volume", "")), f"models/{model[0]}/{model[2]}"}
    return sorted([*results, *(key for key in objects(root) if key in named)])


# --- one object


def _check(root: Root, key: str, now: datetime) -> Checked:
    """Twice where something is wrong: a run may have replaced the object while it was looked at."""
    before = _receipt_bytes(root, key)
    checked = look(root, key, now)
    return look(root, key, now) if checked.findings and _receipt_bytes(root, key) != before else checked


def _receipt_bytes(root: Root, key: str) -> bytes | None:
    try:
        return root.place.get(f"{key}/{RECEIPT}")
    except OSError as error:
        raise_if_silent(error)
        return None


def look(root: Root, key: str, now: datetime) -> Checked:
    """What one object holds against its receipt."""
    remedy = _remedy(key)

    def finding(code: str, found: str, remedy: str = remedy) -> Finding:
        return Finding(key, code, found, remedy)

    links = root.place.links(key)
    if key in links:
        return Checked((finding("fsck.link", "a link stands where a folder should be", "put the folder itself here"),))
    inside = list(root.place.walk(key))
    present = {stored.key.removeprefix(f"{key}/"): stored.size for stored in inside}
    linked = [one_line(link.removeprefix(f"{key}/")) for link in links]
    findings = [finding("fsck.link", f"{name} is a link, whose target is not sealed") for name in linked]
    facts, reason = read_receipt(root, key)
    if facts is None:
        if reason:
            findings.append(finding("fsck.receipt", reason))
        elif is_old(inside, now, UNFINISHED):
            findings.append(finding("fsck.orphan", f"{len(present)} files without a receipt", _orphan_remedy(key)))
        return Checked(tuple(findings))
    named: dict[str, str] = facts["files"]
    outside = [name for name in named if not _stays_inside(name)]
    if outside:
        findings.append(finding("fsck.outside", f"the receipt names {len(outside)} files outside its folder"))
    hashed = read = 0
    for name, digest in named.items():
        if name in outside:
            continue
        size = present.get(name)
        if size is None:
            findings.append(finding("fsck.missing", f"{one_line(name)} is not there"))
            continue
        try:
            same = root.digest(f"{key}/{name}") == digest
        except FileNotFoundError:
            findings.append(finding("fsck.missing", f"{one_line(name)} is not there"))
            continue
        except OSError as error:
            raise_if_silent(error)
            findings.append(finding("fsck.unreadable", f"{one_line(name)} cannot be read ({error.strerror})"))
            continue
        hashed, read = hashed + 1, read + size
        if not same:
            what = f"{one_line(name)} has {size} bytes that are not those of the receipt (SHA-256)"
            findings.append(finding("fsck.changed", what))
    for name in sorted(present.keys() - named.keys() - {RECEIPT}):
        what = f"{one_line(name)} is not named by the receipt"
        findings.append(finding("fsck.extra", what, "move it elsewhere: nothing reads it"))
    return Checked(tuple(findings), hashed, read)


def read_receipt(root: Root, key: str) -> tuple[dict[str, Any] | None, str]:
    """A receipt and '', or None and what is wrong with it; None and '' when there is none."""
    try:
        facts = json.loads(root.place.get(f"{key}/{RECEIPT}"))
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        raise_if_silent(error)
        return None, f"the receipt cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return None, "the receipt is no JSON"
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or not all(isinstance(d, str) and _SHA256.fullmatch(d) for d in files.values()):
        return None, "the receipt does not name its files with their SHA-256"
    return facts, ""


def _stays_inside(name: str) -> bool:
    return "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def is_old(found: Sequence[Stored], now: datetime, age: timedelta) -> bool:
    """Whether all of some objects were written longer ago than ``age``; no objects are not old."""
    return bool(found) and now - max(stored.modified for stored in found) > age


def _remedy(key: str) -> str:
    top = key.partition("/")[0]
    if top in ("volumes", "results"):
        return _MADE_AGAIN
    if top == "models":
        return f"{RESTORED}, promote another version, or train it again"
    return f"{RESTORED}; a training goes on from an older checkpoint with vnet train --resume"


def _orphan_remedy(key: str) -> str:
    if key.startswith("models/"):
        return "look at it, then remove the folder: it is no version of the model"
    return "vnet gc takes it away; a training goes on with vnet train --resume" if "training/" in key else "vnet gc"
