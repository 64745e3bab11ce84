"""What DICOM objects that are made from a series share: how they are opened, and what they take over from it.

Only what ties an object to its patient, study, frame of reference and images is taken over; every other text of the
source (institution, physicians, descriptions, comments) stays behind. UIDs are made of digests and dates are those of
the study, so that the same input gives the same bytes.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.sr.coding import Code
from pydicom.uid import UID, generate_uid

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, digest_of_bytes
from vnet_core.volume import Scan, Volume
from workers.formats.blocks import open_regular

MAKER = "vnet-cohort"
"""Manufacturer and model of the equipment in what is written."""
CHARACTERS = "ISO_IR 192"
"""UTF-8: names of patients and labels in any script."""
SERIES_NUMBER = 9001
"""Of what is written: high, so that viewers list it after the scanner's own series."""
ON_GRID_VOXELS = 0.1
"""How far the pixels or contours of a label may lie beside the image's voxels or slices, in voxels."""

_PATIENT = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
_STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
_EMPTY_IF_ABSENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", *_STUDY[1:])
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID")
_IMAGE = (
    "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator",
    "Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
_NO_DATE = "19000101"
"""Stands for the date of a study that names none, where DICOM demands one."""
_SAME_PLACE_MM = 1e-3

_PARSE_ERRORS = (
    AttributeError, KeyError, IndexError, TypeError, ValueError, EOFError, OSError, ArithmeticError,
    NotImplementedError, RuntimeError, struct.error, zlib.error, BytesLengthException,
)  # fmt: skip
"""What pydicom raises on damaged input."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """The model that made a mask."""

    name: str
    version: str


class Canvas:
    """A label map on an image's grid that structures are painted on."""

    def __init__(self, image: Geometry, largest: int) -> None:
        self.image = image
        self.values = np.zeros(image.shape, np.uint8 if largest <= 255 else np.uint16)
        self.overlap = False

    def paint(self, plane: np.ndarray, where: tuple[np.ndarray, np.ndarray], value: int) -> None:
        """Give the pixels ``where`` of a plane, a view of the map, the value; a higher one that is there stays."""
        there = plane[where]
        self.overlap = self.overlap or bool(((there != 0) & (there != value)).any())
        plane[where] = np.maximum(there, value)

    def scan(self, found: Iterable[str], frame: str) -> Scan:
        """What was painted, with the codes of what was found."""
        warnings = sorted({*found, *(["label.overlap"] if self.overlap else [])})
        return Scan(Volume(self.values[None], self.image), tuple(warnings), frame)


def read_dataset(path: Path, sop_classes: Sequence[str], what: str) -> Dataset:
    """The whole DICOM object. ``ScanError`` ``scan.unreadable`` where it is none of ``sop_classes``, which are ``what``
    in words, ``label.corrupt`` where it cannot be parsed."""
    with open_regular(path) as file, damaged(what):
        try:
            dataset = pydicom.dcmread(BytesIO(file.read()))
            sop_class = str(dataset.get("SOPClassUID", ""))
        except InvalidDicomError:
            raise ScanError("scan.unreadable", f"the file is no DICOM object; give a {what}") from None
    if sop_class not in sop_classes:
        raise ScanError("scan.unreadable", f"the DICOM object is no {what} but of another kind; give a {what}")
    return dataset


@contextmanager
def unwarned() -> Iterator[None]:
    """Keep quiet of texts that are longer or otherwise than DICOM allows: the source's are as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Turn what pydicom raises and warns of on damaged input into ``ScanError`` ``label.corrupt``: its texts may quote
    the file."""
    try:
        with unwarned():
            yield
    except ScanError:
        raise
    except _PARSE_ERRORS as error:
        raise ScanError(
            "label.corrupt",
            f"the {what} is cut off, or lacks what its kind must hold ({type(error).__name__}); export it again",
        ) from None


def coded(item: Dataset) -> Code:
    """A code sequence's item, without its meaning."""
    return Code(str(item.get("CodeValue", "")), str(item.get("CodingSchemeDesignator", "")), "")


def source_headers(files: Sequence[Path]) -> list[Dataset]:
    """Headers of a series, one for each place along its normal, in that order, holding no more than is taken over.

    ``ScanError`` ``mask.needs-dicom`` where the files are no DICOM, ``mask.source-header`` where they lack what a
    derived object must name.
    """
    with unwarned():
        headers = [_header(path) for path in files]
    if len(headers) == 1 or "ImagePositionPatient" not in headers[0]:
        return headers[:1]
    row, column = np.reshape(np.asarray(headers[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    placed: dict[int, Dataset] = {}
    for header in headers:
        along_mm = float(np.asarray(header.ImagePositionPatient, float) @ normal)
        # slices of one series: their orientations differ by rounding at most, highdicom wants them equal
        header.ImageOrientationPatient = headers[0].ImageOrientationPatient
        placed.setdefault(round(along_mm / _SAME_PLACE_MM), header)
    in_order = [placed[place] for place in sorted(placed)]
    step_mm = (max(placed) - min(placed)) * _SAME_PLACE_MM / max(1, len(placed) - 1)
    for header in in_order:
        if not header.get("SliceThickness"):
            header.SliceThickness = round(step_mm, 3)  # readers of segmentations want one
    return in_order


def _header(path: Path) -> Dataset:
    wanted = [*_PATIENT, *_STUDY, *_IMAGE, "SpecificCharacterSet"]
    with open_regular(path) as file:
        try:
            whole = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
            missing = [name for name in _NEEDED if not whole.get(name)]
            header = Dataset()
            for name in (*_PATIENT, *_STUDY, *_IMAGE):
                if name in whole and name not in _PATIENT:
                    header[name] = whole[name]
            for name in _PATIENT:
                if name in whole:
                    setattr(header, name, str(whole[name].value or ""))
        except InvalidDicomError:
            raise ScanError(
                "mask.needs-dicom",
                "the case is no DICOM series, which a DICOM mask has to name; choose nifti, mha, nrrd or ome-zarr",
            ) from None
        except _PARSE_ERRORS:
            missing = ["readable values"]
    if missing:
        raise ScanError(
            "mask.source-header",
            f"the series lacks {', '.join(missing)}, which a DICOM mask has to take over; choose nifti, mha, nrrd or"
            " ome-zarr",
        )
    for name in _EMPTY_IF_ABSENT:
        if name not in header:
            setattr(header, name, "")
    if header.PatientSex not in ("M", "F", "O", ""):
        header.PatientSex = ""
    return header


def take_over(header: Dataset, target: Dataset) -> None:
    """Give ``target`` the patient and the study of a header of :func:`source_headers`."""
    for name in (*_PATIENT, *_STUDY):
        if name in header:
            target[name] = header[name]


def study_date(header: Dataset) -> str:
    """``YYYYMMDD`` of the study."""
    return str(header.StudyDate or "") or _NO_DATE


def content_digest(
    values: np.ndarray, geometry: Geometry, labels: Sequence[Label], algorithm: Algorithm, sources: Sequence[Dataset]
) -> str:
    """Digest of everything that decides a derived object's content; ``sources`` are the headers that it refers to."""
    texts = [repr(geometry), str(values.dtype), version(MAKER), algorithm.name, algorithm.version]
    texts += [label.model_dump_json() for label in labels]
    texts += [str(header.SOPInstanceUID) for header in sources]
    return digest_of_bytes(
        [*(f"{len(text)}:{text}".encode() for text in texts), np.ascontiguousarray(values).tobytes()]
    )


def short_text(name: str) -> str:
    """A name as DICOM holds one: 64 characters, no backslash, no control characters."""
    return "".join(c if c.isprintable() else " " for c in name.replace("\\", "/"))[:64]


def uid_of(digest: str, role: str) -> UID:
    """A UID decided by a digest and the role it plays."""
    return generate_uid(entropy_srcs=[digest, role])
