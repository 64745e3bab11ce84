"""Runs a flow in this process for a command."""

from __future__ import annotations

import logging
import os
from typing import Any

from flows.session import open_session
from vnet_core.errors import EngineError, VnetError


def run_flow(flow: Any, **parameters: Any) -> Any:
    """Run a flow in this process and return the data of its final state.

    A named error of ours comes out as it is; a Prefect API that does not answer becomes EngineError
    ``prefect.unreachable``.
    """
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.cohorts import NoCaseDone

    _quiet_console()
    try:
        # heartbeats tell a server that its remote run lives; in this process they only delay the end by a second
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            state = flow(**parameters, return_state=True)
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        # a full disk stops Prefect's database too, and is then what to tell
        open_session()
        url = os.environ.get("PREFECT_API_URL")
        raise EngineError("prefect.unreachable", f"the Prefect API at {url} stopped answering: {error}") from error
    result = state.result(raise_on_failure=False)
    if isinstance(result, NoCaseDone):
        return result.data
    if isinstance(result, BaseException):
        raise result
    return result


def _quiet_console() -> None:
    """Keep the tracebacks of our own errors off the terminal: the command says each in a line, the UI has them."""
    from prefect.logging.handlers import PrefectConsoleHandler

    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], VnetError))
