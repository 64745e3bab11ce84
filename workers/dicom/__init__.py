"""DICOM: trees of series to volumes, annotations to labels, and label maps back to DICOM."""
