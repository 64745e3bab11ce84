"""MetaImage and NRRD: doubled fields, bzip2, data files beside the header, axes that are not at right angles."""

import bz2
import os
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from tests.workers.sources.test_scans import META, NRRD, SHAPE, numbered, refused
from vnet_core.geometry import world_mm
from vnet_core.sections import ReadingPlan
from workers.sources.scans import read_geometry, read_label, read_scan, read_volume, source_files

BLOCK = numbered(dtype="<i2").tobytes()


def test_a_field_may_be_there_twice_only_with_one_value(tmp_path):
    for name, header, field, other in (
        ("a.mha", META, b"DimSize = 5 4 3\n", b"DimSize = 5 3 4\n"),
        ("a.nrrd", NRRD, b"sizes: 5 4 3\n", b"sizes: 4 5 3\n"),
    ):
        (tmp_path / name).write_bytes(header.replace(field, field + field) + BLOCK)
        np.testing.assert_array_equal(read_volume(tmp_path / name).voxels[0], numbered())
        (tmp_path / name).write_bytes(header.replace(field, field + other) + BLOCK)
        assert refused(tmp_path / name) == "scan.header"


def test_nrrd_dimension_and_the_end_of_its_header(tmp_path):
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD.replace(b"dimension: 3", b"dimension: 4") + BLOCK)
    assert refused(path) == "scan.header"
    path.write_bytes(NRRD.rstrip(b"\n") + b"\n")
    assert refused(path) == "scan.header"
    path.write_bytes(NRRD.replace(b"Patient:=", b"x" * (1 << 20) + b":=") + BLOCK)
    assert refused(path) == "scan.header", "a header without end"


def test_nrrd_header_lines_may_end_as_on_windows(tmp_path):
    path = tmp_path / "a.nrrd"
    path.write_bytes(NRRD.replace(b"\n", b"\r\n") + BLOCK)
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())


@pytest.mark.parametrize("encoding", [b"bzip2", b"bz2"])
def test_nrrd_bzip2(tmp_path, encoding):
    path = tmp_path / "a.nrrd"
    header = NRRD.replace(b"raw", encoding)
    for packed in (bz2.compress(BLOCK), bz2.compress(BLOCK[:50]) + bz2.compress(BLOCK[50:])):
        path.write_bytes(header + packed)
        scan = read_scan(path)
        assert scan.warnings == ()
        np.testing.assert_array_equal(scan.volume.voxels[0], numbered())
        for length in range(0, len(packed), 3):
            path.write_bytes(header + packed[:length])
            assert refused(path) == "scan.truncated"
        for at in range(4, len(packed), 3):
            path.write_bytes(header + packed[:at] + bytes([packed[at] ^ 4]) + packed[at + 1 :])
            try:
                np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
            except ValueError:
                continue
    path.write_bytes(header + bz2.compress(BLOCK) + b"JUNK")
    assert read_scan(path).warnings == ("scan.trailing-bytes",)
    path.write_bytes(header + bz2.compress(BLOCK + bytes(1 << 26)))
    assert refused(path) == "scan.header", "far more voxels than declared"


def test_a_large_bzip2_stream_in_pieces(tmp_path):
    shape = (3, 700, 901)
    voxels = np.random.default_rng(3).integers(0, 200, shape).astype("<i2")
    header = NRRD.replace(b"raw", b"bzip2").replace(b"5 4 3", b"901 700 3")
    (tmp_path / "a.nrrd").write_bytes(header + bz2.compress(voxels.tobytes()))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nrrd").voxels[0], voxels)


