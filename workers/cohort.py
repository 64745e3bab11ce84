"""Cohorts in the storage root: which cases there are, what was found of each, and where their results lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vnet_core import fingerprint as fp
from vnet_core import geometry as geo
from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.fingerprint import Fingerprint
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Plan, digest_of
from vnet_core.volume import Volume
from workers.ledger import State
from workers.scans import read_volume, source_files
from workers.store import Root, file_digest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of cohorts, cases and models: they become folders and artifact keys."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to segment."""

    id: str
    channels: tuple[str, ...]
    """One source per channel: a file, or a folder of DICOM slices."""
    label: str | None = None
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
    sources: tuple[str, ...]
    """Folders, files and manifests that are looked through at every ingest."""
    channels: tuple[str, ...]
    """Names of the input channels."""
    labels: tuple[Label, ...]
    """Names of the label values; empty when no case has a label."""


def check_name(name: str, what: str) -> str:
    """The name, or ConfigError ``<what>.name`` when it cannot be a folder."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{what}.name", f"{what} name {name!r} must match {NAME.pattern}; use letters and digits")
    return name


def safe_id(text: str) -> str:
    """A case id from any text: unusual characters become '-', and a short digest keeps the ids distinct."""
    if NAME.fullmatch(text):
        return text
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "case"
    return f"{cleaned[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def save_cohort(root: Root, cohort: Cohort) -> None:
    """Write the cohort's manifest."""
    mapping = asdict(cohort)
    mapping["labels"] = [label.model_dump() for label in cohort.labels]
    root.put_json(f"cohorts/{cohort.name}/cohort.json", mapping)


def load_cohort(root: Root, name: str) -> Cohort:
    """Read the manifest; ConfigError ``cohort.unknown`` names the cohorts that exist."""
    try:
        mapping = root.get_json(f"cohorts/{check_name(name, 'cohort')}/cohort.json")
    except StorageError as error:
        if error.code != "store.missing":
            raise
        known = ", ".join(root.names("cohorts")) or "none"
        raise ConfigError(
            "cohort.unknown",
            f"there is no cohort {name!r} in {root.folder} (known: {known}); make it with vnet ingest SOURCE --cohort",
        ) from None
    return Cohort(
        mapping["name"],
        tuple(mapping["sources"]),
        tuple(mapping["channels"]),
        tuple(Label(**label) for label in mapping["labels"]),
    )


def save_entry(root: Root, cohort: str, entry: Entry) -> None:
    """Write one case's entry."""
    case = asdict(replace(entry.case, geometry=None))
    case["geometry"] = geo.to_mapping(entry.case.geometry) if entry.case.geometry else None
    root.put_json(
        _entry_key(cohort, entry.case.id),
        {
            "case": case,
            "verdict": asdict(entry.verdict),
            "fingerprint": fp.to_mapping(entry.fingerprint) if entry.fingerprint else None,
            "stamp": entry.stamp,
        },
    )


def load_entry(root: Root, cohort: str, case_id: str) -> Entry:
    """Read one case's entry."""
    mapping = root.get_json(_entry_key(cohort, case_id))
    case = mapping["case"]
    case["channels"] = tuple(case["channels"])
    case["geometry"] = geo.from_mapping(case["geometry"]) if case["geometry"] else None
    verdict = mapping["verdict"]
    return Entry(
        Case(**case),
        Verdict(verdict["state"], tuple(verdict["codes"]), verdict["message"]),
        fp.from_mapping(mapping["fingerprint"]) if mapping["fingerprint"] else None,
        mapping["stamp"],
    )


def load_entries(root: Root, cohort: str) -> list[Entry]:
    """All entries of a cohort, by case id."""
    names = root.names(f"cohorts/{cohort}/cases")
    return [load_entry(root, cohort, name.removesuffix(".json")) for name in names]


def remove_entry(root: Root, cohort: str, case_id: str) -> None:
    """Forget a case that its sources no longer hold; its results stay."""
    root.delete(_entry_key(cohort, case_id))


def _entry_key(cohort: str, case_id: str) -> str:
    return f"cohorts/{cohort}/cases/{case_id}.json"


def volume_key(case: Case, plan: Plan) -> str:
    """Where a case's preprocessed volume lies: decided by its bytes and the preprocessing part of the plan."""
    return f"volumes/{digest_of([case.digest, case.label_digest, plan.volume_digest])[:40]}"


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


def read_channels(sources: Sequence[str]) -> Volume:
    """All channels of a case as one Volume (C, Z, Y, X). ScanError ``cohort.channel-grid`` when their grids differ."""
    volumes = [read_volume(source) for source in sources]
    first = volumes[0].geometry
    for number, volume in enumerate(volumes[1:], 1):
        if not geo.same_grid(first, volume.geometry):
            raise ScanError(
                "cohort.channel-grid",
                f"channel {number} has shape {volume.geometry.shape} and spacing {volume.geometry.spacing_mm} mm,"
                f" channel 0 {first.shape} and {first.spacing_mm} mm at its own place; resample them onto one grid",
            )
    return Volume(np.concatenate([volume.voxels for volume in volumes]), first)


def source_digest(sources: Sequence[str]) -> str:
    """SHA-256 over the SHA-256 of every file of the sources, in order."""
    return digest_of([[file_digest(path) for path in source_files(source)] for source in sources])


def source_stamp(sources: Sequence[str]) -> str:
    """Digest of path, size and time of modification of every file of the sources."""
    facts: list[Any] = []
    for source in sources:
        for path in source_files(source):
            stat = path.stat()
            facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    return digest_of(facts)
