"""Which version of a model is used: the aliases `champion` and `challenger`, and who changed them, when and why.

models/<name>/history/<number>.json

Every change is one object, made once and never changed, and holds the aliases as they are after it: the one with the
highest number is what counts. Numbers are created exclusively (a hard link on disk, a conditional put on an object
storage), so of two writers at once one gets the number and the other decides again on what it finds. A lock would have
to be taken from a writer that died with it; here a writer that dies has either made its change or left everything as it
was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from vnet_core.errors import ConfigError, StorageError
from workers.cohort import check_name
from workers.harmless import one_line
from workers.storage.store import RECEIPT, Root

Alias = Literal["champion", "challenger"]
Action = Literal["promote", "challenge", "withdraw", "rollback"]
ALIASES: tuple[Alias, ...] = ("champion", "challenger")

LONGEST_NAME = 100
LONGEST_REASON = 2_000


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a model's aliases."""

    action: Action
    alias: Alias
    version: str
    """That the alias names from now on; empty: none."""
    before: str
    """That it named until then, empty: none; for the first champion the newest other version."""
    by: str
    """Name of the person, as they gave it."""
    at: str
    """ISO 8601, UTC."""
    why: str
    aliases: Mapping[str, str]
    """All aliases after the change."""


# --- versions


def versions(root: Root, name: str) -> list[str]:
    """Finished versions of a model, oldest first."""
    return sorted((v for v in root.names(f"models/{name}") if _has_receipt(root, f"models/{name}/{v}")), key=_number)


def _has_receipt(root: Root, prefix: str) -> bool:
    """Also a damaged one: a version is not passed over for an older one because its receipt cannot be read."""
    try:
        return root.is_object(f"{prefix}/{RECEIPT}")
    except StorageError as error:
        if error.code != "store.outside":
            raise
        return False


def next_version(root: Root, name: str) -> str:
    """The version after the newest that was ever begun."""
    begun = [*root.names(f"models/{name}"), *root.names(f"training/{name}")]
    return f"v{max((_number(v) for v in begun), default=0) + 1}"


def _number(version: str) -> int:
    match = re.fullmatch(r"v(\d+)", version)
    return int(match[1]) if match else 0


# --- what is used


def aliases(root: Root, name: str) -> dict[str, str]:
    """Version by alias, `champion` and `challenger`, those that are set."""
    last = _objects(root, name)[-1:]
    return dict(_read(root, last[0]).aliases) if last else {}


def history(root: Root, name: str) -> list[Change]:
    """Every change of the model's aliases, oldest first."""
    return [_read(root, key) for key in _objects(root, name)]


def resolve(root: Root, reference: str) -> tuple[str, str]:
    """Name and finished version that a reference stands for.

    ``name`` is the champion, or the newest version where there is none; after ``name@`` stands a version, an alias, or
    `latest`. ConfigError ``model.unknown``, ``model.version`` or ``model.alias`` names what exists.
    """
    name, _, wanted = reference.partition("@")
    check_name(name, "model")
    finished = versions(root, name)
    if not finished:
        known = ", ".join(n for n in root.names("models") if versions(root, n)) or "none"
        raise ConfigError(
            "model.unknown", f"there is no model {name!r} in {root.shown} (known: {known}); train it with vnet train"
        )
    if wanted == "latest":
        return name, finished[-1]
    named = aliases(root, name)
    if wanted in ALIASES or (not wanted and "champion" in named):
        alias = wanted or "champion"
        if alias not in named:
            raise ConfigError(
                "model.alias",
                f"model {name} has no {alias}; it has {_there(finished, named)}; vnet models"
                f" {'promote' if alias == 'champion' else 'challenge'} {name}@VERSION names one",
            )
        if named[alias] not in finished:
            raise ConfigError(
                "model.alias",
                f"the {alias} of model {name} is {named[alias]}, which is not there; it has {', '.join(finished)};"
                f" promote one of them, or vnet models {'rollback' if alias == 'champion' else 'withdraw'} {name}",
            )
        return name, named[alias]
    version = wanted or finished[-1]
    if version not in finished:
        raise ConfigError("model.version", f"model {name} has no version {version!r}; it has {_there(finished, named)}")
    return name, version


def check_files(root: Root, name: str, version: str) -> None:
    """StorageError ``model.damaged`` when a file of a version is not what its receipt says."""
    damaged = root.damaged(f"models/{name}/{version}")
    if damaged:
        held = [alias for alias, named in aliases(root, name).items() if named == version]
        remedy = {
            "champion": f"; it is the champion: vnet models rollback {name}, or promote another version",
            "challenger": f"; it is the challenger: vnet models withdraw {name}",
        }
        raise StorageError(
            "model.damaged",
            f"{', '.join(damaged)} of model {name}@{version} changed since training"
            + (remedy[held[0]] if held else "; restore it from a copy, or use another version"),
        )


def _there(finished: Sequence[str], named: Mapping[str, str]) -> str:
    return ", ".join(finished) + "".join(f", {alias} {version}" for alias, version in named.items())


# --- changes


def promote(root: Root, name: str, version: str, by: str, why: str) -> Change:
    """Make a version (or what an alias or `latest` stands for) the champion; a challenger that it was, it is no more.

    ConfigError ``model.unknown``, ``model.version``, ``model.alias``, or ``model.who`` without a person's name;
    StorageError ``model.damaged``. The same errors come from the other changes.
    """

    def decide(past: Sequence[Change]) -> tuple[Alias, str, str, dict[str, str]]:
        chosen = _sound(root, name, version)
        named = _named(past)
        others = [found for found in versions(root, name) if found != chosen]
        before = named.get("champion") or max(others, key=_number, default="")
        kept = {alias: held for alias, held in named.items() if held != chosen}
        return "champion", chosen, before, kept | {"champion": chosen}

    return _record(root, name, "promote", decide, _signed(name, by, why))


