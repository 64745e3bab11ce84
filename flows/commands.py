"""What each command of ``vnet`` does: call a stage or a flow, and shape what comes back."""

from __future__ import annotations

import logging
import os
import shutil
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


def segment(options: Namespace) -> Result:
    """``vnet segment``."""
    from flows.cohorts import segment_cohort

    session = open_session()
    if bool(options.sources) == bool(options.cohort):
        raise ConfigError("segment.input", "name either sources or --cohort, not both and not neither")
    cohort = options.cohort
    if options.sources:
        paths = sorted(str(Path(source).resolve()) for source in options.sources)
        cohort = f"scans-{digest_of(paths)[:8]}"
        ingest_sources(session.root, cohort, options.sources)
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


def evaluate(options: Namespace) -> Result:
    """``vnet evaluate``."""
    from workers.evaluate import evaluate as run
    from workers.evaluate import masks_in, summary
    from workers.report import to_csv

    found = run(masks_in(options.predictions), masks_in(options.truth), parse_labels(options.label))
    rows = [{"case": e.outcome.case} | row for e in found for row in e.labels]
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(to_csv(rows))
    means = summary(found)
    columns = ("case", "name", "dice", "volume_ml", "truth_volume_ml", "volume_error")
    lines = [text_table(rows, columns), _undone([e.outcome for e in found])]
    lines += [f"mean Dice {name}: {value:.4f}" for name, value in means["dice"].items()]
    if means["mean_dice"] is not None:
        lines.append(f"mean Dice over labels: {means['mean_dice']:.4f}")
    cases = [_case(e.outcome) | {"labels": list(e.labels)} for e in found]
    return Result("\n".join(line for line in lines if line), cases, means)


def query(options: Namespace) -> Result:
    """``vnet query``."""
    from workers.query import Query
    from workers.query import query as run

    names = Query.__slots__
    rows = run(open_session().root, Query(**{name: getattr(options, name) for name in names}))
    columns = ("night", "cohort", "case", "state", "name", "volume_ml", "change_percent", "flags", "codes")
    return Result(text_table(rows, columns) if rows else "no rows", [], {"rows": rows})


def models(options: Namespace) -> Result:
    """``vnet models list|show``."""
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
                    "steps": facts["training"]["steps"],
                    "validation_dice": sum(scores) / len(scores) if scores else None,
                }
            )
    columns = ("model", "labels", "steps", "validation_dice")
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
    "ingest": ingest,
    "preprocess": preprocess,
    "train": train,
    "segment": segment,
    "evaluate": evaluate,
    "nightly": nightly,
    "query": query,
    "models": models,
    "serve": serve,
}
"""Function of each command, but for ``demo``, which is made of them."""
