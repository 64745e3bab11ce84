"""Whether a storage root still holds what it says it holds: every byte, every reference, and what to do where not.

A finding names an object by its key, what is wrong with it as a code, and the remedy. Looking changes nothing;
:func:`repair` takes away damaged volumes and results that the next night makes again, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vnet_core.errors import StorageError
from workers.care.sealed import (
    RESTORED,
    UNFINISHED,
    Checkup,
    Finding,
    check_objects,
    is_old,
    look,
    read_receipt,
)
from workers.cohort import known_entry, load_cohort, load_entry
from workers.harmless import one_line
from workers.identity import KEY as IDENTITY
from workers.identity import private_folder
from workers.registry.aliases import aliases, history
from workers.sources.archives import PREFIX as ARCHIVES
from workers.storage.objects import Stored
from workers.storage.store import RECEIPT, Root, raise_if_silent

DOCUMENTS = ("attempts", "decisions", "questions", "shadows")
"""Whose JSON is read as it is, below the root."""
ASKED_AT_ONCE = 16
"""Objects that a store is asked for at the same time; each answer of a bucket takes milliseconds of waiting."""
_SHAPE = (KeyError, TypeError, ValueError, AttributeError)
"""What reading JSON of another shape than was written raises."""


def fsck(root: Root, now: datetime, cohort: str = "", threads: int | None = None) -> Checkup:
    """Everything that is wrong with a storage root, or with one ``cohort`` of it.

    ``now`` is aware; see :func:`workers.care.sealed.check_objects` for it and for ``threads``.
    """
    checkup = check_objects(root, now, cohort, threads)
    cohorts = [cohort] if cohort else cohorts_of(root)
    findings = list(checkup.findings)
    private = _no_private(root)
    findings += private
    for name in cohorts:
        findings += [] if private else _entries(root, name)
        findings += _nights(root, name)
    findings += _documents(root, cohort)
    if not cohort:
        findings += _aliases(root)
        findings += _leftovers(root, now)
    return replace(checkup, findings=tuple(sorted(findings, key=lambda f: (f.key, f.code, f.found))))


def cohorts_of(root: Root) -> list[str]:
    """Names of all cohorts that have cases, nights or rows."""
    return sorted({name for top in ("cohorts", "nights", "reports", "results") for name in root.names(top)})


# --- cohorts


def _no_private(root: Root) -> list[Finding]:
    """The finding that the private folder is not there at all, which would else be one for each case."""
    try:
        folder = private_folder(root)
    except StorageError as error:
        raise_if_silent(error)
        return [Finding(IDENTITY, "fsck.json", "it is not as it was written", "run any command with the site file")]
    if folder.is_dir() or not root.names("cohorts"):
        return []
    found = f"there is no private folder {folder}, which tells where scans lie"
    remedy = "mount it, or correct identity.private in the site file"
    return [Finding("cohorts", "fsck.no-private", found, remedy)]


def _entries(root: Root, cohort: str) -> Iterator[Finding]:
    """Cases that cannot be read, and those whose private part is missing."""
    ingest = "run vnet ingest SOURCE --cohort again"
    key = f"cohorts/{cohort}/cohort.json"
    if root.exists(key):
        yield from _readable(key, partial(load_cohort, root, cohort), ingest)
    for name in root.names(f"cohorts/{cohort}/cases"):
        case = name.removesuffix(".json")
        yield from _readable(f"cohorts/{cohort}/cases/{name}", partial(load_entry, root, cohort, case), ingest)


def _readable(key: str, read: Callable[[], object], remedy: str) -> Iterator[Finding]:
    try:
        read()
    except StorageError as error:
        if error.code == "identity.no-private":
            found = "the private folder does not hold its part, which tells where its scans lie"
            yield Finding(key, "fsck.no-private", found, f"mount the private folder, or {remedy}")
        else:
            raise_if_silent(error)
            yield Finding(key, "fsck.entry", "it is no JSON of the program, or its private part is not", remedy)
    except _SHAPE:
        yield Finding(key, "fsck.entry", "it is JSON of another shape than is written", remedy)


# --- nights


def _nights(root: Root, cohort: str) -> Iterator[Finding]:
    """Records and rows that cannot be read, or of which one is missing, and rows whose result is missing."""
    recorded = {name.removesuffix(".json") for name in root.names(f"nights/{cohort}") if name.endswith(".json")}
    told = {name.removesuffix(".parquet") for name in root.names(f"reports/{cohort}") if name.endswith(".parquet")}
    for night in sorted(recorded | told):
        record, rows = f"nights/{cohort}/{night}.json", f"reports/{cohort}/{night}.parquet"
        over = True
        if night not in recorded:
            yield Finding(record, "fsck.night", "its rows have no record of the night", RESTORED)
        else:
            facts = _json(root, record)
            # records of version 0.3 have no end
            over = not isinstance(facts, dict) or facts.get("ended", "then") != ""
            if not isinstance(facts, dict) or facts.get("cohort") != cohort:
                yield Finding(record, "fsck.night", "it is no record of a night of this cohort", RESTORED)
        if night not in told:
            if over:
                yield Finding(rows, "fsck.no-rows", "the night is over and has no rows", RESTORED)
            continue
        try:
            results = results_of(root, cohort, night)
        except StorageError as error:
            yield Finding(rows, "fsck.rows", error.message, RESTORED)
            continue
        missing = _without_receipt(root, results)
        if missing:
            found = f"{len(missing)} of {len(results)} results that its rows name are missing, first {missing[0]}"
            remedy = f"the next night makes those again that are still wanted; else {RESTORED}"
            yield Finding(rows, "fsck.no-result", found, remedy)


def _without_receipt(root: Root, results: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
        there = executor.map(root.place.is_object, [f"{key}/{RECEIPT}" for key in results])
        return [key for key, is_there in zip(results, there, strict=True) if not is_there]


def results_of(root: Root, cohort: str, night: str) -> list[str]:
    """Keys of the results that a night's rows name, sorted.

    StorageError ``fsck.rows`` when the table cannot be read, or names something else than results.
    """
    return keys_in(root, f"reports/{cohort}/{night}.parquet", ("result",))


def keys_in(root: Root, key: str, columns: Sequence[str]) -> list[str]:
    """Keys of results in columns of a Parquet table, sorted. StorageError ``fsck.rows`` as for :func:`results_of`."""
    try:
        with root.open(key) as file:
            table = pq.read_table(file, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError):
            raise_if_silent(error)
        raise StorageError("fsck.rows", f"the table cannot be read ({type(error).__name__})") from None
    if table.column_names != list(columns):
        raise StorageError("fsck.rows", f"the table has not the columns {', '.join(columns)}")
    named = {value for column in columns for value in table[column].to_pylist() if value}
    strange = [value for value in named if not isinstance(value, str) or not is_result(value)]
    if strange:
        raise StorageError("fsck.rows", f"{len(strange)} of its rows name something that is no result")
    return sorted(named)


def is_result(key: str) -> bool:
    """Whether a text has the form of a result's key."""
    parts = key.split("/")
    return parts[0] == "results" and len(parts) > 1 and not any(part in ("", ".", "..") for part in parts)


