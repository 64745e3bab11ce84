"""RT structure sets: contours read as label maps on a series' grid, and written along the edges of a mask's voxels.

Reading: a contour belongs to the nearest slice, and a voxel to a contour when its centre lies inside
(:func:`vnet_core.contours.filled`). Writing: what is written reads back as the mask, voxel for voxel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian

from vnet_core.colours import rgb
from vnet_core.contours import even_odd, filled, outlines
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, voxel_index, world_mm
from vnet_core.plan import Label
from vnet_core.volume import Scan
from workers.dicom.codes import Structure, concept_of, values_of
from workers.dicom.derived import (
    CHARACTERS,
    MAKER,
    ON_GRID_VOXELS,
    SERIES_NUMBER,
    Algorithm,
    Canvas,
    coded,
    content_digest,
    damaged,
    read_dataset,
    short_text,
    source_headers,
    study_date,
    take_over,
    uid_of,
    unwarned,
)
from workers.dicom.volumes import frame_digest

STRUCTURE_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
"""RT Structure Set Storage."""

_WHAT = "RT structure set"
_CONTOUR_DATA = Tag("ContourData")
_ASCII = "iso8859"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def read_structures(path: Path, image: Geometry, labels: Sequence[Label] = ()) -> Scan:
    """Label values (1, Z, Y, X), uint8 or uint16, on the image's grid.

    :func:`workers.dicom.codes.values_of` says which structure is which label; without labels, structures count in the
    order in which the file names them. A contour is moved to the nearest slice, at most half a slice away. Where
    structures of two labels overlap, the higher value stays.

    Warnings: ``label.overlap``, ``label.left-out``, ``label.contours-moved`` (a contour lay more than a tenth of a
    slice off), ``label.contour-gaps`` (a slice without a contour between two with one), ``label.contours-cross``
    (contours of one structure overlapped in part and were joined), ``label.contour-copies`` (equal contours counted
    once), ``label.open-contours`` (points and open lines enclose nothing and were left out).

    ``ScanError``: ``scan.unreadable``, ``label.corrupt``, ``label.no-structure`` and, for contours outside of the grid,
    out of its planes, or in two planes at one slice, ``label.grid``.
    """
    dataset = read_dataset(path, (STRUCTURE_CLASS,), _WHAT)
    with damaged(_WHAT):
        structures = _structures(dataset)
        values, found = values_of(structures, labels)
        contours = _contours(dataset, image, values)
        canvas = Canvas(image, max([*values.values(), *(label.value for label in labels)]))
        notes = set(found)
        axis = _flat_axis([c for several in contours.values() for c in several])
        for number, value in values.items():
            _paint(canvas, axis, contours[number], value, notes)
        frame = next((str(item.FrameOfReferenceUID) for item in dataset.ReferencedFrameOfReferenceSequence), "")
    return canvas.scan(notes, frame_digest(frame))


@dataclass(frozen=True, slots=True, eq=False)
class _Contour:
    """One contour of a structure: its kind and its points (N, 3) as fractional voxel indices (z, y, x)."""

    kind: str
    points: np.ndarray


def _structures(dataset: Dataset) -> list[Structure]:
    types: dict[int, tuple[Code, ...]] = {}
    for item in dataset.get("RTROIObservationsSequence", []):
        named = tuple(coded(c) for c in item.get("RTROIIdentificationCodeSequence", []))
        types[int(item.ReferencedROINumber)] = types.get(int(item.ReferencedROINumber), ()) + named
    return [
        Structure(int(item.ROINumber), str(item.get("ROIName", "")), types.get(int(item.ROINumber), ()))
        for item in dataset.StructureSetROISequence
    ]


def _contours(dataset: Dataset, image: Geometry, wanted: dict[int, int]) -> dict[int, list[_Contour]]:
    contours: dict[int, list[_Contour]] = {number: [] for number in wanted}
    for item in dataset.ROIContourSequence:
        number = int(item.ReferencedROINumber)
        if number not in wanted:
            continue
        for contour in item.get("ContourSequence", []):
            points_mm = _numbers(contour).reshape(-1, 3)
            if not np.isfinite(points_mm).all():
                raise ScanError("label.corrupt", "a contour has points that are NaN or Inf; export it again")
            kind = str(contour.ContourGeometricType)
            contours[number].append(_Contour(kind, voxel_index(image, points_mm)))
    return contours


def _numbers(contour: Dataset) -> np.ndarray:
    """float64 of all coordinates of a contour, from its bytes where pydicom has not made objects of them."""
    element = contour.get_item(_CONTOUR_DATA)
    if element is None or not isinstance(element.value, bytes):
        return np.array([float(v) for v in contour.ContourData])
    return np.array(element.value.strip(b" \0").split(b"\\")).astype(float)


def _flat_axis(contours: Sequence[_Contour]) -> int:
    """The array axis across which all closed contours lie flat."""
    spreads = [np.ptp(c.points, axis=0) for c in contours if c.kind in _CLOSED and len(c.points)]
    if not spreads:
        return 0
    largest = np.max(spreads, axis=0)
    axis = int(largest.argmin())
    if largest[axis] > ON_GRID_VOXELS:
        raise ScanError(
            "label.grid",
            f"contours leave the plane of the image's slices by up to {largest[axis]:.2f} voxels (at most"
            f" {ON_GRID_VOXELS}); they were drawn on another series, export them for this one",
        )
    return axis


def _paint(canvas: Canvas, axis: int, contours: Sequence[_Contour], value: int, notes: set[str]) -> None:
    """Paint one structure; what is noteworthy goes into ``notes``."""
    volume = np.moveaxis(canvas.values, axis, 0)
    closed = [c for c in contours if c.kind in _CLOSED and len(c.points) > 2]
    if len(closed) < len(contours):
        notes.add("label.open-contours")
    slices = _by_slice(closed, axis, volume.shape, notes)
    for number, points in slices.items():
        if any(c.kind == _CLOSED[1] for c in closed):
            mask = even_odd(points, volume.shape[1:])
        else:
            filling = filled(points, volume.shape[1:])
            mask = filling.mask
            if filling.crossings:
                notes.add("label.contours-cross")
        rows, columns = np.nonzero(mask)
        canvas.paint(volume[number], (rows, columns), value)
    if slices and len(slices) < max(slices) - min(slices) + 1:
        notes.add("label.contour-gaps")


def _by_slice(
    contours: Sequence[_Contour], axis: int, shape: tuple[int, ...], notes: set[str]
) -> dict[int, list[np.ndarray]]:
    """Points (N, 2) within the plane of the contours of each slice, by its number; equal contours once."""
    slices: dict[int, list[np.ndarray]] = {}
    planes: dict[int, float] = {}
    seen: set[tuple[int, bytes]] = set()
    for contour in contours:
        place = float(contour.points[:, axis].mean())
        flat = np.delete(contour.points, axis, axis=1)
        number = round(place)
        beyond = max(-0.5 - flat.min(), float((flat - shape[1:]).max()) + 0.5)
        if not 0 <= number < shape[0] or beyond > ON_GRID_VOXELS:
            raise ScanError(
                "label.grid",
                f"a contour lies outside of the image: at slice {place:.2f} of 0 to {shape[0] - 1}, up to"
                f" {max(beyond, 0):.2f} voxels beyond its sides; export the label for this series",
            )
        if abs(place - planes.setdefault(number, place)) > ON_GRID_VOXELS:
            raise ScanError(
                "label.grid",
                f"contours at slices {planes[number]:.2f} and {place:.2f} of one structure both lie nearest to slice"
                f" {number}; they were drawn on a series with thinner slices, export them for this one",
            )
        if abs(place - number) > ON_GRID_VOXELS:
            notes.add("label.contours-moved")
        mark = (number, np.unique(np.round(flat, 6), axis=0).tobytes())
        if mark in seen:
            notes.add("label.contour-copies")
            continue
        seen.add(mark)
        slices.setdefault(number, []).append(flat)
    return slices


# --- writing


def write_structures(
    path: Path,
    values: np.ndarray,
    geometry: Geometry,
    labels: Sequence[Label],
    series_files: Sequence[Path],
    algorithm: Algorithm,
) -> None:
    """Write label values (Z, Y, X) as a DICOM RT structure set of the series, structure i + 1 for the i-th label.

    Contours run along the edges of voxels, slice by slice, so that voxel centres tell what is inside; holes are
    contours of their own within their outer one. A label without voxels is a structure without contours. The file
    names the patient and the study of the series, as DICOM demands, and no other text of it.

    ``ScanError``: ``mask.needs-dicom``, ``mask.source-header``.
    """
    headers = source_headers(series_files)
    digest = content_digest(values, geometry, labels, algorithm, headers[:1])
    with unwarned():
        dataset = _empty_set(headers[0], digest, algorithm)
        images = list(_images(headers))
        dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(headers[0], images)]
        dataset.StructureSetROISequence = []
        dataset.ROIContourSequence = []
        dataset.RTROIObservationsSequence = []
        for number, label in enumerate(labels, 1):
            structure = Dataset()
            structure.ROINumber = number
            structure.ReferencedFrameOfReferenceUID = headers[0].FrameOfReferenceUID
            structure.ROIName = short_text(label.name)
            structure.ROIGenerationAlgorithm = "AUTOMATIC"
            dataset.StructureSetROISequence.append(structure)
            drawn = Dataset()
            drawn.ROIDisplayColor = list(rgb(number - 1))
            drawn.ReferencedROINumber = number
            drawn.ContourSequence = list(_written_contours(values == label.value, geometry, images))
            if not drawn.ContourSequence:
                del drawn.ContourSequence
            dataset.ROIContourSequence.append(drawn)
            dataset.RTROIObservationsSequence.append(_observation(number, label))
        dataset.save_as(path, enforce_file_format=True)


def _empty_set(header: Dataset, digest: str, algorithm: Algorithm) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    # explicit VR leaves a contour no more than 64 KiB of text
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.SpecificCharacterSet = CHARACTERS
    take_over(header, dataset)
    dataset.SOPClassUID = STRUCTURE_CLASS
    dataset.SOPInstanceUID = uid_of(digest, "structures")
    dataset.SeriesInstanceUID = uid_of(digest, "series")
    dataset.SeriesNumber = SERIES_NUMBER
    dataset.InstanceNumber = 1
    dataset.Modality = "RTSTRUCT"
    dataset.SeriesDescription = "Structures"
    dataset.ReferringPhysicianName = ""
    dataset.OperatorsName = ""
    dataset.Manufacturer = MAKER
    dataset.ManufacturerModelName = MAKER
    dataset.SoftwareVersions = [version(MAKER), short_text(f"{algorithm.name} {algorithm.version}")]
    dataset.StructureSetLabel = "SEGMENTATION"
    dataset.StructureSetDate = study_date(header)
    dataset.StructureSetTime = "000000"
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _observation(number: int, label: Label) -> Dataset:
    item = Dataset()
    item.ObservationNumber = number
    item.ReferencedROINumber = number
    item.RTROIInterpretedType = ""
    item.ROIInterpreter = ""
    concept = concept_of(label)
    if concept is not None:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator = concept.type.value, concept.type.scheme_designator
        code.CodeMeaning = concept.type.meaning
        item.RTROIIdentificationCodeSequence = [code]
    return item


def _images(headers: Sequence[Dataset]) -> Iterator[tuple[np.ndarray, Dataset]]:
    """Position (x, y, z) in mm of every slice of the series, and the item that refers to it."""
    for header in headers:
        frames = header.get("PerFrameFunctionalGroupsSequence")
        places = [f.PlanePositionSequence[0] for f in frames] if frames else [header]
        for number, place in enumerate(places, 1):
            item = Dataset()
            item.ReferencedSOPClassUID = header.SOPClassUID
            item.ReferencedSOPInstanceUID = header.SOPInstanceUID
            if frames:
                item.ReferencedFrameNumber = number
            yield np.asarray(place.ImagePositionPatient, float), item


def _frame_of_reference(header: Dataset, images: Sequence[tuple[np.ndarray, Dataset]]) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = header.SeriesInstanceUID
    series.ContourImageSequence = [item for _, item in images]
    study = Dataset()
    study.ReferencedSOPClassUID = _STUDY_CLASS
    study.ReferencedSOPInstanceUID = header.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = header.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _written_contours(
    mask: np.ndarray, geometry: Geometry, images: Sequence[tuple[np.ndarray, Dataset]]
) -> Iterator[Dataset]:
    """One item per contour of a bool (Z, Y, X) mask, slice by slice."""
    across = voxel_index(geometry, np.array([position for position, _ in images]))[:, 0]
    for number in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
        near = int(np.abs(across - number).argmin())
        for outline in outlines(mask[number]):
            points_mm = world_mm(geometry, np.column_stack([np.full(len(outline), float(number)), outline]))
            item = Dataset()
            if abs(across[near] - number) <= ON_GRID_VOXELS:
                item.ContourImageSequence = [images[near][1]]
            item.ContourGeometricType = "CLOSED_PLANAR"
            item.NumberOfContourPoints = len(points_mm)
            text = "\\".join(f"{v:.6f}" for v in (points_mm + 0.0).ravel().tolist()).encode()
            text += b" " * (len(text) % 2)
            # pydicom writes the bytes of an item as they are where it takes it for one of the file's own encoding, and
            # makes an object of every number else
            item[_CONTOUR_DATA] = RawDataElement(_CONTOUR_DATA, "DS", len(text), text, 0, True, True)
            item.set_original_encoding(True, True, _ASCII)
            yield item
