"""One finished mask in the storage root: proved, measured, pictured, and published by its receipt.

results/<cohort>/<case>/<key>/
    mask.nii.gz | mask.mha | mask.nrrd | mask.seg.dcm | mask.rtstruct.dcm
                        on the scan's own grid, unless the OME-Zarr is the mask
    mask.ome.zarr/      the same as an OME-Zarr label image
    report.json         one row per label
    qc.png              three planes per label; absent where text may be burnt into the pixels
    receipt.json        last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

import numpy as np

from vnet_core.errors import ConfigError, StorageError
from vnet_core.geometry import Geometry, same_grid, to_canonical, world_mm
from vnet_core.pictures.qc_sheet import qc_picture
from vnet_core.plan import Label, Plan
from vnet_core.report import LabelReport, flags, measure, measure_regions, to_row
from vnet_core.sections import OutputPlan
from vnet_core.spread import Spread
from vnet_core.volume import Volume
from workers.cohort import Case
from workers.failpoints import fail_point
from workers.sources.reading import read_scan_apart
from workers.sources.scans import read_label, source_files, write_label
from workers.storage.arrays import StoredArray, write_ome_labels
from workers.storage.store import Root

if TYPE_CHECKING:
    from workers.dicom.derived import Algorithm

MaskFormat = Literal["nifti", "mha", "nrrd", "ome-zarr", "dicom-seg", "rtstruct"]
LastWords = Callable[[], Mapping[str, Any]]
"""Asked right before the first file and right before the receipt is written: it may raise, and what it returns goes
into the receipt alone."""
_FILES: dict[str, str] = {
    "nifti": "mask.nii.gz",
    "mha": "mask.mha",
    "nrrd": "mask.nrrd",
    "ome-zarr": "mask.ome.zarr",
    "dicom-seg": "mask.seg.dcm",
    "rtstruct": "mask.rtstruct.dcm",
}
_OME = _FILES["ome-zarr"]

CENTROID_TOLERANCE_MM = 0.01
"""How far the centroid of a mask that was read back may lie from that of the array it was written from."""
CENTROID_TOLERANCE_VOXELS = 0.1
"""The same in the finest spacing, where that is less."""
NO_PICTURE = "none, burnt-in annotation possible"
"""What ``report.json`` says of the picture where there is none."""


def mask_file(mask_format: MaskFormat) -> str:
    """Name of the mask's file, or of its folder. ConfigError ``mask.format`` for an unknown format."""
    if mask_format not in _FILES:
        raise ConfigError("mask.format", f"mask format {mask_format!r} is not one of {', '.join(get_args(MaskFormat))}")
    return _FILES[mask_format]


def check_format(case: Case, mask_format: MaskFormat) -> None:
    """Refuse a format that the case cannot have, before anything is computed.

    ``ConfigError`` ``mask.format``; ``ScanError`` ``mask.needs-dicom`` and ``mask.source-header`` for DICOM formats of
    a case whose first channel is no DICOM series, or whose header lacks what such a mask takes over.
    """
    if mask_file(mask_format).endswith(".dcm"):
        from workers.dicom.derived import source_headers

        source_headers(source_files(case.channels[0]))


Values = TypeVar("Values", np.ndarray, StoredArray)


@dataclass(frozen=True, slots=True, eq=False)
class Mask(Generic[Values]):
    """Label values (Z, Y, X) of a case on its own grid, in memory or in the storage root, not yet published."""

    case: Case
    values: Values
    """As the plan numbers them."""
    plan: Plan
    mask_format: MaskFormat
    algorithm: Algorithm
    """The model that made it."""
    provenance: dict[str, Any]
    """Goes into the receipt: digests of plan, model and volume."""
    spread: Spread | None = None
    """How far the passes lie apart that the mask is the mean of; None where it is of one pass."""
    drift: tuple[str, ...] = ()
    """What is unlike the scans that the model was trained on, in words."""


def with_values(mask: Mask[Any], values: np.ndarray) -> Mask[np.ndarray]:
    """The same mask with its values in memory."""
    told = (mask.plan, mask.mask_format, mask.algorithm, mask.provenance, mask.spread, mask.drift)
    return Mask(mask.case, values, *told)


