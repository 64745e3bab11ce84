"""Stage ingest: look through the sources, read every new or changed case once, and give each a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.fingerprint import fingerprint
from vnet_core.geometry import check_label_grid
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan, Volume
from workers.cohort import (
    Case,
    Cohort,
    Entry,
    Verdict,
    check_name,
    entry_ids,
    known_entries,
    label_digest,
    load_cohort,
    remove_entry,
    save_cohort,
    save_entry,
    scan_channels,
    scan_label,
    source_digest,
    source_stamp,
    unnamed,
)
from workers.identity import Pseudonyms, private_root
from workers.ledger import Outcome, settle
from workers.sources.archives import PREFIX, archive_stem, is_archive, unpacked
from workers.sources.discover import checked, discover
from workers.sources.found import Discovery, Found
from workers.sources.mirrors import is_remote, mirrored
from workers.storage.store import Root

TWICE = "cohort.duplicate-case"
UNUSABLE = "label.unusable"
NOTED = ("label.several", "cohort.similar-id")
"""Warnings that a case has before it is read."""
AGAIN = ("scan.changed", "scan.missing", "scan.slow-reader", "scan.reader-memory", "label.values")
"""Refusals that may end without a change of the file, so the next ingest reads it again."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the caller gives; where empty, the sources' own are taken."""

    channels: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    reading: ReadingPlan | None = None
    """How files become volumes; None: as the cohort was read before, or by the defaults."""


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
    refused with its reason; the others go on. Of cases with the same bytes the first by id is kept. Cases that the
    sources no longer hold leave the cohort, and so do archives that no cohort names any more.

    Raises ConfigError ``cohort.empty`` when the sources hold no case at all.
    """
    check_name(name, "cohort")
    names = names or Names()
    before = _cohort_before(root, name)
    reading = names.reading or (before.reading if before else ReadingPlan())
    found, archives = _look_through(root, sources, names.channels, reading)
    if not found.cases:
        raise ConfigError("cohort.empty", f"no scan was found in {', '.join(sources)} ({found.ignored} other files)")
    known = known_entries(root, name)
    labels = names.labels or found.labels
    jobs = [executor.submit(_examine, case, known.get(case.id), labels, reading) for case in found.cases]
    entries, outcomes, unsettled = [], [], []
    for job in as_completed(jobs):
        entry, outcome, compared = job.result()
        if compared:
            unsettled.append(entry.case.id)
        elif entry != known.get(entry.case.id):
            save_entry(root, name, entry)
        entries.append(entry)
        outcomes.append(outcome)
        on_outcome(outcome)
    entries, outcomes = _once_each(entries, outcomes)
    for entry in entries:
        if entry.case.id in unsettled or entry.verdict.codes[:1] == (TWICE,):
            save_entry(root, name, entry)
    for gone in set(entry_ids(root, name)) - {case.id for case in found.cases}:
        remove_entry(root, name, gone)
    cohort = Cohort(
        name,
        tuple(sources),
        _channel_names(found, names, tuple(rule.channel for rule in reading.select)),
        labels or _label_names(entries),
        reading,
        dict(sorted(found.set_aside.items())),
        tuple(found.not_chosen),
        archives,
    )
    save_cohort(root, cohort)
    _remove_archives(root, before.archives if before else ())
    return cohort, sorted(outcomes, key=lambda outcome: outcome.case)


@dataclass(frozen=True, slots=True)
class Preview:
    """What an ingest of a cohort's sources would find, told by names, sizes and times without reading a scan."""

    new: tuple[str, ...]
    """Cases that the cohort does not have yet."""
    changed: tuple[str, ...]
    """Cases whose files are not those that were read."""
    unchanged: tuple[Entry, ...]
    """What the cohort knows of all others."""
    gone: tuple[str, ...]
    """Cases that the sources no longer hold."""


def preview(root: Root, name: str) -> Preview:
    """Look through the sources of a cohort and compare; nothing is read or written but archives that are new.

    ConfigError ``cohort.unknown``.
    """
    cohort = load_cohort(root, name)
    found, _ = _look_through(root, cohort.sources, cohort.channels, cohort.reading)
    known = known_entries(root, name)
    new, changed, unchanged = [], [], []
    for case in found.cases:
        entry = known.get(case.id)
        if entry is None:
            new.append(case.id)
        elif _is_unchanged(entry, case, cohort):
            unchanged.append(entry)
        else:
            changed.append(case.id)
    gone = set(entry_ids(root, name)) - {case.id for case in found.cases}
    return Preview(tuple(new), tuple(changed), tuple(unchanged), tuple(sorted(gone)))


