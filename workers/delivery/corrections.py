"""Masks that people have corrected or confirmed, and the manifest that hands them to training.

In the private folder, because the manifest tells where scans lie:

corrections/<cohort>/<case>/mask.nii.gz       label values of the plan, on the scan's own grid
corrections/<cohort>/<case>/correction.json   who, when, and of which bytes of the scan
training/<cohort>.csv                         a manifest for ``vnet ingest``
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.geometry import check_label_grid
from vnet_core.plan import Label, Plan
from vnet_core.volume import Volume
from workers.cohort import Cohort, Entry, known_entry, load_cohort, scan_label
from workers.identity import private_root, put_private
from workers.nights.decisions import Decision, all_decisions, latest
from workers.registry.models import load_model
from workers.segmentation.masks import load_report, mask_file, written
from workers.sources.scans import write_label
from workers.storage.store import Root

Kind = Literal["corrected", "confirmed"]
MASK = "mask.nii.gz"


@dataclass(frozen=True, slots=True)
class Correction:
    """A mask that a person vouches for."""

    case: str
    kind: Kind
    """``confirmed``: the model's own mask, as it is."""
    key: str
    """The result that was looked at."""
    case_digest: str
    """SHA-256 of the scan's bytes: of other bytes it says nothing."""
    model: str
    by: str
    at: str
    """ISO 8601."""
    voxels: dict[str, int] = field(default_factory=dict)
    """By name of the label."""


@dataclass(frozen=True, slots=True)
class Training:
    """The training manifest of a cohort."""

    path: Path | None
    """A file for ``vnet ingest``; None while there is no case for it."""
    cases: tuple[str, ...]
    outdated: tuple[str, ...]
    """Cases whose scan has changed since its mask was corrected, has left the cohort, or lies under a name that is no
    UTF-8: not in the manifest."""


def correct(root: Root, cohort: str, decision: Decision, mask: str | Path, allow_empty: bool = False) -> Correction:
    """Check a corrected mask, keep a private copy, and add the case to the training manifest.

    ``decision`` says of which result it is the correction, who made it and when. The mask has the values that
    delivered masks have; the copy has those of the model's plan.

    ``ScanError``: what reading gives, ``label.grid`` on another grid than the scan's, ``correction.values`` for a value
    that is none of the plan's, ``correction.empty`` for a mask without a voxel unless ``allow_empty``, and
    ``correction.unchanged`` for the model's own mask. Other errors: :func:`confirm`.
    """
    looked_at = _looked_at(root, cohort, decision)
    volume = _read(str(mask), looked_at)
    if not allow_empty and not volume.labels.any():
        raise ScanError(
            "correction.empty",
            "the corrected mask has no voxel of any label; if the scan really holds none, say so with --empty",
        )
    if np.array_equal(volume.labels, _own(root, looked_at, decision.key).labels):
        raise ScanError(
            "correction.unchanged",
            "the corrected mask is the model's own, voxel by voxel; save the correction and name that file, or confirm"
            " the mask with --as-is",
        )
    return _keep(root, cohort, looked_at, decision, volume, "corrected")


def confirm(root: Root, cohort: str, decision: Decision) -> Correction:
    """Take the model's own mask as the truth and add the case to the training manifest.

    ConfigError ``correction.outdated`` when the scan has other bytes than the result was made of, ``correction.case``
    when the cohort does not hold the case, ``correction.merged`` when the plan writes several labels with one value.
    """
    looked_at = _looked_at(root, cohort, decision)
    return _keep(root, cohort, looked_at, decision, _own(root, looked_at, decision.key), "confirmed")


def corrections(root: Root, cohort: str) -> list[Correction]:
    """All corrections of a cohort, by case."""
    private = private_root(root)
    return [
        Correction(**private.get_json(key))
        for case in private.names(f"corrections/{cohort}")
        if private.exists(key := f"corrections/{cohort}/{case}/correction.json")
    ]


def wanted(root: Root, cohort: str) -> list[Decision]:
    """Decisions to train on a case whose correction is still missing, by case."""
    there = {(found.case, found.key) for found in corrections(root, cohort)}
    last = [found[-1] for _, found in sorted(all_decisions(root, cohort).items())]
    return [one for one in last if one.choice == "train" and (one.case, one.key) not in there]


def training_manifest(root: Root, cohort: str) -> Training:
    """Write the training manifest anew, of every correction that its scan still fits.

    Call it before training: scans may have moved or changed since the last correction.
    """
    private, loaded = private_root(root), load_cohort(root, cohort)
    rows, outdated = [], []
    for correction in corrections(root, cohort):
        entry = known_entry(root, cohort, correction.case)
        if not _stands(root, cohort, correction):
            continue
        if entry is None or entry.case.digest != correction.case_digest or not _writable(entry):
            outdated.append(correction.case)
            continue
        label = private.home / _folder(cohort, correction.case) / MASK
        rows.append([correction.case, *entry.case.channels, str(label), entry.case.patient or ""])
    key = f"training/{cohort}.csv"
    if not rows:
        private.delete(key)
        return Training(None, (), tuple(outdated))
    _put_private(private, key, _csv([_columns(loaded), *rows]))
    return Training(private.home / key, tuple(row[0] for row in rows), tuple(outdated))


