"""Model cards: what a model is for, what it learnt from and how well, and where it may be wrong, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vnet_core.plan import Plan
from vnet_core.statistics import summarise
from workers.markdown import code, table, text

NOTICE = "Research software, not a medical device: masks and volumes need a qualified person's review."
FEW_CASES = 10
"""Below so many judged cases the card says that the figures are rough."""
ANISOTROPIC = 3.0
"""Above this ratio of the coarsest to the finest spacing the card warns of thick slices."""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card of a model, from its ``model.json``. Cases are counted, none is named."""
    plan = Plan.from_mapping(facts["plan"])
    training = facts.get("training", {})
    parts = [
        f"# Model card: {text(facts['name'])}@{text(facts['version'])}",
        f"*{NOTICE}*",
        f"## Intended use\n\n{_use(plan)}",
        f"## Data\n\n{_list(_data(facts, training))}",
        f"## Method\n\n{_list([*_method(plan, training), *map(text, facts.get('cleaning', ()))])}",
        f"## Figures\n\n{_figures(facts)}",
        f"## Limits\n\n{_list(_limits(facts, plan, training))}",
        f"## Provenance\n\n{_provenance(facts, training)}",
    ]
    return "\n\n".join(parts) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _use(plan: Plan) -> str:
    structures = ", ".join(text(label.name) for label in plan.labels)
    channels = ", ".join(text(channel) for channel in plan.channels)
    return (
        f"Outlines {structures} in 3D scans ({_count(len(plan.channels), 'channel')}: {channels}) and measures their"
        " volumes, for research. A person who knows the anatomy looks at the masks before anything is concluded from"
        " them. Not for diagnosis, nor for decisions about a patient's treatment."
    )


