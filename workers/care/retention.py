"""What may go from a storage root, by rules, and what never goes.

Never: a result that a kept night's rows or a decision name, or that the next night would find and use; the newest night
of a cohort; models, their aliases, decisions, entries and what tells who is who; anything younger than the grace.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from vnet_core.errors import ConfigError, StorageError
from vnet_core.plan import Plan
from workers.care.fsck import cohorts_of, keys_in, leftovers, results_of
from workers.care.sealed import is_old, objects
from workers.cohort import load_cohort, load_entries, result_key, volume_key
from workers.identity import private_folder
from workers.leases import is_alive
from workers.nights.decisions import all_decisions
from workers.nights.record import load_night, records
from workers.registry.aliases import ALIASES, aliases, versions
from workers.registry.models import Model, load_model
from workers.settings.retention_rules import Retention
from workers.sources.mirrors import PREFIX as MIRRORS
from workers.sources.mirrors import is_remote, mirror_key
from workers.storage.objects import Stored
from workers.storage.store import RECEIPT, Root

Kind = Literal["night", "result", "volume", "checkpoints", "archive", "unfinished"]
_NIGHT_PARTS = ("reports", "shadows", "logs", "nights")
"""Where the files of a night lie; its record goes last."""
_STAGING = ".unpacking-"
"""How the names of half-unpacked archives begin."""


@dataclass(frozen=True, slots=True)
class Spare:
    """Something that may go."""

    key: str
    """In the storage root, or of an archive in the private folder."""
    kind: Kind
    bytes: int
    why: str


def spares(root: Root, rules: Retention, now: datetime, models: Sequence[str] = ()) -> list[Spare]:
    """Everything that may go by the rules, in the order in which it goes: nights before the results that they name.

    ``now`` is aware. ``models``: references of models that schedules use, beside the champions, challengers, newest
    versions and those of the newest nights. StorageError ``gc.unreadable`` when something that may refer to others
    cannot be read.
    """
    gone = _nights(root, rules, now)
    found = [*gone.values()]
    if rules.results_days is not None or rules.spares_days is not None:
        with _readable():
            needed = _needed(root, {(s.key.split("/")[1], s.key.rpartition("/")[2]) for s in found}, models)
        found += _results(root, rules, now, needed)
        found += _volumes(root, rules, now, needed)
        found += _checkpoints(root, rules, now)
        found += _archives(root, rules, now)
    return [*found, *_unfinished(root, rules, now)]


def collect(
    root: Root, found: Iterable[Spare], on_removed: Callable[[Spare], None] = lambda spare: None
) -> list[Spare]:
    """Remove what :func:`spares` found, and return what is gone; receipts go first.

    StorageError ``gc.running`` when a run is at work: it may be about to use what goes. What went until then is gone.
    """
    private = private_folder(root)
    left = {leftover.key: leftover for leftover in leftovers(root)}
    removed: list[Spare] = []
    for spare in found:
        busy = live_runs(root)
        if busy:
            raise StorageError(
                "gc.running",
                f"{len(busy)} runs are at work, and {len(removed)} things went before; run vnet gc again when they are"
                " over",
            )
        if spare.kind == "night":
            _, cohort, night = spare.key.split("/")
            for stored in _files_of_night(root, cohort, night):
                root.place.delete(stored.key)
        elif spare.kind == "archive":
            Root(private).delete(spare.key)
        elif spare.key in left:
            root.place.discard(left[spare.key])
        elif spare.kind == "unfinished" and spare.key.startswith("archives/"):
            with suppress(FileNotFoundError):
                shutil.rmtree(private / spare.key)
            with suppress(OSError):  # another run is unpacking there
                (private / spare.key).parent.rmdir()
        elif spare.kind == "unfinished" and root.place.exists(f"{spare.key}/{RECEIPT}"):
            continue  # a run has finished it since
        elif spare.kind == "unfinished":
            # what is half done may have a name that no key has
            root.place.delete(spare.key)
            root.place.tidy(spare.key.rpartition("/")[0])
        else:
            root.delete(spare.key)
            root.place.tidy(spare.key.rpartition("/")[0])
        removed.append(spare)
        on_removed(spare)
    return removed


def live_runs(root: Root) -> list[str]:
    """Ids of the runs that are at work on the root."""
    return [run for name in root.names("runs") if is_alive(root, run := name.removesuffix(".json"))]


# --- what goes


def _nights(root: Root, rules: Retention, now: datetime) -> dict[tuple[str, str], Spare]:
    """Nights that are too old, by cohort and id, oldest first."""
    if rules.nights_days is None:
        return {}
    gone = {}
    for cohort in cohorts_of(root):
        names = {name.partition(".")[0] for part in _NIGHT_PARTS for name in root.names(f"{part}/{cohort}")}
        told = [n.removesuffix(".parquet") for n in root.names(f"reports/{cohort}") if n.endswith(".parquet")]
        kept = {*sorted(told)[-1:], *records(root, cohort)[-1:]}
        for night in sorted(names - kept):
            started = _started(night)
            if started is not None and _is_past(now - started, rules.nights_days, rules):
                size = sum(stored.size for stored in _files_of_night(root, cohort, night))
                why = f"{(now - started).days} days old, nights stay {rules.nights_days}"
                gone[cohort, night] = Spare(f"nights/{cohort}/{night}", "night", size, why)
    return gone


def _started(night: str) -> datetime | None:
    try:
        return datetime.strptime(night, "%Y-%m-%d_%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None


def _files_of_night(root: Root, cohort: str, night: str) -> Iterator[Stored]:
    """What is named after a night, its record last."""
    for part in _NIGHT_PARTS:
        for name in root.names(f"{part}/{cohort}"):
            if name.startswith(f"{night}."):
                yield from root.place.walk(f"{part}/{cohort}/{name}")


def _is_past(age: timedelta, days: int, rules: Retention) -> bool:
    return age > max(timedelta(days=days), timedelta(hours=rules.grace_hours))


def _results(root: Root, rules: Retention, now: datetime, needed: _Needed) -> Iterator[Spare]:
    if rules.results_days is None:
        return
    for key in _finished(root, "results/"):
        # masks of another format than NIfTI are results of their own beside it
        current = key.rpartition("/")[0] + "/" + key.rpartition("/")[2].partition("-")[0] in needed.current
        if not current and key not in needed.named and _sealed_before(root, key, rules.results_days, rules, now):
            yield Spare(key, "result", _size(root, key), "no kept night names it, and no night would use it")


def _volumes(root: Root, rules: Retention, now: datetime, needed: _Needed) -> Iterator[Spare]:
    if rules.spares_days is None:
        return
    for key in _finished(root, "volumes/"):
        if key not in needed.volumes and _sealed_before(root, key, rules.spares_days, rules, now):
            yield Spare(key, "volume", _size(root, key), "no case and model of today need it")


def _checkpoints(root: Root, rules: Retention, now: datetime) -> Iterator[Spare]:
    """Of trainings whose model is finished; those of others are what they go on from."""
    if rules.spares_days is None:
        return
    for key in _trainings(root):
        if not _is_published(root, key):
            continue
        folders: dict[str, list[Stored]] = {}
        for stored in root.walk(key):
            before, found, _ = stored.key.partition("/checkpoints/")
            if found:
                folders.setdefault(f"{before}/checkpoints", []).append(stored)
        for folder, inside in sorted(folders.items()):
            size = sum(stored.size for stored in inside)
            newest = max(stored.modified for stored in inside)
            if size and _is_past(now - newest, rules.spares_days, rules):
                yield Spare(folder, "checkpoints", size, "its training is finished")


def _archives(root: Root, rules: Retention, now: datetime) -> Iterator[Spare]:
    if rules.spares_days is None:
        return
    private = private_folder(root)
    with _readable():
        cohorts = [load_cohort(root, cohort) for cohort in root.names("cohorts")]
    used = {key for cohort in cohorts for key in cohort.archives}
    mirrors = {mirror_key(source) for cohort in cohorts for source in cohort.sources if is_remote(source)}
    age = max(timedelta(days=rules.spares_days), timedelta(hours=rules.grace_hours))
    for name in Root(private).names("archives"):
        key = f"archives/{name}"
        if key not in used and _is_old_folder(private / key, now, age):
            yield Spare(key, "archive", _size_of_folder(private / key), "no cohort was read from it")
    for name in Root(private).names(MIRRORS):
        key = f"{MIRRORS}/{name}"
        if key not in mirrors and _is_old_folder(private / key, now, age):
            yield Spare(key, "archive", _size_of_folder(private / key), "no cohort is read from its bucket")


def _unfinished(root: Root, rules: Retention, now: datetime) -> Iterator[Spare]:
    """What runs that died left half done: files without a receipt, half-written files, and their signs of life."""
    age = timedelta(hours=rules.grace_hours)
    for key in objects(root):
        if key.startswith("models/") or key in root.place.links(key) or root.place.exists(f"{key}/{RECEIPT}"):
            continue
        inside = list(root.place.walk(key))
        if is_old(inside, now, age):
            yield Spare(key, "unfinished", sum(stored.size for stored in inside), "it has no receipt")
    for leftover in leftovers(root):
        if is_old([leftover], now, age):
            yield Spare(leftover.key, "unfinished", leftover.size, "half written")
    private = private_folder(root)
    for path in sorted(private.glob(f"archives/*/{_STAGING}*")):
        if _is_old_folder(path, now, age):
            key = path.relative_to(private).as_posix()
            yield Spare(key, "unfinished", _size_of_folder(path), "half unpacked")
    for stored in root.walk("runs"):
        run = stored.key.removeprefix("runs/").removesuffix(".json")
        if is_old([stored], now, age) and not is_alive(root, run):
            yield Spare(stored.key, "unfinished", stored.size, "its process is gone")
    for stored in root.walk("leases"):
        with suppress(FileNotFoundError):  # given back meanwhile
            if is_old([stored], now, age) and not is_alive(root, json.loads(root.place.get(stored.key))["run"]):
                yield Spare(stored.key, "unfinished", stored.size, "the run that held it is gone")


# --- what stays


@dataclass(frozen=True, slots=True)
class _Needed:
    named: set[str]
    """Results that kept rows, comparisons of models and decisions name."""
    current: set[str]
    """Results that a night of today's models would find and use, without the suffix of their format."""
    volumes: set[str]


