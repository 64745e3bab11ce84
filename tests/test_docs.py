"""Every fence of the README and docs is run or read by the program, or says why not."""

import tomllib

import pytest

from tests.keys import PAGES as PAGES_WITH_KEYS
from tests.keys import with_table
from tests.walkthrough import REPOSITORY, fences
from vnet_core.plan import Plan
from workers.settings.site import Site

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LABELS = [{"value": 1, "name": "organ"}]


def test_the_walkthrough_runs_as_it_stands(walkthrough):
    for run in walkthrough.runs:
        assert run.returncode == 0, f"{run.args[-1]}\n{run.stdout}\n{run.stderr}"
    bash = [fence for fence in fences(REPOSITORY / "docs" / "your-scans.md") if fence.language == "bash"]
    assert len(walkthrough.runs) == len(bash)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_run_or_excused(page):
    for fence in fences(page):
        if fence.language == "toml":
            keys = tomllib.loads(fence.text)
            if keys.keys() <= Site.model_fields.keys():
                Site.model_validate(keys)
            else:
                Plan.from_mapping({"labels": LABELS, **keys})
        elif page.name != "your-scans.md":
            assert fence.excused or fence.language in ("", "mermaid"), f"{page.name}: {fence.text}"


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_every_example_plan_is_one(recipe):
    Plan.from_mapping({"labels": LABELS, **tomllib.loads(recipe.read_text("utf-8"))})


@pytest.mark.parametrize("site", sorted((REPOSITORY / "infra" / "sites").glob("*.toml")), ids=lambda path: path.name)
def test_every_site_file_is_one(site):
    Site.model_validate(tomllib.loads(site.read_text("utf-8")))


@pytest.mark.parametrize("name", sorted(PAGES_WITH_KEYS))
def test_tables_of_keys_are_those_of_the_program(name):
    text = (REPOSITORY / name).read_text("utf-8")
    assert text == with_table(text, PAGES_WITH_KEYS[name]), "run: python -m tests.keys"
    assert "| key |" in text
    assert "Undefined" not in text
