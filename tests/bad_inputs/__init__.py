"""The catalogue of inputs that readers get wrong, each made from a seed, with the verdict that its bytes deserve."""

from tests.bad_inputs import dicom, folders, metaimage, nifti
from tests.bad_inputs.inputs import BadInput

INPUTS: tuple[BadInput, ...] = (*nifti.INPUTS, *metaimage.INPUTS, *dicom.INPUTS, *folders.INPUTS)
"""Rows 1 to 90; a row of several variants has a letter for each."""
