"""Fixtures of the tests that run commands."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.command import Command
from tests.workers.tiny_cohort import publish_model, take_in, write_scan
from workers.store import Root

TINY_CASES = 8


@pytest.fixture
def vnet() -> Iterator[Callable[..., Command]]:
    """Start a command; none of its processes outlives the test."""
    started: list[Command] = []

    def start(*arguments: str | Path, root: Path | str, **variables: str) -> Command:
        started.append(Command(*arguments, root=root, **variables))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture(scope="session")
def taken_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a model and a cohort ``many`` of which nothing is segmented yet; its scans lie beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    for number in range(TINY_CASES):
        write_scan(folder / "scans", f"case{number}", number)
    root = Root(folder / "root")
    publish_model(root)
    take_in(root, "many", [folder / "scans"])
    return root.home
