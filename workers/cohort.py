"""Cohorts in the storage root: which cases there are, what was found of each, and where their results lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vnet_core import fingerprint as fp
from vnet_core import geometry as geo
from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.fingerprint import Fingerprint
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Plan, digest_of
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan, Volume
from workers.identity import NAME, get_private, private_root, put_private
from workers.identity import safe_id as safe_id
from workers.ledger import State
from workers.sources.found import NotChosen
from workers.sources.reading import read_label_scan_apart, read_scan_apart
from workers.sources.scans import is_scan, source_files
from workers.storage.store import Root, file_digest


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to segment."""

    id: str
    channels: tuple[str, ...] = field(repr=False)
    """One source per channel: a file, or a folder of DICOM slices. Like the label's, it may name the patient, so that
    what prints cases does not print it."""
    label: str | None = field(default=None, repr=False)
    """Source of the true labels, when known."""
    patient: str | None = None
    """Pseudonym; cases of one patient never fall on both sides of a split."""
    digest: str = ""
    """SHA-256 over the bytes of all channels."""
    label_digest: str | None = None
    """SHA-256 of the label's bytes."""
    geometry: Geometry | None = None
    """Grid of the first channel; None when the case was refused."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a case can be used."""

    state: State
    codes: tuple[str, ...] = ()
    message: str = ""

    @property
    def usable(self) -> bool:
        """Accepted, with or without warnings."""
        return self.state != "refused"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a cohort knows of a case."""

    case: Case
    verdict: Verdict
    fingerprint: Fingerprint | None = None
    stamp: str = ""
    """Paths, sizes and times of modification when the bytes were last read; equal stamps are not read again."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """A named set of cases and where they come from."""

    name: str
    sources: tuple[str, ...] = field(repr=False)
    """Folders, files and manifests that are looked through at every ingest."""
    channels: tuple[str, ...]
    """Names of the input channels."""
    labels: tuple[Label, ...]
    """Names of the label values; empty when no case has a label."""
    reading: ReadingPlan = field(default_factory=ReadingPlan)
    """How its files become volumes."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """What the sources hold that is no case, by reason."""
    not_chosen: tuple[NotChosen, ...] = ()
    """Series of studies that became no channel."""
    archives: tuple[str, ...] = ()
    """Keys of the archives that were unpacked for it."""


def check_name(name: str, what: str) -> str:
    """The name, or ConfigError ``<what>.name`` when it cannot be a folder."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{what}.name", f"{what} name {name!r} must match {NAME.pattern}; use letters and digits")
    return name


def save_cohort(root: Root, cohort: Cohort) -> None:
    """Write the cohort's manifest; its sources, which may name patients, into the private folder."""
    mapping = asdict(cohort)
    mapping["labels"] = [label.model_dump() for label in cohort.labels]
    mapping["reading"] = cohort.reading.model_dump(mode="json")
    key = f"cohorts/{cohort.name}/cohort.json"
    put_private(private_root(root), key, {"sources": mapping.pop("sources")})
    root.put_json(key, mapping)


def load_cohort(root: Root, name: str) -> Cohort:
    """Read the manifest; ConfigError ``cohort.unknown`` names the cohorts that exist; ``cohort.unfinished``: the
    first ingest of this one has not ended.

    StorageError ``identity.no-private`` when its sources are not in the private folder.
    """
    key = f"cohorts/{check_name(name, 'cohort')}/cohort.json"
    try:
        mapping = root.get_json(key)
    except StorageError as error:
        if error.code != "store.missing":
            raise
        raise _missing(root, name) from None
    return Cohort(
        mapping["name"],
        tuple(get_private(private_root(root), key)["sources"]),
        tuple(mapping["channels"]),
        tuple(Label(**label) for label in mapping["labels"]),
        ReadingPlan(**mapping.get("reading", {})),
        mapping.get("set_aside", {}),
        tuple(NotChosen(**series) for series in mapping.get("not_chosen", ())),
        tuple(mapping.get("archives", ())),
    )


def _missing(root: Root, name: str) -> ConfigError:
    """Why a cohort has no manifest: it is written when the ingest is over."""
    known = root.names("cohorts")
    if name in known:
        return ConfigError(
            "cohort.unfinished",
            f"the first ingest of cohort {name!r} in {root.shown} has not ended; wait for it, or run vnet ingest SOURCE"
            " --cohort again",
        )
    return ConfigError(
        "cohort.unknown",
        f"there is no cohort {name!r} in {root.shown} (known: {', '.join(known) or 'none'}); make it with vnet ingest"
        " SOURCE --cohort",
    )


def save_entry(root: Root, cohort: str, entry: Entry) -> None:
    """Write one case's entry; where its files lie, and the stamp made of that, into the private folder."""
    case = asdict(replace(entry.case, geometry=None))
    case["geometry"] = geo.to_mapping(entry.case.geometry) if entry.case.geometry else None
    key = _entry_key(cohort, entry.case.id)
    private = {"channels": case.pop("channels"), "label": case.pop("label"), "stamp": entry.stamp}
    put_private(private_root(root), key, private)
    root.put_json(
        key,
        {
            "case": case,
            "verdict": asdict(entry.verdict),
            "fingerprint": fp.to_mapping(entry.fingerprint) if entry.fingerprint else None,
        },
    )


