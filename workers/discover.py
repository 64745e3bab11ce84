"""Which cases a source holds: a manifest, one scan, a folder of images and labels, or any tree of scans and DICOM.

In a tree, ``<case>_segmentation`` or ``<case>_seg`` beside ``<case>`` is its label (PROMISE12, BraTS), and so is the
file of the scan's name in a folder ``seg-lungs-LUNA16`` at the top.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet

from vnet_core.errors import ConfigError, ScanError
from vnet_core.plan import Label
from workers.cohort import safe_id
from workers.scans import case_stem, dicom_series, is_scan

IMAGE_LABEL_FOLDERS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"), ("images", "labels"))
"""Folder pairs of the Medical Segmentation Decathlon and nnU-Net, and the plain one."""

LABEL_ENDINGS = ("_segmentation", "_seg")
"""What the name of a label adds to that of its case, where both lie in one folder."""

LABEL_FOLDER = "seg-lungs-LUNA16"
"""A folder of labels with the names of scans that lie in other folders beside it."""

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True, slots=True)
class Found:
    """A case as its source names it, not yet read."""

    id: str
    channels: tuple[str, ...]
    label: str | None = None
    patient: str | None = None
    problem: ScanError | None = None
    """Why it cannot be used, when that is already known."""


@dataclass(slots=True)
class Discovery:
    """What the sources hold."""

    cases: list[Found] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    """Channel names where a ``dataset.json`` or manifest tells them."""
    labels: tuple[Label, ...] = ()
    """Label names where a ``dataset.json`` tells them."""
    ignored: int = 0
    """Files that are no scan."""


def discover(sources: Iterable[str], channels: Sequence[str] = ()) -> Discovery:
    """Look through all sources. ConfigError ``source.missing`` when one is not there.

    ``channels``, two or more, are the endings of file names that make one case: ``<case>_t1`` and ``<case>_t2``.
    """
    result = Discovery()
    endings = tuple(f"_{channel}" for channel in channels) if len(channels) > 1 else ()
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise ConfigError("source.missing", f"source {source} does not exist; correct the path or mount the share")
        if path.suffix.lower() in (".csv", ".parquet"):
            _manifest(path, result)
        elif path.is_file():
            result.cases.append(Found(safe_id(case_stem(path)), (str(path),)))
        else:
            _folder(path, result, endings)
    result.cases = _checked(result.cases)
    return result


def _checked(cases: list[Found]) -> list[Found]:
    """Cases by id; a second case of one id and a case with fewer channels than the others carry their problem."""
    expected = max((len(case.channels) for case in cases), default=0)
    seen: dict[str, int] = {}
    taken = {case.id for case in cases}
    result = []
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
        problem, case_id = case.problem, case.id
        if seen[case.id] > 1:
            case_id = next(i for n in itertools.count(2) if (i := f"{case.id}.{n}") not in taken)
            taken.add(case_id)
            problem = ScanError("cohort.duplicate-id", f"{seen[case.id]} cases are called {case.id}; rename one")
        elif problem is None and len(case.channels) < expected:
            problem = ScanError(
                "cohort.missing-channel",
                f"case {case.id} has {len(case.channels)} of {expected} channels; add the missing file",
            )
        result.append(Found(case_id, case.channels, case.label, case.patient, problem))
    return sorted(result, key=lambda case: case.id)


def _manifest(path: Path, result: Discovery) -> None:
    """Columns ``case``; ``image`` or several ``image_<channel>``; optionally ``label`` and ``patient``."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.read_table(path)
            columns, rows = table.column_names, table.to_pylist()
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                rows, columns = list(reader), list(reader.fieldnames or [])
    except ValueError as error:
        raise ConfigError("manifest.unreadable", f"manifest {path.name} cannot be read ({error})") from None
    images = [c for c in columns if c == "image" or c.startswith("image_")]
    if "case" not in columns or not images:
        raise ConfigError(
            "manifest.columns",
            f"manifest {path.name} has the columns {columns}; it needs case and image (or image_<channel> for each)",
        )
    if images != ["image"]:
        result.channels = tuple(c.removeprefix("image_") for c in images)
    for row in rows:
        sources = tuple(_beside(path, row[c]) for c in images if row[c])
        label = _beside(path, row["label"]) if row.get("label") else None
        problem = None
        for source in (*sources, *([label] if label else [])):
            if not (Path(source).exists() or ("#" in source and Path(source.rpartition("#")[0]).is_dir())):
                problem = ScanError("scan.missing", f"{Path(source).name} of the manifest does not exist")
        if not sources:
            problem = ScanError("cohort.missing-image", f"row {row['case']} of the manifest names no image")
        patient = None if row.get("patient") in (None, "") else str(row["patient"])
        result.cases.append(Found(safe_id(str(row["case"])), sources, label, patient, problem))


def _beside(manifest: Path, source: str) -> str:
    return str((manifest.parent / source).resolve())