def test_detached_nrrd_headers_name_a_file_beside_them(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "v.raw").write_bytes(BLOCK)
    (tmp_path / "link.raw").symlink_to(tmp_path / "sub" / "v.raw")
    os.symlink("loop.raw", tmp_path / "loop.raw")
    (tmp_path / "v.raw").write_bytes(BLOCK)
    path = tmp_path / "a.nhdr"
    for name, code in (
        (b"v.raw", None),
        (b"./v.raw", None),
        (b"sub/v.raw", "scan.path-escape"),
        (b"link.raw", "scan.path-escape"),
        (b"loop.raw", "scan.path-escape"),
        (b"x" * 300, "scan.unreadable"),
        (b"absent.raw", "scan.unreadable"),
        (b"LIST 3", "scan.path-escape"),
    ):
        path.write_bytes(NRRD.replace(b"sizes", b"data file: " + name + b"\nsizes"))
        if code is None:
            np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
            assert source_files(path) == [path, tmp_path / "v.raw"]
        else:
            assert refused(path) == code


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_skewed_axes_follow_the_same_rule_as_in_nifti(tmp_path, name):
    path = tmp_path / name
    for shear, expected in ((5e-5, ()), (5e-4, ("geometry.repaired",)), (0.1, "geometry.not-orthonormal")):
        if name == "a.mha":
            text = META.replace(b"1 0 0 0 1 0 0 0 1", f"1 0 0 {shear} 1 0 0 0 1".encode())
        else:
            vectors = f"(0.5,0,0) ({0.75 * shear},0.75,0) (0,0,2.5)".encode()
            text = NRRD.replace(b"(0.3,0.4,0) (-0.6,0.45,0) (0,0,2.5)", vectors)
        path.write_bytes(text + BLOCK)
        if isinstance(expected, str):
            assert refused(path) == refused(path, read_geometry) == expected
            continue
        scan = read_scan(path)
        assert scan.warnings == expected
        image = sitk.ReadImage(str(path))
        for z, y, x in np.ndindex(*SHAPE):
            point = image.TransformIndexToPhysicalPoint((x, y, z))
            np.testing.assert_allclose(point, world_mm(scan.volume.geometry, np.array([z, y, x])), atol=1e-3)
        np.testing.assert_array_equal(scan.volume.voxels[0], numbered())
    resampled = read_scan(path, ReadingPlan(sheared_axes="resample"))
    assert resampled.warnings == ("geometry.straightened",)
    # rows lean by a tenth: 3 rows of 0.75 mm reach 0.225 mm farther, less than one voxel of 0.5 mm more
    assert resampled.volume.geometry.shape == (3, 4, 6)
    assert read_geometry(path, ReadingPlan(sheared_axes="resample")) == resampled.volume.geometry


def test_a_singular_or_mirrored_spacing_is_not_straightened(tmp_path):
    reading = ReadingPlan(sheared_axes="resample")
    for old, new, code in (
        (b"1 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1", "geometry.not-orthonormal"),
        (b"0.5 0.75", b"-0.5 0.75", "geometry.spacing"),
    ):
        text = META.replace(old, new).replace(b"1 0 0 0 1 0 0 0 1", b"1 0 0 0.2 1 0 0 0 1")
        (tmp_path / "a.mha").write_bytes(text + BLOCK)
        assert refused(tmp_path / "a.mha", lambda p: read_scan(p, reading)) == code


def test_a_bomb_is_refused_by_its_header(tmp_path):
    """Nothing is inflated: the stream is no stream."""
    big = META.replace(b"5 4 3", b"1100 1100 1100").replace(b"CompressedData = False", b"CompressedData = True")
    declared = 2 * 1100**3
    (tmp_path / "a.mha").write_bytes(big + b"\x78\x9c" + bytes(declared // 200 - 1000))
    assert refused(tmp_path / "a.mha") == "scan.bomb"
    (tmp_path / "a.mha").write_bytes(big + b"\x78\x9c" + bytes(declared // 2000))
    assert refused(tmp_path / "a.mha") == "scan.truncated", "no stream grows so much"
    bomb = NRRD.replace(b"5 4 3", b"1100 1100 1100").replace(b"raw", b"bzip2")
    (tmp_path / "a.nrrd").write_bytes(bomb + bz2.compress(bytes(1000)))
    assert refused(tmp_path / "a.nrrd") == "scan.bomb"


def test_a_blank_mask_of_many_voxels_is_no_bomb(tmp_path):
    """Below a gibibyte any ratio is taken: this one is a thousand."""
    text = META.replace(b"5 4 3", b"512 512 64").replace(b"CompressedData = False", b"CompressedData = True")
    (tmp_path / "a.mha").write_bytes(text + zlib.compress(bytes(2 * 512 * 512 * 64), 9))
    assert not read_label(tmp_path / "a.mha").labels.any()
