"""Arguments that cannot work are told before anything is started, read or computed."""

import getpass
from argparse import ArgumentParser

import pytest

from flows.commands import COMMANDS
from flows.commands.command import Result
from tests.workers.small_root import COHORT, PLAN
from vnet_core.errors import ConfigError
from workers.cohort import Cohort, save_cohort
from workers.storage.store import Root


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Root:
    root = Root(tmp_path / "root")
    monkeypatch.setenv("VNET_ROOT", str(root.home))
    monkeypatch.delenv("VNET_SITE", raising=False)
    save_cohort(root, Cohort(COHORT, ("/scans",), ("image",), PLAN.labels))
    return root


def run(command: str, *arguments: str) -> Result:
    parser = ArgumentParser()
    COMMANDS[command].arguments(parser)
    return COMMANDS[command].run(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "code", "remedy"),
    [
        (("serve", "--cohort", COHORT), "serve.model", "needs --model"),
        (("serve", "--model", "organs"), "serve.cohort", "need --cohort"),
        (("serve", "--cron", "0 1 * * *"), "serve.cohort", "need --cohort"),
        (("serve", "--cohort", "", "--model", "organs"), "serve.value", "cohort"),
        (("segment", "scans", "--model", "organs", "--output", "/proc/masks"), "output.unwritable", "another place"),
        (("evaluate", "masks", "truth", "--output", "/proc/a/scores.csv"), "output.unwritable", "another place"),
        (("radiomics", "--cohort", COHORT, "--output", "/proc/a/rows.csv"), "output.unwritable", "another place"),
    ],
)
def test_what_cannot_work_is_told_first(arguments: tuple[str, ...], code: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        run(*arguments)
    assert caught.value.code == code


def test_a_login_without_a_name_has_to_say_who_pauses(root: Root, monkeypatch) -> None:
    """As in a container whose user is a number alone."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    with pytest.raises(ConfigError, match="--by") as caught:
        run("pause", "--cohort", COHORT)
    assert caught.value.code == "person.unknown"
    run("pause", "--cohort", COHORT, "--by", "Ada")
    assert root.get_json(f"pauses/{COHORT}.json")["by"] == "Ada"
