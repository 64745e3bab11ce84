"""Label maps from a table of points and diameters, one map per scan on the scan's own grid.

The table is that of LUNA16's ``annotations.csv``: ``seriesuid`` (the scan's file name without suffix, or its case id),
``coordX``, ``coordY``, ``coordZ`` (world millimetres, LPS) and ``diameter_mm``.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vnet_core.errors import ConfigError, ScanError
from vnet_core.geometry import Triple, check_label_grid
from vnet_core.spheres import sphere
from workers.ledger import Outcome, State, settle
from workers.outputs import output_folder
from workers.sources.discover import Found, discover
from workers.sources.scans import case_stem, is_scan, read_geometry, read_label, read_volume, write_label

STAGE = "label"
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
INSIDE, UNDECIDED = 1, 255
"""Values of the label maps: in a sphere; in a sphere but outside the organ."""


@dataclass(frozen=True, slots=True)
class Point:
    """One row of the table."""

    centre_mm: Triple
    """World (x, y, z), LPS."""
    diameter_mm: float


@dataclass(frozen=True, slots=True)
class Gate:
    """Which voxels of a sphere belong to it."""

    minimum: float | None = None
    """Only voxels of at least this intensity (Hounsfield units in CT); None: all."""
    inside: Path | None = None
    """Folder of masks named like the scans. Voxels of a sphere outside its mask become :data:`UNDECIDED`: an automatic
    lung mask cuts off nodules that touch the pleura, so neither nodule nor background is known of them."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What became of one scan."""

    outcome: Outcome
    spheres: int
    """Spheres in its label map."""
    volume_ml: float | None
    """Of the voxels with value :data:`INSIDE`; None when there is no map."""


def read_points(table: Path) -> dict[str, list[Point]]:
    """The rows of the table by scan.

    Raises ConfigError ``annotations.missing``, ``annotations.columns`` or ``annotations.value``, which names the row.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except OSError as error:
        raise ConfigError("annotations.missing", f"table {table} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(
            "annotations.value", f"table {table.name} is no UTF-8 text ({error}); export it again"
        ) from None
    if missing := [c for c in COLUMNS if c not in columns]:
        raise ConfigError(
            "annotations.columns", f"table {table.name} has the columns {columns}; it lacks {', '.join(missing)}"
        )
    points = defaultdict(list)
    for number, row in enumerate(rows, 2):
        try:
            x, y, z, diameter_mm = (float(row[c]) for c in COLUMNS[1:])
        except (TypeError, ValueError):
            x = y = z = diameter_mm = math.nan
        if not all(math.isfinite(v) for v in (x, y, z, diameter_mm)):
            shown = [row[c] for c in COLUMNS[1:]]
            raise ConfigError(
                "annotations.value", f"line {number} of {table.name} holds {shown}; each must be a finite number"
            )
        points[row["seriesuid"].strip()].append(Point((x, y, z), diameter_mm))
    return dict(points)


def label_spheres(sources: Sequence[str], table: Path, output: Path, gate: Gate | None = None) -> list[Labelled]:
    """Write ``output/<case>.nii.gz`` for every scan of the sources, and ``output/manifest.csv`` for ``vnet ingest``.

    Label maps are uint8 on the scan's own grid: 0, :data:`INSIDE` or :data:`UNDECIDED`. A scan that the table does not
    name gets an empty map, which is right where all scans were looked through. A point that lies outside its scan or
    keeps no voxel is left out and its scan ``warned``, codes ``sphere.outside``, ``sphere.diameter`` and
    ``sphere.empty``. A scan that cannot be used is a refused row.

    Raises ConfigError ``annotations.*``, ``source.missing``, ``cohort.empty``, ``label.folder`` or
    ``output.unwritable``.
    """
    points = read_points(table)
    found = discover(sources)
    if not found.cases:
        raise ConfigError("cohort.empty", f"no scan was found in {', '.join(sources)} ({found.ignored} other files)")
    gate = gate or Gate()
    masks = _masks_in(gate.inside) if gate.inside else None
    output_folder(output)
    labelled = [_label(case, _of(case, points), output, gate.minimum, masks) for case in found.cases]
    _write_manifest(output / "manifest.csv", found.cases, {one.outcome.case for one in labelled if one.outcome.done})
    return labelled


def _masks_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError("label.folder", f"{folder} is not a folder; name the folder that holds the masks")
    return {case_stem(path): path for path in sorted(folder.iterdir()) if is_scan(path)}


def _names(case: Found) -> Iterable[str]:
    """What a table may call a case: its id, its file's name without suffix, or its series."""
    yield case.id
    for channel in case.channels[:1]:
        yield case_stem(Path(channel))
        yield channel.rpartition("#")[2]


