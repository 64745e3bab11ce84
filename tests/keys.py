"""Tables of the plan's and the site file's keys in the documentation, made from the program's own fields.

    python -m tests.keys

writes them again after a field has changed.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from tests.walkthrough import REPOSITORY
from vnet_core.plan import Plan
from vnet_core.reporting import Reporting
from workers.settings.site import Nightly, Site

PAGES = {"docs/plans.md": Plan, "docs/sites.md": Site, "docs/quality.md": Reporting}
_TABLE = re.compile(r"<!-- keys -->\n.*?<!-- end of keys -->\n", re.DOTALL)


def table(model: type[BaseModel]) -> str:
    lines = ["<!-- keys -->", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += _rows(model, "")
    return "\n".join([*lines, "<!-- end of keys -->"]) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _rows(kind, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        bounds = "".join(_bound(item) for item in field.metadata)
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{prefix}{name}` | {_name(kind)}{bounds} | {default} | {meaning} |")
        if prefix == "" and _listed(kind) is Nightly:
            rows += _rows(Nightly, f"{name}.")
    return rows


def _default(value: Any) -> str:
    return "empty" if value == "" else f"`{value}`"


def _listed(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def _bound(item: Any) -> str:
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    for kind, (sign, attribute) in signs.items():
        if isinstance(item, kind):
            return f", {sign} {getattr(item, attribute)}"
    return ""


def _name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is typing.Annotated:
        return _name(get_args(kind)[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(_name(part) for part in get_args(kind) if part is not type(None))
    if origin is tuple:
        parts = get_args(kind)
        return f"list of {_name(parts[0])}" if parts[-1] is Ellipsis else f"{len(parts)} x {_name(parts[0])}"
    if origin is dict:
        key, value = get_args(kind)
        return f"table of {_name(value)} by {_name(key)}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"table with {', '.join(f'`{name}`' for name in kind.model_fields)}"
    return {"float": "number", "int": "whole number", "str": "text", "bool": "true or false"}[kind.__name__]


def with_table(page: str, model: type[BaseModel]) -> str:
    return _TABLE.sub(lambda _: table(model), page)


if __name__ == "__main__":
    for name, model in PAGES.items():
        path = REPOSITORY / name
        path.write_text(with_table(path.read_text("utf-8"), model))
