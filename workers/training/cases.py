"""Which cases of a cohort a network can learn from, and what their label maps hold."""

from __future__ import annotations

from collections.abc import Sequence

from vnet_core.errors import TrainingError
from vnet_core.plan import Plan
from workers.cohort import Entry, volume_key
from workers.storage.store import Root


def usable_cases(root: Root, entries: Sequence[Entry], plan: Plan) -> list[Entry]:
    """Entries with a label and a finished volume; TrainingError when nothing can be learnt from them."""
    labelled = [e for e in entries if e.verdict.usable and e.case.label_digest]
    usable = [e for e in labelled if root.receipt(volume_key(e.case, plan))]
    if not usable:
        raise TrainingError(
            "train.no-labels",
            f"{len(entries)} cases, {len(labelled)} with a usable label, 0 of them preprocessed; add labels or run"
            " vnet preprocess",
        )
    cases = _label_cases(usable)
    names = {label.value: label.name for label in plan.labels}
    absent = [value for value in names if not cases.get(value)]
    if len(absent) == len(names):
        raise TrainingError(
            "train.no-foreground",
            f"none of the labels {sorted(names)} occurs in any of {len(usable)} cases; correct plan.labels",
        )
    if absent:
        missing = ", ".join(f"{value} ({names[value]})" for value in absent)
        raise TrainingError(
            "train.absent-label",
            f"label {missing} occurs in 0 of {len(usable)} cases, so it cannot be learnt; take it out of plan.labels or"
            " add cases that have it",
        )
    named = {0, *names, plan.ignore_label}
    if plan.other_labels == "refuse" and (others := [v for v in cases if v not in named]):
        where = ", ".join(f"{value} in {cases[value]}" for value in sorted(others))
        raise TrainingError(
            "train.label-value",
            f"the label maps hold values that the plan does not name ({where} of {len(usable)} cases; it names"
            f' {sorted(names)}); name them in labels, or set other_labels = "background"',
        )
    return usable


def _label_cases(entries: Sequence[Entry]) -> dict[int, int]:
    """In how many cases each label value occurs."""
    counts: dict[int, int] = {}
    for entry in entries:
        for value, number in (entry.fingerprint.label_cases if entry.fingerprint else {}).items():
            counts[value] = counts.get(value, 0) + number
    return counts


def class_voxels(entries: Sequence[Entry], plan: Plan) -> list[int]:
    """Voxels of background, which takes in values that the plan does not name, and of each label."""
    values = [label.value for label in plan.labels]
    voxels = [0] * (len(values) + 1)
    for entry in entries:
        for value, number in (entry.fingerprint.label_voxels if entry.fingerprint else {}).items():
            if value in values:
                voxels[values.index(value) + 1] += number
            elif value != plan.ignore_label:
                voxels[0] += number
    return voxels


def component_volumes_ml(entries: Sequence[Entry], plan: Plan) -> dict[int, list[float]]:
    """Volumes in mL of the true components of each label."""
    volumes: dict[int, list[float]] = {label.value: [] for label in plan.labels}
    for entry in entries:
        for value, parts_ml in (entry.fingerprint.component_ml if entry.fingerprint else {}).items():
            if value in volumes:
                volumes[value] += parts_ml
    return volumes
