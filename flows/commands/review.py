"""Command ``review``: which masks wait for a person, what was decided, and corrected masks for training."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any, get_args

from flows.commands.command import Command, Result
from flows.commands.tables import text_table
from flows.session import Session, open_session
from vnet_core.errors import ConfigError
from workers.nights.decisions import Choice


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "decide", "correct"))
    parser.add_argument("--cohort", required=True, metavar="NAME")
    parser.add_argument("--case", metavar="ID", help="decide, correct: the case")
    parser.add_argument("--choice", choices=get_args(Choice), help="decide: what shall become of its mask")
    parser.add_argument("--by", metavar="NAME", help="decide, correct: who you are; goes into the record")
    parser.add_argument("--note", default="", metavar="TEXT", help="decide: goes into the record")
    parser.add_argument("--correction", metavar="FILE", help="decide --choice train: the corrected mask")
    parser.add_argument("--mask", metavar="FILE", help="correct: the corrected mask")
    parser.add_argument("--as-is", action="store_true", help="decide --choice train: the mask is right, learn from it")
    parser.add_argument("--empty", action="store_true", help="with a corrected mask: the scan holds no label at all")


def review(options: Namespace) -> Result:
    """``vnet review``."""
    session = open_session()
    if options.action == "list":
        return _list(session, options.cohort)
    _check(options)
    return _decide(session, options)


REVIEW = Command(
    "review", "masks that wait for a person's decision, and corrections for training", "root", _arguments, review
)


def _check(options: Namespace) -> None:
    """ConfigError ``review.arguments`` for arguments that do not belong together."""
    needed = ("case", "by", "choice" if options.action == "decide" else "mask")
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise ConfigError("review.arguments", f"vnet review {options.action} needs {' and '.join(missing)}")
    mask = options.correction if options.action == "decide" else options.mask
    foreign = {
        "--correction": options.action == "correct" and options.correction,
        "--mask": options.action == "decide" and options.mask,
        "--choice": options.action == "correct" and options.choice,
        "--as-is": options.as_is and (options.choice != "train" or mask),
        "--correction FILE": options.correction and options.choice != "train",
        "--empty": options.empty and not mask,
    }
    for name, wrong in foreign.items():
        if wrong:
            raise ConfigError(
                "review.arguments",
                f"{name} does not go with the other arguments: a correction or --as-is goes with decide --choice train,"
                " --mask with correct, --empty with a corrected mask",
            )


def _list(session: Session, cohort: str) -> Result:
    from flows.review import newest_rows
    from workers.delivery.corrections import training_manifest, wanted

    night, rows = newest_rows(session.root, cohort)
    waiting: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["review"] in ("awaiting", "rejected", "training"):
            case = waiting.setdefault(row["case"], {name: row[name] or "" for name in _COLUMNS} | {"flags": ""})
            told = [f"{row['name']}: {row['flags']}"] if row["flags"] else []
            case["flags"] = "; ".join([*([case["flags"]] if case["flags"] else []), *told])
    missing = [one.case for one in wanted(session.root, cohort)]
    training = training_manifest(session.root, cohort)
    found = sorted(waiting.values(), key=lambda case: (case["review"] != "awaiting", case["case"]))
    awaiting = sum(case["review"] == "awaiting" for case in found)
    parts = [f"night {night.id} of cohort {cohort}: {awaiting} waiting for a decision"]
    parts += [text_table(found, _COLUMNS)] if found else []
    parts += [f"corrected masks are missing for: {', '.join(missing)}"] if missing else []
    parts += [f"changed since they were corrected: {', '.join(training.outdated)}"] if training.outdated else []
    parts += [f"for training: {len(training.cases)} cases, manifest {training.path}"] if training.path else []
    extra = {
        "night": night.id,
        "masks": found,
        "corrections_wanted": missing,
        "corrections_outdated": list(training.outdated),
        "training_cases": list(training.cases),
        "training_manifest": str(training.path) if training.path else None,
    }
    return Result("\n".join(parts), [], extra)


_COLUMNS = ("case", "review", "flags", "reviewed_by", "reviewed_at")


def _decide(session: Session, options: Namespace) -> Result:
    from flows.review import mirrorable, newest_rows, result_of
    from workers.delivery.corrections import confirm, correct, training_manifest
    from workers.delivery.handing import follow_up
    from workers.nights.decisions import Decision, checked, record

    root, cohort, case = session.root, options.cohort, options.case
    night, rows = newest_rows(root, cohort)
    key = result_of(rows, cohort, case)
    at = session.clock().isoformat(timespec="seconds")
    choice: Choice = options.choice or "train"
    decision = checked(Decision(case, key, choice, options.by, at, night.id, options.note, options.as_is))
    if choice == "mirror" and not mirrorable(root, key):
        raise ConfigError(
            "review.mirrored",
            f"the mask of case {case} was computed with mirroring along all axes already, or its model is gone; accept,"
            " reject or correct it",
        )
    mask = options.correction or options.mask
    said = []
    # before the decision, which is not made when the mask cannot be used
    if mask:
        correction = correct(root, cohort, decision, mask, options.empty)
        said.append(
            "correction kept: " + (", ".join(f"{n} {v} voxels" for n, v in correction.voxels.items()) or "empty")
        )
    elif options.as_is:
        confirm(root, cohort, decision)
        said.append("confirmed as the truth")
    record(root, cohort, decision)
    training = training_manifest(root, cohort)
    delivered = follow_up(root, cohort, night.id)
    if choice == "mirror":
        said.append("the next night of the cohort computes it with mirroring")
    if choice == "train" and not mask and not options.as_is:
        said.append("hand in the corrected mask with: vnet review correct")
    if training.path:
        said.append(f"training manifest: {training.path} ({len(training.cases)} cases)")
    if delivered:
        said.append(f"delivered {len(delivered.written)}, taken away {len(delivered.removed)}")
    text = "\n".join([f"{case}: {decision.review} by {decision.by}", *said])
    extra = {
        "case": case,
        "review": decision.review,
        "result": key,
        "night": night.id,
        "training_manifest": str(training.path) if training.path else None,
    }
    return Result(text, [], extra)
