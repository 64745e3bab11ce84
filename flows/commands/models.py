"""The command ``models``: what models there are, which version of each is used, and what a network looks like."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.commands.command import Command, Result
from flows.commands.people import person, person_arguments
from flows.commands.tables import text_table
from flows.session import open_session
from vnet_core.errors import ConfigError, StorageError
from workers.harmless import one_line, printable
from workers.storage.store import Root

LIST_COLUMNS = ("model", "alias", "labels", "networks", "steps", "validation_dice", "note")
CHANGE_COLUMNS = ("at", "action", "version", "before", "by", "why")


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    parser.add_argument("model", nargs="?", metavar="NAME[@VERSION]|PRESET|FILE", help="describe: preset or plan file")
    person_arguments(parser)
    parser.add_argument("--channels", type=int, default=1, metavar="N", help="describe: channels of the image")
    parser.add_argument("--classes", type=int, default=2, metavar="K", help="describe: classes with background")
    parser.add_argument(
        "--input", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X"), help="describe: voxels"
    )
    parser.add_argument("--graph", type=Path, metavar="FILE", help="describe: draw the network (.png or .svg)")


def models(options: Namespace) -> Result:
    """``vnet models ACTION``."""
    return _ACTIONS[options.action](options)


# --- what there is


def _list(options: Namespace) -> Result:
    root = open_session().root
    names = [options.model] if options.model else root.names("models")
    rows = [row for name in names for row in _versions(root, name)]
    return Result(text_table(rows, LIST_COLUMNS) if rows else "no models", [], {"models": rows})


def _versions(root: Root, name: str) -> list[dict[str, Any]]:
    """One row per version, and one per alias whose version is not there."""
    from workers.registry.aliases import aliases, versions
    from workers.registry.models import load_model

    finished, named = versions(root, name), aliases(root, name)
    rows = []
    for version in finished:
        row = dict.fromkeys(LIST_COLUMNS) | {"model": f"{name}@{version}", "alias": _held(named, version), "note": ""}
        try:
            facts = load_model(root, f"{name}@{version}").facts
        except StorageError as error:
            row["note"] = error.code
        else:
            scores = facts["metrics"]["validation_dice"].values()
            row |= {
                "labels": " ".join(label["name"] for label in facts["labels"]),
                "networks": len(facts["weights"]),
                "steps": facts.get("training", {}).get("steps"),
                "validation_dice": sum(scores) / len(scores) if scores else None,
            }
        rows.append(row)
    for version in dict.fromkeys(held for held in named.values() if held not in finished):
        lost = {"model": f"{name}@{version}", "alias": _held(named, version), "note": "not there"}
        rows.append(dict.fromkeys(LIST_COLUMNS) | lost)
    return rows


def _held(named: dict[str, str], version: str) -> str:
    return " ".join(alias for alias, held in named.items() if held == version)


def _show(options: Namespace) -> Result:
    from workers.registry.models import load_model

    root = open_session().root
    model = load_model(root, _reference(options))
    text = f"{model.reference} {model.digest}\n{root.where(model.prefix)}\n" + "\n".join(
        f"{name}: {value}" for name, value in {**model.facts["metrics"], **model.facts["training"]}.items()
    )
    return Result(text, [], {"model": model.facts, "digest": model.digest})


def _card(options: Namespace) -> Result:
    from workers.registry.models import card_of, load_model

    root = open_session().root
    model = load_model(root, _reference(options))
    card = card_of(root, model)
    return Result(printable(card).rstrip("\n"), [], {"model": model.reference, "card": card})


def _history(options: Namespace) -> Result:
    from workers.registry.aliases import history, resolve

    root = open_session().root
    name, _ = resolve(root, f"{_name(options)}@latest")
    rows = [asdict(change) for change in history(root, name)]
    text = text_table(rows, CHANGE_COLUMNS) if rows else f"nobody has changed the aliases of model {name}"
    return Result(text, [], {"model": name, "changes": rows})


def _describe(options: Namespace) -> Result:
    from flows.commands.networks import describe

    text, extra = describe(options, text_table)
    return Result(text, [], extra)


# --- which is used


def _promote(options: Namespace) -> Result:
    from workers.registry.aliases import promote

    root = open_session().root
    change = promote(root, _name(options), _version(options), person(options), options.why)
    return _changed(root, _name(options), f"{_name(options)}@{change.version} is the champion, before: {change.before}")


def _challenge(options: Namespace) -> Result:
    from workers.registry.aliases import challenge

    root = open_session().root
    change = challenge(root, _name(options), _version(options), person(options), options.why)
    return _changed(root, _name(options), f"{_name(options)}@{change.version} is the challenger")


def _withdraw(options: Namespace) -> Result:
    from workers.registry.aliases import withdraw

    root = open_session().root
    change = withdraw(root, _name(options), person(options), options.why)
    return _changed(root, _name(options), f"{_name(options)}@{change.before} is no longer the challenger")


def _rollback(options: Namespace) -> Result:
    from workers.registry.aliases import rollback

    root = open_session().root
    version = rollback(root, _name(options), person(options), options.why)
    return _changed(root, _name(options), f"{_name(options)}@{version} is the champion again")


def _changed(root: Root, name: str, text: str) -> Result:
    from workers.registry.aliases import aliases

    return Result(one_line(text), [], {"model": name, "aliases": aliases(root, name)})


def _reference(options: Namespace) -> str:
    """The model that was named; ConfigError ``model.name``."""
    if not options.model:
        raise ConfigError("model.name", f"vnet models {options.action} needs NAME or NAME@VERSION")
    return str(options.model)


def _name(options: Namespace) -> str:
    return _reference(options).partition("@")[0]


def _version(options: Namespace) -> str:
    """The version that is to be used, which has to be said."""
    version = _reference(options).partition("@")[2]
    if not version:
        raise ConfigError(
            "model.name",
            f"vnet models {options.action} needs NAME@VERSION, such as {_name(options)}@v2 or {_name(options)}@latest",
        )
    return version


_ACTIONS: dict[str, Callable[[Namespace], Result]] = {
    "list": _list,
    "show": _show,
    "card": _card,
    "history": _history,
    "describe": _describe,
    "promote": _promote,
    "challenge": _challenge,
    "withdraw": _withdraw,
    "rollback": _rollback,
}

MODELS = Command(
    "models",
    "trained models: list and show them, say which version is used; describe a network before training",
    "root",
    _arguments,
    models,
)
