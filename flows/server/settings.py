"""The settings with which Prefect runs here. It reads them from the environment when it is imported: not in here."""

from __future__ import annotations

import os
from pathlib import Path

HOST = "127.0.0.1"
DATABASE_ELSEWHERE = (
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_HOST",
    "PREFECT_SERVER_DATABASE_HOST",
)
"""Variables of which one is set when a server's database is not the file in its home, such as in PostgreSQL."""
HEARTBEAT_S = 30
"""How often a run tells the server that it lives; Prefect allows no shorter pause."""


def prefect_environment(home: Path) -> dict[str, str]:
    """Variables for a process that imports Prefect, with its database and logs in ``home``.

    What the user has set himself is left out, so that the result can go straight into ``os.environ``. Nothing calls
    home, no server starts by itself, and 127.0.0.1 is reached without the proxy.
    """
    wanted = {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        # a run whose server has died ends within a minute; five, the default, take that long for every call
        "PREFECT_CLIENT_MAX_RETRIES": "2",
        # a run asked for in the UI starts within two seconds, not ten
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        # what became of a case is in the storage root; a result that Prefect kept would be a pickle
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        # progress is the command line's business; the UI still has every line
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if "*" not in hosts:
            missing[name] = ",".join(dict.fromkeys([*hosts, HOST, "localhost"]))
    return missing


def server_environment(home: Path, url: str) -> dict[str, str]:
    """The whole environment of a server of ours at ``url``, on 127.0.0.1, with its database in ``home``."""
    environment = dict(os.environ)
    environment.pop("PREFECT_API_URL", None)
    environment |= prefect_environment(home)
    port = url.rpartition(":")[2]
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": port,
        # relative, so that the UI also works as localhost and through a tunnel
        "PREFECT_UI_API_URL": "/api",
        # not into site-packages, which may be read-only
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    return environment
