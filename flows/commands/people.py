"""Who asks for a change: the options ``--by`` and ``--why``, and the name of the login where they are left out."""

from __future__ import annotations

import getpass
from argparse import ArgumentParser, Namespace

from vnet_core.errors import ConfigError


def by_argument(parser: ArgumentParser, does: str) -> None:
    """Adds ``--by``: the person who ``does`` it."""
    parser.add_argument("--by", metavar="PERSON", help=f"who {does}; left out, the name of your login")


def person_arguments(parser: ArgumentParser) -> None:
    """Adds ``--by`` and ``--why`` of a change of a model."""
    by_argument(parser, "changes the model")
    parser.add_argument("--why", default="", metavar="TEXT", help="why it is changed, for its history")


def person(options: Namespace) -> str:
    """Who asks: ``--by``, or the name of the login; ConfigError ``person.unknown`` where there is neither."""
    try:
        return options.by if options.by is not None else getpass.getuser()
    except (OSError, KeyError):
        # a container's user often has a number alone
        raise ConfigError("person.unknown", "this login has 0 names; say who asks for it with --by") from None
