"""The command ``vnet``: reads its arguments, runs one command, and turns the result into text or JSON and an exit code.

0 all done · 2 usage or configuration · 3 some cases failed or were refused, the rest done · 4 no case done
130 interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.commands import COMMANDS
from flows.commands.command import Needs, Result
from flows.server.api import check_api
from flows.server.process import local_api
from flows.server.settings import prefect_environment
from flows.session import ROOT_VARIABLE, SITE_VARIABLE, open_session
from vnet_core.errors import ConfigError, EngineError, MemoryLimitError, StorageError, VnetError
from workers.collector import collector_at_rest
from workers.engines.machine import check_machine
from workers.harmless import printable
from workers.ledger import nameless
from workers.storage.modes import for_the_owner_alone

OK, USAGE, PARTLY, NONE, INTERRUPTED = 0, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``vnet`` with the arguments (default: those of the process); returns the exit code."""
    options = parser().parse_args(arguments)
    for_the_owner_alone()
    _log_to_stderr()
    started = time.monotonic()
    try:
        # standard output is for the result; Ray and others print there too
        with contextlib.redirect_stdout(sys.stderr), _ends_in_order(), _environment(options) as api_is_ready:
            # the server starts while Prefect is imported
            if needs(options) == "api":
                with collector_at_rest():
                    importlib.import_module("flows.cohorts")
            api_is_ready()
            with nameless(f"vnet {options.command}"):
                result = COMMANDS[options.command].run(options)
    except VnetError as error:
        print(printable(f"vnet {options.command}: {error.code}: {error.message}"), file=sys.stderr)
        if options.json:
            _tell(json.dumps({"command": options.command, "error": {"code": error.code, "message": error.message}}))
        before_any_work = isinstance(error, ConfigError | EngineError | MemoryLimitError)
        unwritable = isinstance(error, StorageError) and error.code == "store.unwritable"
        return USAGE if before_any_work or unwritable else NONE
    except KeyboardInterrupt:
        print(f"vnet {options.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    seconds = round(time.monotonic() - started, 2)
    if options.json:
        told = _tell(json.dumps(document(options, seconds, result), allow_nan=False))
    else:
        told = _tell(printable(result.text))
    return exit_code(result.cases) if told else USAGE


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """A service manager's SIGTERM ends a command as Ctrl-C does, and whoever asks twice does not break off the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        for asked in (signal.SIGINT, signal.SIGTERM):
            signal.signal(asked, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(text: str) -> bool:
    """Print the result; whether it could be. A reader that has gone, such as ``head``, has had what it wanted."""
    try:
        print(text, flush=True)
    except OSError as error:
        # what is still in the buffer would fail once more at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        why = error.strerror or error
        print(f"vnet: the work is done, but standard output cannot be written ({why})", file=sys.stderr)
        return False
    return True


def needs(options: argparse.Namespace) -> Needs:
    """What the command needs with these arguments."""
    describes = options.command == "models" and options.action == "describe"
    explains = options.command == "ingest" and options.explain
    return "nothing" if describes or explains else COMMANDS[options.command].needs


def _log_to_stderr() -> None:
    """Our own warnings on standard error; Prefect sets up its own log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("vnet")
    logger.handlers = [handler]
    logger.propagate = False


def document(options: argparse.Namespace, seconds: float, result: Result) -> dict[str, Any]:
    """The one JSON document of a command."""
    counts: dict[str, int] = {}
    for case in result.cases:
        counts[case["state"]] = counts.get(case["state"], 0) + 1
    root = os.environ.get("VNET_ROOT", "")
    common = {"command": options.command, "root": root, "seconds": seconds, "counts": counts, "cases": result.cases}
    return common | result.extra


def exit_code(cases: Sequence[dict[str, Any]]) -> int:
    """The exit code for what became of the cases; a command without cases has done its work."""
    undone = sum(case["state"] in ("refused", "failed", "carried-over") for case in cases)
    if undone == 0:
        return OK
    return NONE if undone == len(cases) else PARTLY


@contextlib.contextmanager
def _environment(options: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Give the process the environment that flows and their subprocesses read, before Prefect is imported.

    Yields a function that returns once the Prefect API answers.

    A command that runs flows gets a Prefect API: the one that PREFECT_API_URL names, the server that ``vnet serve``
    runs on this root, or one of its own for the time of the command. All on this root share one database.
    """
    needed = needs(options)
    if needed == "nothing":
        yield lambda: None
        return
    if options.root:
        os.environ[ROOT_VARIABLE] = options.root
    if options.site:
        os.environ[SITE_VARIABLE] = str(Path(options.site).resolve())
    session = open_session()
    os.environ[ROOT_VARIABLE] = session.root.shown
    home = session.root.home / "prefect"
    os.environ.update(prefect_environment(home))
    if options.verbose:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"
    url = os.environ.get("PREFECT_API_URL")
    if needed == "api":
        check_machine()
    if needed != "api" or url:
        if url and needed == "api":
            check_api(url)
        yield lambda: None
        return
    with local_api(home) as api:
        os.environ["PREFECT_API_URL"] = api.url
        yield api.wait_until_ready


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", metavar="URL", help="storage root (default: VNET_ROOT, else ./vnet-data)")
    common.add_argument("--site", metavar="FILE", help="site file (default: VNET_SITE, else this machine)")
    common.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    common.add_argument("--verbose", action="store_true", help="show the log of the flows")
    top = argparse.ArgumentParser(
        prog="vnet",
        description="Nightly 3D segmentation of whole cohorts with V-Net. Research software, not a medical device.",
    )
    added = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.arguments(added.add_parser(command.name, help=command.help, description=command.help, parents=[common]))
    return top


if __name__ == "__main__":
    sys.exit(main())