def _data(facts: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    learnt, judged = len(training.get("training_cases", ())), len(training.get("validation_cases", ()))
    if training.get("folds", 1) > 1:
        lines = [f"{_count(learnt, 'labelled case')} in a cross-validation; each was judged by a network that had not"]
        lines[0] += " learnt from it"
    else:
        lines = [f"{_count(learnt, 'labelled case')} to learn from, {judged} others to judge by; no patient is in both"]
    names = ", ".join(f"{text(label['name'])} ({label['value']})" for label in facts["labels"])
    lines.append(f"labels and their values: {names}")
    if data := facts.get("provenance", {}).get("data"):
        lines.append(f"digests of the {len(data)} scans and of their labels are in `model.json`, under `provenance`")
    return lines


def _method(plan: Plan, training: Mapping[str, Any]) -> list[str]:
    preparation, network, fitting = plan.preprocess, plan.network, plan.training
    intensity = {
        "zscore": "intensities to mean 0 and deviation 1",
        "window": f"intensities from {preparation.window[0]:g} to {preparation.window[1]:g} to -1 .. 1",
        "percentiles": f"intensities cut to {preparation.window[0]:g} .. {preparation.window[1]:g} and standardised",
        "range": "intensities to 0 .. 1 by the scan's own range",
    }[preparation.intensity]
    corrected = "N4 bias correction, " if preparation.bias_field == "n4" else ""
    deciding = {
        "softmax": "every voxel is one label or background",
        "sigmoid": f"{_count(len(plan.told_regions), 'region')}, each told by itself",
    }[plan.head]
    losses = " + ".join(f"{weight:g} {name}" for name, weight in fitting.loss.terms.items())
    mirrored = len(plan.inference.mirror_axes)
    return [
        f"scans on a grid of {_by(preparation.spacing_mm)} mm (z, y, x); {corrected}{intensity}",
        f"V-Net of {network.levels} levels, kernels of {network.kernel_size}, {network.width} channels at full"
        f" resolution, {fitting.patch_size[0]} x {fitting.patch_size[1]} x {fitting.patch_size[2]} voxels at a time;"
        f" {deciding}",
        f"loss {losses}; {fitting.optimiser}, learning rate {fitting.learning_rate:g}, {fitting.schedule};"
        f" batches of {fitting.batch_size}",
        f"masks by {_count(training.get('folds', 1), 'network')}"
        + (f" and {2**mirrored - 1} mirror images" if mirrored else "")
        + f"; {_cleaning(plan)}",
    ]


def _cleaning(plan: Plan) -> str:
    names = {label.value: text(label.name) for label in plan.labels}
    steps = []
    for one in plan.inference.cleaning:
        told = ["only the largest component"] if one.keep == "largest" else []
        told += [f"components of at least {one.minimum_ml:g} mL"] if one.minimum_ml else []
        told += ["holes filled"] if one.holes == "fill" else []
        steps.append(f"{names[one.label]}: {', '.join(told) or 'as it is'}")
    return f"cleaned ({'; '.join(steps)})" if steps else "not cleaned afterwards"


def _figures(facts: Mapping[str, Any]) -> str:
    metrics = facts.get("metrics", {})
    judged, names = metrics.get("case_dice", {}), metrics.get("structures", ())
    if not judged:
        return "None: no case was kept apart to judge by."
    rows = []
    for column, name in enumerate(names):
        scores = [float("nan") if row[column] is None else float(row[column]) for _, row in sorted(judged.items())]
        found = summarise(scores, sorted(judged), best=1.0)
        spread = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
        figures = [f"{value:.3f}" if value is not None else "" for value in (found.mean, found.median, found.worst)]
        rows.append((name, found.cases, figures[0], spread, *figures[1:]))
    header = ("structure", "cases", "mean Dice", "95 % interval", "median", "lowest")
    notes = "The interval is that of the mean over cases (bootstrap). Cases without the structure are not counted."
    return f"{table(header, rows)}\n\n{notes}"


def _limits(facts: Mapping[str, Any], plan: Plan, training: Mapping[str, Any]) -> list[str]:
    judged = len(facts.get("metrics", {}).get("case_dice", {}))
    lines = [
        "It has seen the kind of scan that it learnt from and no other: another scanner, protocol, age group or"
        " disease needs cases of its own to be judged by.",
        "The judged cases come from the same source as those it learnt from; elsewhere it is likely to do worse.",
    ]
    if 0 < judged < FEW_CASES:
        lines.append(f"The figures rest on {_count(judged, 'case')}; they are rough.")
    if training.get("started_from"):
        lines.append(
            f"It started from {text(training['started_from'])}, which may have learnt from cases that are judged here:"
            " the figures may be too good. Compare the two on new cases, as challenger and champion."
        )
    lines.append("A structure that the edge of the scan cuts off is measured as far as it is seen.")
    if max(plan.preprocess.spacing_mm) > ANISOTROPIC * min(plan.preprocess.spacing_mm):
        lines.append("Its grid is coarse along one axis; structures thinner than a slice may be missed.")
    return lines


def _provenance(facts: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    origin = facts.get("provenance", {})
    rows = [
        ("started from", training.get("started_from") or "nothing"),
        ("steps", training.get("steps", "")),
        ("minutes", f"{training['minutes']:.1f}" if "minutes" in training else ""),
        ("workers", _workers(training)),
        ("arithmetic", training.get("precision", "")),
        ("parameters", f"{training['parameters']:,}" if "parameters" in training else ""),
        ("program", f"vnet-cohort {origin.get('version', '')}".strip()),
        ("commit", origin.get("commit", "")),
        ("torch", origin.get("torch") or training.get("torch", "")),
        ("platform", training.get("platform", "")),
        ("model digest", origin.get("digest", "")),
        ("plan digest", facts["plan_digest"]),
        ("data digest", origin.get("data_digest", "")),
    ]
    lines = [f"- {name}: {code(value)}" for name, value in rows if value != ""]
    return "\n".join(lines)


def _workers(training: Mapping[str, Any]) -> str:
    """How many trained together; after interruptions how many from which step on."""
    attempts = training.get("attempts", ())
    if len(attempts) < 2:
        return str(training.get("workers", ""))
    return ", ".join(f"{attempt['workers']} from step {attempt['from_step']}" for attempt in attempts)


def _by(triple: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in triple)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
