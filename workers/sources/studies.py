"""Cases of DICOM trees: every volume is one, or every study where rules of selection choose its channels.

A segmentation (DICOM SEG or RTSTRUCT) becomes the label of the one case whose series it refers to. Of several for one
case SEG goes before RTSTRUCT; where several of the better kind are left, none is taken and the case carries the warning
``label.several``, since nothing tells which is the truth. What refers to no case here, or to more than one, is set
aside. A clinic's segmentations are often of other structures than ours, so one that cannot be used refuses no case.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vnet_core.errors import ScanError
from workers.dicom.select import choose
from workers.dicom.tree import Annotation, Series, Tree, scan_tree
from workers.identity import MODALITIES
from workers.sources.found import Discovery, Found, NotChosen, Rules

COUNTED_HERE = ("not-dicom", "hidden", "link", "link-outside", "not-regular", "unreadable")
"""Reasons of a tree for files that are no DICOM and folders: who lists the source counts or shows them."""


def dicom_cases(tree: Tree, top: Path, rules: Rules, result: Discovery) -> list[Found]:
    """Every case of a tree below ``top``, labelled where a segmentation of the tree refers to it.

    What the tree sets aside, and segmentations that become no label, are counted in ``result``.
    """
    cases = _studies(tree, top, rules, result) if rules.select else _volumes(tree, top, rules)
    result.set_aside.update({reason: count for reason, count in tree.set_aside.items() if reason not in COUNTED_HERE})
    return _labelled(cases, tree.annotations, result.set_aside)


def study_of_folder(folder: Path, found: Found, rules: Rules, result: Discovery) -> Found:
    """A case of a manifest with the channels that the rules choose from all series below ``folder``."""
    tree = scan_tree(folder)
    chosen = _chosen(tree.volumes, found, rules, result)
    if chosen.label:
        return chosen
    return _labelled([chosen], tree.annotations, result.set_aside)[0]


def _volumes(tree: Tree, top: Path, rules: Rules) -> list[Found]:
    volumes = sorted(tree.volumes, key=lambda series: (series.folder, series.uid, series.part))
    names = _names([series.folder for series in volumes], top)
    cases = []
    for series, name in zip(volumes, names, strict=True):
        case_id = rules.case_id(name)
        if rules.ids:
            # damaged files without a UID are known by their folder
            uid = series.uid if series.study else f"{series.uid} {series.folder}"
            case_id = rules.ids.series(series.modality, uid, series.part)
        patient = _patient([series], rules)
        cases.append(Found(case_id, (series.source,), patient=patient, problem=series.problem))
    return cases


def _studies(tree: Tree, top: Path, rules: Rules, result: Discovery) -> list[Found]:
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in sorted(tree.volumes, key=lambda series: (series.folder, series.uid, series.part)):
        studies[series.study].append(series)
    folders = [Path(os.path.commonpath([series.folder for series in of_study])) for of_study in studies.values()]
    cases = []
    for (uid, of_study), name in zip(studies.items(), _names(folders, top), strict=True):
        case_id = rules.ids.series("", uid) if rules.ids else rules.case_id(name)
        found = Found(case_id, (), patient=_patient(of_study, rules))
        cases.append(_chosen(of_study, found, rules, result))
    return cases


def _chosen(volumes: Sequence[Series], found: Found, rules: Rules, result: Discovery) -> Found:
    """The case with the channels of its study, or with the reason why it has none."""
    try:
        chosen = choose(volumes, rules.select)
    except ScanError as error:
        return replace(found, problem=error)
    for series, reason in chosen.reasons:
        result.not_chosen.append(
            NotChosen(
                found.id,
                series.modality if series.modality in MODALITIES else "",
                series.orientation,
                series.slices,
                round(series.slice_spacing_mm, 3),
                reason,
            )
        )
    channels = [chosen.channels[rule.channel] for rule in rules.select]
    problem = next((series.problem for series in channels if series.problem), None)
    return replace(found, channels=tuple(series.source for series in channels), problem=problem)


def _patient(volumes: Sequence[Series], rules: Rules) -> str | None:
    """A pseudonym; without the site's secret there is none, and the number itself goes nowhere."""
    return rules.ids.patient(volumes[0].patient, volumes[0].study) if rules.ids else None


def _names(folders: Sequence[Path], top: Path) -> list[str]:
    """A name after each folder's way from ``top``, numbered where several share one."""
    bare = ["-".join(folder.relative_to(top).parts) or top.name for folder in folders]
    total, used = Counter(bare), Counter[str]()
    names = []
    for name in bare:
        names.append(name if total[name] == 1 else f"{name}-{used[name]}")
        used[name] += 1
    return names


def _labelled(cases: Sequence[Found], annotations: Sequence[Annotation], set_aside: Counter[str]) -> list[Found]:
    """The cases with those segmentations as labels that refer to them alone."""
    of_series: dict[str, list[int]] = defaultdict(list)
    for number, case in enumerate(cases):
        for source in case.channels:
            of_series[_uid(source)].append(number)
    drawn: dict[int, list[Annotation]] = defaultdict(list)
    seen: set[str] = set()
    for annotation in sorted(annotations, key=lambda annotation: annotation.path):
        if annotation.sop_uid and annotation.sop_uid in seen:
            set_aside["annotation-copy"] += 1
            continue
        seen.add(annotation.sop_uid)
        meant = {number for uid in annotation.references for number in of_series.get(uid, [])}
        if len(meant) == 1:
            drawn[meant.pop()].append(annotation)
        else:
            set_aside["annotation-of-several-scans" if meant else "annotation-without-scan"] += 1
    return [_with_label(case, drawn[number], set_aside) for number, case in enumerate(cases)]


def _with_label(case: Found, drawn: Sequence[Annotation], set_aside: Counter[str]) -> Found:
    if not drawn:
        return case
    better = [annotation for annotation in drawn if annotation.kind == "seg"] or list(drawn)
    taken = better if len(better) == 1 else []
    if len(drawn) > len(taken):
        set_aside["annotation-not-taken"] += len(drawn) - len(taken)
    if not taken:
        return replace(case, warnings=(*case.warnings, "label.several"))
    return replace(case, label=str(taken[0].path), refers=True)


def _uid(source: str) -> str:
    """SeriesInstanceUID of a source ``FOLDER#UID`` or ``FOLDER#UID/PART``; '' where it names none."""
    return source.rpartition("#")[2].partition("/")[0] if "#" in source else ""