def _is_unchanged(entry: Entry, found: Found, cohort: Cohort) -> bool:
    if found.problem:
        return entry.verdict.codes[:1] == (found.problem.code,)
    try:
        stamp = source_stamp(Case(found.id, found.channels, found.label), cohort.labels, cohort.reading)
    except ScanError as error:
        return entry.verdict.codes[:1] == (error.code,)
    return entry.stamp == stamp and _same_sources(entry, found)


def _cohort_before(root: Root, name: str) -> Cohort | None:
    """The cohort as the last ingest left it; None where there is none, or its private part is lost."""
    if not root.exists(f"cohorts/{name}/cohort.json"):
        return None
    try:
        return load_cohort(root, name)
    except StorageError as error:
        if error.code != "identity.no-private":
            raise
        return None


# --- sources


def _look_through(
    root: Root, sources: Sequence[str], channels: Sequence[str], reading: ReadingPlan
) -> tuple[Discovery, tuple[str, ...]]:
    """What the sources hold, and the keys of the archives that were unpacked for it."""
    ids = Pseudonyms.of(root)
    places, keys, refused = [], [], []
    for source in sources:
        path = mirrored(private_root(root), source) if is_remote(source) else Path(source)
        if not (path.exists() and is_archive(path)):
            places.append(str(path))
            continue
        try:
            folder = unpacked(private_root(root), path)
        except ScanError as error:
            refused.append(Found(ids.case(archive_stem(path)), (), problem=error))
        else:
            places.append(str(folder))
            keys.append(f"{PREFIX}/{folder.parent.name}")
    found = discover(places, channels, reading, ids, root.home)
    found.cases = checked([*found.cases, *refused]) if refused else found.cases
    return found, tuple(sorted(set(keys)))


def _remove_archives(root: Root, before: Sequence[str]) -> None:
    """Remove what this cohort had unpacked and no cohort names any more."""
    cohorts = [_cohort_before(root, name) for name in root.names("cohorts")]
    used = {key for cohort in cohorts if cohort for key in cohort.archives}
    for key in set(before) - used:
        private_root(root).delete(key)


def _channel_names(found: Discovery, names: Names, chosen: tuple[str, ...]) -> tuple[str, ...]:
    count = max(len(case.channels) for case in found.cases)
    channels = names.channels or chosen or found.channels or (("image",) if count <= 1 else ())
    channels = channels or tuple(f"channel-{i}" for i in range(count))
    if count and len(channels) != count:
        raise ConfigError(
            "cohort.channels", f"{len(channels)} channel names {channels} for cases with {count} channels; name each"
        )
    return channels


def _label_names(entries: Sequence[Entry]) -> tuple[Label, ...]:
    values = {v for e in entries if e.fingerprint for v in e.fingerprint.label_voxels if v > 0}
    return tuple(unnamed(value) for value in sorted(values))


# --- cases


def _examine(
    found: Found, known: Entry | None, labels: Sequence[Label], reading: ReadingPlan
) -> tuple[Entry, Outcome, bool]:
    """Read one case whole, unless its files are those of its known entry, and judge it.

    The last value says that the known entry was refused for another case with the same bytes, which is judged anew.
    """
    entry = Entry(
        Case(found.id, found.channels, found.label, found.patient),
        Verdict("refused"),
    )

    def judge() -> tuple:
        nonlocal entry
        if found.problem:
            raise found.problem
        case = entry.case
        stamp = source_stamp(case, labels, reading)
        if known and known.stamp == stamp and _same_sources(known, found):
            entry = _restored(known, found)
            if not entry.verdict.usable:
                raise ScanError(entry.verdict.codes[0], entry.verdict.message)
            return entry.verdict.state, None, entry.verdict.codes
        entry = replace(entry, stamp=stamp)
        entry = _read(entry, found, labels, reading)
        if source_stamp(case, labels, reading) != stamp:
            raise ScanError(
                "scan.changed", "the file changed while it was read; run vnet ingest again when it is whole"
            )
        return entry.verdict.state, None, entry.verdict.codes

    outcome = settle("ingest", found.id, judge)
    if outcome.state in ("refused", "failed"):
        # what may end well without a change of the file is read again next time
        lasting = outcome.state == "refused" and outcome.codes[0] not in AGAIN
        verdict = Verdict("refused", outcome.codes, outcome.message)
        entry = replace(entry, verdict=verdict, fingerprint=None, stamp=entry.stamp if lasting else "")
        outcome = replace(outcome, state="refused")
    else:
        outcome = replace(outcome, message=entry.verdict.message)
    return entry, outcome, known is not None and known.verdict.codes[:1] == (TWICE,)


