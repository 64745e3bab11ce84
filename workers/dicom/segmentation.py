"""DICOM segmentations (DICOM-SEG): read as label maps on a series' grid, and written from masks.

Reading: every frame is placed by its own position, orientation and pixel spacing; it must lie on a slice of the image,
pixel on voxel. Writing: highdicom makes one binary segment per label, because every viewer reads that kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.pixels import iter_pixels
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from vnet_core.colours import rgb
from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, voxel_index
from vnet_core.plan import Label
from vnet_core.volume import Scan
from workers.dicom.codes import ANATOMICAL, SIDES, TISSUE, Concept, Structure, concept_of, values_of
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
    uid_of,
    unwarned,
)
from workers.dicom.volumes import frame_digest
from workers.formats.headers import MAX_VOXELS

SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage, Label Map Segmentation Storage."""
HALF = 0.5
"""A voxel belongs to a fractional segment from this share of the largest value on."""

_WHAT = "DICOM segmentation"
_BACKGROUND = Code("125040", "DCM", "Background")


def read_segmentation(path: Path, image: Geometry, labels: Sequence[Label] = ()) -> Scan:
    """Label values (1, Z, Y, X), uint8 or uint16, on the image's grid.

    :func:`workers.dicom.codes.values_of` says which segment is which label. A voxel of a fractional segment counts from
    half the largest value on (warning ``label.thresholded``). Where segments of two labels overlap, the higher value
    stays (warning ``label.overlap``). Frames may leave the image's grid only where they are empty.

    ``ScanError``: ``scan.unreadable``, ``label.corrupt``, ``label.grid``, ``label.no-structure``, ``scan.too-large``.
    """
    dataset = read_dataset(path, SEGMENTATION_CLASSES, _WHAT)
    with damaged(_WHAT):
        segments = _segments(dataset)
        values, found = values_of(segments, labels)
        canvas = Canvas(image, max([*values.values(), *(label.value for label in labels)]))
        kind = str(dataset.SegmentationType)
        if int(dataset.Rows) * int(dataset.Columns) > MAX_VOXELS:
            raise ScanError("scan.too-large", f"a frame has {dataset.Rows} x {dataset.Columns} pixels; crop it")
        for frame, pixels in zip(_frames(dataset, image), _pixels(dataset), strict=True):
            if kind == "LABELMAP":
                _check_described(pixels, dataset)
                for number in np.intersect1d(np.unique(pixels), list(values)).tolist():
                    _paint(canvas, frame, pixels == number, values[number])
            elif frame.segment in values:
                limit = HALF * int(dataset.MaximumFractionalValue) if kind == "FRACTIONAL" else 1
                _paint(canvas, frame, pixels >= limit, values[frame.segment])
        if kind == "FRACTIONAL":
            found = (*found, "label.thresholded")
        frame_uid = str(dataset.get("FrameOfReferenceUID", ""))
    return canvas.scan(found, frame_digest(frame_uid))


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a plane of pixels lies on a grid."""

    axes: tuple[int, int, int]
    """Array axes of the grid across the plane, along its rows' index and along its columns' index."""
    start: tuple[int, int, int]
    """Grid index, along ``axes``, of its first pixel."""
    signs: tuple[int, int]
    """Whether rows and columns run up (1) or down (-1) their axes."""
    segment: int = 0


def _paint(canvas: Canvas, frame: Frame, mask: np.ndarray, value: int) -> None:
    """Give the pixels of a frame's bool mask the value; ScanError ``label.grid`` where they lie outside of the grid."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return
    volume = np.moveaxis(canvas.values, frame.axes, (0, 1, 2))
    rows = frame.start[1] + frame.signs[0] * rows
    columns = frame.start[2] + frame.signs[1] * columns
    inside = (rows >= 0) & (rows < volume.shape[1]) & (columns >= 0) & (columns < volume.shape[2])
    inside &= 0 <= frame.start[0] < volume.shape[0]
    if not inside.all():
        raise ScanError(
            "label.grid",
            f"{int(np.count_nonzero(~inside))} labelled pixels of one frame lie outside of the image's grid"
            f" {canvas.values.shape}; export the label for this series",
        )
    canvas.paint(volume[frame.start[0]], (rows, columns), value)


