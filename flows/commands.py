"""What each command of ``vnet`` does: call a stage or a flow, and shape what comes back."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.session import Session, open_session
from vnet_core.errors import ConfigError, EngineError, VnetError
from vnet_core.plan import Label, config_error, digest_of
from workers.clusters import processors
from workers.cohort import Cohort
from workers.ledger import Outcome, counts
from workers.store import Root


@dataclass(frozen=True, slots=True)
class Result:
    """What a command has to say."""

    text: str
    """For a person."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """One mapping per case: case, state, codes, message and what the command adds."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the JSON document."""


def _case(outcome: Outcome) -> dict[str, Any]:
    return {
        "case": outcome.case,
        "state": outcome.state,
        "codes": list(outcome.codes),
        "message": outcome.message,
    }


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned columns; numbers to the right."""
    shown = [[_shown(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in shown)) if shown else len(c) for i, c in enumerate(columns)]
    numeric = [all(isinstance(row[c], int | float | None) for row in rows) for c in columns]
    lines = [
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(line, widths, numeric, strict=True))
        for line in [list(columns), *shown]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _undone(outcomes: Sequence[Outcome]) -> str:
    rows = [
        {"case": o.case, "state": o.state, "code": " ".join(o.codes), "reason": o.message}
        for o in outcomes
        if not o.done or o.state == "warned"
    ]
    return "\n" + text_table(rows, ("case", "state", "code", "reason")) if rows else ""


def _summary(outcomes: Sequence[Outcome]) -> str:
    found = counts(outcomes)
    text = ", ".join(f"{number} {state}" for state, number in found.items()) or "no cases"
    done = [o for o in outcomes if o.done]
    if done and all(o.state == "cached" for o in done):
        text = f"no case computed: {text}"
    return text + _undone(outcomes)


def parse_labels(given: Sequence[str]) -> tuple[Label, ...]:
    """Labels from ``VALUE=NAME``; ConfigError ``label.option`` otherwise."""
    labels = []
    for text in given:
        value, _, name = text.partition("=")
        if not (value.isdigit() and int(value) > 0 and name):
            raise ConfigError("label.option", f"--label {text!r} is not VALUE=NAME, such as 1=liver")
        labels.append(Label(value=int(value), name=name))
    return tuple(sorted(labels, key=lambda label: label.value))


def ingest(options: Namespace) -> Result:
    """``vnet ingest``."""
    session = open_session()
    cohort, outcomes = ingest_sources(session.root, options.cohort, options.sources, options.channel, options.label)
    text = f"cohort {cohort.name}: {_summary(outcomes)}"
    return Result(text, [_case(o) for o in outcomes], {"cohort": cohort.name, "sources": list(cohort.sources)})


def ingest_sources(
    root: Root, cohort: str, sources: Sequence[str], channels: Sequence[str] = (), labels: Sequence[str] = ()
) -> tuple[Cohort, list[Outcome]]:
    """Ingest local sources on all processor cores; ``labels`` as ``VALUE=NAME``."""
    from workers.ingest import Names
    from workers.ingest import ingest as run

    absolute = [str(Path(source).expanduser().resolve()) for source in sources]
    with ThreadPoolExecutor(processors()) as executor:
        return run(root, cohort, absolute, executor, Names(tuple(channels), parse_labels(labels)))


def fetch(options: Namespace) -> Result:
    """``vnet fetch``: one data set, or without a name the list of them."""
    from workers.datasets import CATALOGUE
    from workers.fetch import dataset
    from workers.fetch import fetch as run

    if not options.name:
        rows = [{"name": n, "what": d.title, "licence": d.licence} for n, d in CATALOGUE.items()]
        return Result(text_table(rows, ("name", "what", "licence")), [], {"datasets": rows})
    wanted = dataset(options.name, options.sha256)
    output = options.output or Path(wanted.folder)
    fetched = run(wanted, output, _Meter())
    cases = [_case(f.outcome) | {"path": str(f.path) if f.path else None, "sha256": f.sha256 or None} for f in fetched]
    lines = [f"{wanted.title}\nlicence: {wanted.licence}; {wanted.homepage}"]
    lines += [f"{f.path}  sha256 {f.sha256}" for f in fetched if f.path]
    lines += [
        f"{f.outcome.case}: no checksum is published, so nothing proves it; compare the one above with its homepage"
        for f in fetched
        if f.path and "fetch.unchecked" in f.outcome.codes
    ]
    failed = _undone([f.outcome for f in fetched if not f.outcome.done])
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


def label(options: Namespace) -> Result:
    """``vnet label spheres``."""
    from workers.annotations import Gate, label_spheres

    sources = [str(Path(source).expanduser()) for source in options.sources]
    gate = Gate(options.hu_min, options.inside)
    labelled = label_spheres(sources, options.annotations, options.output, gate)
    cases = [_case(one.outcome) | {"spheres": one.spheres, "volume_ml": one.volume_ml} for one in labelled]
    text = (
        f"{sum(one.spheres for one in labelled)} spheres in {sum(one.spheres > 0 for one in labelled)} scans:"
        f" {_summary([one.outcome for one in labelled])}\n{options.output / 'manifest.csv'}"
    )
    return Result(text, cases, {"manifest": str(options.output / "manifest.csv")})


def preprocess(options: Namespace) -> Result:
    """``vnet preprocess``."""
    from flows.cohorts import preprocess_cohort

    data = run_flow(preprocess_cohort, cohort=options.cohort, plan=_absolute(options.plan))
    outcomes = data["outcomes"]
    text = f"cohort {options.cohort}: {_summary(outcomes)}"
    return Result(text, [_case(o) for o in outcomes], {"plan_digest": data["plan"]})


def _absolute(plan: str) -> str:
    return plan if plan == "auto" else str(Path(plan).expanduser().resolve())


def train(options: Namespace) -> Result:
    """``vnet train``."""
    from flows.training import TrainingSettings, train_model
    from workers.models import load_model

    session = open_session()
    if options.minutes == 0:
        raise ConfigError("train.value", "--minutes 0 cannot train; use more than 0")
    try:
        settings = TrainingSettings(
            minutes=options.minutes or 0.0,
            steps=options.steps,
            plan=_absolute(options.plan),
            preset=options.preset or "",
            folds=options.folds,
            start=options.start,
            workers=options.workers,
            resume=options.resume,
        )
    except ValidationError as error:
        raise config_error(error, TrainingSettings, "train") from None
    data = run_flow(
        train_model,
        cohort=options.cohort,
        model=options.model,
        settings=settings,
    )
    model = load_model(session.root, data["model"])
    training = model.facts["training"]
    scores = model.facts["metrics"]["validation_dice"]
    dice = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or "no validation cases"
    text = (
        f"model {model.reference}: {training['steps']} steps in {training['minutes']:.1f} min,"
        f" validation Dice: {dice}\n{session.root.path(model.prefix)}"
    )
    extra = {"model": model.reference, "digest": model.digest, "training": training, "metrics": model.facts["metrics"]}
    return Result(text, [], extra)


def plan(options: Namespace) -> Result:
    """``vnet plan explain``."""
    from flows.plans import derived
    from workers.cohort import load_cohort, load_entries

    session = open_session()
    cohort = load_cohort(session.root, options.cohort)
    found = derived(cohort, load_entries(session.root, cohort.name), session.site.engines)
    rows = [{"key": r.key, "value": r.value, "because": r.words} for r in found.reasons]
    text = text_table(rows, ("key", "value", "because"))
    return Result(text, [], {"reasons": rows, "plan": found.plan.model_dump(mode="json")})


def segment(options: Namespace) -> Result:
    """``vnet segment``."""
    from flows.cohorts import segment_cohort
    from workers.models import load_model

    session = open_session()
    if bool(options.sources) == bool(options.cohort):
        raise ConfigError("segment.input", "name either sources or --cohort, not both and not neither")
    cohort = options.cohort
    if options.sources:
        paths = sorted(str(Path(source).resolve()) for source in options.sources)
        cohort = f"scans-{digest_of(paths)[:8]}"
        channels = load_model(session.root, options.model).plan.channels
        ingest_sources(session.root, cohort, options.sources, channels if len(channels) > 1 else ())
    data = run_flow(segment_cohort, cohort=cohort, model=options.model, mask_format=options.format)
    return _night_result(session, data, options.output)


def nightly(options: Namespace) -> Result:
    """``vnet nightly``."""
    from flows.cohorts import nightly as flow

    session = open_session()
    data = run_flow(flow, cohort=options.cohort, model=options.model, mask_format=options.format)
    return _night_result(session, data, None)


def _night_result(session: Session, data: Mapping[str, Any], output: str | None) -> Result:
    """Cases of a night with their masks and volumes; masks are copied to ``output`` where it is given."""
    from workers.masks import load_report

    cases, rows = [], []
    for outcome in data["outcomes"]:
        case = _case(outcome)
        if outcome.done:
            report = load_report(session.root, outcome.key)
            mask = session.root.path(f"{outcome.key}/{report['mask']}")
            if output:
                mask = copy_mask(mask, Path(output), outcome.case)
            case |= {"mask": str(mask), "labels": [_label(row) for row in report["labels"]]}
            rows += [{"case": outcome.case, "state": outcome.state} | row for row in report["labels"]]
        cases.append(case)
    report_path = session.root.path(f"reports/{data['cohort']}/{data['night']}.csv")
    for row in rows:
        row["flags"] = " ".join(row["flags"])
    columns = ("case", "state", "name", "volume_ml", "components", "flags")
    parts = [
        f"night {data['night']} of cohort {data['cohort']}: {_summary(data['outcomes'])}",
        text_table(rows, columns) if rows else "",
        f"table: {report_path}",
        f"masks: {Path(output).resolve() if output else session.root.path('results/' + data['cohort'])}",
    ]
    return Result("\n".join(p for p in parts if p), cases, {"night": data["night"], "report": str(report_path)})


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
    slices = None if row["slice_first"] is None else [row["slice_first"], row["slice_last"]]
    return {
        "label": row["label"],
        "name": row["name"],
        "volume_ml": row["volume_ml"],
        "voxels": row["voxels"],
        "slices": slices,
        "touches_border": row["touches_border"],
    }


def copy_mask(mask: Path, folder: Path, case: str) -> Path:
    """The mask as ``folder/<case><suffix>``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{case}{mask.name.removeprefix('mask')}"
    temporary = folder / f".{target.name}.part"
    shutil.copyfile(mask, temporary)
    temporary.replace(target)
    return target


