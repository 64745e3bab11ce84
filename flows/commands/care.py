"""Commands that look after an installation: ``fsck``, ``gc``, ``doctor`` and ``metrics``."""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Command, Result, no_arguments
from flows.session import ROOT_VARIABLE, SITE_VARIABLE, open_session, utc_now
from vnet_core.errors import EngineError

if TYPE_CHECKING:
    from workers.care.doctor import Check
    from workers.care.retention import Spare
    from workers.care.sealed import Checkup, Finding

SHOWN = 20
"""Keys of a kind that ``gc`` names on a terminal; the JSON document names all."""
HOST = "127.0.0.1"


# --- fsck


def _fsck_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--cohort", metavar="NAME", help="only this cohort, with the volumes and models of its results")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="take away damaged volumes and results that the next night makes again; never models, decisions or nights",
    )


def fsck(options: Namespace) -> Result:
    """``vnet fsck``: exit code 3 when something is wrong and was not repaired."""
    from workers.care.fsck import fsck as check
    from workers.care.fsck import repair
    from workers.cohort import load_cohort

    session = open_session()
    if options.cohort:
        load_cohort(session.root, options.cohort)
    checkup = check(session.root, session.clock(), options.cohort or "")
    findings = list(checkup.findings)
    if options.repair:
        findings = repair(session.root, findings, session.clock())
    summary = _summary(checkup, findings)
    lines = [f"{f.key}  {f.code}: {f.found}\n    {f.done or f.remedy}" for f in findings]
    # the root itself is what was looked at, so that findings are some of the cases and never all
    whole = {"case": "root", "state": "accepted", "codes": [], "message": summary}
    cases = [whole, *(_as_case(finding) for finding in findings)]
    extra = {
        "objects": checkup.objects,
        "files": checkup.files,
        "bytes": checkup.bytes,
        "megabytes_per_s": round(checkup.megabytes_per_s, 1),
        "findings": [asdict(finding) for finding in findings],
    }
    return Result("\n".join([*lines, summary]), cases, extra)


def _summary(checkup: Checkup, findings: Sequence[Finding]) -> str:
    open_ones = sum(not finding.done for finding in findings)
    looked = (
        f"{checkup.objects} objects, {checkup.files} files, {_bytes(checkup.bytes)} hashed"
        f" at {checkup.megabytes_per_s:.0f} MB/s"
    )
    done = f", {len(findings) - open_ones} repaired" if len(findings) > open_ones else ""
    return f"{looked}: {f'{open_ones} findings' if open_ones else 'nothing is wrong'}{done}"


def _as_case(finding: Finding) -> dict[str, Any]:
    message = f"{finding.found}; {finding.done or finding.remedy}"
    state = "warned" if finding.done else "failed"
    return {"case": finding.key, "state": state, "codes": [finding.code], "message": message}


FSCK = Command(
    "fsck", "hash everything again and find what is damaged, missing or left over", "root", _fsck_arguments, fsck
)


# --- gc


def _gc_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    for name, what in (
        ("nights-days", "rows, pages and log of nights; the newest of a cohort stays"),
        ("results-days", "masks that no kept night names and no night would use again"),
        ("spares-days", "volumes, unpacked archives and checkpoints that nothing needs"),
        ("artifacts-days", "older versions of reports and tables in the UI"),
    ):
        parser.add_argument(f"--{name}", type=_days, metavar="N", help=f"days that these stay: {what}")
    parser.add_argument("--grace-hours", type=_at_least_one, metavar="N", help="nothing younger goes (default 24)")


def _days(text: str) -> int:
    return int(_at_least_one(text))


