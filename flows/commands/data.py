"""Commands that bring data in: ``fetch``, ``label`` and ``ingest``."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Command, Result
from flows.commands.tables import case_row, summary, text_table, undone
from flows.session import open_session
from vnet_core.errors import ConfigError
from vnet_core.plan import Label, Plan
from workers.engines.clusters import processors
from workers.ledger import Outcome
from workers.sources.mirrors import is_remote
from workers.storage.store import Root

if TYPE_CHECKING:
    from workers.cohort import Cohort
    from workers.ingest import Names


def _fetch_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME|URL", help="which data set; none: list them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to (default: a folder of its own in data)")
    parser.add_argument("--sha256", metavar="HEX", help="checksum that the file must have")


def fetch(options: Namespace) -> Result:
    """``vnet fetch``: one data set, or without a name the list of them."""
    from workers.sources.datasets import CATALOGUE
    from workers.sources.fetch import dataset
    from workers.sources.fetch import fetch as run

    if not options.name:
        rows = [{"name": n, "what": d.title, "licence": d.licence} for n, d in CATALOGUE.items()]
        return Result(text_table(rows, ("name", "what", "licence")), [], {"datasets": rows})
    wanted = dataset(options.name, options.sha256)
    output = options.output or Path(wanted.folder)
    fetched = run(wanted, output, _Meter())
    cases = [
        case_row(f.outcome) | {"path": str(f.path) if f.path else None, "sha256": f.sha256 or None} for f in fetched
    ]
    lines = [f"{wanted.title}\nlicence: {wanted.licence}; {wanted.homepage}"]
    lines += [f"{f.path}  sha256 {f.sha256}" for f in fetched if f.path]
    lines += [
        f"{f.outcome.case}: no checksum is published, so nothing proves it; compare the one above with its homepage"
        for f in fetched
        if f.path and "fetch.unchecked" in f.outcome.codes
    ]
    failed = undone([f.outcome for f in fetched if not f.outcome.done])
    following = []
    if not failed:
        places = {"output": shlex.quote(str(output)), "path": shlex.quote(str(fetched[0].path))}
        following = [line.format(**places) for line in wanted.following]
        lines += [f"layout: {wanted.layout}"] if wanted.layout else []
        lines += ["next:", *(f"  {line}" for line in following)]
    return Result("\n".join([*lines, failed] if failed else lines), cases, {"next": following})


class _Meter:
    """A line on a terminal's standard error that says how far a download has come, at most twice a second."""

    def __init__(self) -> None:
        self._shown_at = 0.0

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Show ``done`` of ``total`` bytes of a file."""
        if not sys.stderr.isatty() or (done != total and time.monotonic() - self._shown_at < 0.5):
            return
        self._shown_at = time.monotonic()
        whole = f" of {total / 1e6:.1f}" if total else ""
        print(f"\r{name}: {done / 1e6:.1f}{whole} MB", end="\n" if done == total else "", file=sys.stderr, flush=True)


FETCH = Command(
    "fetch",
    "bring public data by name, or a file by its URL: checked, resumed, unpacked",
    "nothing",
    _fetch_arguments,
    fetch,
)


def _label_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("spheres",))
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, scan file, or manifest")
    parser.add_argument("--annotations", required=True, type=Path, metavar="FILE", help="CSV of points and diameters")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the label maps")
    parser.add_argument("--hu-min", type=float, metavar="HU", help="leave out voxels below this intensity")
    parser.add_argument("--inside", type=Path, metavar="DIR", help="masks of the organ, named like the scans")


def label(options: Namespace) -> Result:
    """``vnet label spheres``."""
    from workers.sources.annotations import Gate, label_spheres

    sources = [str(Path(source).expanduser()) for source in options.sources]
    gate = Gate(options.hu_min, options.inside)
    labelled = label_spheres(sources, options.annotations, options.output, gate)
    cases = [case_row(one.outcome) | {"spheres": one.spheres, "volume_ml": one.volume_ml} for one in labelled]
    text = (
        f"{sum(one.spheres for one in labelled)} spheres in {sum(one.spheres > 0 for one in labelled)} scans:"
        f" {summary([one.outcome for one in labelled])}\n{options.output / 'manifest.csv'}"
    )
    return Result(text, cases, {"manifest": str(options.output / "manifest.csv")})


LABEL = Command(
    "label",
    "make label maps: spheres at the points of a table, such as LUNA16's nodules",
    "nothing",
    _label_arguments,
    label,
)


def _ingest_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="folder, scan file, zip or tar, or CSV or Parquet manifest"
    )
    parser.add_argument("--cohort", metavar="NAME", help="cohort to make or to refresh")
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=NAME", help="name of a label value")
    parser.add_argument("--channel", action="append", default=[], metavar="NAME", help="name of a channel, in order")
    parser.add_argument("--plan", metavar="FILE", help="TOML whose reading, channels and labels are taken")
    parser.add_argument("--explain", metavar="CODE", help="what a code means and what to do about it; all: every code")


def ingest(options: Namespace) -> Result:
    """``vnet ingest``."""
    from vnet_core.codes import tally

    if options.explain:
        return explain(options.explain)
    if not (options.sources and options.cohort):
        raise ConfigError("ingest.input", "name at least one SOURCE and --cohort NAME, or give --explain CODE")
    names = _names(options)
    session = open_session()
    cohort, outcomes = ingest_sources(session.root, options.cohort, options.sources, names)
    codes = tally(outcome.codes for outcome in outcomes)
    parts = [f"cohort {cohort.name}: {summary(outcomes)}"]
    if codes:
        rows = [{**row, "what to do": row["remedy"]} for row in codes]
        parts.append("codes:\n" + text_table(rows, ("code", "state", "cases", "what to do")))
    if cohort.set_aside:
        counted = ", ".join(f"{count} {reason}" for reason, count in cohort.set_aside.items())
        parts.append(f"set aside, no cases: {counted}")
    if cohort.not_chosen:
        parts.append(f"series of a study that are no channel: {len(cohort.not_chosen)} (with reasons in --json)")
    extra = {
        "cohort": cohort.name,
        "sources": list(cohort.sources),
        "codes": codes,
        "set_aside": cohort.set_aside,
        "not_chosen": [asdict(series) for series in cohort.not_chosen],
        "reading": cohort.reading.model_dump(mode="json"),
    }
    return Result("\n".join(parts), [case_row(o) for o in outcomes], extra)


def explain(name: str) -> Result:
    """The entry of a code, or of all; ConfigError ``ingest.code`` names the nearest to one that is not known."""
    from vnet_core.codes import CODES, code_of, nearest

    found = CODES if name == "all" else {name: code_of(name)}
    rows = [
        {"code": one, "state": code.state, "meaning": code.meaning, "remedy": code.remedy}
        for one, code in found.items()
        if code
    ]
    if not rows:
        raise ConfigError("ingest.code", f"there is no code {name!r}; the nearest is {nearest(name)}")
    if name == "all":
        text = text_table(rows, ("code", "state", "meaning", "remedy"))
    else:
        text = f"{name} ({rows[0]['state']})\n  {rows[0]['meaning']}\n  What to do: {rows[0]['remedy']}"
    return Result(text, [], {"codes": rows})


def _names(options: Namespace) -> Names:
    """Channels, labels and reading of the plan file, where one is given, with those of the command line before them."""
    from workers.ingest import Names

    labels = parse_labels(options.label)
    if not options.plan:
        return Names(tuple(options.channel), labels)
    plan, given = _plan(options.plan)
    return Names(
        tuple(options.channel) or (plan.channels if "channels" in given else ()),
        labels or (plan.labels if "labels" in given else ()),
        plan.reading,
    )


def _plan(path: str) -> tuple[Plan, set[str]]:
    """What a plan file says of files, and which of those keys it has; the plan's other sections are not looked at."""
    from flows.plans import read_settings

    settings = read_settings(path)
    given: dict[str, Any] = {key: settings[key] for key in ("channels", "labels", "reading") if key in settings}
    rules = given.get("reading", {}).get("select", []) if isinstance(given.get("reading"), dict) else []
    if rules and "channels" not in given:
        given["channels"] = [rule.get("channel", "") for rule in rules if isinstance(rule, dict)]
    # a plan needs a label, and a file of settings may leave it to the cohort
    return Plan.from_mapping({"labels": [{"value": 1, "name": "label-1"}], **given}), set(given)


def ingest_sources(root: Root, cohort: str, sources: Sequence[str], names: Names) -> tuple[Cohort, list[Outcome]]:
    """Ingest sources on all processor cores; paths may be those of the working directory."""
    from workers.ingest import ingest as run

    absolute = [source if is_remote(source) else str(Path(source).expanduser().resolve()) for source in sources]
    with ThreadPoolExecutor(processors()) as executor:
        return run(root, cohort, absolute, executor, names)


def parse_labels(given: Sequence[str]) -> tuple[Label, ...]:
    """Labels from ``VALUE=NAME``; ConfigError ``label.option`` otherwise."""
    labels = []
    for text in given:
        value, _, name = text.partition("=")
        if not (value.isdigit() and int(value) > 0 and name):
            raise ConfigError("label.option", f"--label {text!r} is not VALUE=NAME, such as 1=liver")
        labels.append(Label(value=int(value), name=name))
    return tuple(sorted(labels, key=lambda label: label.value))


INGEST = Command(
    "ingest",
    "look through folders, DICOM trees, archives or manifests and give every case a verdict",
    "root",
    _ingest_arguments,
    ingest,
)