def _same_sources(known: Entry, found: Found) -> bool:
    """Whether a known entry stands for the same files, and what was noted of them while looking."""
    noted = [code for code in known.verdict.codes if code in NOTED]
    accepted = known.verdict.usable or known.verdict.codes[:1] == (TWICE,)
    label = found.label if UNUSABLE in known.verdict.codes else known.case.label
    same = (known.case.channels, label) == (found.channels, found.label)
    return same and (noted == list(found.warnings) or not accepted)


def _restored(known: Entry, found: Found) -> Entry:
    """The known entry as it was before it was compared with the other cases."""
    entry = replace(known, case=replace(known.case, patient=found.patient))
    if known.verdict.codes[:1] == (TWICE,):
        return replace(entry, verdict=_accepted(known.verdict.codes[1:], ""))
    return entry


def _accepted(warnings: Sequence[str], message: str) -> Verdict:
    codes = tuple(dict.fromkeys(warnings))
    return Verdict("warned" if codes else "accepted", codes, message)


def _once_each(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> tuple[list[Entry], list[Outcome]]:
    """The same, but that of usable cases with the same bytes all but the first by id are refused."""
    first: dict[str, str] = {}
    twice: dict[str, Verdict] = {}
    for entry in sorted((e for e in entries if e.verdict.usable), key=lambda entry: entry.case.id):
        kept = first.setdefault(entry.case.digest, entry.case.id)
        if kept != entry.case.id:
            message = f"the same bytes are already in the cohort as case {kept}; remove one of them"
            twice[entry.case.id] = Verdict("refused", (TWICE, *entry.verdict.codes), message)
    return (
        [replace(e, verdict=twice[e.case.id]) if e.case.id in twice else e for e in entries],
        [
            replace(o, state="refused", codes=v.codes, message=v.message) if (v := twice.get(o.case)) else o
            for o in outcomes
        ],
    )


def _read(entry: Entry, found: Found, labels: Sequence[Label], reading: ReadingPlan) -> Entry:
    """The entry with digests, geometry and fingerprint; ScanError says why the case can't be used."""
    case, message = entry.case, ""
    scan = scan_channels(case.channels, reading)
    warnings = [*found.warnings, *scan.warnings]
    label = None
    if case.label:
        try:
            label, noted = _label_of(case.label, scan, labels, reading)
            warnings += noted
        except ScanError as error:
            if not found.refers:
                raise
            case = replace(case, label=None)
            warnings.append(UNUSABLE)
            message = f"the segmentation that refers to this scan was not taken ({error.code}): {error.message}"
    case = replace(
        case,
        digest=source_digest(case.channels, reading),
        label_digest=label_digest(case.label, labels) if case.label else None,
        geometry=scan.volume.geometry,
    )
    return Entry(case, _accepted(warnings, message), fingerprint(scan.volume, label), entry.stamp)


def _label_of(source: str, scan: Scan, labels: Sequence[Label], reading: ReadingPlan) -> tuple[Volume, list[str]]:
    """The label of a scan, with warnings; ScanError where it does not belong to the scan or to the cohort."""
    label = scan_label(source, scan.volume.geometry, labels, reading)
    if label.frame and scan.frame and label.frame != scan.frame:
        raise ScanError(
            "cohort.frames",
            "label and image have 2 frames of reference, so equal coordinates are not equal places; take the label that"
            " was drawn on this image",
        )
    check_label_grid(scan.volume.geometry, label.volume.geometry)
    found, named = set(np.unique(label.volume.labels).tolist()), {one.value for one in labels}
    if named and (unknown := found - named - {0}):
        raise ScanError(
            "label.values",
            f"the label holds the values {sorted(unknown)}, the cohort's are {sorted(named)}; relabel it or name them",
        )
    return label.volume, [*label.warnings, *([] if found - {0} else ["label.empty"])]