def parse_structures(given: Sequence[str]) -> tuple[Any, ...]:
    """What is scored, from ``VALUE=NAME`` or ``VALUE,VALUE=NAME``; ConfigError ``label.option`` otherwise."""
    from vnet_core.metrics import Structure

    found = []
    for text in given:
        numbers, _, name = text.partition("=")
        values = numbers.split(",")
        if not name or not all(v.isdecimal() and 0 < int(v) < 65536 for v in values):
            raise ConfigError(
                "label.option", f"--label {text!r} is not VALUE=NAME or VALUE,VALUE=NAME, such as 1=liver or 1,4=core"
            )
        found.append(Structure(name, tuple(dict.fromkeys(int(v) for v in values))))
    names = [structure.name for structure in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("label.option", f"--label gives the name {twice[0]!r} twice; give each a name of its own")
    return tuple(sorted(found, key=lambda structure: (len(structure.values) > 1, structure.values)))


def evaluate(options: Namespace) -> Result:
    """``vnet evaluate``."""
    from workers.evaluate import OUTPUTS, columns, masks_in, patients_in, summary, to_parquet
    from workers.evaluate import evaluate as run
    from workers.report import to_csv

    output: Path | None = options.output
    if output and output.suffix.lower() not in OUTPUTS:
        raise ConfigError("evaluate.output", f"--output {output} ends in none of {', '.join(OUTPUTS)}; rename it")
    patients = patients_in(options.patients) if options.patients else {}
    tolerances_mm = options.tolerance_mm
    with ThreadPoolExecutor(processors()) as executor:
        found = run(
            masks_in(options.predictions),
            masks_in(options.truth),
            parse_structures(options.label),
            tolerances_mm,
            executor,
        )
    means = summary(found, patients)
    cases = [_case(e.outcome) | {"labels": list(e.labels)} for e in found]
    rows = [{"case": e.outcome.case} | row for e in found for row in e.labels]
    names = columns(tolerances_mm)
    if output:
        written = {
            ".csv": lambda: to_csv(rows) if rows else (",".join(names) + "\n").encode(),
            ".parquet": lambda: to_parquet(rows, names),
            ".json": lambda: json.dumps({"cases": cases, **means}, allow_nan=False, indent=1).encode(),
        }[output.suffix.lower()]()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(written)
    return Result(_scores_text(found, rows, means, names), cases, means)


def _scores_text(
    found: Sequence[Any], rows: Sequence[Mapping[str, Any]], means: Mapping[str, Any], names: Sequence[str]
) -> str:
    """Scores of each case, then of each structure over the cases."""
    tolerant = [name for name in names if name.startswith("surface_dice")]
    shown = ["dice", "hd95_mm", "assd_mm", *tolerant, "volume_ml", "truth_volume_ml", "volume_error"]
    over_cases = [
        {"name": name, "metric": metric, **of_name[metric]}
        for name, of_name in means["summary"]["labels"].items()
        for metric in ("dice", "iou", "hd95_mm", "assd_mm", "abd_mm", *tolerant, "absolute_volume_error")
    ]
    lines = [
        text_table(rows, ("case", "name", *shown)),
        _undone([e.outcome for e in found]),
        "over the cases: mean with 95 % interval; infinite: prediction or truth was empty",
        text_table(
            over_cases,
            ("name", "metric", "cases", "infinite", "mean", "low", "high", "median", "worst", "worst_case"),
        ),
    ]
    lines += [f"mean Dice {name}: {value:.4f}" for name, value in means["dice"].items()]
    if means["mean_dice"] is not None:
        lines.append(f"mean Dice over labels: {means['mean_dice']:.4f}")
    return "\n".join(line for line in lines if line)


def query(options: Namespace) -> Result:
    """``vnet query``."""
    from workers.query import Query
    from workers.query import query as run

    names = Query.__slots__
    rows = run(open_session().root, Query(**{name: getattr(options, name) for name in names}))
    columns = ("night", "cohort", "case", "state", "name", "volume_ml", "change_percent", "flags", "codes")
    return Result(text_table(rows, columns) if rows else "no rows", [], {"rows": rows})


def models(options: Namespace) -> Result:
    """``vnet models list|show|describe``."""
    if options.action == "describe":
        from flows.networks import describe

        text, extra = describe(options, text_table)
        return Result(text, [], extra)
    from workers.models import load_model, versions

    root = open_session().root
    if options.action == "show":
        if not options.model:
            raise ConfigError("model.name", "vnet models show needs NAME or NAME@VERSION")
        model = load_model(root, options.model)
        text = f"{model.reference} {model.digest}\n{root.path(model.prefix)}\n" + "\n".join(
            f"{name}: {value}" for name, value in {**model.facts["metrics"], **model.facts["training"]}.items()
        )
        return Result(text, [], {"model": model.facts, "digest": model.digest})
    rows = []
    for name in root.names("models"):
        for version in versions(root, name):
            facts = load_model(root, f"{name}@{version}").facts
            scores = facts["metrics"]["validation_dice"].values()
            rows.append(
                {
                    "model": f"{name}@{version}",
                    "labels": " ".join(label["name"] for label in facts["labels"]),
                    "networks": len(facts["weights"]),
                    "steps": facts["training"]["steps"],
                    "validation_dice": sum(scores) / len(scores) if scores else None,
                }
            )
    columns = ("model", "labels", "networks", "steps", "validation_dice")
    return Result(text_table(rows, columns) if rows else "no models", [], {"models": rows})


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


HANDLERS: dict[str, Callable[[Namespace], Result]] = {
    "fetch": fetch,
    "label": label,
    "ingest": ingest,
    "preprocess": preprocess,
    "train": train,
    "plan": plan,
    "segment": segment,
    "evaluate": evaluate,
    "nightly": nightly,
    "query": query,
    "models": models,
    "serve": serve,
}
"""Function of each command, but for ``demo``, which is made of them."""
