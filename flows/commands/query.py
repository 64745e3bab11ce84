"""``vnet query``: rows over all nights by filters, by SQL or by a saved question, on the terminal or as a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from flows.commands.command import Command, Result
from flows.commands.tables import text_table
from flows.session import open_session
from vnet_core.errors import ConfigError
from vnet_core.reporting import FLAGS
from workers.ledger import State

if TYPE_CHECKING:
    from workers.reports.answers import FileFormat
    from workers.reports.query import Answer

SHOWN = ("night", "cohort", "case", "state", "name", "volume_ml", "change_percent", "flags", "codes")
"""Columns of the table on a terminal; a file has all of them."""
STATES: tuple[State, ...] = get_args(State)
REVIEWS = ("awaiting", "accepted", "rejected", "training")
FILE_FORMATS = ("csv", "json", "parquet")


def _arguments(parser: ArgumentParser) -> None:
    rows = parser.add_argument_group("filters", "those that may be repeated pass what any of their values passes")
    _several(rows, "cohort", "NAME", "cohort")
    _several(rows, "label", "NAME", "label or region")
    _several(rows, "model", "NAME[@VERSION]", "model; without a version all of them")
    _several(rows, "flag", "FLAG", f"{', '.join(FLAGS)}, or any", (*FLAGS, "any"))
    _several(rows, "state", "STATE", ", ".join(STATES), STATES)
    _several(rows, "review", "STATE", ", ".join(REVIEWS), REVIEWS)
    rows.add_argument("--patient", metavar="PSEUDONYM", help="one patient")
    rows.add_argument("--case", metavar="ID", help="one case")
    rows.add_argument("--nights", type=int, metavar="N", help="only the newest N nights of each cohort")
    rows.add_argument("--from", dest="first", metavar="DAY", help="nights of this day (YYYY-MM-DD, UTC) and later")
    rows.add_argument("--to", dest="last", metavar="DAY", help="nights of this day and earlier")
    rows.add_argument("--volume-min-ml", type=float, metavar="ML")
    rows.add_argument("--volume-max-ml", type=float, metavar="ML")
    rows.add_argument("--change-min-percent", type=float, metavar="P", help="smallest change since the night before")
    rows.add_argument("--change-max-percent", type=float, metavar="P", help="largest change since the night before")
    rows.add_argument(
        "--patient-change-min-percent", type=float, metavar="P", help="smallest change since the patient's scan before"
    )
    rows.add_argument("--patient-change-max-percent", type=float, metavar="P", help="largest such change")
    rows.add_argument("--limit", type=int, metavar="N", help="most rows, newest night first (default 1000; 0: all)")
    parser.add_argument("--sql", metavar="SELECT", help="a SELECT over the tables rows, latest and nights")
    parser.add_argument("--saved", metavar="NAME", help="answer a saved question; filters given too replace its own")
    parser.add_argument("--save", metavar="NAME", help="keep this question by a name")
    parser.add_argument("--questions", action="store_true", help="list the saved questions")
    parser.add_argument("--format", choices=("table", *FILE_FORMATS), help="default: that of --output, else table")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the rows there")


def _several(group: _ArgumentGroup, what: str, metavar: str, text: str, choices: tuple[str, ...] | None = None) -> None:
    """An option that may be repeated; all of its values are the question's ``<what>s``."""
    group.add_argument(
        f"--{what}",
        dest=f"{what}s",
        action="append",
        default=[],
        choices=choices,
        metavar=metavar,
        help=f"{text}; may be repeated",
    )


def query(options: Namespace) -> Result:
    """``vnet query``."""
    from workers.reports.query import Query, describe
    from workers.reports.query import query as run
    from workers.reports.questions import load_question, question_names, save_question

    root = open_session().root
    if options.questions:
        listed = [{"name": name, "question": describe(load_question(root, name))} for name in question_names(root)]
        text = text_table(listed, ("name", "question")) if listed else "no saved questions"
        return Result(text, [], {"questions": listed})
    file_format = _format(options)
    question = replace(load_question(root, options.saved) if options.saved else Query(), **_given(options))
    answer = run(root, question)
    if options.save:
        save_question(root, options.save, question)
    return _result(options, file_format, answer, SHOWN if not question.sql else answer.columns)


def _given(options: Namespace) -> dict[str, Any]:
    """The fields of the question that the command line names."""
    from workers.reports.query import Query

    names = (name for name in Query.__slots__ if getattr(options, name) not in (None, []))
    found = {name: getattr(options, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _format(options: Namespace) -> FileFormat | None:
    """The format that is asked for, by name or by the name of the file; None: a table on the terminal."""
    suffix = options.output.suffix.removeprefix(".").lower() if options.output else "table"
    found: str = options.format or suffix
    if options.output and found not in FILE_FORMATS:
        raise ConfigError(
            "query.output", f"no file is written as {found or 'nothing'}; give --format csv, json or parquet"
        )
    if not options.output and found == "parquet":
        raise ConfigError("query.output", "Parquet is no text for a terminal; name a file with --output")
    return None if found == "table" else cast("FileFormat", found)


def _result(options: Namespace, file_format: FileFormat | None, answer: Answer, columns: tuple[str, ...]) -> Result:
    from workers.outputs import write_output
    from workers.reports.answers import encode

    number = len(answer.rows)
    if file_format is None:
        text = text_table(answer.rows, columns) if answer.rows else "no rows"
    elif options.output:
        write_output(options.output, encode(answer, file_format))
        text = f"{number} rows in {options.output}"
    else:
        text = encode(answer, file_format).decode().rstrip("\n")
    if answer.more and (file_format is None or options.output):
        text += f"\nthe first {number} rows; --limit 0 gives all"
    return Result(text, [], {"rows": answer.rows, "more": answer.more})


QUERY = Command("query", "rows over all nights, by filters or SQL", "root", _arguments, query)
