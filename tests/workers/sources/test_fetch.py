"""Downloads from a server in this process: proved, resumed, unpacked without surprises, and nothing half left."""

import hashlib
import io
import re
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.web import Site, serving
from vnet_core.errors import ConfigError, StorageError
from workers.sources.archives import Limits
from workers.sources.datasets import CATALOGUE, Remote
from workers.sources.fetch import dataset, download, fetch, unpack

BODY = np.random.default_rng(0).bytes(200_000)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data).hexdigest()}"


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def visible(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.startswith(".")]


def tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- one file


@pytest.mark.parametrize("checksum", [sha256(BODY), md5(BODY), None])
def test_a_file_comes_whole(site, tmp_path, checksum):
    site.files["a.bin"] = BODY
    path = download(site.remote("a.bin", checksum), tmp_path)
    assert path == tmp_path / "a.bin"
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["a.bin"]


def test_an_interrupted_download_goes_on_where_it_stopped(site, tmp_path):
    site.files["a.bin"] = BODY
    site.cut_after = [70_000]
    with pytest.raises(StorageError, match="stopped after 65536 bytes") as caught:
        download(site.remote("a.bin", sha256(BODY)), tmp_path, attempts=1)
    assert caught.value.code == "fetch.interrupted"
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.validator"]
    assert download(site.remote("a.bin", sha256(BODY)), tmp_path).read_bytes() == BODY
    assert site.asked == ["whole", "bytes=65536-"]
    assert names(tmp_path) == ["a.bin"]


def test_one_command_takes_a_broken_connection_up_again(site, tmp_path):
    site.files["a.bin"] = BODY
    site.cut_after = [70_000, 70_000]
    assert download(site.remote("a.bin", sha256(BODY)), tmp_path).read_bytes() == BODY
    assert site.asked == ["whole", "bytes=65536-", "bytes=131072-"]


