"""Which cases a source holds: a manifest, one scan, a folder of images and labels, or any tree of scans and DICOM.

In a tree, ``<case>_segmentation`` or ``<case>_seg`` beside ``<case>`` is its label (PROMISE12, BraTS), and so is the
file of the scan's name in a folder ``seg-lungs-LUNA16`` at the top. A link is followed to a file inside the source
alone; a scan that is a link out of it is a refused case, and other links are set aside. Nothing that is passed over
goes uncounted, but for hidden files and folders. Messages name no file, because its name may be a patient's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vnet_core.errors import ConfigError, ScanError
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from workers.dicom.tree import Tree, scan_tree
from workers.identity import Pseudonyms
from workers.sources.archives import is_archive
from workers.sources.found import Discovery, Found, Rules, is_zarr
from workers.sources.manifests import SUFFIXES as MANIFEST_SUFFIXES
from workers.sources.manifests import read_manifest
from workers.sources.scans import case_stem, is_nifti, is_scan, numbered_volume
from workers.sources.studies import dicom_cases

IMAGE_LABEL_FOLDERS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"), ("images", "labels"))
"""Folder pairs of the Medical Segmentation Decathlon and nnU-Net, and the plain one."""

LABEL_ENDINGS = ("_segmentation", "_seg")
"""What the name of a label adds to that of its case, where both lie in one folder."""

LABEL_FOLDER = "seg-lungs-LUNA16"
"""A folder of labels with the names of scans that lie in other folders beside it."""

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def discover(
    sources: Iterable[str],
    channels: Sequence[str] = (),
    reading: ReadingPlan | None = None,
    ids: Pseudonyms | None = None,
    passed_by: Path | None = None,
) -> Discovery:
    """Look through all sources but the folder ``passed_by``. ConfigError ``source.missing`` when one is not there.

    ``channels``, two or more, are the endings of file names that make one case: ``<case>_t1`` and ``<case>_t2``. Of
    ``reading`` the rules of selection count. Without ``ids``, cases have the names of their files and folders.
    """
    result = Discovery()
    endings = tuple(f"_{channel}" for channel in channels) if len(channels) > 1 else ()
    rules = Rules(endings, reading.select if reading else (), ids, passed_by)
    for source in sources:
        path, number = numbered_volume(source) or (Path(source), None)
        if not path.exists():
            raise ConfigError("source.missing", f"source {source} does not exist; correct the path or mount the share")
        if path.is_dir() and not is_zarr(path):
            _folder(path, rules, result)
        elif path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES:
            read_manifest(path, rules, result)
        else:
            told, end = ("", "") if number is None else (f"-{number}", f"[{number}]")
            result.cases.append(Found(rules.case_id(case_stem(path) + told), (f"{path}{end}",)))
    result.cases = checked(result.cases)
    return result


def checked(cases: Iterable[Found]) -> list[Found]:
    """Cases by id; a second case of one id and a case with fewer channels than the others carry their problem.

    An id that differs from an earlier one in upper and lower case alone gets some digits and the warning
    ``cohort.similar-id``, because some file systems and stores do not tell the two apart.
    """
    cases = list(cases)
    expected = max((len(case.channels) for case in cases), default=0)
    seen: dict[str, int] = {}
    spelt: dict[str, str] = {}
    taken = {case.id.casefold() for case in cases}
    result = []
    for case in cases:
        case_id, problem, warnings = case.id, case.problem, case.warnings
        if spelt.setdefault(case_id.casefold(), case_id) != case_id:
            case_id = f"{case_id[:90]}-{hashlib.sha256(case_id.encode()).hexdigest()[:8]}"
            warnings = (*warnings, "cohort.similar-id")
        seen[case_id] = seen.get(case_id, 0) + 1
        if (count := seen[case_id]) > 1:
            case_id = next(i for n in itertools.count(2) if (i := f"{case_id[:90]}.{n}").casefold() not in taken)
            problem = problem or _twice(case, count)
        elif problem is None and len(case.channels) < expected:
            problem = ScanError(
                "cohort.missing-channel",
                f"the case has {len(case.channels)} of {expected} channels; add the missing file",
            )
        taken.add(case_id.casefold())
        result.append(replace(case, id=case_id, problem=problem, warnings=warnings))
    return sorted(result, key=lambda case: case.id)


def _twice(case: Found, count: int) -> ScanError:
    """The refusal of a case whose id was there before: a DICOM volume has that of its series, a file its name's."""
    if any("#" in channel for channel in case.channels):
        return ScanError(
            "cohort.series-twice",
            f"the same DICOM series lies in {count} folders (case {case.id}); remove one, or name both in a manifest",
        )
    return ScanError("cohort.duplicate-id", f"{count} cases have the id {case.id}; rename one")