# --- models and documents


def _aliases(root: Root) -> Iterator[Finding]:
    """Aliases that cannot be read or point to no finished version."""
    for name in root.names("models"):
        key = f"models/{name}/history"
        try:
            history(root, name)
            named = aliases(root, name)
        except (StorageError, *_SHAPE) as error:
            if isinstance(error, StorageError):
                raise_if_silent(error)
            yield Finding(key, "fsck.alias", "a change of the aliases cannot be read", RESTORED)
            continue
        for alias, version in sorted(named.items()):
            if read_receipt(root, f"models/{name}/{version}")[0] is None:
                found = f"{one_line(alias)} is {one_line(version)}, which is no finished version"
                yield Finding(key, "fsck.alias", found, f"{RESTORED}, or vnet models promote another version")


def _documents(root: Root, cohort: str) -> Iterator[Finding]:
    """JSON that is no JSON, of everything that has no receipt."""
    for top in DOCUMENTS:
        for stored in root.walk(f"{top}/{cohort}" if cohort else top):
            if stored.key.endswith(".json") and _json(root, stored.key) is None:
                yield Finding(stored.key, "fsck.json", "it is no JSON", RESTORED)


def _json(root: Root, key: str) -> object:
    """What a JSON object holds, or None when it is none."""
    try:
        found: object = json.loads(root.place.get(key))
    except OSError as error:
        raise_if_silent(error)
        return None
    except (ValueError, RecursionError):
        return None
    return found


def _leftovers(root: Root, now: datetime) -> Iterator[Finding]:
    """Half-written objects, wherever they lie."""
    for leftover in leftovers(root):
        if is_old([leftover], now, UNFINISHED):
            yield Finding(leftover.key, "fsck.leftover", "it was half written when its run died", "vnet gc")


def leftovers(root: Root) -> Iterator[Stored]:
    """Half-written objects of a root; Prefect's own files and unpacked archives are left alone."""
    for leftover in root.place.leftovers():
        if not leftover.key.startswith(("prefect/", f"private/{ARCHIVES}/")):
            yield leftover


# --- repair

_REPAIRED = frozenset(
    ("fsck.changed", "fsck.missing", "fsck.receipt", "fsck.outside", "fsck.unreadable", "fsck.orphan")
)


def repair(root: Root, findings: Sequence[Finding], now: datetime) -> list[Finding]:
    """Take away what is damaged and can be made again; every finding comes back, with what was done.

    A volume is made again whenever a night needs it. A result is made again when its case is still in its cohort with
    the same bytes and its model is there. The receipt goes first, so that a killed repair leaves an unfinished object
    and no half one. Each object is looked at again before anything is removed.
    """
    damaged = {f.key for f in findings if f.code in _REPAIRED and f.key.startswith(("volumes/", "results/"))}
    done = {key: _take_away(root, key, now) for key in sorted(damaged)}
    return [replace(f, done=done[f.key]) if f.code in _REPAIRED and f.key in done else f for f in findings]


def _take_away(root: Root, key: str, now: datetime) -> str:
    if not any(f.code in _REPAIRED for f in look(root, key, now).findings):
        return "nothing left to do"
    if key.startswith("results/") and not _can_be_made_again(root, key):
        return ""
    try:
        root.delete(key)
    except StorageError as error:  # a name that no key has
        raise_if_silent(error)
        return ""
    return "removed; the next night that needs it makes it again"


def _can_be_made_again(root: Root, key: str) -> bool:
    _, cohort, case, _ = key.split("/")
    try:
        entry = known_entry(root, cohort, case)
    except StorageError as error:
        raise_if_silent(error)
        return False
    if entry is None or not entry.verdict.usable:
        return False
    facts, _ = read_receipt(root, key)
    if facts is None:
        facts = _report_of(root, key)
    name, _, version = str(facts.get("model", "")).partition("@")
    return facts.get("case_digest", entry.case.digest) == entry.case.digest and (
        not name or root.place.is_object(f"models/{name}/{version}/{RECEIPT}")
    )


def _report_of(root: Root, key: str) -> dict[str, Any]:
    try:
        report = root.get_json(f"{key}/report.json")
    except (StorageError, OSError):
        return {}
    return report if isinstance(report, dict) else {}