def test_a_connection_that_brings_nothing_is_not_asked_for_ever(site, tmp_path):
    site.files["a.bin"] = BODY
    site.cut_after = [70_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(StorageError) as caught:
        download(site.remote("a.bin"), tmp_path)
    assert caught.value.code == "fetch.interrupted"
    assert site.asked == ["whole", "bytes=65536-"]


def test_a_file_that_changed_meanwhile_is_not_patched_together(site, tmp_path):
    site.files["a.bin"] = b"x" * 200_000
    site.cut_after = [70_000]
    with pytest.raises(StorageError):
        download(site.remote("a.bin"), tmp_path, attempts=1)
    site.files["a.bin"], site.etag = BODY, '"two"'
    assert download(site.remote("a.bin"), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_proof_that_the_file_is_the_same_it_begins_again(site, tmp_path, etag):
    site.files["a.bin"], site.etag = BODY, etag
    site.cut_after = [70_000]
    with pytest.raises(StorageError):
        download(site.remote("a.bin"), tmp_path, attempts=1)
    assert download(site.remote("a.bin"), tmp_path).read_bytes() == BODY
    assert site.asked == ["whole", "whole"]


def test_a_server_without_ranges_begins_again(site, tmp_path):
    site.files["a.bin"], site.knows_ranges = BODY, False
    site.cut_after = [70_000]
    with pytest.raises(StorageError):
        download(site.remote("a.bin"), tmp_path, attempts=1)
    assert download(site.remote("a.bin", md5(BODY)), tmp_path).read_bytes() == BODY


def test_a_part_that_is_whole_already_is_taken(site, tmp_path):
    """The program was killed between the last byte and the renaming."""
    site.files["a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY)
    (tmp_path / "a.bin.part.validator").write_text(site.etag)
    assert download(site.remote("a.bin", sha256(BODY)), tmp_path).read_bytes() == BODY


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    site.files["a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    (tmp_path / "a.bin.part.validator").write_text(site.etag)
    with pytest.raises(StorageError):
        download(site.remote("a.bin", sha256(BODY)), tmp_path)
    assert download(site.remote("a.bin", sha256(BODY)), tmp_path).read_bytes() == BODY


def test_a_wrong_checksum_is_told_with_both_digests_and_nothing_is_left(site, tmp_path):
    site.files["a.bin"] = BODY
    expected, found = "0" * 64, hashlib.sha256(BODY).hexdigest()
    with pytest.raises(StorageError) as caught:
        download(site.remote("a.bin", f"sha256:{expected}"), tmp_path)
    assert caught.value.code == "fetch.checksum"
    assert expected in str(caught.value)
    assert found in str(caught.value)
    assert names(tmp_path) == []


def test_a_page_that_is_not_there_is_named(site, tmp_path):
    with pytest.raises(StorageError, match=r"gone\.bin answered 404") as caught:
        download(site.remote("gone.bin"), tmp_path)
    assert caught.value.code == "fetch.http"
    assert names(tmp_path) == []


def test_a_host_that_does_not_answer_is_an_interruption(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(StorageError) as caught:
        download(Remote(f"http://127.0.0.1:{port}/a.bin"), tmp_path)
    assert caught.value.code == "fetch.interrupted"


def test_how_far_it_has_come_counts_from_the_files_first_byte(site, tmp_path):
    site.files["a.bin"], site.cut_after = BODY, [70_000]
    seen: list[tuple[str, int, int | None]] = []
    fetch(dataset(f"{site.url}/a.bin"), tmp_path, lambda *progress: seen.append(progress))
    assert [done for _, done, _ in seen] == [65_536, 131_072, 196_608, 200_000]
    assert {(name, total) for name, _, total in seen} == {("a.bin", 200_000)}


# --- data sets


def test_an_archive_is_unpacked_and_done_only_once(site, tmp_path):
    body = tar(**{"Task04/imagesTr/a.nii.gz": b"scan", "Task04/dataset.json": b"{}", "Task04/._dataset.json": b"mac"})
    site.files["Task04.tar"] = body
    wanted = dataset(f"{site.url}/Task04.tar", hashlib.sha256(body).hexdigest())
    (first,) = fetch(wanted, tmp_path)
    assert (first.outcome.state, first.path) == ("computed", tmp_path / "Task04")
    assert first.sha256 == hashlib.sha256(body).hexdigest()
    assert visible(tmp_path) == ["Task04/dataset.json", "Task04/imagesTr/a.nii.gz"]
    (second,) = fetch(wanted, tmp_path)
    assert (second.outcome.state, second.path, second.sha256) == ("cached", first.path, first.sha256)
    assert site.asked == ["whole"]


def test_what_was_removed_is_fetched_again(site, tmp_path):
    site.files["a.csv"] = b"seriesuid\n"
    wanted = dataset(f"{site.url}/a.csv")
    fetch(wanted, tmp_path)
    (tmp_path / "a.csv").unlink()
    assert fetch(wanted, tmp_path)[0].outcome.done
    assert (tmp_path / "a.csv").read_bytes() == b"seriesuid\n"


def test_a_file_without_known_checksum_is_a_warning_with_its_digest(site, tmp_path):
    site.files["a.csv"] = b"seriesuid\n"
    (one,) = fetch(dataset(f"{site.url}/a.csv"), tmp_path)
    assert (one.outcome.state, one.outcome.codes) == ("warned", ("fetch.unchecked",))
    assert one.sha256 == hashlib.sha256(b"seriesuid\n").hexdigest()


def test_a_failure_is_a_row_and_the_other_files_come(site, tmp_path):
    site.files["b.csv"] = b"b"
    wanted = dataset(f"{site.url}/b.csv")
    two = replace(wanted, files=(site.remote("a.zip"), *wanted.files))
    rows = fetch(two, tmp_path)
    assert [(row.outcome.case, row.outcome.state) for row in rows] == [("a.zip", "failed"), ("b.csv", "warned")]
    assert rows[0].outcome.codes == ("fetch.http",)
    assert visible(tmp_path) == ["b.csv"]


def test_a_web_page_in_place_of_an_archive_is_refused(site, tmp_path):
    site.files["a.zip"] = b"<html>log in first</html>"
    (one,) = fetch(dataset(f"{site.url}/a.zip"), tmp_path)
    assert (one.outcome.state, one.outcome.codes) == ("failed", ("fetch.archive",))
    assert not any(p.is_dir() for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "sha", "code"),
    [
        ("hipocampus", None, "fetch.unknown"),
        ("file:///etc/passwd", None, "fetch.unknown"),
        ("msd-hippocampus", "abc", "fetch.sha256"),
        ("luna16", "0" * 64, "fetch.sha256"),
        ("https://example.org/", None, "fetch.url"),
        ("https://example.org/..%2fescape", None, None),
        ("https://example.org/%2e%2e", None, "fetch.url"),
    ],
)
def test_what_cannot_be_fetched_is_named_before_anything_is_asked(name, sha, code):
    if code is None:
        assert dataset(name, sha).files[0].url == name
        return
    with pytest.raises(ConfigError) as caught:
        dataset(name, sha)
    assert caught.value.code == code


def test_a_callers_checksum_goes_before_the_catalogues():
    assert dataset("msd-hippocampus", "A" * 64).files[0].checksum == f"sha256:{'a' * 64}"
    assert dataset("msd-hippocampus").files[0].checksum == "md5:9d24dba78a72977dbd1d2e110310f31b"


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_of_the_catalogue_is_whole(name):
    entry = dataset(name)
    assert entry.title
    assert entry.licence
    assert entry.folder.startswith("data/")
    assert entry.homepage.startswith("http")
    assert all(line.startswith("vnet ") for line in entry.following)
    for remote in entry.files:
        assert remote.url.startswith("https://")
        assert remote.checksum is None or re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", remote.checksum)


# --- archives


def packed(folder: Path, name: str, body: bytes) -> Path:
    path = folder / name
    path.write_bytes(body)
    return path


def test_an_archive_with_many_things_at_its_top_gets_a_folder_of_its_name(tmp_path):
    archive = packed(tmp_path, "training_data.zip", zipped({"Case00.mhd": b"a", "Case00.raw": b"b"}))
    assert unpack(archive, tmp_path) == tmp_path / "training_data"
    assert names(tmp_path) == ["training_data/Case00.mhd", "training_data/Case00.raw"]


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_member_lies_outside(tmp_path, name, kind):
    files = {"ok.txt": b"ok", name: b"out"}
    archive = packed(tmp_path, f"a.{kind}", zipped(files) if kind == "zip" else tar(**files))
    with pytest.raises(StorageError, match=rf"a\.{kind} is not unpacked: .* outside") as caught:
        unpack(archive, tmp_path)
    assert caught.value.code == "fetch.archive"
    assert names(tmp_path) == [archive.name]
    assert not (tmp_path.parent / "out.txt").exists()


def test_an_archive_that_grows_without_measure_is_refused(tmp_path):
    archive = packed(tmp_path, "a.zip", zipped({"zeros": bytes(1_000_000)}))
    with pytest.raises(StorageError, match="1000000 bytes, at most"):
        unpack(archive, tmp_path, Limits(slack_bytes=1000))
    many = packed(tmp_path, "b.zip", zipped({f"{i}": b"" for i in range(3)}))
    with pytest.raises(StorageError, match="at most 2 files"):
        unpack(many, tmp_path, Limits(files=2))
    assert names(tmp_path) == ["a.zip", "b.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_damaged_archive_leaves_nothing(tmp_path, name):
    files = {"d/a.bin": BODY, "d/b.bin": BODY}
    body = zipped(files) if name == "a.zip" else tar(**files)
    damaged = bytearray(body[:250_000] if name == "a.tar" else body)
    if name == "a.zip":
        damaged[100_000] ^= 0xFF
    with pytest.raises(StorageError, match="damaged"):
        unpack(packed(tmp_path, name, bytes(damaged)), tmp_path)
    assert names(tmp_path) == [name]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.txt").write_text("mine")
    archive = packed(tmp_path, "a.zip", zipped({"data/a.txt": b"theirs"}))
    with pytest.raises(StorageError, match="is there already") as caught:
        unpack(archive, tmp_path)
    assert caught.value.code == "fetch.exists"
    assert names(tmp_path) == ["a.zip", "data/mine.txt"]
