"""What a label map holds: volumes, places and pieces, label by label and region by region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import cc3d
import numpy as np
from scipy import ndimage

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, Triple, world_mm
from vnet_core.plan import Label, Region
from vnet_core.reporting import MANY_COMPONENTS

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class LabelReport:
    """Size and place of one label or region. Without voxels it has volume 0 and None for every place."""

    label: int | None
    """Its value in the label map; None for a region, which has several."""
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
    return _measured(labels_ZYX, geometry, label_parts(labels))


def measure_regions(
    labels_ZYX: np.ndarray, geometry: Geometry, labels: Sequence[Label], regions: Sequence[Region]
) -> list[LabelReport]:
    """One report per region, in their order: the voxels of all its values together; as :func:`measure` otherwise.

    The map holds the values of the plan, as :func:`measure` wants it. Regions may overlap, so their volumes do not add
    up. A region that is one of ``labels`` under the same name is left out: the label's report says the same.
    """
    return _measured(labels_ZYX, geometry, region_parts(labels, regions))


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
    return shape_flags(report.voxels, report.touches_border, report.components, MANY_COMPONENTS)


def shape_flags(voxels: int, touches_border: bool, components: int, many_components: int) -> tuple[str, ...]:
    """The flags that follow from a mask alone: ``empty``, ``touches-border``, ``many-components`` (above the limit)."""
    found = {"empty": voxels == 0, "touches-border": touches_border, "many-components": components > many_components}
    return tuple(flag for flag, present in found.items() if present)


@dataclass(frozen=True, slots=True)
class Part:
    """What one report is about."""

    label: int | None
    name: str
    values: tuple[int, ...]

    def mask(self, labels_ZYX: np.ndarray) -> np.ndarray:
        """Where it is, bool."""
        one = len(self.values) == 1
        found: np.ndarray = labels_ZYX == self.values[0] if one else np.isin(labels_ZYX, self.values)
        return found


def label_parts(labels: Sequence[Label]) -> list[Part]:
    """What :func:`measure` reports."""
    return [Part(label.value, label.name, (label.value,)) for label in labels]


def region_parts(labels: Sequence[Label], regions: Sequence[Region]) -> list[Part]:
    """What :func:`measure_regions` reports."""
    alone = {(label.name, frozenset({label.value})) for label in labels}
    return [
        Part(None, region.name, region.values)
        for region in regions
        if (region.name, frozenset(region.values)) not in alone
    ]


def _measured(labels_ZYX: np.ndarray, geometry: Geometry, parts: Sequence[Part]) -> list[LabelReport]:
    if labels_ZYX.shape != geometry.shape:
        raise ScanError("scan.shape", f"labels of shape {labels_ZYX.shape} do not fit the grid {geometry.shape}")
    highest = max((value for part in parts for value in part.values), default=1)
    boxes = ndimage.find_objects(labels_ZYX, max_label=highest)
    return [_measure(labels_ZYX, geometry, part, union([boxes[v - 1] for v in part.values])) for part in parts]


def union(boxes: Sequence[Box | None]) -> Box | None:
    """The smallest box that holds all those that there are."""
    found = [box for box in boxes if box is not None]
    if not found:
        return None
    z, y, x = (slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found, strict=True))
    return z, y, x


def _measure(labels_ZYX: np.ndarray, geometry: Geometry, part: Part, box: Box | None) -> LabelReport:
    if box is None:
        return report_of(part, None, geometry)
    mask = part.mask(labels_ZYX[box])
    per_index = [np.count_nonzero(mask, axis=tuple({0, 1, 2} - {a})) for a in range(3)]
    # not as bool: cc3d 4.1 reserves too few numbers for bool arrays, and fails on the comb 1 0 1 of shape (1, 1, 3)
    _, components = cc3d.connected_components(mask.view(np.uint8), connectivity=26, return_N=True)
    bounds = bounds_mm(mask, np.array([s.start for s in box]), geometry)
    return report_of(part, box, geometry, per_index, bounds, int(components))


def report_of(
    part: Part,
    box: Box | None,
    geometry: Geometry,
    per_index: Sequence[np.ndarray] = (),
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    components: int = 0,
) -> LabelReport:
    """The report of a part from its counts: the box of its voxels, None where there are none, how many lie at each
    index of the box along each axis, the world corners of :func:`bounds_mm`, and its connected pieces."""
    if box is None or bounds is None:
        return LabelReport(part.label, part.name, 0, 0.0, None, None, None, None, None, 0, False)
    voxels = int(per_index[0].sum())
    centroid = np.array([s.start for s in box]) + [float(n @ np.arange(len(n))) / voxels for n in per_index]
    return LabelReport(
        label=part.label,
        name=part.name,
        voxels=voxels,
        volume_ml=voxels * geometry.voxel_ml,
        slice_first=box[0].start,
        slice_last=box[0].stop - 1,
        bbox_min_mm=_triple(bounds[0]),
        bbox_max_mm=_triple(bounds[1]),
        centroid_mm=_triple(world_mm(geometry, centroid)),
        components=components,
        touches_border=any(s.start == 0 or s.stop == n for s, n in zip(box, geometry.shape, strict=True)),
    )


def bounds_mm(mask: np.ndarray, start: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """World box of the voxels of a mask whose first voxel has index ``start``, out to their edges."""
    # a coordinate changes monotonically along a row, so the first and last voxel of each row hold its extremes
    rows = np.argwhere(mask.any(axis=2))
    in_rows = mask[rows[:, 0], rows[:, 1]]
    ends = (in_rows.argmax(axis=1), mask.shape[2] - 1 - in_rows[:, ::-1].argmax(axis=1))
    centres_mm = world_mm(geometry, np.concatenate([np.column_stack([rows, x]) for x in ends]) + start)
    half_voxel_mm = np.abs(geometry.matrix[:3, :3]).sum(axis=1) / 2
    return centres_mm.min(axis=0) - half_voxel_mm, centres_mm.max(axis=0) + half_voxel_mm


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (float(v) for v in values)
    return (x, y, z)