def load_entry(root: Root, cohort: str, case_id: str) -> Entry:
    """Read one case's entry; StorageError ``identity.no-private`` when the private folder does not hold its part."""
    return _load(root, private_root(root), _entry_key(cohort, case_id))


def known_entry(root: Root, cohort: str, case_id: str) -> Entry | None:
    """The case's entry, or None when the root or the private folder does not hold it."""
    return _known(root, private_root(root), _entry_key(cohort, case_id))


def known_entries(root: Root, cohort: str) -> dict[str, Entry]:
    """All entries of a cohort by case id, without those whose private part is lost."""
    private, ids = private_root(root), entry_ids(root, cohort)
    return {case: entry for case in ids if (entry := _known(root, private, _entry_key(cohort, case)))}


def entry_ids(root: Root, cohort: str) -> list[str]:
    """Ids of all cases of a cohort."""
    return [name.removesuffix(".json") for name in root.names(f"cohorts/{cohort}/cases")]


def _known(root: Root, private: Root, key: str) -> Entry | None:
    try:
        return _load(root, private, key)
    except StorageError as error:
        if error.code not in ("store.missing", "identity.no-private"):
            raise
        return None


def _load(root: Root, private_parts: Root, key: str) -> Entry:
    mapping, private = root.get_json(key), get_private(private_parts, key)
    case, verdict = mapping["case"], mapping["verdict"]
    case |= {"channels": tuple(private["channels"]), "label": private["label"]}
    case["geometry"] = geo.from_mapping(case["geometry"]) if case["geometry"] else None
    return Entry(
        Case(**case),
        Verdict(verdict["state"], tuple(verdict["codes"]), verdict["message"]),
        fp.from_mapping(mapping["fingerprint"]) if mapping["fingerprint"] else None,
        private["stamp"],
    )


def load_entries(root: Root, cohort: str) -> list[Entry]:
    """All entries of a cohort, by case id."""
    private = private_root(root)
    return [_load(root, private, _entry_key(cohort, case)) for case in entry_ids(root, cohort)]


def remove_entry(root: Root, cohort: str, case_id: str) -> None:
    """Forget a case that its sources no longer hold; its results stay."""
    root.delete(_entry_key(cohort, case_id))
    private_root(root).delete(_entry_key(cohort, case_id))


def _entry_key(cohort: str, case_id: str) -> str:
    return f"cohorts/{cohort}/cases/{case_id}.json"


def volume_key(case: Case, plan: Plan) -> str:
    """Where a case's preprocessed volume lies: decided by its bytes and the preprocessing part of the plan."""
    return f"volumes/{digest_of([case.digest, case.label_digest, plan.volume_digest])[:40]}"


def scan_key(volume: str) -> str:
    """Where the scan of a volume lies while several workers prepare stretches of it."""
    return f"{volume}.scan"


def volume_geometry(root: Root, key: str) -> Geometry:
    """The network's grid of a finished volume."""
    receipt = root.receipt(key)
    assert receipt is not None, f"{key} is not finished"
    return geo.from_mapping(receipt["geometry"])


def result_key(cohort: str, case: Case, plan: Plan, model_digest: str) -> str:
    """Where a case's mask and report lie: decided by its bytes, the plan and the model."""
    # the label does not decide a mask
    parts = [case.digest, plan.volume_digest, model_digest, plan.inference.model_dump(mode="json")]
    return f"results/{cohort}/{case.id}/{digest_of(parts)[:40]}"


def check_reading(cohort: Cohort, plan: Plan) -> None:
    """ConfigError ``plan.reading`` when the plan reads files differently than they were read at ingest.

    Rules of selection may differ: they say which series is which channel, and change no voxel.
    """
    read, wanted = (_settings(reading) for reading in (cohort.reading, plan.reading))
    differing = [name for name in read if read[name] != wanted[name]]
    if differing:
        raise ConfigError(
            "plan.reading",
            f"cohort {cohort.name} was read with "
            + ", ".join(f"reading.{name} = {read[name]!r} (the plan has {wanted[name]!r})" for name in differing)
            + "; run vnet ingest again with --plan, or take a model that was trained with these settings",
        )


def _settings(reading: ReadingPlan) -> dict[str, Any]:
    """Settings that decide voxels and grids."""
    return reading.model_dump(mode="json", exclude={"select"})


