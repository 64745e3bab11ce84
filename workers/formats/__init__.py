"""Scan files: their headers checked by us, their voxels accounted for byte by byte."""