def written(values: np.ndarray, labels: Sequence[Label], output: OutputPlan) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Values (Z, Y, X) and labels, by ascending value, as the output section wants them written.

    Labels with one value are one label, with their names joined by '+'; it has a code where all of them have the same.
    """
    table, merged = translation(labels, output, int(values.max(initial=0)))
    return table[values], merged


def translation(labels: Sequence[Label], output: OutputPlan, largest: int = 0) -> tuple[np.ndarray, tuple[Label, ...]]:
    """The value that each value up to ``largest`` is written with, uint8 or uint16, and the labels of the written."""
    told = {label.value: output.values.get(label.name, label.value) for label in labels}
    table = np.zeros(max([*told, largest]) + 1, np.int64)
    for value, target in told.items():
        table[value] = target
    merged = []
    for target in sorted(set(told.values()) - {0}):
        parts = [label for label in labels if told[label.value] == target]
        code = parts[0].code if len({part.code for part in parts}) == 1 else ""
        merged.append(Label(value=target, name="+".join(part.name for part in parts), code=code))
    return table.astype(_dtype(table.max(initial=0))), tuple(merged)


def publish_mask(root: Root, key: str, mask: Mask[np.ndarray], last_words: LastWords = dict[str, Any]) -> None:
    """Write all files of a result and its receipt; one that is published already is left as it is.

    Raises StorageError ``mask.unproven`` when a written mask, read back, does not lie where the array lay, and
    ScanError as :func:`check_format` does, and where the scan is gone or no longer what it was.
    """
    geometry = mask.case.geometry
    assert geometry is not None, "a case without geometry was refused at ingest"
    last_words()
    if root.receipt(key) is None:
        with root.room():
            _publish(root, key, mask, geometry, last_words)


def _publish(root: Root, key: str, mask: Mask[np.ndarray], geometry: Geometry, last_words: LastWords) -> None:
    root.delete(key)
    plan = mask.plan
    values, labels = written(mask.values, plan.labels, plan.output)
    name = mask_file(mask.mask_format)
    for file in sorted({name, _OME}):
        if file == _OME:
            write_ome_labels(root, f"{key}/{file}", values, geometry, labels)
        else:
            with root.written(f"{key}/{file}") as path:
                _write(path, mask, values, labels)
        _prove(root, f"{key}/{file}", values, labels, geometry)
    found = measure(mask.values, geometry, plan.labels)
    regions = measure_regions(mask.values, geometry, plan.labels, plan.regions)
    picture = put_picture(root, key, mask, mask.values)
    put_report(root, key, mask, picture, found, regions)
    root.seal(key, {**facts_of(mask), **last_words()})


def put_picture(root: Root, key: str, mask: Mask[Any], values: np.ndarray) -> str:
    """Write the picture of a mask with these values, where one may be made; what ``report.json`` says of it."""
    scan = read_scan_apart(mask.case.channels[0], mask.plan.reading)
    if scan.burnt_in:
        return NO_PICTURE
    assert mask.case.geometry is not None, "a case without geometry was refused at ingest"
    picture = qc_picture(scan.volume.voxels[0], values, mask.case.geometry, mask.plan.labels)
    root.put(f"{key}/qc.png", picture)
    return "qc.png"


def put_report(
    root: Root,
    key: str,
    mask: Mask[Any],
    picture: str,
    labels: Sequence[LabelReport],
    regions: Sequence[LabelReport],
) -> None:
    """Write ``report.json``: what was measured of a mask, and what its picture is."""
    report: dict[str, Any] = {"labels": _rows(labels, mask)}
    if regions:
        report["regions"] = _rows(regions, mask)
    name = mask_file(mask.mask_format)
    report |= {"drift": list(mask.drift), "case": mask.case.id, "mask": name, "picture": picture}
    root.put_json(f"{key}/report.json", report | mask.provenance)
    fail_point("segment:written")


def facts_of(mask: Mask[Any]) -> dict[str, Any]:
    """What the receipt says of a mask, whoever made it."""
    return {"stage": "segment", "case_digest": mask.case.digest, **mask.provenance}


def _write(path: Path, mask: Mask[np.ndarray], values: np.ndarray, labels: Sequence[Label]) -> None:
    """One file in the mask's own format."""
    geometry = mask.case.geometry
    assert geometry is not None, "a case without geometry was refused at ingest"
    if not path.name.endswith(".dcm"):
        write_label(path, values, geometry)
        return
    from workers.dicom.segmentation import write_segmentation
    from workers.dicom.structures import write_structures

    write = write_segmentation if mask.mask_format == "dicom-seg" else write_structures
    write(path, values, geometry, labels, source_files(mask.case.channels[0]), mask.algorithm)


