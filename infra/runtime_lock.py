"""The part of requirements.lock that running needs, without what only tests do: ``requirements-run.lock``.

    python infra/runtime_lock.py > requirements-run.lock

It follows what the installed packages say they need, so run it where requirements.lock is installed.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]


def needed(wanted: Iterable[str]) -> set[str]:
    """Canonical names of the packages that these requirements bring in, themselves among them."""
    found: set[tuple[str, str]] = set()
    left = [Requirement(text) for text in wanted]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        for extra in ("", *one.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                said = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:
                continue  # of another platform
            left += [each for each in said if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def runtime_lock(repository: Path) -> str:
    """The lines of the lock whose packages the project needs to run."""
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    names = needed(project["dependencies"])
    lines = (repository / "requirements.lock").read_text("utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if canonicalize_name(line.partition("==")[0]) in names)


if __name__ == "__main__":
    sys.stdout.write(runtime_lock(REPOSITORY))