def _folder(folder: Path, rules: Rules, result: Discovery) -> None:
    result.stacked = False
    if (folder / "dataset.json").is_file():
        _dataset_json(folder / "dataset.json", result)
    pairs = [(folder / i, folder / t) for i, t in IMAGE_LABEL_FOLDERS if (folder / i).is_dir()]
    if not pairs:
        _tree(folder, rules, result)
    for images, labels in pairs:
        _images_and_labels(images, labels, folder, rules, result)


# --- dataset.json


def _dataset_json(path: Path, result: Discovery) -> None:
    """Channel and label names of the Decathlon's (value to name) and nnU-Net's (name to value) ``dataset.json``."""

    def unusable(why: object) -> ConfigError:
        return ConfigError("source.dataset-json", f"{path} cannot be used ({why}); mend or remove it")

    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(error) from None
    channels, labels = ((mapping.get(k) or {}) if isinstance(mapping, dict) else None for k in ("modality", "labels"))
    if isinstance(mapping, dict) and mapping.get("channel_names"):
        channels = mapping["channel_names"]
    if isinstance(channels, list):
        channels = {str(number): name for number, name in enumerate(channels)}
    if not isinstance(channels, dict) or not isinstance(labels, dict) or not all(str(k).isdigit() for k in channels):
        raise unusable("its modality, channel_names or labels are no tables from number to name")
    result.channels = tuple(str(channels[k]) for k in sorted(channels, key=int))
    result.stacked = "channel_names" not in mapping and len(result.channels) > 1
    result.labels = tuple(sorted(_labels(labels, path), key=lambda label: label.value))


def _labels(labels: Mapping[str, Any], path: Path) -> Iterator[Label]:
    for key, value in labels.items():
        number, name = (int(key), str(value)) if str(key).isdigit() else (value, str(key))
        if not isinstance(number, int):
            raise ConfigError(
                "source.regions", f"label {name} of {path} has the value {number}; give each label one whole number"
            )
        if number > 0:
            try:
                yield Label(value=number, name=name)
            except ValidationError:
                raise ConfigError(
                    "source.dataset-json", f"label {name!r} of {path} has the value {number}; use 1 to 65535 and a name"
                ) from None


# --- folders


@dataclass(frozen=True, slots=True)
class _Folder:
    """What lies in one folder, hidden entries left out."""

    path: Path
    scans: list[Path]
    """Files and Zarr folders with the name of a scan."""
    folders: list[Path]
    others: list[Path]
    outside: frozenset[str]
    """Those scans that are links to somewhere outside the source."""
    problem: ScanError | None = None


def _list(path: Path, top: Path, rules: Rules, result: Discovery) -> _Folder:
    """List one folder of a source that begins at ``top``."""
    try:
        entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    except OSError as error:
        problem = ScanError("scan.unreadable", f"a folder cannot be listed: {error.strerror}; mend its permissions")
        return _Folder(path, [], [], [], frozenset(), problem)
    scans, folders, others, outside = [], [], [], set()
    inside = top.resolve()
    for entry in entries:
        linked = entry.is_symlink()
        led_out = linked and not entry.resolve().is_relative_to(inside)
        if is_zarr(entry) or (is_scan(entry) and not _holds_something(entry)):
            scans.append(entry)
            if led_out:
                outside.add(str(entry))
        elif linked:
            result.set_aside["link-outside" if led_out else "link"] += 1
        elif entry.is_dir():
            if rules.passed_by is None or entry.resolve() != rules.passed_by:
                folders.append(entry)
        else:
            others.append(entry)
    return _Folder(path, scans, folders, others, frozenset(outside))


def _holds_something(path: Path) -> bool:
    """Whether it is a folder with something in it, such as the ``scan.nii/scan.nii`` that some programs unpack to."""
    try:
        return path.is_dir() and not path.is_symlink() and any(path.iterdir())
    except OSError:
        return False


def _walk(top: Path, rules: Rules, result: Discovery) -> Iterator[_Folder]:
    """Every folder from ``top`` down, parents first, siblings by name."""
    waiting = [top]
    while waiting:
        listed = _list(waiting.pop(), top, rules, result)
        waiting += reversed(listed.folders)
        yield listed


def _found(case_id: str, channels: Sequence[str], label: str | None, outside: frozenset[str]) -> Found:
    """A case of files, refused where one is a link that leads out of the source."""
    problem = None
    if led := sum(source in outside for source in (*channels, label)):
        problem = ScanError(
            "scan.path-escape",
            f"{led} of the case's files are links that lead out of the source; copy the files, or name them in a"
            " manifest",
        )
    return Found(case_id, tuple(channels), label, problem=problem)