def _needed(root: Root, gone: set[tuple[str, str]], models: Sequence[str]) -> _Needed:
    used = _models(root, models)
    plans = {model.plan.volume_digest: model.plan for model in used}
    needed = _Needed(set(), set(), _of_open_trainings(root))
    for cohort in cohorts_of(root):
        for name in root.names(f"reports/{cohort}"):
            night = name.removesuffix(".parquet")
            if name.endswith(".parquet") and (cohort, night) not in gone:
                needed.named.update(results_of(root, cohort, night))
        for name in root.names(f"shadows/{cohort}"):
            if name.endswith(".parquet") and (cohort, name.removesuffix(".parquet")) not in gone:
                compared = keys_in(root, f"shadows/{cohort}/{name}", ("champion_key", "challenger_key"))
                needed.named.update(compared)
        for found in all_decisions(root, cohort).values():
            needed.named.update(decision.key for decision in found)
        kept = f"cohorts/{cohort}/plan.json"
        own = [Plan.from_mapping(root.get_json(kept))] if root.exists(kept) else []
        for entry in load_entries(root, cohort):
            needed.volumes.update(volume_key(entry.case, plan) for plan in (*plans.values(), *own))
            needed.current.update(result_key(cohort, entry.case, model.plan, model.digest) for model in used)
    return needed


