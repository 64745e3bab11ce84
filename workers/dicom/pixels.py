"""Pixels of DICOM frames: as they are stored, with every declared byte accounted for, and rescaled to values.

Uncompressed data are taken from the file as they lie; run lengths, JPEG and JPEG-LS are decoded by pydicom with GDCM
and CharLS, JPEG 2000 by OpenJPEG. Values are never inverted: MONOCHROME1 is a matter of the display (PS3.3
C.7.6.3.1.2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vnet_core.errors import ScanError
from workers.dicom.elements import BIG_ENDIAN, DEFLATED, PYDICOM_FAULTS, corrupt, quiet_pydicom
from workers.dicom.headers import inflated
from workers.dicom.slices import Frame
from workers.formats.blocks import open_regular
from workers.formats.itk import itk_reader

_JPEG_2000 = tuple("1.2.840.10008.1.2.4." + end for end in ("90", "91", "201", "202", "203"))
_EXTENDED = "1.2.840.10008.1.2.4.51"
_INTEGERS = tuple(np.dtype(code) for code in ("u1", "i1", "u2", "i2", "u4", "i4"))


def same_pixels(a: Frame, b: Frame) -> bool:
    """Whether the stored bytes of the pixel data of two files are the same."""
    return _digest_of(a) == _digest_of(b)


def _digest_of(frame: Frame) -> bytes:
    assert frame.pixels is not None
    stamp = frame.path.stat()
    if frame.kind.syntax == DEFLATED:
        return _digest(frame.path, 0, stamp.st_size, stamp.st_mtime_ns)
    return _digest(frame.path, frame.pixels.start, frame.pixels.length, stamp.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, start: int, length: int, _: int) -> bytes:
    digest = sha256()
    with open_regular(path) as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(length, 1 << 20))):
            digest.update(piece)
            length -= len(piece)
    return digest.digest()


def value_type(frames: Sequence[Frame]) -> np.dtype:
    """The dtype that holds the values of all frames: the smallest integer where slopes and intercepts are whole, the
    stored one where there is nothing to rescale, else float64, which is what SimpleITK gives.
    """
    stored = np.result_type(*{_stored_type(f).newbyteorder("=") for f in frames})
    if stored.kind == "f" or all((f.slope, f.intercept) == (1.0, 0.0) for f in frames):
        return stored if stored.kind == "f" or stored in _INTEGERS else np.dtype(np.float64)
    if any(f.slope != int(f.slope) or f.intercept != int(f.intercept) for f in frames):
        return np.dtype(np.float64)
    ends = [end * f.slope + f.intercept for f in frames for end in _range(f)]
    low, high = min(ends), max(ends)
    fitting = (t for t in _INTEGERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return next(fitting, np.dtype(np.float64))


def _range(frame: Frame) -> tuple[int, int]:
    """Smallest and largest stored value."""
    _, bits, _, signed = frame.kind.bits
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def _stored_type(frame: Frame) -> np.dtype:
    allocated, _, _, signed = frame.kind.bits
    assert frame.pixels is not None
    code = {"float": "f4", "double": "f8"}.get(frame.pixels.kind, f"{'i' if signed else 'u'}{allocated // 8}")
    return np.dtype(code).newbyteorder(">" if frame.kind.syntax == BIG_ENDIAN else "<")


def read_values(frames: Sequence[Frame]) -> np.ndarray:
    """Values (Z, Y, X) of the frames in their order, rescaled frame by frame, in :func:`value_type`.

    ``ScanError``: ``dicom.corrupt-slice`` for what cannot be decoded, or is not as large as declared.
    """
    values = np.empty((len(frames), *frames[0].kind.shape), value_type(frames))
    of_file = sorted(range(len(frames)), key=lambda z: (str(frames[z].path), frames[z].index))
    for _, group in groupby(of_file, key=lambda z: str(frames[z].path)):
        order = list(group)
        planes = _planes([frames[z] for z in order])
        for z, stored in zip(order, planes, strict=True):
            frame = frames[z]
            if (frame.slope, frame.intercept) == (1.0, 0.0):
                values[z] = stored
            elif values.dtype.kind == "f":
                values[z] = stored * np.float64(frame.slope) + frame.intercept
            else:
                values[z] = stored.astype(np.int64) * int(frame.slope) + int(frame.intercept)
    return values


def _planes(frames: list[Frame]) -> Iterator[np.ndarray]:
    """Stored values (Y, X) of frames of one file."""
    pixels = frames[0].pixels
    assert pixels is not None
    if pixels.encapsulated:
        for frame, plane in zip(frames, _decoded(frames), strict=True):
            yield _used_bits(plane, frame, high=frame.kind.bits[1] - 1)
        return
    whole = inflated(frames[0].path) if frames[0].kind.syntax == DEFLATED else None
    for frame in frames:
        yield _used_bits(_native(frame, whole), frame, high=frame.kind.bits[2])


def _native(frame: Frame, whole: bytes | None) -> np.ndarray:
    pixels, dtype = frame.pixels, _stored_type(frame)
    assert pixels is not None
    size = dtype.itemsize * frame.kind.shape[0] * frame.kind.shape[1]
    start = pixels.start + frame.index * size
    if whole is not None:
        data = whole[start : start + size]
    else:
        with open_regular(frame.path) as file:
            data = os.pread(file.fileno(), size, start)
    if len(data) != size:
        raise corrupt(f"the pixel data of a slice break off after {len(data)} of {size} bytes")
    return np.frombuffer(data, dtype).reshape(frame.kind.shape)


def _used_bits(plane: np.ndarray, frame: Frame, high: int) -> np.ndarray:
    """Integers without the bits that the header does not declare as used: those may hold anything (PS3.5 8.1.1)."""
    stored, width = frame.kind.bits[1], 8 * plane.dtype.itemsize
    if plane.dtype.kind == "f" or stored >= width:
        return plane
    return (plane << (width - 1 - high)) >> (width - stored)


def _decoded(frames: list[Frame]) -> Iterator[np.ndarray]:
    first = frames[0]
    allocated, stored, _, signed = first.kind.bits
    options: dict[str, Any] = {
        "rows": first.kind.shape[0],
        "columns": first.kind.shape[1],
        "samples_per_pixel": 1,
        "number_of_frames": first.frames,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": allocated,
        "bits_stored": stored,
        "pixel_representation": int(signed),
        "pixel_keyword": "PixelData",
        # signs and unused bits are seen to by _used_bits, for every syntax alike
        "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
        "correct_unused_bits": False,
    }
    given = 0
    with open_regular(first.path) as file, quiet_pydicom():
        assert first.pixels is not None
        file.seek(first.pixels.start)
        try:
            if first.kind.syntax in _JPEG_2000:
                planes = _jpeg_2000(file.read(first.pixels.length + 8), frames)
            elif first.kind.syntax == _EXTENDED and stored > 8:
                planes = _twelve_bits(frames)
            else:
                planes = _by_pydicom(file, frames, options)
            for plane in islice(planes, len(frames)):
                if plane.shape != first.kind.shape:
                    raise ValueError
                given += 1
                yield plane
        except PYDICOM_FAULTS:  # their text may quote the file
            given = -1
    if given < len(frames):
        raise ScanError(
            "dicom.corrupt-slice", "the pixel data of a slice cannot be decoded; export the series uncompressed"
        )


def _by_pydicom(file: BinaryIO, frames: list[Frame], options: dict[str, Any]) -> Iterator[np.ndarray]:
    """Frames of a file that stands at its pixel data."""
    from pydicom.pixels import get_decoder

    indices = [frame.index for frame in frames]
    every = indices == list(range(frames[0].frames))  # then the fragments are gone through once
    decoder = get_decoder(frames[0].kind.syntax)
    for plane, _ in decoder.iter_array(file, indices=None if every else indices, raw=True, **options):
        yield plane


def _jpeg_2000(data: bytes, frames: list[Frame]) -> Iterator[np.ndarray]:
    """JPEG 2000 and HTJ2K by OpenJPEG, which pydicom knows only by way of another package."""
    from openjpeg.utils import decode_pixel_data, get_parameters
    from pydicom.encaps import generate_frames

    wanted = {frame.index: frame for frame in frames}
    for index, stream in enumerate(generate_frames(data, number_of_frames=frames[0].frames)):
        frame = wanted.get(index)
        if frame is None:
            continue
        found = get_parameters(stream)
        shape, precision = (found["rows"], found["columns"]), int(found["precision"])
        if shape != frame.kind.shape or found["samples_per_pixel"] != 1 or precision > frame.kind.bits[0]:
            raise ValueError
        width = 1 if precision <= 8 else 2 if precision <= 16 else 4
        code = f"<{'i' if found['is_signed'] else 'u'}{width}"
        plane = np.frombuffer(decode_pixel_data(stream, version=2), code).reshape(shape)
        yield plane.astype(_stored_type(frame).newbyteorder("="))


def _twelve_bits(frames: list[Frame]) -> Iterator[np.ndarray]:
    """JPEG of 12 bits, which GDCM decodes from a file and not from a fragment."""
    import SimpleITK as sitk

    with itk_reader("GDCMImageIO", frames[0].path) as reader:
        volume = sitk.GetArrayFromImage(reader.Execute()).reshape(frames[0].frames, *frames[0].kind.shape)
    for frame in frames:
        _, bits, _, signed = frame.kind.bits
        stored = np.rint((volume[frame.index] - frame.intercept) / frame.slope).astype(np.int64)
        yield (-1 if signed else (1 << bits) - 1) - stored if frame.kind.inverted else stored  # ITK inverts