def challenge(root: Root, name: str, version: str, by: str, why: str = "") -> Change:
    """Make a version the challenger, which takes the place of an earlier one.

    ConfigError ``model.alias`` when the model has no champion (``name`` would mean the newest version, which often is
    the challenger), or when the version is the champion.
    """

    def decide(past: Sequence[Change]) -> tuple[Alias, str, str, dict[str, str]]:
        chosen = _sound(root, name, version)
        named = _named(past)
        champion = named.get("champion")
        if champion in (None, chosen):
            found = f"{chosen} is its champion" if champion else "it has no champion"
            raise ConfigError(
                "model.alias", f"model {name} cannot get {chosen} as challenger, {found}; promote another version first"
            )
        return "challenger", chosen, named.get("challenger", ""), named | {"challenger": chosen}

    return _record(root, name, "challenge", decide, _signed(name, by, why))


def withdraw(root: Root, name: str, by: str, why: str = "") -> Change:
    """Leave the model without a challenger; the version stays. ConfigError ``model.alias`` when there is none."""

    def decide(past: Sequence[Change]) -> tuple[Alias, str, str, dict[str, str]]:
        named = _named(past)
        if "challenger" not in named:
            raise ConfigError("model.alias", f"model {name} has no challenger; there is nothing to withdraw")
        return "challenger", "", named.pop("challenger"), named

    return _record(root, name, "withdraw", decide, _signed(name, by, why))


def rollback(root: Root, name: str, by: str, why: str = "") -> str:
    """Take the last promotion back that still stands; returns the version that is the champion again.

    Versions that are gone are passed over. ConfigError ``model.rollback`` when there is nothing to go back to.
    """

    def decide(past: Sequence[Change]) -> tuple[Alias, str, str, dict[str, str]]:
        named, finished = _named(past), versions(root, name)
        champion = named.get("champion", "")
        earlier = [version for version in _standing(past)[:-1] if version in finished and version != champion]
        if not earlier:
            found = f"{champion} is its first champion" if champion else "it never had a champion"
            raise ConfigError(
                "model.rollback",
                f"model {name} cannot go back, {found} (it has {', '.join(finished) or 'no version'}); promote the"
                " version that is to be used",
            )
        chosen = _sound(root, name, earlier[-1])
        kept = {alias: held for alias, held in named.items() if held != chosen}
        return "champion", chosen, champion, kept | {"champion": chosen}

    return _record(root, name, "rollback", decide, _signed(name, by, why)).version


def _standing(past: Sequence[Change]) -> list[str]:
    """Champions whose promotion was not taken back, oldest first; the last one is the champion."""
    stack: list[str] = []
    for change in past:
        if change.action == "promote":
            stack += [change.before] if not stack and change.before else []
            stack += [change.version] if stack[-1:] != [change.version] else []
        elif change.action == "rollback":
            while stack and stack[-1] != change.version:
                stack.pop()
            stack = stack or [change.version]
    return stack


def _sound(root: Root, name: str, version: str) -> str:
    """The finished, undamaged version that is meant."""
    _, chosen = resolve(root, f"{name}@{version}")
    check_files(root, name, chosen)
    return chosen


def _named(past: Sequence[Change]) -> dict[str, str]:
    return dict(past[-1].aliases) if past else {}


@dataclass(frozen=True, slots=True)
class _Signed:
    """Who changes something, and why."""

    by: str
    why: str


def _signed(name: str, by: str, why: str) -> _Signed:
    """Both as they are kept; ConfigError ``model.who``."""
    who, reason = one_line(by).strip(), one_line(why).strip()
    if not who or len(who) > LONGEST_NAME or len(reason) > LONGEST_REASON:
        raise ConfigError(
            "model.who",
            f"a change of model {name} needs the name of a person (got {len(who)} characters, 1 to {LONGEST_NAME} are"
            f" taken) and a reason of at most {LONGEST_REASON} characters (got {len(reason)})",
        )
    return _Signed(who, reason)


def _now() -> datetime:
    return datetime.now(UTC)


def _record(
    root: Root,
    name: str,
    action: Action,
    decide: Callable[[Sequence[Change]], tuple[Alias, str, str, dict[str, str]]],
    signed: _Signed,
) -> Change:
    """Write the change that follows from what was before; decided again when somebody else was faster."""
    while True:
        keys = _objects(root, name)
        alias, version, before, after = decide([_read(root, key) for key in keys])
        ordered: dict[str, str] = {one: after[one] for one in ALIASES if one in after}
        at = _now().isoformat(timespec="seconds")
        change = Change(action, alias, version, before, signed.by, at, signed.why, ordered)
        number = int(keys[-1][-11:-5]) + 1 if keys else 1
        content = json.dumps(asdict(change), indent=1, ensure_ascii=False).encode()
        if root.create(f"models/{name}/history/{number:06d}.json", content):
            return change


def _objects(root: Root, name: str) -> list[str]:
    """Keys of the changes, oldest first."""
    folder = f"models/{check_name(name, 'model')}/history"
    return [f"{folder}/{found}" for found in root.names(folder) if re.fullmatch(r"\d{6}\.json", found)]


def _read(root: Root, key: str) -> Change:
    facts: dict[str, Any] = root.get_json(key)
    try:
        return Change(**facts)
    except TypeError:
        raise StorageError("store.corrupt", f"{key} is no change of a model; restore it from a copy") from None