def _images_and_labels(images: Path, labels: Path, top: Path, rules: Rules, result: Discovery) -> None:
    """Two folders with equal names in both; a folder in ``images`` may hold a DICOM series."""
    listed = _list(images, top, rules, result)
    drawn = _list(labels, top, rules, result) if labels.is_dir() else _Folder(labels, [], [], [], frozenset())
    outside = listed.outside | drawn.outside
    truth = {case_stem(path): str(path) for path in drawn.scans}
    _count_others([*listed.others, *drawn.others, *drawn.folders], result)
    for folder in (listed, drawn):
        if folder.problem:
            result.cases.append(Found(rules.case_id(folder.path.name), (), problem=folder.problem))
    for name, channels in _by_case(listed.scans, rules.endings).items():
        case = _found(rules.case_id(name), channels, truth.pop(name, None), outside)
        (file, *more) = (Path(channel) for channel in channels)
        if result.stacked and not more and is_nifti(file) and case_stem(file) == name:
            case = replace(case, channels=tuple(f"{file}[{number}]" for number in range(len(result.channels))))
        result.cases.append(case)
    for folder_path in listed.folders:
        cases = dicom_cases(scan_tree(folder_path), folder_path, rules, result)
        if not cases:
            result.set_aside["not-a-scan"] += 1
        if len(cases) == 1 and folder_path.name in truth:
            cases = [replace(cases[0], label=truth.pop(folder_path.name), refers=False)]
        result.cases += cases
    for name, path in truth.items():
        problem = ScanError("cohort.missing-image", f"a label has no image of its name in {images.name}; add the image")
        result.cases.append(Found(rules.case_id(name), (), path, problem=problem))


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


def _tree(folder: Path, rules: Rules, result: Discovery) -> None:
    """Any folder: every scan file but labels is a case, every DICOM volume or study is one."""
    apart, outside = {}, frozenset[str]()
    if (folder / LABEL_FOLDER).is_dir():
        drawn = _list(folder / LABEL_FOLDER, folder, rules, result)
        _count_others([*drawn.others, *drawn.folders], result)
        apart, outside = {case_stem(path): str(path) for path in drawn.scans}, drawn.outside
    others: list[Path] = []
    for listed in _walk(folder, rules, result):
        if listed.path == folder / LABEL_FOLDER:
            continue
        prefix = "-".join(listed.path.relative_to(folder).parts)
        if listed.problem:
            result.cases.append(Found(rules.case_id(prefix or folder.name), (), problem=listed.problem))
        groups = _by_case(listed.scans, rules.endings)
        beside = {name: next((e for e in LABEL_ENDINGS if name + e in groups), None) for name in groups}
        labels = {name + ending for name, ending in beside.items() if ending}
        for name, channels in groups.items():
            if name in labels:
                continue
            ending = beside[name]
            label = groups[name + ending][0] if ending else apart.pop(name, None)
            case_id = rules.case_id(f"{prefix}-{name}" if prefix else name)
            result.cases.append(_found(case_id, channels, label, listed.outside | outside))
        others += listed.others
    if others:
        tree = scan_tree(folder)
        if rules.passed_by and rules.passed_by.is_relative_to(folder.resolve()):
            tree = _without(tree, rules.passed_by)
        result.cases += dicom_cases(tree, folder, rules, result)
        used = {path for series in tree.volumes for path in series.files}
        used |= {annotation.path for annotation in tree.annotations}
        _count_others([path for path in others if path not in used and not _looks_like_dicom(path)], result)
    # the scans of these were not fetched
    if apart:
        result.set_aside["label-without-scan"] += len(apart)


def _without(tree: Tree, folder: Path) -> Tree:
    """The tree without what lies in a folder."""
    return replace(
        tree,
        volumes=tuple(
            s for s in tree.volumes if not any(path.resolve().is_relative_to(folder) for path in s.files[:1])
        ),
        annotations=tuple(a for a in tree.annotations if not a.path.resolve().is_relative_to(folder)),
    )


def _count_others(paths: Iterable[Path], result: Discovery) -> None:
    for path in paths:
        if not path.is_dir() and not path.is_file():
            result.set_aside["not-regular"] += 1
        else:
            result.set_aside["archive" if is_archive(path) else "not-a-scan"] += 1


def _looks_like_dicom(path: Path) -> bool:
    """Whether it is a file that begins like DICOM: what a tree has counted by its own reason."""
    try:
        # a pipe would wait for a writer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(handle, "rb") as file:
        return stat.S_ISREG(os.fstat(handle).st_mode) and file.read(132)[128:] == b"DICM"