def _folder(folder: Path, result: Discovery, endings: Sequence[str]) -> None:
    if (folder / "dataset.json").is_file():
        _dataset_json(folder / "dataset.json", result)
    pairs = [(folder / i, folder / t) for i, t in IMAGE_LABEL_FOLDERS if (folder / i).is_dir()]
    if not pairs:
        _tree(folder, result, endings)
    for images, labels in pairs:
        _images_and_labels(images, labels, result, endings)


def _dataset_json(path: Path, result: Discovery) -> None:
    """Channel and label names of the Decathlon's (value to name) and nnU-Net's (name to value) ``dataset.json``."""
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("source.dataset-json", f"{path} is not JSON ({error}); mend or remove it") from None
    channels = mapping.get("channel_names") or mapping.get("modality") or {}
    result.channels = tuple(str(channels[k]) for k in sorted(channels, key=int))
    labels = []
    for key, value in (mapping.get("labels") or {}).items():
        number, name = (int(key), str(value)) if str(key).isdigit() else (value, str(key))
        if not isinstance(number, int):
            raise ConfigError(
                "source.regions", f"label {name} of {path} has the value {number}; give each label one whole number"
            )
        if number > 0:
            labels.append(Label(value=number, name=name))
    result.labels = tuple(sorted(labels, key=lambda label: label.value))


def _images_and_labels(images: Path, labels: Path, result: Discovery, endings: Sequence[str]) -> None:
    truth = {case_stem(path): path for path in _scans_in(labels, result)} if labels.is_dir() else {}
    for name, channels in _by_case(_scans_in(images, result), endings).items():
        label = truth.pop(name, None)
        result.cases.append(Found(safe_id(name), channels, str(label) if label else None))
    for name, path in truth.items():
        problem = ScanError("cohort.missing-image", f"label {path.name} has no image in {images.name}")
        result.cases.append(Found(safe_id(name), (), str(path), None, problem))


def _scans_in(folder: Path, result: Discovery) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    scans = [p for p in files if is_scan(p)]
    result.ignored += len(files) - len(scans)
    return scans


def _by_case(paths: Iterable[Path], endings: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Files grouped by case, in the order of the channels.

    ``name_0000`` and ``name_0001`` are two channels of ``name``, and so are two names that differ in their ``endings``.
    """
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    stems = {path: case_stem(path) for path in paths}
    known = set(stems.values())
    for path, stem in stems.items():
        name, number = stem, 0
        match = _CHANNEL.fullmatch(stem)
        if match and f"{match[1]}_0000" in known:
            name, number = match[1], int(match[2])
        for place, ending in enumerate(endings):
            if stem.endswith(ending) and stem != ending:
                name, number = stem.removesuffix(ending), place
        groups[name].append((number, str(path)))
    return {name: tuple(path for _, path in sorted(files)) for name, files in groups.items()}


def _tree(folder: Path, result: Discovery, endings: Sequence[str]) -> None:
    """Any folder: every scan file but labels is a case, every DICOM series is a case."""
    below = (p for p in folder.rglob("*") if p.is_dir() and not p.relative_to(folder).as_posix().startswith("."))
    shown = [folder, *sorted(p for p in below if "/." not in p.relative_to(folder).as_posix())]
    apart = {}
    if (folder / LABEL_FOLDER).is_dir():
        shown.remove(folder / LABEL_FOLDER)
        apart = {case_stem(path): path for path in _scans_in(folder / LABEL_FOLDER, result)}
    for directory in shown:
        files = [p for p in sorted(directory.iterdir()) if p.is_file() and not p.name.startswith(".")]
        scans = [p for p in files if is_scan(p)]
        prefix = "-".join(directory.relative_to(folder).parts)
        groups = _by_case(scans, endings)
        beside = {name: next((e for e in LABEL_ENDINGS if name + e in groups), None) for name in groups}
        labels = {name + ending for name, ending in beside.items() if ending}
        for name, channels in groups.items():
            if name in labels:
                continue
            label = None
            if ending := beside[name]:
                label = groups[name + ending][0]
            elif name in apart:
                label = str(apart.pop(name))
            result.cases.append(Found(safe_id(f"{prefix}-{name}" if prefix else name), channels, label))
        others = [p for p in files if not is_scan(p)]
        slices = [p for p in others if _looks_like_dicom(p)]
        result.cases += _series(directory, prefix or directory.name) if slices else []
        result.ignored += len(others) - len(slices)
    # the scans of these were not fetched
    result.ignored += len(apart)


def _series(directory: Path, name: str) -> list[Found]:
    """Every DICOM series of one folder; a folder whose slices cannot be told apart is one refused case."""
    try:
        series = dicom_series(directory)
    except ScanError as error:
        return [Found(safe_id(name), (), problem=error)]
    if not series:
        problem = ScanError("dicom.no-image", "this DICOM folder holds 0 readable image series; copy it again")
        return [Found(safe_id(name), (), problem=problem)]
    ids = [name] if len(series) == 1 else [f"{name}-{number}" for number in range(len(series))]
    return [Found(safe_id(i), (f"{directory}#{uid}",)) for i, uid in zip(ids, sorted(series), strict=True)]


def _looks_like_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
