"""At the end of a night: the challenger segments a sample of its cases too, and a page says how the two agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flows.session import Session
from vnet_core.errors import VnetError
from vnet_core.pictures.bland_altman import bland_altman_picture
from vnet_core.pictures.outlines import two_outlines
from workers.ledger import Outcome, State, settle
from workers.markdown import code, picture, table, text
from workers.nights.shadows import (
    Pair,
    Shadow,
    Standing,
    check_comparable,
    compare,
    in_sample,
    most_different,
    pairs_of,
    shadows,
    standings,
    structure_mask,
    write_shadow,
)
from workers.registry.aliases import aliases
from workers.registry.models import Model, load_model
from workers.reports.story import NOTICE
from workers.segmentation.segment import Job, key_of
from workers.settings.rules import NightRules
from workers.sources.reading import read_scan_apart
from workers.storage.store import Root

if TYPE_CHECKING:
    from workers.reports.report import Night

STAGE = "challenger"
CASES = 4
"""Most cases with a picture of both outlines in a page."""
FAILED_LINES = 20
"""Most cases without a comparison that a page lists; the record has all."""

NO_PICTURE = "*No picture: the scan or a mask is not at hand, or the scan may have text in its pixels.*"

Segment = Callable[[Model, Sequence[Job]], list[Outcome]]
"""Preprocesses and segments jobs by a model."""


def shadow(session: Session, night: Night, jobs: Sequence[Job], rules: NightRules, segment: Segment) -> None:
    """Let the night's challenger segment its sample and publish the comparison as `challenger-<cohort>`.

    Nothing happens where the model has no challenger or the share is 0, and where a night has nothing to add, the page
    stays that of the night before. A challenger that cannot be used is told in the page; it never fails the night.
    """
    from prefect import get_run_logger
    from prefect.artifacts import create_markdown_artifact

    from flows.ui.artifacts import artifact_key

    found = compared_night(session.root, night, jobs, rules.challenger_share, segment)
    if found is None:
        return
    log = get_run_logger()
    if found.problem:
        log.warning("challenger %s: %s", found.challenger, found.problem)
    for case in found.failed:
        log.warning("challenger %s: %s %s", case["case"], ",".join(case["codes"]), case["message"])
    if not (found.compared or found.failed or found.problem):
        log.info("challenger %s: nothing new among %d cases of its sample", found.challenger, found.sampled)
        return
    create_markdown_artifact(
        markdown=challenge_page(session.root, found, jobs),
        key=artifact_key("challenger", night.cohort),
        description=f"{found.challenger} beside {found.champion}; {found.compared} cases compared in night {night.id}",
    )


def compared_night(root: Root, night: Night, jobs: Sequence[Job], share: float, segment: Segment) -> Shadow | None:
    """Segment, compare and record the night's sample; None where there is nothing to do."""
    name = night.model.partition("@")[0]
    version = aliases(root, name).get("challenger")
    reference = f"{name}@{version}"
    if not version or share <= 0 or reference == night.model:
        return None
    begun = Shadow(night.id, night.cohort, night.model, reference, "", "", share, 0)
    try:
        champion, challenger = load_model(root, night.model), load_model(root, reference)
        begun = replace(begun, champion_digest=champion.digest, challenger_digest=challenger.digest)
        check_comparable(champion.plan, challenger.plan)
        found, pairs = _compared(root, begun, (champion, challenger), jobs, segment)
    except VnetError as error:
        found, pairs = replace(begun, problem=f"{error.code}: {error.message}"), []
    write_shadow(root, found, pairs)
    return found


def _compared(
    root: Root, begun: Shadow, models: tuple[Model, Model], jobs: Sequence[Job], segment: Segment
) -> tuple[Shadow, list[Pair]]:
    champion, challenger = models
    sample = [
        job
        for job in jobs
        if in_sample(job.case, challenger.digest, begun.share) and root.receipt(key_of(job, champion))
    ]
    earlier = [one for one in _so_far(root, begun) if one.night != begun.night]
    known = {(pair.champion_key, pair.challenger_key) for pair in pairs_of(root, earlier)}
    # the claim on a case is on the champion's result
    todo = [replace(job, claim=None) for job in sample if (key_of(job, champion), key_of(job, challenger)) not in known]
    held = {job.case.id: job for job in todo}
    pairs: list[Pair] = []
    outcomes = []
    for outcome in segment(challenger, todo) if todo else []:
        if outcome.done:
            found, outcome = _pairs(root, held[outcome.case], models)
            pairs += found
        outcomes.append(outcome)
    # a case that the night had no time for is neither compared nor failed, and comes up again
    failed = [
        {"case": one.case, "codes": list(one.codes), "message": one.message}
        for one in outcomes
        if one.state in ("failed", "refused")
    ]
    compared = len({pair.case for pair in pairs})
    return replace(begun, sampled=len(sample), compared=compared, failed=failed), pairs


def _pairs(root: Root, job: Job, models: tuple[Model, Model]) -> tuple[list[Pair], Outcome]:
    """What the two results of a case have to say, and how their comparison ended; never raises."""
    champion, challenger = models
    pairs: list[Pair] = []

    def look() -> tuple[State, str | None, tuple[str, ...]]:
        ours, theirs = (champion, key_of(job, champion)), (challenger, key_of(job, challenger))
        pairs.extend(compare(root, job.case.id, ours, theirs))
        return "computed", None, ()

    return pairs, settle(STAGE, job.case.id, look)


