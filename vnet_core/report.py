"""What a label map holds: volumes, places and pieces, label by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import cc3d
import numpy as np
from scipy import ndimage

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Triple, world_mm
from vnet_core.plan import Label

MANY_COMPONENTS = 10
"""A label in more pieces than this is flagged: most structures are one piece, and noise comes in dozens."""


@dataclass(frozen=True, slots=True)
class LabelReport:
    """Size and place of one label. A label without voxels has volume 0 and None for every place."""

    label: int
    """Its value in the label map."""
    name: str
    """Its name in the plan."""
    voxels: int
    """Number of its voxels."""
    volume_ml: float
    """Their volume."""
    slice_first: int | None
    """Lowest index along array axis 0 of the grid that holds the label."""
    slice_last: int | None
    """Highest such index, itself included."""
    bbox_min_mm: Triple | None
    """Lower corner, world (x, y, z), of the smallest box along the world axes that holds its voxels, edges included."""
    bbox_max_mm: Triple | None
    """Upper corner of that box."""
    centroid_mm: Triple | None
    """Mean world (x, y, z) of its voxel centres."""
    components: int
    """Connected pieces (26 neighbours)."""
    touches_border: bool
    """Whether a voxel lies on a face of the grid: the structure may go on outside, its volume is a lower bound."""


def measure(labels_ZYX: np.ndarray, geometry: Geometry, labels: Sequence[Label]) -> list[LabelReport]:
    """One report per label, in their order, of an integer label map (Z, Y, X) on its own grid.

    Values that are not among ``labels`` count as background. After one pass over the map, each label costs the work
    of its own bounding box. Raises ScanError ``scan.shape`` when the map does not fit the grid.
    """
    if labels_ZYX.shape != geometry.shape:
        raise ScanError("scan.shape", f"labels of shape {labels_ZYX.shape} do not fit the grid {geometry.shape}")
    boxes = ndimage.find_objects(labels_ZYX, max_label=max((label.value for label in labels), default=1))
    return [_measure(labels_ZYX, geometry, label, boxes[label.value - 1]) for label in labels]


def to_row(report: LabelReport) -> dict[str, int | float | str | bool | None]:
    """The report as one flat row of a table or JSON object; ``bbox_min_mm`` becomes ``bbox_min_x_mm`` and so on.

    The columns are the same whether the label has voxels or not.
    """
    row: dict[str, int | float | str | bool | None] = {}
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name in ("bbox_min_mm", "bbox_max_mm", "centroid_mm"):
            stem = field.name.removesuffix("_mm")
            for axis, coordinate in zip("xyz", value or (None, None, None), strict=True):
                row[f"{stem}_{axis}_mm"] = coordinate
        else:
            row[field.name] = value
    return row


def flags(report: LabelReport) -> tuple[str, ...]:
    """What a reader should look at: ``empty``, ``touches-border``, ``many-components`` (above MANY_COMPONENTS)."""
    found = {
        "empty": report.voxels == 0,
        "touches-border": report.touches_border,
        "many-components": report.components > MANY_COMPONENTS,
    }
    return tuple(flag for flag, present in found.items() if present)


def _measure(
    labels_ZYX: np.ndarray, geometry: Geometry, label: Label, box: tuple[slice, slice, slice] | None
) -> LabelReport:
    if box is None:
        return LabelReport(label.value, label.name, 0, 0.0, None, None, None, None, None, 0, False)
    mask = labels_ZYX[box] == label.value
    start = np.array([s.start for s in box])
    voxels = int(np.count_nonzero(mask))
    per_index = (np.count_nonzero(mask, axis=tuple({0, 1, 2} - {a})) for a in range(3))
    centroid = start + [float(n @ np.arange(len(n))) / voxels for n in per_index]
    # not as bool: cc3d 4.1 reserves too few numbers for bool arrays, and fails on the comb 1 0 1 of shape (1, 1, 3)
    _, components = cc3d.connected_components(mask.view(np.uint8), connectivity=26, return_N=True)
    lower_mm, upper_mm = _bounds_mm(mask, start, geometry)
    return LabelReport(
        label=label.value,
        name=label.name,
        voxels=voxels,
        volume_ml=voxels * geometry.voxel_ml,
        slice_first=box[0].start,
        slice_last=box[0].stop - 1,
        bbox_min_mm=lower_mm,
        bbox_max_mm=upper_mm,
        centroid_mm=_triple(world_mm(geometry, centroid)),
        components=int(components),
        touches_border=any(s.start == 0 or s.stop == n for s, n in zip(box, geometry.shape, strict=True)),
    )


def _bounds_mm(mask: np.ndarray, start: np.ndarray, geometry: Geometry) -> tuple[Triple, Triple]:
    """World box of the voxels of a mask whose first voxel has index ``start``, out to their edges."""
    # a coordinate changes monotonically along a row, so the first and last voxel of each row hold its extremes
    rows = np.argwhere(mask.any(axis=2))
    in_rows = mask[rows[:, 0], rows[:, 1]]
    ends = (in_rows.argmax(axis=1), mask.shape[2] - 1 - in_rows[:, ::-1].argmax(axis=1))
    centres_mm = world_mm(geometry, np.concatenate([np.column_stack([rows, x]) for x in ends]) + start)
    half_voxel_mm = np.abs(geometry.matrix[:3, :3]).sum(axis=1) / 2
    return _triple(centres_mm.min(axis=0) - half_voxel_mm), _triple(centres_mm.max(axis=0) + half_voxel_mm)


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (float(v) for v in values)
    return (x, y, z)
