"""Questions that people keep by name, in the storage root: ``questions/<name>.json``."""

from __future__ import annotations

import re
from dataclasses import asdict, fields

from pydantic import TypeAdapter, ValidationError

from vnet_core.errors import ConfigError, StorageError
from workers.reports.query import Query
from workers.storage.store import Root

NAME = r"[a-z0-9][a-z0-9-]{0,59}"
"""What a question can be called."""
NONE = "none"
"""Stands for no question in a form, and so is no name."""
_QUESTION = TypeAdapter(Query)


def save_question(root: Root, name: str, question: Query) -> None:
    """Keep a question; one of that name is replaced. ConfigError ``query.name``."""
    if not re.fullmatch(NAME, name) or name == NONE:
        raise ConfigError(
            "query.name",
            f"a question cannot be called {name!r}; use up to 60 small letters, digits and dashes, and not {NONE!r}",
        )
    empty = {field.name: field.default for field in fields(Query)}
    root.put_json(f"questions/{name}.json", {k: v for k, v in asdict(question).items() if v != empty[k]})


def load_question(root: Root, name: str) -> Query:
    """ConfigError ``query.unknown-question`` names those that there are; StorageError ``store.corrupt``."""
    known = question_names(root)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError("query.unknown-question", f"no question is called {name!r} (saved: {listed})")
    key = f"questions/{name}.json"
    try:
        return _QUESTION.validate_python(root.get_json(key))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise StorageError(
            "store.corrupt", f"{key} holds no question ({place}: {problem['msg']}); delete it or save it again"
        ) from None


def question_names(root: Root) -> list[str]:
    """Names of all saved questions, sorted."""
    return [name.removesuffix(".json") for name in root.names("questions") if name.endswith(".json")]