def _so_far(root: Root, found: Shadow) -> list[Shadow]:
    """All nights of the cohort with this pair of models."""
    pair = found.champion_digest, found.challenger_digest
    return [one for one in shadows(root, found.cohort) if (one.champion_digest, one.challenger_digest) == pair]


# --- the page


def challenge_page(root: Root, found: Shadow, jobs: Sequence[Job]) -> str:
    """The comparison over all nights so far as Markdown, with the cases of ``jobs`` that differ most in pictures."""
    nights = _so_far(root, found)
    pairs = pairs_of(root, nights)
    cases = len({pair.case for pair in pairs})
    counted = [night for night in nights if night.compared]
    parts = [
        f"# {text(found.challenger)} beside {text(found.champion)} on {text(found.cohort)}",
        f"**{cases} {'case' if cases == 1 else 'cases'} compared** over {len(counted)}"
        f" {'night' if len(counted) == 1 else 'nights'}, {found.compared} of them in night {code(found.night)}; the"
        f" sample is {100 * found.share:g} % of the cases, {found.sampled} of this night.",
        f"*{NOTICE}*",
    ]
    if found.problem:
        parts.append(f"**The challenger could not be used in this night.** {text(found.problem)}")
    if pairs:
        parts += ["## How far they agree", _figures(standings(pairs)), _plot(found, pairs)]
        parts += [_reading_aid(), *_differing(root, found, pairs, jobs)]
    if found.failed:
        parts.append(_failures(found))
    parts.append(_what_now(found))
    return "\n\n".join(parts) + "\n"


def _figures(rows: Sequence[Standing]) -> str:
    cells = []
    for row in rows:
        volumes = row.volumes
        cells.append(
            (
                row.label,
                volumes.cases,
                "" if row.mean_dice is None else f"{row.mean_dice:.3f}",
                "" if row.lowest_dice is None else f"{row.lowest_dice:.3f}",
                "" if volumes.bias_ml is None else f"{volumes.bias_ml:+.3g}",
                _between(volumes.bias_low_ml, volumes.bias_high_ml),
                _between(volumes.low_ml, volumes.high_ml),
            )
        )
    header = ("structure", "cases", "mean Dice", "lowest", "bias mL", "95 % interval", "limits of agreement mL")
    return table(header, cells)


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:+.3g} to {high:+.3g}"


def _plot(found: Shadow, pairs: Sequence[Pair]) -> str:
    volumes: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        volumes.setdefault(pair.label, []).append((pair.champion_ml, pair.challenger_ml))
    title = f"{found.challenger} against {found.champion}"
    return picture("Bland-Altman plot of the volumes", bland_altman_picture(volumes, title))


def _reading_aid() -> str:
    return (
        "Dice here is between the two models: it says how far they agree, not which of them is right. A bias above 0"
        " means that the challenger finds more. Between the limits lie about 95 % of the differences."
    )


def _differing(root: Root, found: Shadow, pairs: Sequence[Pair], jobs: Sequence[Job]) -> list[str]:
    """The cases that differ most, with pictures as far as their scans are at hand."""
    worst = most_different(pairs, CASES)
    if not worst:
        return []
    held = {job.case.id: job for job in jobs}
    sections = ["## Where they differ most"]
    for pair in worst:
        figures = f"Dice {pair.dice:.3f}; {pair.champion_ml:.4g} mL by the champion, {pair.challenger_ml:.4g} mL by the"
        sections.append(f"### {text(pair.case)}: {text(pair.label)}\n\n{figures} challenger.")
        job = held.get(pair.case)
        png = None if found.problem or job is None else _outlines(root, found, pair, job)
        sections.append(picture(pair.case, png) if png else NO_PICTURE)
    return sections


def _outlines(root: Root, found: Shadow, pair: Pair, job: Job) -> bytes | None:
    """The structure by both models on the scan; None where that may or can not be shown."""
    champion, challenger = load_model(root, found.champion), load_model(root, found.challenger)
    try:
        scan = read_scan_apart(job.case.channels[0], champion.plan.reading)
        ours = structure_mask(root, pair.champion_key, champion.plan, pair.label)
        theirs = structure_mask(root, pair.challenger_key, challenger.plan, pair.label)
        if scan.burnt_in:
            return None
        return two_outlines(scan.volume.voxels[0], ours, theirs, scan.volume.geometry, pair.label)
    except VnetError:
        return None


def _failures(found: Shadow) -> str:
    lines = [
        f"- **{text(case['case'])}** {code(' '.join(case['codes']))}: {text(case['message'])}"
        for case in found.failed[:FAILED_LINES]
    ]
    if len(found.failed) > len(lines):
        lines.append(f"- and {len(found.failed) - len(lines)} more")
    return "\n".join([f"## Without a comparison ({len(found.failed)})", "", *lines])


def _what_now(found: Shadow) -> str:
    name, _, version = found.challenger.partition("@")
    return (
        "## What now\n\n"
        f"- To use it from the next night on: the form `promote-model-form`, model {code(name)}, version"
        f" {code(version)}; or {code(f'vnet models promote {found.challenger} --why REASON')}. The present one"
        f" comes back with `rollback-model-form`.\n"
        f"- To stop comparing: the form `withdraw-challenger-form`, or {code(f'vnet models withdraw {name}')}.\n"
        "- The challenger's masks and volumes are in no report and no delivery."
    )
