"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.object_store import object_store, writable_store
from tests.walkthrough import REPOSITORY, run_page

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling
    from xdist.workermanage import Producer

__all__ = ["object_store", "writable_store"]

TOGETHER = frozenset(
    f"tests/{name}.py"
    for name in (
        "flows/commands/test_commands",
        "flows/test_faults",
        "flows/test_night_engine",
        "flows/test_training",
        "flows/test_ui",
        "test_docs",
    )
)
"""Files whose tests need the walkthrough, or engines that stand ready: both take a minute."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Where processes share the tests, each takes a file at a time, and one takes all that belong ``TOGETHER``."""
    from xdist.scheduler import LoadFileScheduling

    class ByStart(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "together" if file in TOGETHER else file

    return ByStart(config, log)


LONG_S = 3600
"""Limit of a test that takes minutes by itself, on a machine that has other work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests longer than others, where they do not say it themselves."""
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("faults")
        if is_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_S))


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """Folder of real scans: the environment variable VNET_SCANS, or shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VNET_SCANS", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real scans at {folder} (set VNET_SCANS)")
    return folder


@dataclass(frozen=True)
class Walkthrough:
    """What docs/your-scans.md leaves behind: cohorts ``training`` and ``tonight``, model ``organs``, masks, a night."""

    folder: Path
    """Holds ``scans``, ``masks`` and the storage root ``vnet-data``."""
    runs: list[subprocess.CompletedProcess[str]]

    @property
    def root(self) -> Path:
        return self.folder / "vnet-data"

    def copy_root(self, target: Path) -> Path:
        """A storage root of its own for a test that changes it."""
        return Path(shutil.copytree(self.root, target, ignore=shutil.ignore_patterns("servers", "*.log")))


@pytest.fixture(scope="session")
def walkthrough(tmp_path_factory) -> Walkthrough:
    """The commands of docs/your-scans.md, run once for all tests that need a trained model or a finished night."""
    folder = tmp_path_factory.mktemp("walkthrough")
    return Walkthrough(folder, run_page(REPOSITORY / "docs" / "your-scans.md", folder))
