"""The commands of containers, read by the programs that they start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


def read(command: Sequence[str]) -> None:
    """Have the real program parse a command without running it; an argument that it does not know raises."""
    program, *arguments = command
    assert all(isinstance(word, str) for word in command), f"{command} has words that are no text"
    if program == "vnet":
        from flows.cli import parser

        parser().parse_args(arguments)
    elif program == "prefect":
        from prefect.cli._app import _app as app

        app.parse_args(list(arguments), exit_on_error=False, print_error=False)
    elif program == "dask":
        from distributed.cli import dask_scheduler, dask_worker

        commands = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
        _read(commands[arguments[0]], arguments[1:])
    elif program == "ray":
        from ray.scripts.scripts import cli

        _read(cli.commands[arguments[0]], arguments[1:])
    else:
        raise AssertionError(f"nobody here reads the arguments of {program}")


def with_files(command: Sequence[str], folder: Path) -> list[str]:
    """The command with the secrets of a container where they lie on this machine, with the same names."""
    return [
        word.replace("/run/secrets/dask/", f"{folder}/dask_").replace("/run/secrets", str(folder)) for word in command
    ]


def _read(command: click.Command, arguments: Sequence[str]) -> None:
    context = command.make_context(command.name, list(arguments))
    # what Dask does not know it keeps for modules that are loaded before it
    left = [*context.args, *context.params.get("preload_argv", ())]
    assert not left, f"{command.name} does not know {left}"