def scan_channels(sources: Sequence[str], reading: ReadingPlan) -> Scan:
    """All channels of a case, voxels (C, Z, Y, X), on the grid of the first one.

    Each is read in a process of its own kind: a crash, a hang or hunger for memory is a refusal. ``ScanError``: what
    reading gives, ``cohort.frames`` where channels have different frames of reference, ``cohort.channel-grid`` where
    their grids differ and ``reading`` does not allow to resample.
    """
    scans = [read_scan_apart(source, reading) for source in sources]
    frames = {scan.frame for scan in scans} - {""}
    if len(frames) > 1:
        raise ScanError(
            "cohort.frames",
            f"the {len(scans)} channels have {len(frames)} frames of reference, so equal coordinates are not equal"
            " places; register them onto one another first",
        )
    codes = [code for scan in scans for code in scan.warnings]
    volumes = [scan.volume for scan in scans]
    first = volumes[0].geometry
    for number, volume in enumerate(volumes):
        if geo.same_grid(first, volume.geometry):
            continue
        if reading.channel_grids == "refuse":
            raise ScanError(
                "cohort.channel-grid",
                f"channel {number} has shape {volume.geometry.shape} and spacing {volume.geometry.spacing_mm} mm,"
                f" channel 0 {first.shape} and {first.spacing_mm} mm at its own place; set reading.channel_grids ="
                ' "resample", or resample them onto one grid',
            )
        from vnet_core.straighten import onto  # brings torch in, which few cases need

        volumes[number] = onto(volume, first)
        codes.append("cohort.channels-resampled")
    burnt_in = any(scan.burnt_in for scan in scans)
    if burnt_in:
        codes.append("dicom.burnt-in")
    voxels = np.concatenate([v.voxels for v in volumes]) if len(volumes) > 1 else volumes[0].voxels
    return Scan(Volume(voxels, first), tuple(dict.fromkeys(codes)), min(frames, default=""), burnt_in)


def read_channels(sources: Sequence[str], reading: ReadingPlan | None = None) -> Volume:
    """The voxels of :func:`scan_channels`."""
    return scan_channels(sources, reading or ReadingPlan()).volume


def unnamed(value: int) -> Label:
    """The label of a value that nobody has named."""
    return Label(value=value, name=f"label-{value}")


def scan_label(source: str, image: Geometry, labels: Sequence[Label], reading: ReadingPlan) -> Scan:
    """The true labels of a case whose image has the grid ``image``, read apart; ``ScanError``: what reading gives.

    The structures of a DICOM segmentation become the ``labels`` of their name or code. Where the cohort names none, a
    single structure is label 1; several are refused, ``label.unnamed``, since files number them as they like.
    """
    names = _names(labels)
    scan = read_label_scan_apart(source, image, names, reading)
    if not names and _by_name(source) and (largest := int(scan.volume.voxels.max())) > 1:
        raise ScanError(
            "label.unnamed",
            f"the file holds {largest} structures and the cohort names none; name them with --label VALUE=NAME or in"
            " the plan",
        )
    return scan


def label_digest(source: str, labels: Sequence[Label]) -> str:
    """SHA-256 of what decides a label map: its bytes, and the names of labels where the file has names."""
    names = [label.model_dump(mode="json") for label in _names(labels)] if _by_name(source) else []
    return digest_of([source_digest([source]), names]) if names else source_digest([source])


def _names(labels: Sequence[Label]) -> Sequence[Label]:
    return labels if any(label != unnamed(label.value) for label in labels) else ()


def _by_name(source: str) -> bool:
    """Whether labels are told by their names: DICOM segmentations and contours, which are single files."""
    path = Path(source)
    return path.is_file() and not is_scan(path)


def source_digest(sources: Sequence[str], reading: ReadingPlan | None = None) -> str:
    """SHA-256 of what decides the voxels of the sources, in order.

    That is the SHA-256 of every file, of a DICOM series whatever its files are called, which part of them a source
    names, and the settings of ``reading`` that are not the default.
    """
    parts = []
    for source in sources:
        digests = [file_digest(path) for path in source_files(source)]
        parts.append([*(sorted(digests) if "#" in source else digests), *_part(source)])
    usual = _settings(ReadingPlan())
    changed = {k: v for k, v in _settings(reading or ReadingPlan()).items() if v != usual[k]}
    return digest_of([parts, changed] if changed else parts)


def _part(source: str) -> list[str]:
    """What a source takes of its files, where that is not all: ``FOLDER#UID/PART`` and ``FILE[CHANNEL]``."""
    series = source.rpartition("#")[2] if "#" in source else ""
    channel = re.search(r"\[\d+\]$", source)
    return [series.partition("/")[2]] if "/" in series else [channel[0]] if channel else []


def source_stamp(case: Case, labels: Sequence[Label], reading: ReadingPlan) -> str:
    """Digest of path, size and time of modification of every file of a case, and of how they are read.

    ``ScanError`` ``scan.unreadable`` when a file is not there.
    """
    facts: list[Any] = [_settings(reading)]
    if case.label and _by_name(case.label):
        facts += [label.model_dump(mode="json") for label in _names(labels)]
    for source in (*case.channels, *([case.label] if case.label else [])):
        for path in source_files(source):
            try:
                status = path.stat()
            except OSError as error:
                raise ScanError(
                    "scan.unreadable", f"a file of the scan cannot be looked at: {error.strerror}"
                ) from None
            facts.append([str(path), status.st_size, status.st_mtime_ns])
    return digest_of(facts)
