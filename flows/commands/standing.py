"""Commands for nights that stand still and cases that are left alone: ``pause``, ``resume`` and ``quarantine``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from flows.commands.command import Command, Result
from flows.commands.people import by_argument, person
from flows.commands.tables import text_table
from flows.session import open_session


def _cohort_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", required=True, metavar="NAME")


def _pause_arguments(parser: ArgumentParser) -> None:
    _cohort_argument(parser)
    by_argument(parser, "lets them wait")


def pause(options: Namespace) -> Result:
    """``vnet pause``."""
    from workers.nights import pauses

    pauses.pause(open_session().root, options.cohort, person(options))
    return Result(
        f"nights of cohort {options.cohort} wait: cases under way are finished, the engines are let go; go on with"
        f" vnet resume --cohort {options.cohort}"
    )


def resume(options: Namespace) -> Result:
    """``vnet resume``."""
    from workers.nights import pauses

    pauses.resume(open_session().root, options.cohort)
    return Result(f"nights of cohort {options.cohort} go on")


def _quarantine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("list", "release"),
        help="show cases that failed, or let them be tried again in the next night",
    )
    _cohort_argument(parser)
    parser.add_argument("--case", action="append", default=[], metavar="ID", help="left out: all; may be repeated")


def quarantine(options: Namespace) -> Result:
    """``vnet quarantine``."""
    from workers.cohort import load_cohort
    from workers.nights import attempts

    root = open_session().root
    load_cohort(root, options.cohort)
    if options.action == "release":
        released = attempts.release(root, options.cohort, options.case)
        return Result(f"released: {', '.join(released) or 'nothing'}", [], {"released": released})
    rows = [
        {
            "case": case,
            "nights": len(found),
            "stage": found[-1].stage,
            "codes": " ".join(found[-1].codes),
            "last": found[-1].night,
            "message": found[-1].message,
        }
        for case, found in attempts.failures(root, options.cohort).items()
    ]
    text = text_table(rows, ("case", "nights", "stage", "codes", "last", "message")) if rows else "no case has failed"
    return Result(text, [], {"failures": rows})


PAUSE = Command("pause", "let the nights of a cohort wait", "root", _pause_arguments, pause)
RESUME = Command("resume", "let the nights of a cohort go on", "root", _cohort_argument, resume)
QUARANTINE = Command(
    "quarantine", "cases that fail again and again: list and release", "root", _quarantine_arguments, quarantine
)
