"""One finished mask in the storage root: proved, measured, pictured, and published by its receipt.

results/<cohort>/<case>/<key>/
    mask.nii.gz | mask.mha | mask.nrrd   on the scan's own grid
    mask.ome.zarr/                       the same as an OME-Zarr label image
    report.json                          one row per label
    qc.png                               three planes per label
    receipt.json                         last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from vnet_core.errors import ConfigError, StorageError
from vnet_core.geometry import Geometry, same_grid, to_canonical, world_mm
from vnet_core.pictures import qc_picture
from vnet_core.plan import Label
from vnet_core.report import flags, measure, to_row
from workers.arrays import write_ome_labels
from workers.cohort import Case
from workers.scans import read_label, read_volume, write_label
from workers.store import Root, raise_if_full

MaskFormat = Literal["nifti", "mha", "nrrd"]
_FILES: dict[str, str] = {"nifti": "mask.nii.gz", "mha": "mask.mha", "nrrd": "mask.nrrd"}

CENTROID_TOLERANCE_MM = 0.01
"""How far the centroid of a mask that was read back may lie from that of the array it was written from."""


def mask_file(mask_format: MaskFormat) -> str:
    """The mask's file name. ConfigError ``mask.format`` for an unknown format."""
    if mask_format not in _FILES:
        raise ConfigError("mask.format", f"mask format {mask_format!r} is not one of {', '.join(get_args(MaskFormat))}")
    return _FILES[mask_format]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Label values (Z, Y, X) of a case on its own grid, not yet published."""

    case: Case
    values: np.ndarray
    labels: tuple[Label, ...]
    mask_format: MaskFormat
    provenance: dict[str, Any]
    """Goes into the receipt: digests of plan, model and volume."""


def publish_mask(root: Root, key: str, mask: Mask) -> None:
    """Write all files of a result and its receipt.

    Raises StorageError ``mask.unproven`` when the written mask, read back, does not lie where the array lay.
    """
    geometry = mask.case.geometry
    assert geometry is not None, "a case without geometry was refused at ingest"
    try:
        _publish(root, key, mask, geometry)
    except OSError as error:
        raise_if_full(error, root.folder)
        raise


def _publish(root: Root, key: str, mask: Mask, geometry: Geometry) -> None:
    root.delete(key)
    name = mask_file(mask.mask_format)
    path = root.path(f"{key}/{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, mask.values, geometry)
    _prove(root, f"{key}/{name}", mask.values, geometry)
    write_ome_labels(root, f"{key}/mask.ome.zarr", mask.values, geometry, mask.labels)
    reports = measure(mask.values, geometry, mask.labels)
    rows = [{**to_row(report), "flags": list(flags(report))} for report in reports]
    root.put_json(f"{key}/report.json", {"case": mask.case.id, "mask": name, "labels": rows, **mask.provenance})
    image = read_volume(mask.case.channels[0])
    root.put(f"{key}/qc.png", qc_picture(image.voxels[0], mask.values, geometry, mask.labels))
    root.seal(key, {"stage": "segment", "case_digest": mask.case.digest, **mask.provenance})


def _prove(root: Root, key: str, values: np.ndarray, geometry: Geometry) -> None:
    """Read the mask back and compare voxels, grid and, on two ways, the centroid in world millimetres."""
    written = read_label(root.path(key))
    if not np.array_equal(written.labels, values) or not same_grid(written.geometry, geometry):
        raise StorageError("mask.unproven", f"{key} does not read back as it was written; check the disk, run again")
    reorientation, canonical = to_canonical(geometry)
    expected = _centroid_mm(reorientation.apply(values), canonical)
    found = _centroid_mm(written.labels, written.geometry)
    if expected is not None and found is not None:
        distance_mm = float(np.abs(expected - found).max())
        if distance_mm > CENTROID_TOLERANCE_MM:
            raise StorageError(
                "mask.unproven",
                f"{key} reads back {distance_mm:.3f} mm from where it was computed (at most {CENTROID_TOLERANCE_MM}"
                " mm); it was not published, report the scan's header",
            )


def _centroid_mm(values: np.ndarray, geometry: Geometry) -> np.ndarray | None:
    voxels = np.argwhere(values)
    return world_mm(geometry, voxels.mean(axis=0)) if len(voxels) else None


def load_report(root: Root, key: str) -> dict[str, Any]:
    """``report.json`` of a finished result."""
    report: dict[str, Any] = root.get_json(f"{key}/report.json")
    return report


def label_values(classes: np.ndarray, labels: Sequence[Label]) -> np.ndarray:
    """Label values from class indices (0 background, i + 1 the i-th label); uint8 where all fit, else uint16."""
    values = [0, *(label.value for label in labels)]
    return np.asarray(values, np.uint8 if max(values) <= 255 else np.uint16)[classes]
