"""What a 3-D viewer in a page is given: a coarse scan with its mask, without anything of the patient.

Made once for a result and kept as ``previews/<cohort>/<case>/<digest>.json``; deleting them costs reading the scans
again. The mask of a scan that cannot be read any more is shown alone.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from typing import Any

import numpy as np

from vnet_core.errors import ScanError, StorageError, VnetError
from vnet_core.geometry import same_grid
from vnet_core.pictures.previews import nifti, preview
from vnet_core.plan import Label
from vnet_core.volume import Volume
from workers.cohort import known_entry, load_cohort
from workers.segmentation.masks import load_report
from workers.sources.reading import read_scan_apart
from workers.sources.scans import read_label
from workers.storage.store import Root

Volumes = dict[str, Any]
"""``image`` (base64 of a gzipped NIfTI, or None), ``mask`` (the same), ``labels`` (``index``, ``name``, ``rgb``), and
``centre`` (RAS mm of a voxel of the largest label, or None)."""


def volumes_of(root: Root, cohort: str, case: str, key: str) -> Volumes | None:
    """The volumes of a result; None where no picture may be made of it or its mask is damaged."""
    cached = f"previews/{key.removeprefix('results/')}.json"
    kept = _kept(root, cached)
    if kept is not None:
        return kept
    try:
        if load_report(root, key).get("picture") != "qc.png":
            return None
        labels = _labels(root, key)
        with root.at_hand(f"{key}/mask.ome.zarr") as path:
            mask = read_label(path)
    except (ScanError, StorageError):
        return None
    scan, burnt_in = _scan(root, cohort, case, key, mask)
    if burnt_in:
        return None
    found = _volumes(scan, mask, labels)
    if scan is not None:
        root.put_json(cached, found)
    return found


def _kept(root: Root, cached: str) -> Volumes | None:
    """What was kept; None where there is nothing that can be read, and so has to be made again."""
    if not root.exists(cached):
        return None
    try:
        kept: Volumes = root.get_json(cached)
    except StorageError:
        return None
    return kept


def _scan(root: Root, cohort: str, case: str, key: str, mask: Volume) -> tuple[np.ndarray | None, bool]:
    """The voxels that the mask was made from, None where they are gone; and whether text may be burnt into them."""
    try:
        entry = known_entry(root, cohort, case)
        if entry is None or entry.case.digest != (root.receipt(key) or {}).get("case_digest"):
            return None, False
        scan = read_scan_apart(entry.case.channels[0], load_cohort(root, cohort).reading)
    except (VnetError, OSError):
        return None, False
    if scan.burnt_in:
        return None, True
    return (scan.volume.voxels[0] if same_grid(scan.volume.geometry, mask.geometry) else None), False


def _labels(root: Root, key: str) -> list[tuple[Label, tuple[int, int, int]]]:
    """Labels of the mask as it was written, with their colours."""
    facts = root.get_json(f"{key}/mask.ome.zarr/zarr.json")["attributes"]["ome"]["image-label"]
    colours: Mapping[int, Any] = {one["label-value"]: one["rgba"][:3] for one in facts["colors"]}
    return [
        (Label(value=one["label-value"], name=one["name"]), tuple(colours[one["label-value"]]))
        for one in facts["properties"]
    ]


def _volumes(scan: np.ndarray | None, mask: Volume, labels: list[tuple[Label, tuple[int, int, int]]]) -> Volumes:
    small = preview(scan, mask.labels, mask.geometry, [label for label, _ in labels])
    there = set(np.unique(small.labels).tolist())
    centre = small.centre_mm
    return {
        "image": None if small.image is None else _packed(nifti(small.image, small.geometry)),
        "mask": _packed(nifti(small.labels, small.geometry)),
        "labels": [
            {"index": index, "name": label.name, "rgb": list(colour)}
            for index, (label, colour) in enumerate(labels, 1)
            if index in there
        ],
        "centre": None if centre is None else [-centre[0], -centre[1], centre[2]],
    }


def _packed(content: bytes) -> str:
    # no time in it, so that one volume gives one text
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
