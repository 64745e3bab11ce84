"""Archives as sources: sound ones are unpacked once, and no other writes anything outside its folder."""

import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.files import file_of
from vnet_core.errors import ScanError
from workers.sources.archives import Limits, archive_stem, is_archive, unpacked
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def tarred(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def refused(root: Root, path: Path, limits: Limits | None = None) -> str:
    """The code; nothing is left unpacked, and nothing was written beside the root."""
    before = everything(path.parent, root)
    with pytest.raises(ScanError) as caught:
        unpacked(root, path, limits or Limits())
    assert everything(path.parent, root) == before
    assert not [p for p in root.home.rglob("*") if p.is_file() or p.name == "scans"]
    assert "secret" not in str(caught.value), "a member's name may be a patient's"
    return caught.value.code


def everything(folder: Path, root: Root) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if not p.is_relative_to(root.home))


def test_names_of_archives():
    assert all(is_archive(Path(f"a{end}")) for end in (".zip", ".tar", ".tar.gz", ".TGZ"))
    assert not any(is_archive(Path(f"a{end}")) for end in (".nii.gz", ".gz", ".nii", ".7z"))
    assert [archive_stem(Path(f"day.1{end}")) for end in (".zip", ".tar", ".tar.gz", ".TGZ")] == ["day.1"] * 4


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar"), (tarred, "a.tgz")])
def test_a_sound_archive_is_unpacked_once(root, tmp_path, pack, name):
    path = pack(tmp_path / name, ("images/a.nii", b"one"), ("./labels/b.nii", b"two"), ("._a.nii", b"fork"))
    folder = unpacked(root, path)
    assert folder.name == "scans"
    assert folder.parent.parent == file_of(root, "archives")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        "images/a.nii": b"one",
        "labels/b.nii": b"two",
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    times = [p.stat().st_mtime_ns for p in folder.rglob("*")]
    path.touch()
    assert unpacked(root, path) == folder
    assert [p.stat().st_mtime_ns for p in folder.rglob("*")] == times
    assert [p.name for p in folder.parent.iterdir()] == ["scans"], "nothing half done is left"


def test_a_single_folder_at_the_top_is_the_content(root, tmp_path):
    path = zipped(tmp_path / "a.zip", ("Task1/imagesTr/a.nii", b"1"), ("Task1/dataset.json", b"{}"))
    assert sorted(p.name for p in unpacked(root, path).iterdir()) == ["dataset.json", "imagesTr"]


def test_archives_within_an_archive_stay_closed(root, tmp_path):
    inner = zipped(tmp_path / "inner.zip", ("deep.nii", b"1")).read_bytes()
    folder = unpacked(root, zipped(tmp_path / "a.zip", ("inner.zip", inner), ("b.nii", b"2")))
    assert sorted(p.name for p in folder.iterdir()) == ["b.nii", "inner.zip"]
    assert (folder / "inner.zip").read_bytes() == inner


def test_equal_bytes_under_two_names_are_one_folder(root, tmp_path):
    one = zipped(tmp_path / "a.zip", ("a.nii", b"1"), ("b.nii", b"2"))
    two = tmp_path / "b.zip"
    two.write_bytes(one.read_bytes())
    assert unpacked(root, one) == unpacked(root, two)


@pytest.mark.parametrize(
    "name",
    ["../secret.nii", "a/../../secret.nii", "/secret.nii", "a\\..\\secret.nii", "C:/secret.nii", "a/secret\n.nii"],
)
@pytest.mark.parametrize(("pack", "archive"), [(zipped, "a.zip"), (tarred, "a.tar.gz")])
def test_a_member_that_would_leave_the_folder_refuses_all(root, tmp_path, pack, archive, name):
    assert refused(root, pack(tmp_path / archive, ("good.nii", b"1"), (name, b"2"))) == "archive.unsafe"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_file_refuse_it(root, tmp_path, kind):
    info = tarfile.TarInfo("link.nii")
    info.type, info.linkname = kind, "/etc/passwd"
    assert refused(root, tarred(tmp_path / "a.tar", (info, b""))) == "archive.unsafe"


def test_a_link_in_a_zip_file_refuses_it(root, tmp_path):
    info = zipfile.ZipInfo("link.nii")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert refused(root, zipped(tmp_path / "a.zip", (info, b"/etc/passwd"))) == "archive.unsafe"