def _at_least_one(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal() or float(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not 1 or more")
    return float(text)


def gc(options: Namespace) -> Result:
    """``vnet gc``."""
    from workers.care.retention import collect, spares
    from workers.settings.retention_rules import Retention

    session = open_session()
    given = {name: value for name in Retention.model_fields if (value := getattr(options, name)) is not None}
    rules = Retention.model_validate(session.site.retention.model_dump() | given)
    now = session.clock()
    found = spares(session.root, rules, now, [entry.model for entry in session.site.nightly])
    if not options.dry_run:
        found = collect(session.root, found)
    versions = 0
    if rules.artifacts_days is not None:
        from flows.server.pruning import old_versions, prune

        with _api() as url:
            versions = (old_versions if options.dry_run else prune)(url, rules.artifacts_days, now)
    total = sum(spare.bytes for spare in found)
    would = "would go" if options.dry_run else "went"
    lines = [
        *_by_kind(found),
        f"{len(found)} things with {_bytes(total)} {would}, and {versions} older versions of artifacts",
    ]
    if rules == Retention(grace_hours=rules.grace_hours):
        lines.append("no rule was given, so only what died runs left half done goes; see vnet gc --help")
    extra = {
        "dry_run": options.dry_run,
        "rules": rules.model_dump(),
        "bytes": total,
        "gone": [asdict(spare) for spare in found],
        "artifact_versions": versions,
    }
    return Result("\n".join(lines), [], extra)


def _by_kind(found: Sequence[Spare]) -> Iterator[str]:
    for kind, number in Counter(spare.kind for spare in found).items():
        of_kind = [spare for spare in found if spare.kind == kind]
        yield f"{kind}: {number}, {_bytes(sum(spare.bytes for spare in of_kind))}"
        yield from (f"  {spare.key}  {_bytes(spare.bytes)}, {spare.why}" for spare in of_kind[:SHOWN])
        if number > SHOWN:
            yield f"  and {number - SHOWN} more (--json names all)"


@contextlib.contextmanager
def _api() -> Iterator[str]:
    """The Prefect API that is named or runs on this root, or a private one for the block."""
    from flows.server.api import check_api
    from flows.server.process import local_api

    url = os.environ.get("PREFECT_API_URL")
    if url:
        check_api(url)
        yield url
        return
    with local_api(Path(os.environ["PREFECT_HOME"])) as api:
        os.environ["PREFECT_API_URL"] = api.url
        api.wait_until_ready()
        yield api.url


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


GC = Command("gc", "remove by rules what nothing refers to any more", "root", _gc_arguments, gc)


# --- doctor


def doctor(options: Namespace) -> Result:
    """``vnet doctor``: exit code 3 when something is bad. It opens root and site itself, since they may be at fault."""
    from flows.server.settings import prefect_environment
    from workers.settings.site import Site
    from workers.storage.store import Root

    site_file = options.site or os.environ.get(SITE_VARIABLE) or None
    root_url = options.root or os.environ.get(ROOT_VARIABLE) or None
    with contextlib.suppress(ValueError):
        # before Prefect is imported
        os.environ.update(prefect_environment(Root(root_url or Site().root).home / "prefect"))
    from flows.commands.doctor import diagnose

    checks = diagnose(root_url, site_file, utc_now())
    extra = {"checks": [asdict(check) for check in checks]}
    return Result(told(checks), [_as_row(check) for check in checks], extra)


def told(checks: Sequence[Check]) -> str:
    """A line for each check, the remedy below it where there is one, and how many are in which state."""
    width = max(len(check.name) for check in checks)
    lines = [
        f"{check.state:7}  {check.name:{width}}  {check.found}"
        + (f"\n{'':{width + 11}}{check.remedy}" if check.remedy else "")
        for check in checks
    ]
    tally = Counter(check.state for check in checks)
    return "\n".join([*lines, ", ".join(f"{tally[s]} {s}" for s in ("ok", "warning", "bad") if tally[s])])


def _as_row(check: Check) -> dict[str, Any]:
    state = {"ok": "accepted", "warning": "warned", "bad": "failed"}[check.state]
    return {"case": check.name, "state": state, "codes": [], "message": f"{check.found}; {check.remedy}".rstrip("; ")}


DOCTOR = Command(
    "doctor", "whether this machine, its storage and its services can do the work", "nothing", no_arguments, doctor
)


# --- metrics


def _metrics_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"serve them at http://{HOST}:N/metrics until stopped (0: any free port)"
    )


def metrics(options: Namespace) -> Result:
    """``vnet metrics``."""
    from prometheus_client import start_http_server

    from workers.reports.metrics_text import metrics_text, registry

    root = open_session().root
    if options.port is None:
        text = metrics_text(root)
        return Result(text.rstrip("\n"), [], {"metrics": text})
    try:
        server, thread = start_http_server(options.port, addr=HOST, registry=registry(root))
    except (OSError, OverflowError) as error:
        raise EngineError(
            "metrics.port-busy", f"port {options.port} on {HOST} cannot be used ({error}); choose another"
        ) from None
    print(f"http://{HOST}:{server.server_port}/metrics  (Ctrl-C stops)", file=sys.stderr, flush=True)
    with server:
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
        server.shutdown()
    return Result("stopped")


METRICS = Command("metrics", "figures of the newest nights for Prometheus", "root", _metrics_arguments, metrics)