def _stands(root: Root, cohort: str, correction: Correction) -> bool:
    """A mask that a person has corrected stays true; one that was confirmed is until somebody says otherwise."""
    if correction.kind == "corrected":
        return True
    decision = latest(root, cohort, correction.case, correction.key)
    return decision is None or decision.review == "accepted"


def _writable(entry: Entry) -> bool:
    """Whether a manifest, which is UTF-8, can tell where the scan lies."""
    try:
        "".join(entry.case.channels).encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(cohort: Cohort) -> list[str]:
    images = ["image"] if len(cohort.channels) == 1 else [f"image_{channel}" for channel in cohort.channels]
    return ["case", *images, "label", "patient"]


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue().encode()


# --- one mask


@dataclass(frozen=True, slots=True)
class _LookedAt:
    """What a result was made of."""

    entry: Entry
    plan: Plan
    model: str
    cohort: Cohort


def _looked_at(root: Root, cohort: str, decision: Decision) -> _LookedAt:
    entry, receipt = known_entry(root, cohort, decision.case), root.receipt(decision.key)
    if entry is None or entry.case.geometry is None:
        raise ConfigError(
            "correction.case", f"cohort {cohort} does not hold case {decision.case}; run vnet ingest, or correct --case"
        )
    if receipt is None:
        raise StorageError("store.missing", f"{decision.key} is not finished; run the night again")
    if receipt["case_digest"] != entry.case.digest:
        raise ConfigError(
            "correction.outdated",
            f"the scan of case {decision.case} has changed since this mask was made; run vnet nightly and review the"
            " new mask",
        )
    model = load_report(root, decision.key)["model"]
    return _LookedAt(entry, load_model(root, model).plan, model, load_cohort(root, cohort))


def _read(source: str, looked_at: _LookedAt) -> Volume:
    """A mask with the values that masks are written with, on the scan's grid, with the plan's values."""
    geometry, plan = looked_at.entry.case.geometry, looked_at.plan
    assert geometry is not None, "checked when the result was looked at"
    back, labels = _back(plan)
    volume = scan_label(source, geometry, labels, looked_at.cohort.reading).volume
    check_label_grid(geometry, volume.geometry)
    found = set(np.unique(volume.labels).tolist())
    if unknown := found - set(back):
        raise ScanError(
            "correction.values",
            f"the mask holds the values {sorted(unknown)}, the model's are {sorted(set(back) - {0})}; relabel it",
        )
    table = np.zeros(max(back) + 1, np.uint8 if max(back.values()) <= 255 else np.uint16)
    for told, value in back.items():
        table[told] = value
    return Volume(table[volume.labels][None], geometry)


def _own(root: Root, looked_at: _LookedAt, key: str) -> Volume:
    """The model's own mask, from the file that every result has."""
    with root.at_hand(f"{key}/{mask_file('ome-zarr')}") as path:
        return _read(str(path), looked_at)


def _back(plan: Plan) -> tuple[dict[int, int], tuple[Label, ...]]:
    """The plan's value by the value that it is written with, and the labels as they are written."""
    _, labels = written(np.zeros((1, 1, 1), np.uint8), plan.labels, plan.output)
    told = {label.value: plan.output.values.get(label.name, label.value) for label in plan.labels}
    if len(set(told.values()) | {0}) != len(told) + 1:
        raise ConfigError(
            "correction.merged",
            f"the plan writes {len(told)} labels with {len(set(told.values()) - {0})} values, so a written mask does"
            " not tell them apart; train without output.values and segment again",
        )
    return {0: 0} | {target: value for value, target in told.items()}, labels


def _keep(root: Root, cohort: str, looked_at: _LookedAt, decision: Decision, volume: Volume, kind: Kind) -> Correction:
    private, folder = private_root(root), _folder(cohort, decision.case)
    names = {label.value: label.name for label in looked_at.plan.labels}
    values, counts = np.unique(volume.labels, return_counts=True)
    correction = Correction(
        decision.case,
        kind,
        decision.key,
        looked_at.entry.case.digest,
        looked_at.model,
        decision.by,
        decision.at,
        {names[v]: c for v, c in zip(values.tolist(), counts.tolist(), strict=True) if v},
    )
    with tempfile.TemporaryDirectory(dir=private.home, prefix=".correction-") as temporary:
        path = Path(temporary, MASK)
        write_label(path, volume.labels, volume.geometry)
        content = path.read_bytes()
    # without its record a mask counts for nothing, and the record of an earlier one is no longer true
    private.delete(f"{folder}/correction.json")
    _put_private(private, f"{folder}/{MASK}", content)
    put_private(private, f"{folder}/correction.json", asdict(correction))
    training_manifest(root, cohort)
    return correction


def _put_private(private: Root, key: str, content: bytes) -> None:
    """Write a file for its owner alone, in folders that are for their owner alone."""
    folder = private.home
    for part in key.split("/")[:-1]:
        folder /= part
        folder.mkdir(mode=0o700, exist_ok=True)
    private.put(key, content)


def _folder(cohort: str, case: str) -> str:
    return f"corrections/{cohort}/{case}"