def _of(case: Found, points: Mapping[str, list[Point]]) -> list[Point]:
    return next((points[name] for name in _names(case) if name in points), [])


def _label(
    case: Found, points: Sequence[Point], output: Path, minimum: float | None, masks: Mapping[str, Path] | None
) -> Labelled:
    messages: list[str] = []
    volume_ml: float | None = None
    painted = 0

    def paint() -> tuple[State, None, tuple[str, ...]]:
        nonlocal volume_ml, painted
        if case.problem:
            raise case.problem
        scan = read_volume(case.channels[0]) if minimum is not None else None
        geometry = scan.geometry if scan else read_geometry(case.channels[0])
        organ = None
        if masks is not None:
            name = next((name for name in _names(case) if name in masks), None)
            if name is None:
                raise ScanError("label.no-mask", f"case {case.id} has no mask of that name; add it or drop --inside")
            mask = read_label(masks[name])
            check_label_grid(geometry, mask.geometry)
            organ = mask.labels > 0
        values_ZYX = np.zeros(geometry.shape, np.uint8)
        codes = []
        for point in points:
            try:
                window, kept = sphere(geometry, point.centre_mm, point.diameter_mm)
            except ScanError as error:
                codes.append(error.code)
                messages.append(error.message)
                continue
            if scan is not None:
                kept = kept & (scan.voxels[0][window] >= minimum)
            if not kept.any():
                codes.append("sphere.empty")
                messages.append(f"a sphere of {point.diameter_mm:g} mm holds no voxel of at least {minimum:g}")
                continue
            painted += 1
            inside = kept if organ is None else kept & organ[window]
            part_ZYX = values_ZYX[window]
            part_ZYX[kept & ~inside & (part_ZYX == 0)] = UNDECIDED
            part_ZYX[inside] = INSIDE
        # a hidden name is no scan, so that half a map is never taken for one
        temporary = output / f".{case.id}.nii.gz"
        write_label(temporary, values_ZYX, geometry)
        temporary.replace(output / f"{case.id}.nii.gz")
        volume_ml = int(np.count_nonzero(values_ZYX == INSIDE)) * geometry.voxel_ml
        return "warned" if codes else "computed", None, tuple(sorted(set(codes)))

    outcome = settle(STAGE, case.id, paint)
    return Labelled(replace(outcome, message=outcome.message or "; ".join(messages)), painted, volume_ml)


def _write_manifest(path: Path, cases: Sequence[Found], labelled: set[str]) -> None:
    """Every scan with its label map; one without map stays in the table, for ingest to tell why."""
    count = max(len(case.channels) for case in cases)
    images = ["image"] if count == 1 else [f"image_{i}" for i in range(count)]
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *images, "label", "patient"])
        for case in cases:
            channels = [str(Path(c).resolve()) for c in case.channels]
            channels += [""] * (count - len(channels))
            label = f"{case.id}.nii.gz" if case.id in labelled else ""
            writer.writerow([case.id, *channels, label, case.patient or ""])
    temporary.replace(path)
