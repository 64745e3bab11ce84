"""That the reader of commands refuses what the programs would."""

import click
import pytest
from cyclopts import CycloptsError

from tests.infra.programs import read

WRONG = {
    "vnet serve --prot 4200": SystemExit,
    "prefect server start --prot 4200": CycloptsError,
    "dask scheduler --prot 8786": click.UsageError,
    "dask worker --memroy-limit 1GB": click.UsageError,
    "ray start --hed": Exception,
    "nginx": AssertionError,
}


@pytest.mark.parametrize("command", WRONG)
def test_an_argument_that_a_program_does_not_know_is_no_argument(command: str, capsys) -> None:
    with pytest.raises(WRONG[command]):
        read(command.split())


@pytest.mark.parametrize("command", ["vnet serve", "prefect worker start --pool vnet", "ray start --head --block"])
def test_what_it_knows_is_read(command: str) -> None:
    read(command.split())
