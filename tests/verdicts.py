"""The table of codes in the documentation, made from the program's own.

    python -m tests.verdicts

writes it again after a code has changed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.walkthrough import REPOSITORY
from vnet_core.codes import CODES

PAGE = REPOSITORY / "docs" / "verdicts.md"
_TABLE = re.compile(r"<!-- codes -->\n.*?<!-- end of codes -->\n", re.DOTALL)
_CODE = re.compile(r"(scan|case|geometry|dicom|select|cohort|label|archive|sphere|metrics|evaluate)\.(?!nii)[a-z0-9-]+")
_NOT_OF_SCANS = ("ConfigError", "StorageError", "EngineError", "MemoryLimitError", "TrainingError")


def table() -> str:
    lines = ["<!-- codes -->", "| code | case is | what it means | what to do |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | {code.state} | {code.meaning} | {code.remedy} |" for name, code in CODES.items()]
    return "\n".join([*lines, "<!-- end of codes -->"]) + "\n"


def with_table(page: str) -> str:
    return _TABLE.sub(lambda _: table(), page)


def codes_in(tree: ast.AST) -> Iterator[str]:
    """Strings of a module that are codes of a scan: not those that other errors carry."""
    others = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _NOT_OF_SCANS
        and node.args
    }
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in others and _CODE.fullmatch(node.value):
            yield node.value


def codes_in_sources() -> dict[str, set[str]]:
    """Every code that the sources name, with the modules that do."""
    found: dict[str, set[str]] = {}
    for package in ("vnet_core", "workers"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if path != REPOSITORY / "vnet_core" / "codes.py":
                for code in codes_in(ast.parse(path.read_text(encoding="utf-8"))):
                    found.setdefault(code, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")))