def _rows(reports: Sequence[LabelReport], mask: Mask[Any]) -> list[dict[str, Any]]:
    """Rows of ``report.json``, with the technical uncertainty where the mask is of several passes."""
    return [
        {**to_row(report), **_spread(report, mask.plan, mask.spread), "flags": list(flags(report))}
        for report in reports
    ]


def _spread(report: LabelReport, plan: Plan, spread: Spread | None) -> dict[str, float]:
    if spread is None:
        return {}
    regions = {region.name: region.values for region in plan.regions}
    values = regions[report.name] if report.label is None else (report.label,)
    return asdict(spread.of(values, report.volume_ml))


def _prove(root: Root, key: str, values: np.ndarray, labels: Sequence[Label], geometry: Geometry) -> None:
    """Read the mask back and compare voxels, grid and, on two ways, the centroid in world millimetres."""
    with root.at_hand(key) as path:
        found = _read_back(path, labels, geometry)
    if not np.array_equal(found.labels, values) or not same_grid(found.geometry, geometry):
        raise unproven(key)
    reorientation, canonical = to_canonical(geometry)
    expected_mm = _centroid_mm(reorientation.apply(values), canonical)
    check_places(key, expected_mm, _centroid_mm(found.labels, found.geometry), geometry)


def check_places(key: str, expected_mm: np.ndarray | None, found_mm: np.ndarray | None, geometry: Geometry) -> None:
    """StorageError ``mask.unproven`` where two centroids, world (x, y, z), of one mask lie apart."""
    if expected_mm is not None and found_mm is not None:
        distance_mm = float(np.abs(expected_mm - found_mm).max())
        allowed_mm = min(CENTROID_TOLERANCE_MM, CENTROID_TOLERANCE_VOXELS * min(geometry.spacing_mm))
        if distance_mm > allowed_mm:
            raise StorageError(
                "mask.unproven",
                f"{key} reads back {distance_mm:.3g} mm from where it was computed (at most {allowed_mm:.3g} mm);"
                " it was not published, report the scan's header",
            )


def unproven(key: str) -> StorageError:
    """The error of a mask whose voxels or grid are not those that were written."""
    return StorageError("mask.unproven", f"{key} does not read back as it was written; check the disk, run again")


def _read_back(path: Path, labels: Sequence[Label], geometry: Geometry) -> Volume:
    if not path.name.endswith(".dcm"):
        return read_label(path)
    from workers.dicom.segmentation import read_segmentation
    from workers.dicom.structures import read_structures

    # by their order, not by their names: two labels may have one name
    read = read_segmentation if path.name == _FILES["dicom-seg"] else read_structures
    numbered = read(path, geometry).volume
    table = np.array([0, *(label.value for label in labels)])
    return Volume(table[numbered.voxels], numbered.geometry)


def _centroid_mm(values: np.ndarray, geometry: Geometry) -> np.ndarray | None:
    along = [np.count_nonzero(values, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return world_mm(geometry, mean_index(along)) if along[0].any() else None


def mean_index(along: Sequence[np.ndarray]) -> np.ndarray:
    """Mean index (z, y, x) of voxels, of which so many lie at every index of each axis."""
    return np.array([float(counts @ np.arange(len(counts))) / float(counts.sum()) for counts in along])


def load_report(root: Root, key: str) -> dict[str, Any]:
    """``report.json`` of a finished result."""
    report: dict[str, Any] = root.get_json(f"{key}/report.json")
    return report


def label_values(classes: np.ndarray, labels: Sequence[Label]) -> np.ndarray:
    """Label values from class indices (0 background, i + 1 the i-th label); uint8 where all fit, else uint16."""
    values = [0, *(label.value for label in labels)]
    return np.asarray(values, _dtype(max(values)))[classes]


def _dtype(largest: int) -> type[np.unsignedinteger]:
    return np.uint8 if largest <= 255 else np.uint16
