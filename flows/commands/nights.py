"""Commands over many nights: ``query`` reads what they found, ``serve`` runs them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from flows.commands.command import Command, Result
from flows.commands.tables import text_table
from flows.session import open_session
from vnet_core.errors import ConfigError


def _query_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", metavar="NAME")
    parser.add_argument("--label", metavar="NAME")
    parser.add_argument("--case", metavar="ID")
    parser.add_argument("--state", metavar="STATE", help="computed, cached, failed or refused")
    parser.add_argument("--flag", metavar="FLAG", help="empty, touches-border or many-components")
    parser.add_argument("--volume-min-ml", type=float, metavar="ML")
    parser.add_argument("--volume-max-ml", type=float, metavar="ML")
    parser.add_argument("--change-min-percent", type=float, metavar="P", help="smallest change since the night before")
    parser.add_argument("--nights", type=int, metavar="N", help="only the newest N nights of each cohort")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="most rows (default 1000)")


def query(options: Namespace) -> Result:
    """``vnet query``."""
    from workers.query import Query
    from workers.query import query as run

    names = Query.__slots__
    rows = run(open_session().root, Query(**{name: getattr(options, name) for name in names}))
    columns = ("night", "cohort", "case", "state", "name", "volume_ml", "change_percent", "flags", "codes")
    return Result(text_table(rows, columns) if rows else "no rows", [], {"rows": rows})


QUERY = Command("query", "rows over all nights", "root", _query_arguments, query)


def _serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", action="append", default=[], metavar="NAME", help="cohort to run every night")
    parser.add_argument("--model", metavar="NAME[@VERSION]", help="model of the nightly run")
    parser.add_argument("--cron", default="0 1 * * *", metavar="CRON", help="when (default: every night at 1:00)")
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: the site's ui_port, 4200)")


def serve(options: Namespace) -> Result:
    """``vnet serve``: runs until it is interrupted."""
    from flows.deployments import serve as run
    from workers.site import Nightly

    if options.cohort and not options.model:
        raise ConfigError(
            "serve.model", f"--cohort {options.cohort[0]} needs --model: which one is to run every night?"
        )

    schedules = [Nightly(cohort=cohort, model=options.model or "", cron=options.cron) for cohort in options.cohort]
    run(open_session(), schedules, options.port)
    return Result("stopped")


SERVE = Command(
    "serve",
    "the Prefect server, its UI, the deployments and the schedules, on this machine",
    "root",
    _serve_arguments,
    serve,
)
