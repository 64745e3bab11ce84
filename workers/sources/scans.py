"""Scan files to volumes, and label maps back to files: the only place in the program that reorders axes.

:mod:`workers.formats` decodes NIfTI, MetaImage, NRRD and OME-Zarr, because their stock readers return truncated data
as success; :mod:`workers.dicom` reads series, segmentations and contours. Files index x, y, z and we index z, y, x;
voxels need no move, since x is fastest in both. Messages name no file and no identifier: both may name a patient.

A source is a scan file, ``FILE[k]`` for one volume (from 0) of a NIfTI file with four axes, an OME-Zarr folder, a
folder that holds one DICOM series, or ``FOLDER#SeriesInstanceUID`` with an optional ``/PART`` where it holds several.
Reading happens in this process; :mod:`workers.sources.reading` does the same apart from it, as files that come from
elsewhere should be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, matrix_of
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan, Volume
from workers.dicom.headers import NotDicom, read_elements
from workers.dicom.tree import find_series
from workers.dicom.volumes import read_series, series_geometry
from workers.formats.blocks import Layout, open_regular, read_block, read_planes, unchanged
from workers.formats.headers import FileGrid, Settled, not_a, settled
from workers.formats.metaimage import META_SUFFIXES, meta_layout
from workers.formats.nifti import NIFTI_SUFFIXES, nifti_layout, second_opinion
from workers.formats.nifti import is_nifti as is_nifti
from workers.formats.nrrd import NRRD_SUFFIXES, nrrd_layout
from workers.formats.ome_zarr import is_ome_zarr as is_ome_zarr
from workers.formats.ome_zarr import ome_zarr_files, ome_zarr_layout, read_ome_zarr
from workers.formats.writing import LABEL_SUFFIXES as LABEL_SUFFIXES
from workers.formats.writing import write_label as write_label
from workers.formats.writing import write_volume as write_volume

SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *META_SUFFIXES, *NRRD_SUFFIXES)
"""Suffixes of scan files, in any case; a DICOM series and an OME-Zarr image are folders."""
AS_STORED = ReadingPlan()
"""What is read where nothing is chosen: every doubt is a refusal, no voxel is interpolated."""

_VOLUME = re.compile(r"(.+)\[([0-9]{1,9})\]", re.DOTALL)
_SOP_CLASS = 0x00080016
_NAME_SUFFIXES = (*SCAN_SUFFIXES, ".ome.zarr", ".zarr")


def is_scan(path: Path) -> bool:
    """Whether the name is that of a scan file; hidden files such as ``._scan.nii.gz`` are not."""
    return not path.name.startswith(".") and path.name.lower().endswith(SCAN_SUFFIXES)


def case_stem(path: Path) -> str:
    """The name without its scan suffix: ``liver_0000.nii.gz`` gives ``liver_0000``; other names stay whole."""
    suffix = next((s for s in _NAME_SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_scan(source: str | Path, reading: ReadingPlan = AS_STORED) -> Scan:
    """One channel (1, Z, Y, X) in its stored dtype; float32 or float64 where the header rescales or axes are sheared.

    ``ScanError`` codes: ``scan.unreadable``, ``scan.changed``, ``scan.header``, ``scan.truncated``, ``scan.checksum``,
    ``scan.bomb``, ``scan.not-3d``, ``scan.dtype``, ``scan.empty``, ``scan.too-large``, ``scan.nonfinite``,
    ``scan.path-escape``, ``geometry.*`` and, for series, ``dicom.*``. Warnings: ``scan.trailing-bytes``,
    ``scan.unscaled``, ``geometry.repaired``, ``geometry.straightened``, ``geometry.transforms-differ``,
    ``geometry.assumed-axes`` and, for series, ``dicom.*``.
    """
    scan, steps_mm = _read(source, reading)
    _refuse_nonfinite(scan.volume.voxels)
    if steps_mm is None:
        return scan
    from vnet_core.straighten import straightened  # brings torch, which few scans need

    return replace(scan, volume=straightened(scan.volume, steps_mm))


def read_volume(source: str | Path, reading: ReadingPlan = AS_STORED) -> Volume:
    """The volume of :func:`read_scan`."""
    return read_scan(source, reading).volume


def read_label(
    source: str | Path,
    image: Geometry | None = None,
    labels: Sequence[Label] = (),
    reading: ReadingPlan = AS_STORED,
) -> Volume:
    """The volume of :func:`read_label_scan`."""
    return read_label_scan(source, image, labels, reading).volume


def read_label_scan(
    source: str | Path,
    image: Geometry | None = None,
    labels: Sequence[Label] = (),
    reading: ReadingPlan = AS_STORED,
) -> Scan:
    """A label map (1, Z, Y, X), uint8 where its values fit, else uint16; whole numbers stored as float are converted.

    DICOM segmentations and contours are drawn on the grid of their ``image``, with the values of ``labels``.

    ``ScanError`` codes: those of :func:`read_scan`, ``label.not-integer``, ``label.negative``, ``label.values`` and,
    for DICOM, those of :mod:`workers.dicom.segmentation` and :mod:`workers.dicom.structures`, or ``label.no-image``
    without ``image``.
    """
    if is_dicom_file(Path(source)):
        return _read_annotation(Path(source), image, labels)
    scan, steps_mm = _read(source, reading)
    _refuse_nonfinite(scan.volume.voxels)
    volume = _whole_numbers(scan.volume)
    if steps_mm is not None:
        from vnet_core.straighten import straightened_labels

        volume = straightened_labels(volume, steps_mm)
    return replace(scan, volume=volume)


def read_geometry(source: str | Path, reading: ReadingPlan = AS_STORED) -> Geometry:
    """The grid alone, from headers; every check of :func:`read_scan` that needs no voxel is made."""
    path, series, volume = _split(source)
    if is_ome_zarr(path):
        return settled(ome_zarr_layout(path).grid, reading.sheared_axes).geometry
    if os.path.isdir(path):
        return series_geometry(find_series(path, series), reading)
    with unchanged(path):
        layout = _layout(path, reading, volume)
        place = settled(layout.grid, reading.sheared_axes)
        _second_opinion(path, layout, reading)
    return place.geometry


def label_planes(path: Path) -> Iterator[np.ndarray]:
    """Planes (Y, X) of a NIfTI, MetaImage or NRRD label map in turn, for what is larger than memory; not rescaled.

    Errors as :func:`workers.formats.blocks.read_planes`.
    """
    yield from read_planes(_layout(path, AS_STORED))


def source_files(source: str | Path) -> list[Path]:
    """All files whose bytes make up the source, sorted: the data file beside a header, the slices of a series."""
    path, series, _ = _split(source)
    if is_ome_zarr(path):
        return ome_zarr_files(path)
    if os.path.isdir(path):
        found = find_series(path, series)
        if found.problem is not None:  # of a damaged series some files are not listed
            raise found.problem
        return sorted(found.files)
    if is_nifti(path) or not is_scan(path):  # one file by its definition: nothing to parse
        open_regular(path).close()
        return [path]
    return sorted({path, _layout(path, AS_STORED).data_file})


def numbered_volume(source: str | Path) -> tuple[Path, int] | None:
    """File and number of ``FILE[k]``; None where the source does not name one volume of a NIfTI file."""
    match = _VOLUME.fullmatch(str(source))
    if match is None or not is_nifti(Path(match[1])) or os.path.exists(source):  # a file may have such a name itself
        return None
    return Path(match[1]), int(match[2])


def is_dicom_file(path: Path) -> bool:
    """Whether it is a single DICOM file, by its first bytes or its suffix."""
    if not os.path.isfile(path):
        return False
    with open_regular(path) as file:
        return file.read(132)[128:] == b"DICM" or path.name.lower().endswith(".dcm")


def _read_annotation(path: Path, image: Geometry | None, labels: Sequence[Label]) -> Scan:
    """A DICOM segmentation or the contours of a structure set, by what the file says it is."""
    from workers.dicom.segmentation import SEGMENTATION_CLASSES, read_segmentation
    from workers.dicom.structures import STRUCTURE_CLASS, read_structures

    if image is None:
        raise ScanError("label.no-image", "a DICOM label lies on the grid of its image; give that image with it")
    with unchanged(path):
        try:
            kind = read_elements(path).text(_SOP_CLASS)
        except NotDicom:
            kind = ""
        if kind in SEGMENTATION_CLASSES:
            return read_segmentation(path, image, labels)
        if kind == STRUCTURE_CLASS:
            return read_structures(path, image, labels)
    raise ScanError(
        "scan.unreadable", "the DICOM file is neither a segmentation nor a structure set; give one, or a label map"
    )


def _split(source: str | Path) -> tuple[Path, str, int | None]:
    """Path, series of a folder, volume of a file."""
    path, numbered = Path(source), numbered_volume(source)
    if numbered is not None:
        return numbered[0], "", numbered[1]
    head, mark, series = str(source).rpartition("#")
    if mark and not os.path.exists(path) and os.path.isdir(head):  # no error for a name that no file can have
        return Path(head), series, None
    return path, "", None


def _read(source: str | Path, reading: ReadingPlan) -> tuple[Scan, np.ndarray | None]:
    """The scan as stored; where its axes are sheared, on a stand-in of its origin alone, and with its steps in mm."""
    path, series, volume = _split(source)
    if is_ome_zarr(path):
        voxels, image = read_ome_zarr(path)
        return _on_its_grid(voxels, image.grid, settled(image.grid, reading.sheared_axes), image.warnings)
    if os.path.isdir(path):
        found = find_series(path, series)
        with unchanged(*found.files):
            return read_series(found, reading), None
    with unchanged(path):
        layout = _layout(path, reading, volume)
        with unchanged(layout.data_file):
            place = settled(layout.grid, reading.sheared_axes)
            voxels, notes = read_block(layout)  # first: damage is told as damage, not as odd geometry
            doubts = _second_opinion(path, layout, reading)
    return _on_its_grid(voxels, layout.grid, place, (*layout.warnings, *notes, *doubts))


def _on_its_grid(
    voxels: np.ndarray, grid: FileGrid, place: Settled, warnings: tuple[str, ...]
) -> tuple[Scan, np.ndarray | None]:
    noted = tuple(dict.fromkeys((*warnings, *place.warnings)))
    if not place.sheared:
        return Scan(Volume(voxels[None], place.geometry), noted), None
    stand_in = replace(place.geometry, shape=grid.shape, origin_mm=matrix_of([grid.origin_mm] * 3)[0])
    return Scan(Volume(voxels[None], stand_in), noted), grid.steps_mm


def _layout(path: Path, reading: ReadingPlan, volume: int | None = None) -> Layout:
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return nifti_layout(path, reading.nifti_transform, volume)
    if name.endswith(META_SUFFIXES):
        return meta_layout(path)
    if name.endswith(NRRD_SUFFIXES):
        return nrrd_layout(path)
    with open_regular(path) as file:
        raise not_a(f"scan file ({', '.join(SCAN_SUFFIXES)})", file.read(348))


def _second_opinion(path: Path, layout: Layout, reading: ReadingPlan) -> tuple[str, ...]:
    return second_opinion(path, layout.grid, reading.nifti_transform) if is_nifti(path) else ()


def _refuse_nonfinite(voxels: np.ndarray) -> None:
    if voxels.dtype.kind != "f":
        return
    bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels[0])
    if bad:
        raise ScanError(
            "scan.nonfinite", f"{bad} of {voxels.size} voxels are NaN or Inf; replace them by measured values"
        )


def _whole_numbers(volume: Volume) -> Volume:
    voxels = volume.voxels
    if voxels.dtype.kind == "f":
        fractional = sum(int(np.count_nonzero(plane != np.trunc(plane))) for plane in volume.labels)
        if fractional:
            raise ScanError(
                "label.not-integer",
                f"{fractional} of {voxels.size} label voxels are no whole numbers; threshold the soft label first",
            )
    low, high = voxels.min(), voxels.max()
    if low < 0:
        raise ScanError("label.negative", f"the smallest label is {low:g}, must be at least 0; renumber the labels")
    if high > 65535:
        raise ScanError("label.values", f"the largest label is {high:g}, must be at most 65535; renumber the labels")
    return Volume(voxels.astype(np.uint8 if high < 256 else np.uint16, copy=False), volume.geometry)


def bring_in_readers() -> None:
    """Import what reading a scan would import on the way; for a process that limits its memory before it reads."""
    import pydicom.pixels  # noqa: F401
    import SimpleITK  # noqa: F401


def bring_in_readers_of_drawn_labels() -> None:
    """As :func:`bring_in_readers`, for labels in DICOM segmentations and contours; takes half a second."""
    import workers.dicom.segmentation
    import workers.dicom.structures  # noqa: F401
