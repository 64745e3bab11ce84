"""The locked versions are not those with a known hole, and what is declared does not allow them either."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.walkthrough import REPOSITORY

LOWEST = {
    # a file set may name files outside its folder, which are then read, copied or removed (CVE-2026-32711)
    "pydicom": "3.0.2",
    # a page that somebody is made to open runs code through the dashboard behind Jupyter's proxy (CVE-2026-23528)
    "distributed": "2026.1.0",
    # a web page that somebody is made to open posts jobs to a Ray on his machine (CVE-2025-62593)
    "ray": "2.52",
    # torch.load runs code in spite of weights_only=True (CVE-2025-32434)
    "torch": "2.6",
    # a Parquet or Arrow file runs code when it is read (CVE-2023-47248)
    "pyarrow": "14.0.1",
    # a small compressed answer fills the memory (CVE-2025-66471)
    "urllib3": "2.6",
}
"""The first version without a hole that this program would open, and the hole."""


def locked() -> dict[str, Version]:
    lines = (REPOSITORY / "requirements.lock").read_text("utf-8").splitlines()
    pairs = [line.partition("==")[::2] for line in lines if line.strip() and not line.startswith(("#", "-"))]
    return {_plain(name): Version(version) for name, version in pairs}


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    return {_plain(found.name): found for found in map(Requirement, project["dependencies"])}


def _plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("package", "lowest"), LOWEST.items())
def test_the_locked_version_is_without_the_hole(package: str, lowest: str) -> None:
    assert locked()[package] >= Version(lowest)


@pytest.mark.parametrize(("package", "lowest"), [pair for pair in LOWEST.items() if pair[0] in declared()])
def test_an_installation_without_the_lock_is_without_it_too(package: str, lowest: str) -> None:
    bounds = [Version(bound.version) for bound in declared()[package].specifier if bound.operator == ">="]
    assert bounds
    assert max(bounds) >= Version(lowest)


def test_every_package_is_pinned_to_one_version() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text("utf-8").splitlines()
    loose = [line for line in lines if line.strip() and not line.startswith(("#", "-")) and "==" not in line]
    assert loose == []


@pytest.mark.parametrize(
    ("file", "pattern", "package"),
    [
        ("infra/kubernetes/base/ray.yaml", r"rayVersion: (\S+)", "ray"),
        ("infra/prefect.yaml", r"prefect-version: (\S+)", "prefect"),
    ],
)
def test_a_version_that_is_written_elsewhere_is_the_locked_one(file: str, pattern: str, package: str) -> None:
    assert re.findall(pattern, (REPOSITORY / file).read_text("utf-8")) == [str(locked()[package])]


def test_the_page_on_upgrades_names_this_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    page = (REPOSITORY / "docs" / "deploy.md").read_text("utf-8")
    assert re.findall(r"git checkout v(\S+)", page) == [project["version"]]
