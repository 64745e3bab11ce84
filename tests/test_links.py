"""Links of every Markdown file: to files and headings that are there, and files that are named are there too."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.walkthrough import REPOSITORY

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
FOLDERS = ("benchmarks", "docs", "examples", "flows", "infra", "tests", "vnet_core", "workers")
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
"""A file or folder of the repository in a page's text."""
MADE = "infra/secrets"
"""What infra/make-secrets makes."""
MODULE = re.compile(r"python -m ((?:benchmarks|infra|tests)[\w.]*)")


def tracked() -> list[Path]:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else ["README.md", "CHANGELOG.md"]
    pages = {REPOSITORY / name for name in names if name} | set((REPOSITORY / "docs").glob("*.md"))
    return sorted(page for page in pages if page.exists())


PAGES = tracked()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links: small letters, digits and dashes."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = [one for one in found if one == name or one.startswith(f"{name}-")]
        found.add(f"{name}-{len(again)}" if name in found else name)
    return found


def broken(page: Path, text: str) -> Iterator[str]:
    """Links of a page that lead nowhere; addresses of other hosts are not asked."""
    for target in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page, prose(page))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    named = [name for name in NAMED.findall(prose(page)) if not name.startswith(MADE)]
    named += [f"{name.replace('.', '/')}.py" for name in MODULE.findall(page.read_text("utf-8"))]
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_page_of_the_documentation_and_every_picture_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in LINK.findall(prose(page))
    }
    docs = REPOSITORY / "docs"
    assert [path.name for path in (*docs.glob("*.md"), *docs.glob("images/*")) if path not in linked] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What *is* here?\n\n## Twice\n\n## Twice\n")
    text = "[a](page.md) [b](#what-is-here) [c](page.md#twice-1) [d](https://example.org/x) `[e](code)`"
    assert list(broken(page, text)) == []
    assert list(broken(page, "[a](other.md) [b](#nowhere) [c](page.md#twice-2)")) == [
        "other.md",
        "#nowhere",
        "page.md#twice-2",
    ]