def test_a_folder_and_a_file_of_one_name_refuse_it(root, tmp_path):
    assert refused(root, tarred(tmp_path / "a.tar", ("a", b"1"), ("a/b", b"2"))) == "archive.unsafe"
    assert refused(root, tarred(tmp_path / "b.tar", ("a.nii", b"1"), ("a.nii", b"2"))) == "archive.unsafe"


@pytest.mark.parametrize("name", ["a" * 300 + ".nii", "/".join(["abc"] * 600)])
def test_a_name_that_is_too_long_refuses_it(root, tmp_path, name):
    assert refused(root, zipped(tmp_path / "a.zip", (name, b"1"))) == "archive.unsafe"


def test_an_encrypted_archive_is_named(root, tmp_path):
    path = zipped(tmp_path / "a.zip", ("a.nii", b"1"))
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        offset = data.find(signature) + at
        data[offset] |= 1
    path.write_bytes(bytes(data))
    assert refused(root, path) == "archive.encrypted"


def test_a_bomb_is_refused_before_it_is_unpacked(root, tmp_path):
    """16 MiB of zeros in some 16 kB."""
    for pack, name in ((zipped, "a.zip"), (tarred, "a.tgz")):
        path = pack(tmp_path / name, ("a.nii", bytes(1 << 24)))
        assert path.stat().st_size < 1 << 15
        assert refused(root, path, Limits(slack_bytes=1 << 20)) == "archive.too-large"


def test_small_archives_may_grow_and_large_ones_not_beyond_the_whole():
    limits = Limits(total_bytes=5000, growth=100, slack_bytes=1000)
    assert [limits.unpacked_bytes(size) for size in (0, 10, 40, 1000)] == [1000, 2000, 5000, 5000]
    assert Limits().unpacked_bytes(30 * 10**9) > 31 * 10**9, "the largest public data sets"


def test_too_many_members_are_refused(root, tmp_path):
    path = zipped(tmp_path / "a.zip", *((f"{n}.nii", b"") for n in range(12)))
    other = tarred(tmp_path / "a.tar", *((f"{n}.nii", b"") for n in range(12)))
    assert refused(root, path, Limits(files=11)) == "archive.too-large"
    assert refused(root, other, Limits(files=11)) == "archive.too-large"
    assert len(list(unpacked(root, other, Limits(files=12)).iterdir())) == 12


def test_a_zip_file_that_lists_a_million_members_is_refused_by_its_end(root, tmp_path):
    """Its list is not read: it would take a gigabyte of memory."""
    path = zipped(tmp_path / "a.zip", ("a.nii", b"1"))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x05\x06")
    struct.pack_into("<I", data, at + 12, 1 << 30)
    path.write_bytes(bytes(data))
    assert refused(root, path) == "archive.too-large"


def test_a_long_header_of_a_tar_file_is_not_read_into_memory(root, tmp_path):
    """An extended header of 64 MiB, which tarfile would take whole."""
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    path = tarred(tmp_path / "a.tgz", (info, bytes(1 << 26)))
    assert refused(root, path) == "archive.damaged"


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar"), (tarred, "a.tgz")])
def test_an_archive_that_is_cut_off_anywhere_or_foreign_is_damaged(root, tmp_path, pack, name):
    content = os.urandom(1500)
    path = pack(tmp_path / name, ("a.nii", content), ("b.nii", content))
    whole = path.read_bytes()
    # a tar file is cut between two members too, where the standard library sees nothing
    lengths = (0, 10, 300, 512 + 100, 512 + 1536, 2 * (512 + 1536))
    for length in (length for length in lengths if length < len(whole)):
        path.write_bytes(whole[:length])
        assert refused(root, path) == "archive.damaged", length
    path.write_bytes(b"<html>404</html>" * 100)
    assert refused(root, path) == "archive.damaged"


def test_a_changed_byte_is_found_by_its_checksum(root, tmp_path):
    path = zipped(tmp_path / "a.zip", ("a.nii", b"x" * 1000), packing=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"xx", b"xy", 1))
    assert refused(root, path) == "archive.damaged"
    path = tarred(tmp_path / "a.tgz", ("a.nii", os.urandom(5000)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the checksum at the end of the gzip stream
    path.write_bytes(bytes(data))
    assert refused(root, path) == "archive.damaged"


def test_what_is_no_file_is_not_opened(root, tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    assert refused(root, tmp_path / "a.zip") == "scan.unreadable"
    assert refused(root, tmp_path / "gone.zip") == "scan.unreadable"