def _segments(dataset: Dataset) -> list[Structure]:
    """The described segments but the background's."""
    segments = []
    for item in dataset.SegmentSequence:
        types = tuple(coded(c) for c in item.get("SegmentedPropertyTypeCodeSequence", []))
        modifiers = [
            coded(modifier)
            for c in item.get("SegmentedPropertyTypeCodeSequence", [])
            for modifier in c.get("SegmentedPropertyTypeModifierCodeSequence", [])
        ]
        side = next((name for name, code in SIDES.items() if code in modifiers), "")
        if int(item.SegmentNumber) and _BACKGROUND not in types:
            segments.append(Structure(int(item.SegmentNumber), str(item.get("SegmentLabel", "")), types, side))
    return segments


def _pixels(dataset: Dataset) -> Iterator[np.ndarray]:
    """Every frame's pixels (rows, columns) as stored."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if int(dataset.BitsAllocated) > 1 or syntax.is_encapsulated or not syntax.is_little_endian:
        yield from iter_pixels(dataset, raw=True)
        return
    # one bit per pixel, a frame follows on the last one's bits, which pydicom 3.0 does not always cut out whole
    data = np.frombuffer(dataset.PixelData, np.uint8)
    size = int(dataset.Rows) * int(dataset.Columns)
    count = int(dataset.NumberOfFrames)
    if len(data) * 8 < count * size:
        raise ScanError(
            "label.corrupt",
            f"the pixel data are {len(data)} bytes, {count} frames need {-(-count * size // 8)}; copy the file again",
        )
    for first in range(0, count * size, size):
        bits = np.unpackbits(data[first // 8 : (first + size + 7) // 8], bitorder="little")
        yield bits[first % 8 :][:size].reshape(int(dataset.Rows), int(dataset.Columns))


def _check_described(pixels: np.ndarray, dataset: Dataset) -> None:
    """ScanError ``label.values`` for a value that is no segment, zero or padding."""
    described = [int(item.SegmentNumber) for item in dataset.SegmentSequence]
    unknown = np.setdiff1d(np.unique(pixels), [0, int(dataset.get("PixelPaddingValue", 0)), *described])
    if len(unknown):
        raise ScanError(
            "label.values",
            f"the label map holds {len(unknown)} values that no segment describes, first {int(unknown[0])};"
            " export it again",
        )


def _frames(dataset: Dataset, image: Geometry) -> Iterator[Frame]:
    """Where each frame lies on the image's grid."""
    shared = dataset.SharedFunctionalGroupsSequence[0] if "SharedFunctionalGroupsSequence" in dataset else Dataset()
    shape = (int(dataset.Rows), int(dataset.Columns))
    for item in dataset.PerFrameFunctionalGroupsSequence:
        position = _group("PlanePositionSequence", item, shared)
        plane = _group("PlaneOrientationSequence", item, shared)
        measures = _group("PixelMeasuresSequence", item, shared)
        if position is None or plane is None or measures is None:
            raise ScanError(
                "dicom.missing-geometry",
                "a frame lacks position, orientation or pixel spacing; export the segmentation again",
            )
        along_row, along_column = np.reshape(np.asarray(plane.ImageOrientationPatient, float), (2, 3))
        spacing_mm = np.asarray(measures.PixelSpacing, float)
        segment = _group("SegmentIdentificationSequence", item, shared)
        yield _placed(
            image,
            np.asarray(position.ImagePositionPatient, float),
            np.array([along_column * spacing_mm[0], along_row * spacing_mm[1]]),
            shape,
            int(segment.ReferencedSegmentNumber) if segment is not None else 0,
        )


def _group(name: str, *holders: Dataset) -> Dataset | None:
    """The first item of a functional group, from the first holder that has it."""
    return next((holder[name].value[0] for holder in holders if name in holder), None)


