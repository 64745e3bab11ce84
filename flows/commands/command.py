"""What a command of ``vnet`` is: its name and arguments, what it needs, what it does, and what it has to say."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Needs = Literal["nothing", "root", "api"]
"""``nothing``: works on files alone; ``root``: the storage root and the site; ``api``: a Prefect API too."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command has to say."""

    text: str
    """For a person."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """One mapping per case: case, state, codes, message and what the command adds."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the JSON document."""


def no_arguments(parser: ArgumentParser) -> None:
    """Of a command without arguments of its own."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. What it needs beyond parsing is imported when it runs."""

    name: str
    help: str
    needs: Needs
    arguments: Callable[[ArgumentParser], None]
    """Adds its arguments to a parser."""
    run: Callable[[Namespace], Result]