def _models(root: Root, scheduled: Sequence[str]) -> list[Model]:
    """Champions, challengers and newest versions, those of every cohort's newest night, and scheduled ones."""
    references = {reference for reference in scheduled if reference}
    for name in root.names("models"):
        finished = versions(root, name)
        named = aliases(root, name)
        references |= {f"{name}@{version}" for version in finished[-1:]}
        references |= {f"{name}@{alias}" for alias in ALIASES if named.get(alias) in finished}
    for cohort in cohorts_of(root):
        references |= {load_night(root, cohort, night).model for night in records(root, cohort)[-1:]}
    found = {}
    for reference in sorted(references):
        try:
            model = load_model(root, reference)
        except ConfigError:
            continue  # a model that is not there needs nothing
        found[model.digest] = model
    return list(found.values())


def _trainings(root: Root) -> list[str]:
    return [f"training/{name}/{v}" for name in root.names("training") for v in root.names(f"training/{name}")]


def _of_open_trainings(root: Root) -> set[str]:
    """Volumes that trainings without a finished model go on with."""
    volumes: set[str] = set()
    for key in _trainings(root):
        if not _is_published(root, key):
            for stored in root.walk(key):
                if stored.key.endswith("/run.json"):
                    run = root.get_json(stored.key)
                    volumes |= {*run["training"].values(), *run["validation"].values()}
    return volumes


def _is_published(root: Root, training: str) -> bool:
    """Whether the model of a training is finished."""
    return root.place.is_object(f"{training.replace('training/', 'models/', 1)}/{RECEIPT}")


@contextmanager
def _readable() -> Iterator[None]:
    """What cannot be read might refer to anything, so that nothing goes then."""
    try:
        yield
    except (StorageError, KeyError, TypeError, AttributeError, ValueError) as error:
        what = error.message if isinstance(error, StorageError) else f"JSON of another shape ({type(error).__name__})"
        raise StorageError(
            "gc.unreadable", f"something that tells what is needed cannot be read: {what}; run vnet fsck first"
        ) from error


# --- files


def _finished(root: Root, prefix: str) -> Iterator[str]:
    for key in objects(root):
        if key.startswith(prefix) and key not in root.place.links(key) and root.place.is_object(f"{key}/{RECEIPT}"):
            yield key


def _sealed_before(root: Root, key: str, days: int, rules: Retention, now: datetime) -> bool:
    return all(_is_past(now - stored.modified, days, rules) for stored in root.place.walk(f"{key}/{RECEIPT}"))


def _size(root: Root, key: str) -> int:
    """Bytes of everything below a key."""
    return sum(stored.size for stored in root.place.walk(key))


def _size_of_folder(folder: Path) -> int:
    return sum(Path(place, name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def _is_old_folder(folder: Path, now: datetime, age: timedelta) -> bool:
    """Whether a folder of the private part, and everything in it, was last written longer ago than ``age``."""
    try:
        newest = folder.lstat().st_mtime
        for place, folders, names in os.walk(folder):
            newest = max([newest, *(Path(place, name).lstat().st_mtime for name in (*folders, *names))])
    except FileNotFoundError:
        return False  # somebody works on it
    return now.timestamp() - newest > age.total_seconds()