def _placed(image: Geometry, first_mm: np.ndarray, steps_mm: np.ndarray, shape: tuple[int, int], segment: int) -> Frame:
    """The frame on the grid, or ScanError ``label.grid`` where its pixels are not voxels of the grid.

    ``first_mm``: centre of its first pixel; ``steps_mm`` (2, 3): from row to row and from column to column.
    """
    origin = voxel_index(image, first_mm)
    steps = voxel_index(image, first_mm + steps_mm) - origin
    whole = np.rint(steps)
    axes = [int(np.abs(step).argmax()) for step in whole]
    one_by_one = bool((np.abs(whole).sum(axis=1) == 1).all()) and axes[0] != axes[1]
    reach = np.array([[0, 0], [shape[0] - 1, 0], [0, shape[1] - 1]])
    off = float(np.abs(origin + reach @ steps - np.rint(origin) - reach @ whole).max())
    if not one_by_one or max(off, float(np.abs(steps - whole).max())) > ON_GRID_VOXELS:
        raise ScanError(
            "label.grid",
            f"a frame of the segmentation has other axes or spacing than the image, or lies {off:.2f} voxels beside its"
            f" voxels (image: shape {image.shape}, spacing {_mm(image.spacing_mm)}); export the label for this series",
        )
    first = np.rint(origin).astype(int)
    across = ({0, 1, 2} - set(axes)).pop()
    return Frame(
        (across, axes[0], axes[1]),
        (int(first[across]), int(first[axes[0]]), int(first[axes[1]])),
        (int(whole[0, axes[0]]), int(whole[1, axes[1]])),
        segment,
    )


def _mm(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ") mm"


# --- writing


def write_segmentation(
    path: Path,
    values: np.ndarray,
    geometry: Geometry,
    labels: Sequence[Label],
    series_files: Sequence[Path],
    algorithm: Algorithm,
) -> None:
    """Write label values (Z, Y, X) as a DICOM segmentation of the series, segment i + 1 for the i-th label.

    Frames without a labelled pixel are left out, unless there is no other; a label without voxels is described all the
    same. The file names the patient and the study of the series, as DICOM demands, and no other text of it.

    ``ScanError``: ``mask.needs-dicom``, ``mask.source-header``.
    """
    headers = source_headers(series_files)
    first = headers[0]
    numbers = np.zeros(int(values.max()) + 1, np.uint8 if len(labels) <= 255 else np.uint16)
    for number, label in enumerate(labels, 1):
        numbers[label.value : label.value + 1] = number
    digest = content_digest(values, geometry, labels, algorithm, headers)
    with unwarned():
        try:
            dataset = Segmentation(
                source_images=headers,
                pixel_array=hd.Volume(
                    numbers[values],
                    affine=geometry.matrix,
                    coordinate_system="PATIENT",
                    frame_of_reference_uid=first.FrameOfReferenceUID,
                ),
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=[_description(n, label, algorithm) for n, label in enumerate(labels, 1)],
                series_instance_uid=uid_of(digest, "series"),
                series_number=SERIES_NUMBER,
                sop_instance_uid=uid_of(digest, "segmentation"),
                instance_number=1,
                manufacturer=MAKER,
                manufacturer_model_name=MAKER,
                software_versions=version(MAKER),
                device_serial_number="0",
                omit_empty_frames=bool(values.any()),
                content_label="SEGMENTATION",
                series_description="Segmentation",
                content_date=study_date(first),
                content_time="000000",
                specific_character_set=CHARACTERS,
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ScanError(
                "mask.source-header",
                f"the series' header does not carry a DICOM segmentation ({type(error).__name__}); choose nifti, mha,"
                " nrrd or ome-zarr",
            ) from None
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = dataset.ContentDate, dataset.ContentTime
    dataset.ContentCreatorName = ""
    for item in dataset.ContributingEquipmentSequence:
        del item.ContributionDateTime
    dimensions = uid_of(digest, "dimensions")
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    with unwarned():
        dataset.save_as(path, enforce_file_format=True)


def _description(number: int, label: Label, algorithm: Algorithm) -> SegmentDescription:
    concept = concept_of(label) or Concept(ANATOMICAL, TISSUE)
    description = SegmentDescription(
        segment_number=number,
        segment_label=short_text(label.name),
        segmented_property_category=concept.category,
        segmented_property_type=concept.type,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=short_text(algorithm.name),
            family=codes.cid7162.ArtificialIntelligence,
            version=short_text(algorithm.version),
        ),
        display_color=CIELabColor.from_rgb(*rgb(number - 1)),
    )
    if concept.side:
        modifier = hd.sr.CodedConcept.from_code(SIDES[concept.side])
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description
