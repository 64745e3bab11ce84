"""``vnet serve`` and ``vnet deploy``: the nights that run by themselves, here or by somebody else's server."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from pydantic import ValidationError

from flows.commands.command import Command, Result
from flows.session import open_session
from vnet_core.errors import ConfigError
from vnet_core.plan import config_error


def _serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", action="append", default=[], metavar="NAME", help="cohort to run every night")
    parser.add_argument("--model", metavar="NAME[@VERSION]", help="model of the nightly run")
    parser.add_argument("--cron", metavar="CRON", help="when (default: every night at 1:00)")
    parser.add_argument(
        "--port", type=int, metavar="N", help="port on 127.0.0.1 (default: the site's ui_port, 4200; 0: any free one)"
    )


def serve(options: Namespace) -> Result:
    """``vnet serve``: runs until it is interrupted."""
    from flows.schedules.deployments import serve as run
    from workers.settings.site import Nightly

    if options.cohort and not options.model:
        raise ConfigError(
            "serve.model", f"--cohort {options.cohort[0]} needs --model: which one is to run every night?"
        )
    if (options.model or options.cron) and not options.cohort:
        raise ConfigError("serve.cohort", "--model and --cron need --cohort: which one is to run every night?")
    said = {"cron": options.cron} if options.cron else {}
    try:
        schedules = [Nightly(cohort=cohort, model=options.model, **said) for cohort in options.cohort]
    except ValidationError as error:
        raise config_error(error, Nightly, "serve") from None
    run(open_session(), schedules, options.port)
    return Result("stopped")


SERVE = Command(
    "serve",
    "the Prefect server, its UI, the deployments and the schedules, on this machine",
    "root",
    _serve_arguments,
    serve,
)


def _deploy_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--api",
        metavar="URL",
        help="Prefect API, ending in /api (default: PREFECT_API_URL, else the server that runs on this root)",
    )
    parser.add_argument("--work-pool", metavar="NAME", help="work pool whose workers run what is asked for")


def deploy(options: Namespace) -> Result:
    """``vnet deploy``: deployments, schedules, automations and the block of the site file, in a Prefect server."""
    from flows.schedules.deployments import deploy as run

    changes = run(open_session(), options.api, options.work_pool)
    text = "\n".join(f"{change:<10}  {name}" for name, change in changes.items())
    return Result(text, [], {"changes": changes})


DEPLOY = Command(
    "deploy",
    "the deployments, schedules and automations of the site file, to a Prefect server that runs elsewhere",
    "root",
    _deploy_arguments,
    deploy,
)
