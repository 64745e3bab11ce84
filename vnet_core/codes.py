"""What each code of a refusal or a warning means, and what to do about it.

Codes are stable: tables, manifests of runs and other programs rely on them. :class:`vnet_core.errors.ScanError` carries
the codes that refuse a case; the others are warnings of a case that was accepted.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

CodeState = Literal["refused", "warned", "failed"]


@dataclass(frozen=True, slots=True)
class Code:
    """One reason."""

    state: CodeState
    """What it does to a case: `refused`, or `warned` where it is accepted all the same; `failed`: the scan is not at
    fault, and the next run tries it again."""
    meaning: str
    remedy: str


_REFUSED: dict[str, tuple[str, str]] = {
    # --- files
    "scan.missing": (
        "A file that the manifest names is not there.",
        "Correct the path in the manifest, or mount the share.",
    ),
    "scan.unreadable": (
        "The file cannot be opened, is no regular file, or is not of the format that its name promises.",
        "Copy it again from its source, mend its permissions, or convert it to a format that is read.",
    ),
    "scan.path-escape": (
        "A link or a header leads to a file outside the folder that was given.",
        "Put the file itself into the folder, or name it in a manifest.",
    ),
    "scan.changed": (
        "The bytes changed while they were read, or are not those that were ingested.",
        "Wait until the copy is finished and run vnet ingest again.",
    ),
    "scan.crashed-reader": (
        "The process that decoded the file ended without an answer; the file is damaged or hostile.",
        "Export the scan again, uncompressed; do not open this file with other software.",
    ),
    "scan.slow-reader": (
        "Decoding took longer than a scan of the declared size can take.",
        "Look at the storage, or export the scan again; the next run tries it again.",
    ),
    "scan.reader-memory": (
        "Decoding took more memory than a scan of the declared size can take.",
        "Export the scan again, uncompressed; the next run tries it again.",
    ),
    "scan.header": (
        "The header contradicts itself or the bytes that follow it.",
        "Convert the scan again from its source.",
    ),
    "scan.truncated": ("The file ends before the last declared byte.", "Copy it again from its source."),
    "scan.checksum": ("The compressed data do not have their own checksum.", "Copy the file again from its source."),
    "scan.too-large": (
        "The header declares more voxels than are read.",
        "If the number is right, crop the scan; if not, convert it again.",
    ),
    "scan.bomb": (
        "The compressed data would grow more than a scan can.",
        "If that is meant, store the scan uncompressed.",
    ),
    "scan.empty": ("An axis has no voxel.", "Convert the scan again from its source."),
    "scan.not-3d": (
        "The image does not have three axes, or not the volume that is named.",
        "Name one volume as FILE[k], or split it.",
    ),
    "scan.shape": ("Voxels and grid have different shapes.", "Convert the scan again from its source."),
    "scan.dtype": (
        "A voxel is not one plain number: colour, vector, complex, or a type that is not read.",
        "Convert the scan to one grey value per voxel.",
    ),
    "scan.nonfinite": ("Some voxels are NaN or Inf.", "Replace them by measured values."),
    "scan.constant": ("All voxels of a channel have one value.", "Export the scan again; nothing is in it."),
    # --- geometry
    "geometry.missing": (
        "The header does not say where left and right are, or how large a voxel is.",
        "Convert the scan again from its source with its orientation.",
    ),
    "geometry.nonfinite": ("The header's place or axes hold NaN or Inf.", "Correct the header, or convert again."),
    "geometry.spacing": ("A voxel spacing is zero or negative.", "Correct the header, or convert again."),
    "geometry.not-orthonormal": (
        "The axes do not stand at right angles, or are no axes at all.",
        'Set reading.sheared_axes = "resample" in the plan, or resample the scan.',
    ),
    "geometry.ambiguous": (
        "Two fields of the header place the scan differently, so two viewers would too.",
        "Make sform, qform and units agree, or choose one with reading.nifti_transform in the plan.",
    ),
    "geometry.no-overlap": (
        "A channel shows another place than the first one.",
        "Register the channels, or take this one out.",
    ),
    # --- DICOM
    "dicom.corrupt-slice": (
        "A slice is cut off, damaged, or does not hold the pixels that its header declares.",
        "Copy the series again from its source.",
    ),
    "dicom.missing-slices": ("Slices are missing between others.", "Fetch the whole series."),
    "dicom.nonuniform-spacing": (
        "The distances between slices differ.",
        "Resample the series to even slices, or fetch the one with even slices.",
    ),
    "dicom.duplicate-slices": (
        "Different slices lie at one place, and nothing tells them apart.",
        "Split the series by time point, echo or whatever differs.",
    ),
    "dicom.too-few-slices": ("The series has too few slices for a volume.", "Fetch the whole series, or leave it out."),
    "dicom.mixed-orientation": (
        "Slices of one series lie in different planes.",
        "Take the localiser or the second stack out.",
    ),
    "dicom.mixed-size": ("Slices of one series have different numbers of pixels.", "Split the series."),
    "dicom.mixed-spacing": ("Slices of one series have different pixel spacings.", "Split the series."),
    "dicom.mixed-frame": ("Slices of one series have different frames of reference.", "Split the series."),
    "dicom.gantry-tilt": (
        "Slices are displaced in their plane by a tilted gantry.",
        'Set reading.gantry_tilt = "correct" in the plan.',
    ),
    "dicom.missing-geometry": (
        "A slice lacks position, orientation or pixel spacing.",
        "Export the series again with its geometry.",
    ),
    "dicom.multiframe": (
        "A file holds several frames whose places in space it does not tell.",
        "Convert it to single frames or NIfTI.",
    ),
    "dicom.mosaic": ("Slices are tiled within one image.", "Convert the series to NIfTI."),
    "dicom.modality-lut": (
        "The values of a slice go through a table of its own.",
        "Export the series with a plain rescale.",
    ),
    "dicom.transfer-syntax": (
        "The slices are compressed in a way that is not decoded.",
        "Export the series uncompressed, or as JPEG 2000 or RLE.",
    ),
    "dicom.syntax-mismatch": (
        "A file's data are encoded otherwise than it declares.",
        "Export the series again from its source.",
    ),
    "dicom.several-series": ("The folder holds several series and none was named.", "Name one: FOLDER#SeriesUID."),
    "dicom.unknown-series": ("The folder does not hold the series that was named.", "Correct the UID after the #."),
    "select.none": (
        "No series of the study fits a rule of reading.select.",
        "Widen the rule, or leave the study out; the reasons for each series are listed.",
    ),
    "select.several": (
        "Several series of the study fit one rule of reading.select.",
        "Narrow the rule, or say with prefer which of them is taken.",
    ),
    # --- cohorts
    "cohort.series-twice": (
        "One DICOM series lies in two folders, perhaps in two encodings.",
        "Remove one, or give both ids in a manifest.",
    ),
    "cohort.duplicate-id": ("Two cases have one name.", "Rename one of them, or give ids in a manifest."),
    "cohort.duplicate-case": (
        "The same bytes are in the cohort under two names; the first by id is kept, since a second would count twice.",
        "Remove one of them.",
    ),
    "cohort.missing-id": ("A row of the manifest has no case.", "Give every row a name of its own in column case."),
    "cohort.missing-image": ("A label, or a row of a manifest, has no image.", "Add the image, or remove the label."),
    "cohort.missing-channel": ("The case has fewer channels than the others.", "Add the missing file."),
    "cohort.channel-grid": (
        "The channels of the case lie on different grids.",
        'Set reading.channel_grids = "resample" in the plan, or resample them onto one grid.',
    ),
    "cohort.frames": (
        "The channels have different frames of reference, so equal coordinates are not equal places.",
        "Register them onto one another first.",
    ),
    # --- labels
    "label.grid": ("The label lies on another grid than its image.", "Resample the label onto the image's grid."),
    "label.not-integer": ("Some label voxels are no whole numbers.", "Threshold the soft label first."),
    "label.negative": ("Some label values are negative.", "Renumber the labels."),
    "label.values": (
        "The label holds values that the cohort does not name, or values above 65535.",
        "Name them with --label VALUE=NAME, or relabel the file.",
    ),
    "label.unnamed": (
        "A DICOM segmentation holds several structures, and the cohort names none.",
        "Name them with --label VALUE=NAME or in the plan, as the file does.",
    ),
    "label.no-structure": (
        "No structure of the file has the name or code of a label.",
        "Name the labels as the file does, or give them its codes.",
    ),
    "label.corrupt": ("The segmentation or structure set is damaged.", "Export it again."),
    "label.no-image": ("A DICOM label was given without the image whose grid it lies on.", "Give both."),
    "label.dtype": ("A label map to be written has a type that masks do not have.", "Convert it to uint8 or uint16."),
    "label.no-mask": ("The scan has no organ mask of its name.", "Add the mask, or drop --inside."),
    # --- archives and buckets
    "scan.unsafe-name": (
        "Objects of a source in a bucket have names that are no path below a folder.",
        "Rename them, or give a prefix without them.",
    ),
    "archive.unsafe": (
        "A member of the archive would leave its folder, is a link or a device, or occurs twice.",
        "Do not unpack it; ask where it comes from.",
    ),
    "archive.too-large": (
        "The archive holds more files or bytes than are unpacked, or grows more than scans can.",
        "Look into it; unpack it yourself and give the folder.",
    ),
    "archive.encrypted": ("The archive is encrypted.", "Unpack it with its password and give the folder."),
    "archive.damaged": ("The archive cannot be read to its end.", "Copy it again from its source."),
    # --- spheres and scores
    "sphere.outside": ("A point lies outside its scan.", "Correct the table, or give the right scan."),
    "sphere.diameter": ("A diameter is not positive.", "Correct the table."),
    "metrics.shape": ("Mask and truth have different grids.", "Give masks on the truth's grid."),
    "evaluate.no-truth": ("A mask has no truth of its name.", "Add the truth, or remove the mask."),
}

_WARNED: dict[str, tuple[str, str]] = {
    "scan.trailing-bytes": ("A few bytes follow the last declared one and were passed over.", "Nothing, if expected."),
    "scan.unscaled": (
        "The header's slope is no number, which by custom means: not rescaled.",
        "Check that the intensities are what they should be.",
    ),
    "geometry.repaired": (
        "The axes missed right angles by rounding and were turned into the nearest that have them.",
        "Nothing.",
    ),
    "geometry.assumed-axes": (
        "The metadata do not say which way the axes point; head, back and left were taken.",
        "Check the mask against the scan, or convert the scan again with its orientation.",
    ),
    "geometry.straightened": (
        "The axes did not stand at right angles and the scan was resampled onto a grid that does.",
        "Nothing; the mask lies on that grid too.",
    ),
    "geometry.transforms-differ": (
        "The header's sform and qform place the scan differently; reading.nifti_transform said which one counts.",
        "Check the mask against the scan in the viewer that you use.",
    ),
    "dicom.localiser": ("A few slices in another plane were taken for localisers and left out.", "Nothing."),
    "dicom.copies": ("Identical copies of slices were left out.", "Nothing."),
    "dicom.tilt-corrected": (
        "The tilt of the gantry was removed by linear interpolation.",
        "Nothing; the mask lies on the straight grid too.",
    ),
    "dicom.burnt-in": (
        "Text may be burnt into the pixels, so no picture is made of this case.",
        "Nothing; or export the series without burnt-in text.",
    ),
    "cohort.channels-resampled": (
        "Channels lay on other grids of one frame and were resampled onto the first one's.",
        "Nothing; the mask lies on the first channel's grid.",
    ),
    "cohort.similar-id": (
        "The id differs from another one in upper and lower case alone, so some digits were added to it.",
        "Rename one of the cases, if it is not meant.",
    ),
    "label.empty": ("The label map has no labelled voxel.", "Nothing, if the structure is absent."),
    "label.overlap": ("Structures of two labels overlap; the higher value stays.", "Check the structures."),
    "label.left-out": ("Structures that are none of the labels were left out.", "Name them, if they are wanted."),
    "label.thresholded": ("A segment holds shares; voxels from half the largest on were taken.", "Check the segment."),
    "label.contours-moved": ("Contours lie between slices and were moved to the nearest.", "Check the contours."),
    "label.contour-gaps": ("A slice between two with contours has none.", "Check the contours."),
    "label.contours-cross": ("Contours of one structure cross each other and were joined.", "Check the contours."),
    "label.contour-copies": ("Equal contours were counted once.", "Nothing."),
    "label.open-contours": ("Points and open lines enclose nothing and were left out.", "Nothing."),
    "label.several": (
        "Several segmentations refer to this scan, and none was taken.",
        "Name the right one in column label of a manifest.",
    ),
    "label.unusable": (
        "The segmentation that refers to this scan cannot be its label, so the case has none; the reason says why.",
        "Name the labels as the file does; nothing, if it is of other structures.",
    ),
    "sphere.empty": ("A sphere holds no voxel above the limit.", "Check --hu-min."),
}

_FAILED: dict[str, tuple[str, str]] = {
    "case.kills-worker": (
        "Several workers died while they preprocessed the case, the last ones with no other case beside it.",
        "Look at the scan, and at the workers' logs and memory; take it out of the cohort if it stays.",
    ),
    "case.out-of-memory": (
        "The workers that preprocessed the case were ended for holding more memory than they may.",
        "Give the workers more memory, have fewer of them, or raise preprocess.spacing_mm in the plan.",
    ),
    "internal.*": (
        "The program failed on this case in a way that it does not know; the log has the details.",
        "Run the command again; if it stays, report it with the log.",
    ),
}


def _codes(state: CodeState, of: Mapping[str, tuple[str, str]]) -> dict[str, Code]:
    return {code: Code(state, meaning, remedy) for code, (meaning, remedy) in of.items()}


CODES: Mapping[str, Code] = MappingProxyType(
    dict(sorted((_codes("refused", _REFUSED) | _codes("warned", _WARNED) | _codes("failed", _FAILED)).items()))
)
"""Every code that the verdict on a case can carry, in alphabetical order."""


def code_of(name: str) -> Code | None:
    """The entry of a code; ``internal.KeyError`` has that of ``internal.*``. None when there is none."""
    return CODES.get("internal.*" if name.startswith("internal.") else name)


def nearest(name: str) -> str:
    """The known code that is spelt most like ``name``."""
    return difflib.get_close_matches(name, CODES, n=1, cutoff=0.0)[0]


def tally(verdicts: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """Over the codes of many cases: ``code``, ``state``, ``cases`` that carry it, ``meaning`` and ``remedy``.

    Refusals come first, the most frequent at the top. A code of another stage, which is not in :data:`CODES`, is
    `failed` and without words.
    """
    cases = Counter(code for codes in verdicts for code in set(codes))
    known = {code: code_of(code) or Code("failed", "", "") for code in cases}
    order = ("refused", "failed", "warned")
    return [
        {
            "code": code,
            "state": known[code].state,
            "cases": cases[code],
            "meaning": known[code].meaning,
            "remedy": known[code].remedy,
        }
        for code in sorted(cases, key=lambda code: (order.index(known[code].state), -cases[code], code))
    ]
