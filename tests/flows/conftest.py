"""Fixtures of the tests that run commands."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows.server.process import ServerProcess, start_server
from tests.flows.command import Command, receipts
from tests.flows.standing import standing_engines
from tests.workers.tiny_cohort import publish_model, take_in, write_scan
from workers.nights.record import records
from workers.reports.report import read_rows
from workers.storage.store import Root

TINY_CASES = 8


def nightly(*options: str) -> list[str]:
    """The night of cohort ``many``."""
    return ["nightly", "--cohort", "many", "--model", "known", "--json", *options]


def rows(root: Path) -> dict[str, str]:
    """State of every case in the newest night."""
    newest = records(Root(root), "many")[-1]
    return {row["case"]: row["state"] for row in read_rows(Root(root), "many", newest)}


def finished(vnet: Callable[..., Command], root: Path, undisturbed: dict[str, Any]) -> None:
    """Run the night again: everything is there, once, with the bytes of an undisturbed night."""
    again = vnet(*nightly(), root=root)
    assert again.wait() == 0, again.err
    assert rows(root).keys() == undisturbed.keys()
    assert receipts(root) == undisturbed
    for path in root.glob("results/many/*/*/receipt.json"):
        assert Root(root).damaged(path.parent.relative_to(root).as_posix()) == []
    assert Root(root).names("leases") == []


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


@pytest.fixture
def at_server(vnet: Callable[..., Command], site_server: ServerProcess) -> Callable[..., Command]:
    """As ``vnet``, where a Prefect server runs already."""
    return partial(vnet, PREFECT_API_URL=site_server.api_url)


@pytest.fixture
def at_site(vnet: Callable[..., Command], site: dict[str, str]) -> Callable[..., Command]:
    """As ``vnet``, where a Prefect server, Ray and Dask run already."""
    return partial(vnet, **site)


@pytest.fixture(scope="session")
def site_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A Prefect server as a site has it: commands that are given its address start none of their own."""
    home = tmp_path_factory.mktemp("site") / "prefect"
    with start_server(home, 0) as started:
        with sqlite3.connect(home / "prefect.db") as source, sqlite3.connect(home / "empty.db") as copy:
            source.backup(copy)
        yield started


@pytest.fixture(scope="session")
def site(site_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that name a Prefect server, a Ray and a Dask that run already to a command."""
    with standing_engines(tmp_path_factory.mktemp("engines")) as engines:
        yield engines | {"PREFECT_API_URL": site_server.api_url}


@pytest.fixture(scope="session")
def prefect_home(site_server: ServerProcess) -> Callable[[Path], Path]:
    """Makes a home for a Prefect server: its database is empty, but has its tables, which take seconds to make."""

    def make(home: Path) -> Path:
        home.mkdir(mode=0o700, parents=True)
        shutil.copy(site_server.log_path.parent / "empty.db", home / "prefect.db")
        return home

    return make


@pytest.fixture(scope="module")
def server(prefect_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A Prefect server of a module's own."""
    with start_server(prefect_home(tmp_path_factory.mktemp("prefect") / "home"), 0) as started:
        yield started


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


@pytest.fixture(scope="session")
def tiny_receipts(
    taken_in: Path, site_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Receipts of a night over ``taken_in`` that nothing disturbed."""
    root = Path(shutil.copytree(taken_in, tmp_path_factory.mktemp("undisturbed") / "root"))
    command = Command(*nightly(), root=root, PREFECT_API_URL=site_server.api_url)
    try:
        assert command.wait() == 0, command.err
    finally:
        command.end()
    return receipts(root)
