"""DICOM objects of many frames, and objects that are no scans: segmentation, contours, report, screenshot."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ComprehensiveSRStorage,
    EnhancedMRImageStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
)

from tests.bad_inputs.inputs import random
from tests.bad_inputs.slices import uid


def legacy_enhanced(slices: Sequence[Dataset]) -> Dataset:
    """The series as one legacy converted enhanced CT image."""
    return LegacyConvertedEnhancedCTImage(
        list(slices), uid("legacy series"), series_number=2, sop_instance_uid=uid("legacy"), instance_number=1
    )


def enhanced(slices: Sequence[Dataset], order: Sequence[int]) -> Dataset:
    """The slices as frames of one enhanced MR image, in the given order, with functional groups."""
    ds = deepcopy(slices[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid("enhanced")
    ds.Modality, ds.NumberOfFrames = "MR", len(order)
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = ds.PixelSpacing
    shared.PixelMeasuresSequence[0].SliceThickness = ds.SliceThickness
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number in order:
        frame = Dataset()
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = slices[number].ImagePositionPatient
        frame.PixelValueTransformationSequence = [Dataset()]
        transformation = frame.PixelValueTransformationSequence[0]
        transformation.RescaleSlope, transformation.RescaleType = 1, "US"
        transformation.RescaleIntercept = slices[number].RescaleIntercept
        frame.FrameContentSequence = [Dataset()]
        frame.FrameContentSequence[0].StackID = "1"
        frame.FrameContentSequence[0].InStackPositionNumber = number + 1
        frame.FrameContentSequence[0].DimensionIndexValues = [1, number + 1]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    for name in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
        "RescaleIntercept", "RescaleType", "KVP", "ConvolutionKernel",
    ):  # fmt: skip
        delattr(ds, name)
    ds.PixelData = b"".join(slices[number].PixelData for number in order)
    return ds


def beside(slices: Sequence[Dataset]) -> dict[str, Dataset]:
    """Objects that refer to the series, by name."""
    return {
        "segmentation": segmentation(slices),
        "contours": contours(slices),
        "report": report(slices),
        "screenshot": screenshot(slices),
    }


def segmentation(slices: Sequence[Dataset]) -> Dataset:
    """One segment, a liver, on the grid of the series."""
    algorithm = AlgorithmIdentificationSequence("test", codes.DCM.ArtificialIntelligence, "1")
    liver = SegmentDescription(
        1, "Liver", codes.SCT.Organ, codes.SCT.Liver, "AUTOMATIC", algorithm_identification=algorithm
    )
    mask = random((len(slices), slices[0].Rows, slices[0].Columns)) > 1500
    return Segmentation(
        list(slices), mask.astype(np.uint8), "BINARY", [liver], uid("seg series"), 3, uid("seg"), 1, "Maker", "Model",
        "1", "1",
    )  # fmt: skip


def contours(slices: Sequence[Dataset]) -> Dataset:
    """A square of 4 mm on two slices."""
    ds = _like(slices[0], RTStructureSetStorage, "RTSTRUCT")
    ds.StructureSetLabel, ds.StructureSetDate, ds.StructureSetTime = "test", "20260101", "120000"
    region = Dataset()
    region.ROINumber, region.ROIName, region.ROIGenerationAlgorithm = 1, "GTV", "MANUAL"
    region.ReferencedFrameOfReferenceUID = slices[0].FrameOfReferenceUID
    ds.StructureSetROISequence = [region]
    images = [_reference(s) for s in slices]
    listed, study, frame = Dataset(), Dataset(), Dataset()
    listed.SeriesInstanceUID, listed.ContourImageSequence = slices[0].SeriesInstanceUID, images
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", slices[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [listed]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = slices[0].FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    drawn = Dataset()
    drawn.ReferencedROINumber, drawn.ROIDisplayColor = 1, [255, 0, 0]
    drawn.ContourSequence = []
    for piece in slices[3:5]:
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        x, y, z = map(float, piece.ImagePositionPatient)
        corners = [(2, 2), (6, 2), (6, 6), (2, 6)]
        contour.ContourData = [mm for dx, dy in corners for mm in (round(x + dx, 3), round(y + dy, 3), z)]
        contour.ContourImageSequence = [_reference(piece)]
        drawn.ContourSequence.append(contour)
    ds.ROIContourSequence = [drawn]
    observation = Dataset()
    observation.ObservationNumber, observation.ReferencedROINumber = 1, 1
    observation.RTROIInterpretedType, observation.ROIInterpreter = "GTV", ""
    ds.RTROIObservationsSequence = [observation]
    return ds


def report(slices: Sequence[Dataset]) -> Dataset:
    """A structured report without content."""
    ds = _like(slices[0], ComprehensiveSRStorage, "SR")
    ds.ValueType, ds.ContinuityOfContent = "CONTAINER", "SEPARATE"
    ds.CompletionFlag, ds.VerificationFlag = "COMPLETE", "UNVERIFIED"
    return ds


def screenshot(slices: Sequence[Dataset]) -> Dataset:
    """A secondary capture of one slice, without a place."""
    ds = deepcopy(slices[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid("screenshot")
    ds.SeriesInstanceUID, ds.ConversionType = uid("screenshot series"), "WSD"
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"):
        delattr(ds, name)
    return ds


def _like(source: Dataset, sop_class: str, modality: str) -> Dataset:
    """A data set of the same patient and study, in a series of its own."""
    ds = Dataset()
    ds.file_meta = deepcopy(source.file_meta)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid(modality)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = source.StudyInstanceUID, uid(modality, "series")
    ds.PatientName, ds.PatientID = source.PatientName, source.PatientID
    ds.PatientBirthDate, ds.PatientSex = source.PatientBirthDate, source.PatientSex
    ds.StudyDate, ds.StudyTime, ds.StudyID = source.StudyDate, source.StudyTime, source.StudyID
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.Manufacturer = "", "", "Maker"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = modality, 9, 1
    return ds


def _reference(source: Dataset) -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return ds
