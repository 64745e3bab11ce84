"""Stage ingest: look through the sources, read every new or changed case once, and give each a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace

import numpy as np

from vnet_core.errors import ConfigError, ScanError
from vnet_core.fingerprint import fingerprint
from vnet_core.plan import Label
from vnet_core.preprocess import check_label_grid
from workers.cohort import (
    Case,
    Cohort,
    Entry,
    Verdict,
    check_name,
    load_entry,
    read_channels,
    remove_entry,
    save_cohort,
    save_entry,
    source_digest,
    source_stamp,
)
from workers.discover import Discovery, Found, discover
from workers.ledger import Outcome, settle
from workers.scans import read_label
from workers.store import Root


@dataclass(frozen=True, slots=True)
class Names:
    """Names that the caller gives; where empty, the sources' own are taken."""

    channels: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()


def ingest(
    root: Root,
    name: str,
    sources: Sequence[str],
    executor: Executor,
    names: Names | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Cohort, list[Outcome]]:
    """Make or refresh the cohort ``name`` from its sources and give every case an entry in the root.

    A case whose files have the size and time of the last ingest is not read again. A case that can't be used is
    refused with its reason; the others go on. Cases that the sources no longer hold leave the cohort.

    Raises ConfigError ``cohort.empty`` when the sources hold no case at all.
    """
    check_name(name, "cohort")
    names = names or Names()
    found = discover(sources, names.channels)
    if not found.cases:
        raise ConfigError("cohort.empty", f"no scan was found in {', '.join(sources)} ({found.ignored} other files)")
    before = {n.removesuffix(".json") for n in root.names(f"cohorts/{name}/cases")}
    known_labels = {label.value for label in names.labels or found.labels}
    jobs = {
        executor.submit(
            _examine, case, load_entry(root, name, case.id) if case.id in before else None, known_labels
        ): case
        for case in found.cases
    }
    entries, outcomes = [], []
    for job in as_completed(jobs):
        entry, outcome = job.result()
        save_entry(root, name, entry)
        entries.append(entry)
        outcomes.append(outcome)
        on_outcome(outcome)
    for gone in before - {case.id for case in found.cases}:
        remove_entry(root, name, gone)
    cohort = Cohort(
        name, tuple(sources), _channel_names(found, names), names.labels or found.labels or _label_names(entries)
    )
    save_cohort(root, cohort)
    return cohort, sorted(outcomes, key=lambda outcome: outcome.case)


def _channel_names(found: Discovery, names: Names) -> tuple[str, ...]:
    count = max(len(case.channels) for case in found.cases)
    channels = names.channels or found.channels or (("image",) if count == 1 else ())
    channels = channels or tuple(f"channel-{i}" for i in range(count))
    if len(channels) != count:
        raise ConfigError(
            "cohort.channels", f"{len(channels)} channel names {channels} for cases with {count} channels; name each"
        )
    return channels


def _label_names(entries: Sequence[Entry]) -> tuple[Label, ...]:
    values = {v for e in entries if e.fingerprint for v in e.fingerprint.label_voxels if v > 0}
    return tuple(Label(value=value, name=f"label-{value}") for value in sorted(values))


def _examine(found: Found, known: Entry | None, label_values: set[int]) -> tuple[Entry, Outcome]:
    """Read one case whole, unless its files are those of its known entry, and judge it."""
    entry = Entry(
        Case(found.id, found.channels, found.label, found.patient),
        Verdict("refused"),
    )

    def judge() -> tuple:
        nonlocal entry
        if found.problem:
            raise found.problem
        sources = [*found.channels, *([found.label] if found.label else [])]
        stamp = source_stamp(sources)
        if known and known.stamp == stamp and known.case.label == found.label:
            case = replace(known.case, patient=found.patient)
            entry = replace(known, case=case)
            if not known.verdict.usable:
                raise ScanError(known.verdict.codes[0], known.verdict.message)
            return known.verdict.state, None, known.verdict.codes
        entry = replace(entry, stamp=stamp)
        entry = _read(entry, label_values)
        return entry.verdict.state, None, entry.verdict.codes

    outcome = settle("ingest", found.id, judge)
    if outcome.state in ("refused", "failed"):
        # what failed for another reason than the scan itself is read again next time
        stamp = entry.stamp if outcome.state == "refused" else ""
        verdict = Verdict("refused", outcome.codes, outcome.message)
        entry = replace(entry, verdict=verdict, fingerprint=None, stamp=stamp)
        outcome = replace(outcome, state="refused")
    return entry, outcome


def _read(entry: Entry, label_values: set[int]) -> Entry:
    """The entry with digests, geometry and fingerprint; ScanError says why the case can't be used."""
    case = entry.case
    image = read_channels(case.channels)
    label = read_label(case.label) if case.label else None
    warnings = []
    if label is not None:
        check_label_grid(image.geometry, label.geometry)
        unknown = set(np.unique(label.labels).tolist()) - label_values - {0}
        if label_values and unknown:
            raise ScanError(
                "label.values",
                f"the label holds the values {sorted(unknown)}, the cohort's are {sorted(label_values)}; relabel it or"
                " name them",
            )
        if not label.labels.any():
            warnings.append("label.empty")
    case = replace(
        case,
        digest=source_digest(case.channels),
        label_digest=source_digest([case.label]) if case.label else None,
        geometry=image.geometry,
    )
    return Entry(
        case, Verdict("warned" if warnings else "accepted", tuple(warnings)), fingerprint(image, label), entry.stamp
    )
