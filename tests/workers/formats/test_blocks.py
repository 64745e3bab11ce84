"""Files that are opened: regular ones only, and unchanged while they are read."""

import os
import socket
import threading

import numpy as np
import pytest

from tests.workers.sources.test_scans import META, nifti_bytes, numbered, refused
from vnet_core.errors import ScanError
from workers.formats.blocks import unchanged
from workers.sources.scans import read_geometry, read_volume, source_files


@pytest.mark.parametrize("reader", [read_volume, read_geometry, source_files])
def test_only_regular_files_are_opened(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "to-pipe.nii").symlink_to("pipe.nii")
    (tmp_path / "zero.nii.gz").symlink_to("/dev/zero")
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to("absent")
    (tmp_path / "folder.nii.gz").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.nii"))
    for name in ("pipe.nii", "to-pipe.nii", "zero.nii.gz", "loop.nii.gz", "gone.nii.gz", "folder.nii.gz", "socket.nii"):
        assert refused(tmp_path / name, reader) == "scan.unreadable"
    listener.close()
    for name in ("x" * 300 + ".nii", "a\0b.nii", "x" * 300, "a.nii/b.nii"):
        assert refused(tmp_path / name, reader) == "scan.unreadable"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_file(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti_bytes())
    (tmp_path / "a.nii").chmod(0)
    assert refused(tmp_path / "a.nii") == "scan.unreadable"


def test_a_link_to_a_scan_is_a_scan(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti_bytes())
    (tmp_path / "b.nii").symlink_to("a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii").voxels[0], numbered())


@pytest.mark.parametrize("change", ["longer", "shorter", "newer", "another", "gone"])
@pytest.mark.parametrize("damaged", [True, False])
def test_a_file_that_changes_is_told_as_such_whatever_else_it_looks_like(tmp_path, change, damaged):
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.write_bytes(b"12345678")
        os.utime(path, (1000, 1000))
    with unchanged(first, second), second.open("rb") as file:
        file.read()

    def read() -> None:
        with unchanged(first, second):
            if change in ("longer", "shorter"):
                second.write_bytes(b"1234567" if change == "shorter" else b"123456789")
                os.utime(second, (1000, 1000))
            elif change == "newer":
                os.utime(second, (2000, 2000))
            elif change == "another":
                (tmp_path / "c").write_bytes(b"12345678")
                os.utime(tmp_path / "c", (1000, 1000))
                (tmp_path / "c").rename(second)
            else:
                second.unlink()
            if damaged:
                raise ScanError("scan.truncated", "cut")

    with pytest.raises(ScanError, match="1 of 2 files") as caught:
        read()
    assert caught.value.code == "scan.changed"


@pytest.mark.parametrize("name", ["a.nii", "a.mhd"])
def test_a_scan_that_is_written_to_while_it_is_read(tmp_path, name):
    shape = (64, 256, 256)
    voxels = np.zeros(shape, "<i2")
    data_file = tmp_path / ("a.nii" if name == "a.nii" else "v.raw")
    data_file.write_bytes(nifti_bytes(voxels) if name == "a.nii" else voxels.tobytes())
    (tmp_path / "a.mhd").write_bytes(META.replace(b"LOCAL", b"v.raw").replace(b"5 4 3", b"256 256 64"))
    assert read_volume(tmp_path / name).geometry.shape == shape
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            os.utime(data_file)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        codes = set()
        for _ in range(200):  # at one of them the writer gets its turn
            try:
                read_volume(tmp_path / name)
            except ScanError as error:
                codes.add(error.code)
                break
    finally:
        done.set()
        writer.join()
    assert codes == {"scan.changed"}


def test_damage_without_a_change_stays_damage(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(ScanError, match="cut"), unchanged(tmp_path / "a", tmp_path / "absent"):
        raise ScanError("scan.truncated", "cut")
