"""The command ``vnet``: reads its arguments, runs one command, and turns the result into text or JSON and an exit code.

0 all done · 2 usage or configuration · 3 some cases failed or were refused, the rest done · 4 no case done
130 interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.server import check_api, local_api, prefect_environment
from flows.session import ROOT_VARIABLE, SITE_VARIABLE, open_session
from vnet_core.errors import ConfigError, EngineError, MemoryLimitError, StorageError, VnetError
from vnet_core.sections import PRESETS

RUNS_FLOWS = ("demo", "preprocess", "train", "segment", "nightly")
"""Commands that need a Prefect API."""
WITHOUT_ROOT = ("evaluate", "fetch", "label")
"""Commands that use no storage root."""
API_TIMEOUT_S = 10.0
"""How long an API that is named may take to answer."""

OK, USAGE, PARTLY, NONE, INTERRUPTED = 0, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``vnet`` with the arguments (default: those of the process); returns the exit code."""
    options = parser().parse_args(arguments)
    _log_to_stderr()
    started = time.monotonic()
    try:
        # standard output is for the result; Ray and others print there too
        with contextlib.redirect_stdout(sys.stderr), _environment(options) as api_is_ready:
            from flows import commands
            from flows.demo import demo

            # the server starts while Prefect is imported
            if options.command in RUNS_FLOWS:
                importlib.import_module("flows.cohorts")
            api_is_ready()
            result = demo() if options.command == "demo" else commands.HANDLERS[options.command](options)
    except VnetError as error:
        print(f"vnet {options.command}: {error.code}: {error.message}", file=sys.stderr)
        if options.json:
            print(json.dumps({"command": options.command, "error": {"code": error.code, "message": error.message}}))
        before_any_work = isinstance(error, ConfigError | EngineError | MemoryLimitError)
        unwritable = isinstance(error, StorageError) and error.code == "store.unwritable"
        return USAGE if before_any_work or unwritable else NONE
    except KeyboardInterrupt:
        print(f"vnet {options.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    seconds = round(time.monotonic() - started, 2)
    if options.json:
        print(json.dumps(document(options, seconds, result), allow_nan=False))
    else:
        print(result.text)
    return exit_code(result.cases)


def _log_to_stderr() -> None:
    """Our own warnings on standard error; Prefect sets up its own log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("vnet")
    logger.handlers = [handler]
    logger.propagate = False


def document(options: argparse.Namespace, seconds: float, result: Any) -> dict[str, Any]:
    """The one JSON document of a command."""
    counts: dict[str, int] = {}
    for case in result.cases:
        counts[case["state"]] = counts.get(case["state"], 0) + 1
    root = os.environ.get("VNET_ROOT", "")
    common = {"command": options.command, "root": root, "seconds": seconds, "counts": counts, "cases": result.cases}
    return common | result.extra


def exit_code(cases: Sequence[dict[str, Any]]) -> int:
    """The exit code for what became of the cases; a command without cases has done its work."""
    undone = sum(case["state"] in ("refused", "failed", "carried-over") for case in cases)
    if undone == 0:
        return OK
    return NONE if undone == len(cases) else PARTLY


@contextlib.contextmanager
def _environment(options: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Give the process the environment that flows and their subprocesses read, before Prefect is imported.

    Yields a function that returns once the Prefect API answers.

    A command that runs flows gets a Prefect API: the one that PREFECT_API_URL names, the server that ``vnet serve``
    runs on this root, or one of its own for the time of the command. All on this root share one database.
    """
    if options.command in WITHOUT_ROOT or getattr(options, "action", "") == "describe":
        yield lambda: None
        return
    if options.root:
        os.environ[ROOT_VARIABLE] = options.root
    if options.site:
        os.environ[SITE_VARIABLE] = str(Path(options.site).resolve())
    session = open_session()
    os.environ[ROOT_VARIABLE] = str(session.root.folder)
    home = session.root.folder / "prefect"
    os.environ.update(prefect_environment(home))
    if options.verbose:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"
    url = os.environ.get("PREFECT_API_URL")
    if options.command not in RUNS_FLOWS or url:
        if url and options.command in RUNS_FLOWS:
            check_api(url, API_TIMEOUT_S)
        yield lambda: None
        return
    with local_api(home) as api:
        os.environ["PREFECT_API_URL"] = api.url
        yield api.wait_until_ready


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", metavar="URL", help="storage root (default: VNET_ROOT, else ./vnet-data)")
    common.add_argument("--site", metavar="FILE", help="site file (default: VNET_SITE, else this machine)")
    common.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    common.add_argument("--verbose", action="store_true", help="show the log of the flows")
    top = argparse.ArgumentParser(
        prog="vnet",
        description="Nightly 3D segmentation of whole cohorts with V-Net. Research software, not a medical device.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    add("demo", "the whole way on a cohort made from a seed, in about two minutes on two cores")

    fetch = add("fetch", "bring public data by name, or a file by its URL: checked, resumed, unpacked")
    fetch.add_argument("name", nargs="?", metavar="NAME|URL", help="which data set; none: list them")
    fetch.add_argument("--output", type=Path, metavar="DIR", help="where to (default: a folder of its own in data)")
    fetch.add_argument("--sha256", metavar="HEX", help="checksum that the file must have")

    label = add("label", "make label maps: spheres at the points of a table, such as LUNA16's nodules")
    label.add_argument("action", choices=("spheres",))
    label.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, scan file, or manifest")
    label.add_argument("--annotations", required=True, type=Path, metavar="FILE", help="CSV of points and diameters")
    label.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the label maps")
    label.add_argument("--hu-min", type=float, metavar="HU", help="leave out voxels below this intensity")
    label.add_argument("--inside", type=Path, metavar="DIR", help="masks of the organ, named like the scans")

    ingest = add("ingest", "look through folders, DICOM trees or manifests and give every case a verdict")
    ingest.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, scan file, or CSV or Parquet manifest")
    ingest.add_argument("--cohort", required=True, metavar="NAME")
    ingest.add_argument("--label", action="append", default=[], metavar="VALUE=NAME", help="name of a label value")
    ingest.add_argument("--channel", action="append", default=[], metavar="NAME", help="name of a channel, in order")

    preprocess = add("preprocess", "bring a cohort onto the plan's grid, as Zarr volumes, on Dask")
    preprocess.add_argument("--cohort", required=True, metavar="NAME")
    preprocess.add_argument("--plan", default="auto", metavar="auto|FILE", help="TOML with settings that differ")

    train = add("train", "train a V-Net on a cohort's labelled cases, on Ray")
    train.add_argument("--cohort", required=True, metavar="NAME")
    train.add_argument("--model", required=True, metavar="NAME")
    budget = train.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    budget.add_argument("--minutes", type=float, metavar="M", help="training time (default 10; resuming: as before)")
    train.add_argument("--plan", default="auto", metavar="auto|FILE", help="TOML with settings that differ")
    train.add_argument("--preset", choices=tuple(PRESETS), help="a named network instead of the plan's")
    train.add_argument("--folds", type=int, default=1, metavar="K", help="cross-validation: K networks, one model")
    train.add_argument("--from", dest="start", default="", metavar="NAME[@VERSION]", help="model to go on from")
    train.add_argument("--workers", type=int, metavar="W", help="Ray workers that train together")
    train.add_argument("--resume", action="store_true", help="go on with the newest unfinished training")

    plan = add("plan", "the plan that a cohort gets, and why")
    plan.add_argument("action", choices=("explain",))
    plan.add_argument("--cohort", required=True, metavar="NAME")

    segment = add("segment", "segment scans or a cohort with a model")
    segment.add_argument("sources", nargs="*", metavar="SOURCE", help="folder, scan file, or manifest")
    segment.add_argument("--cohort", metavar="NAME", help="an ingested cohort, instead of sources")
    segment.add_argument("--model", required=True, metavar="NAME[@VERSION]")
    segment.add_argument("--output", metavar="DIR", help="also copy every mask to DIR/<case>.nii.gz")
    segment.add_argument("--format", default="nifti", choices=("nifti", "mha", "nrrd"), help="format of the masks")

    evaluate = add("evaluate", "masks against truth: overlap, distances and volumes per case, label and cohort")
    evaluate.add_argument("predictions", metavar="PREDICTIONS", help="folder of masks")
    evaluate.add_argument("truth", metavar="TRUTH", help="folder of true label maps with the same names")
    evaluate.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="VALUES=NAME",
        help="what to score: 1=liver, or labels together as 1,2,4=whole-tumour (default: every label)",
    )
    evaluate.add_argument(
        "--tolerance-mm", nargs="+", type=float, default=[1.0], metavar="MM", help="of surface Dice (default: 1)"
    )
    evaluate.add_argument("--patients", metavar="FILE", help="CSV with the columns case and patient, for the intervals")
    evaluate.add_argument("--output", metavar="FILE", type=Path, help="write scores as .csv, .parquet or .json")

    nightly = add("nightly", "what is new or changed: ingest, preprocess, segment, report")
    nightly.add_argument("--cohort", required=True, metavar="NAME")
    nightly.add_argument("--model", required=True, metavar="NAME[@VERSION]")
    nightly.add_argument("--format", default="nifti", choices=("nifti", "mha", "nrrd"), help="format of the masks")

    query = add("query", "rows over all nights")
    query.add_argument("--cohort", metavar="NAME")
    query.add_argument("--label", metavar="NAME")
    query.add_argument("--case", metavar="ID")
    query.add_argument("--state", metavar="STATE", help="computed, cached, failed or refused")
    query.add_argument("--flag", metavar="FLAG", help="empty, touches-border or many-components")
    query.add_argument("--volume-min-ml", type=float, metavar="ML")
    query.add_argument("--volume-max-ml", type=float, metavar="ML")
    query.add_argument("--change-min-percent", type=float, metavar="P", help="smallest change since the night before")
    query.add_argument("--nights", type=int, metavar="N", help="only the newest N nights of each cohort")
    query.add_argument("--limit", type=int, default=1000, metavar="N", help="most rows (default 1000)")

    models = add("models", "trained models: list them, show one; describe a network before training")
    models.add_argument("action", choices=("list", "show", "describe"))
    models.add_argument("model", nargs="?", metavar="NAME[@VERSION]|PRESET|FILE", help="describe: preset or plan file")
    models.add_argument("--channels", type=int, default=1, metavar="N", help="describe: channels of the image")
    models.add_argument("--classes", type=int, default=2, metavar="K", help="describe: classes with background")
    models.add_argument(
        "--input", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X"), help="describe: voxels"
    )
    models.add_argument("--graph", type=Path, metavar="FILE", help="describe: draw the network (.png or .svg)")

    serve = add("serve", "the Prefect server, its UI, the deployments and the schedules, on this machine")
    serve.add_argument("--cohort", action="append", default=[], metavar="NAME", help="cohort to run every night")
    serve.add_argument("--model", metavar="NAME[@VERSION]", help="model of the nightly run")
    serve.add_argument("--cron", default="0 1 * * *", metavar="CRON", help="when (default: every night at 1:00)")
    serve.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: the site's ui_port, 4200)")
    return top


if __name__ == "__main__":
    sys.exit(main())
