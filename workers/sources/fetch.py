"""Public data by one command: downloads that go on where they stopped, are proved, and are unpacked without surprises.

Pooch fetches and proves a file, but begins again after an interruption; :class:`ResumingDownloader` keeps what came as
``<file>.part`` beside it and asks for the rest with a range request (RFC 9110, section 14).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pooch
import requests

from vnet_core.errors import ConfigError, ScanError, StorageError
from workers.ledger import Outcome, State, settle
from workers.outputs import output_folder
from workers.sources import archives
from workers.sources.datasets import CATALOGUE, Dataset, Remote
from workers.storage.folders import raise_if_full

STAGE = "fetch"
ATTEMPTS = 5
"""How often a broken connection is taken up again by one command; each time it must have brought something new."""
TIMEOUT_S = 60.0
"""Without a byte for this long a connection counts as broken."""
CHUNK_BYTES = 1 << 16
"""Written at a time; a connection that breaks loses at most this much."""
Progress = Callable[[str, int, int | None], None]
"""Told the file's name, the bytes that have come, and how many there are, where the server says so."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one file."""

    outcome: Outcome
    path: Path | None
    """The file, or the folder that the archive was unpacked to; None when it failed."""
    sha256: str
    """Digest found; empty when it failed."""


def dataset(name: str, sha256: str | None = None) -> Dataset:
    """The data set of a catalogue name or of an ``http(s)://`` URL, with the checksum that the caller knows.

    Raises ConfigError ``fetch.unknown`` naming what there is, ``fetch.sha256`` for a checksum that cannot be one.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigError("fetch.sha256", f"--sha256 {sha256!r} is not 64 hexadecimal digits; copy it again")
    known = f"sha256:{sha256.lower()}" if sha256 else None
    if name in CATALOGUE:
        found = CATALOGUE[name]
        if known and len(found.files) > 1:
            raise ConfigError(
                "fetch.sha256", f"{name} has {len(found.files)} files and --sha256 names one; fetch them by their URLs"
            )
        files = (Remote(found.files[0].url, known),) if known else found.files
        return replace(found, files=files)
    if urlsplit(name).scheme not in ("http", "https"):
        raise ConfigError(
            "fetch.unknown", f"{name!r} is no data set and no http(s) URL; known are {', '.join(CATALOGUE)}"
        )
    _file_name(name)
    return Dataset(
        name, (Remote(name, known),), "see its source", name, "", "data", ("vnet ingest {path} --cohort NAME",)
    )


def fetch(wanted: Dataset, output: Path, on_bytes: Progress = lambda name, done, total: None) -> list[Fetched]:
    """Bring every file of a data set into ``output``; archives are unpacked and removed.

    What an earlier call finished is ``cached``. A file without known checksum is ``warned``, code ``fetch.unchecked``.
    Failures are rows: ``fetch.http``, ``fetch.interrupted`` (the next call goes on), ``fetch.checksum``,
    ``fetch.archive`` or ``fetch.exists``; nothing is left that looks finished. ConfigError ``output.unwritable``.
    """
    output_folder(output)
    return [_fetch_one(remote, output, on_bytes) for remote in wanted.files]


def _fetch_one(remote: Remote, output: Path, on_bytes: Progress) -> Fetched:
    name = _file_name(remote.url)
    receipt = output / f".{name}.fetched.json"
    path, sha256 = None, ""

    def bring() -> tuple[State, None, tuple[str, ...]]:
        nonlocal path, sha256
        codes = () if remote.checksum else ("fetch.unchecked",)
        done = _read_receipt(receipt)
        if done and done["checksum"] == remote.checksum and (output / done["path"]).exists():
            path, sha256 = output / done["path"], done["sha256"]
            return "cached", None, codes
        try:
            file = download(remote, output, lambda done, total: on_bytes(name, done, total))
            sha256 = pooch.file_hash(str(file))
            path = unpack(file, output) if archives.is_archive(file) else file
            _write_receipt(receipt, {"checksum": remote.checksum, "sha256": sha256, "path": path.name})
        except OSError as error:
            raise_if_full(error, output)
            raise
        return "warned" if codes else "computed", None, codes

    return Fetched(settle(STAGE, name, bring), path, sha256)


def _read_receipt(path: Path) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write_receipt(path: Path, facts: Mapping[str, str | None]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(path)


def _file_name(url: str) -> str:
    """The last part of a URL's path. ConfigError ``fetch.url`` when it is no plain file name."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", name):
        raise ConfigError("fetch.url", f"{url} names no file; its path must end in a plain file name")
    return name


# --- one file


def download(
    remote: Remote,
    folder: Path,
    on_bytes: Callable[[int, int | None], None] = lambda done, total: None,
    attempts: int = ATTEMPTS,
) -> Path:
    """The file ``folder/<last part of the URL>``, whole and proved, or none of that name.

    Raises StorageError ``fetch.http``, ``fetch.interrupted`` or, with both digests, ``fetch.checksum``.
    """
    name = _file_name(remote.url)
    part = folder / f"{name}.part"
    pooch.get_logger().setLevel("WARNING")  # its advice is for those who call it themselves
    try:
        downloader = ResumingDownloader(part, on_bytes, attempts)
        pooch.retrieve(remote.url, remote.checksum, name, folder, downloader=downloader)
    except requests.HTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        raise StorageError(
            "fetch.http", f"{remote.url} answered {code}; look at the address in a browser, it may have moved"
        ) from None
    except requests.RequestException as error:
        size = part.stat().st_size if part.exists() else 0
        raise StorageError(
            "fetch.interrupted",
            f"{name} stopped after {size} bytes ({type(error).__name__}); the same command goes on from there",
        ) from None
    except ValueError as error:
        # the only one left that pooch raises: it has removed the file by now, and its text holds both digests
        raise StorageError("fetch.checksum", f"{error} Fetch it again, or ask its publisher") from None
    return folder / name


class ResumingDownloader:
    """A downloader for pooch that keeps what came in ``part`` and, called again, asks for the rest alone.

    The part goes on only when the server proves by its validator (ETag or Last-Modified, sent as If-Range) that the
    file is still the one it was; a server that sends none, or knows no ranges, begins again.
    """

    def __init__(self, part: Path, on_bytes: Callable[[int, int | None], None], attempts: int) -> None:
        self.part = part
        self.on_bytes = on_bytes
        self.attempts = attempts
        self._note = part.with_name(f"{part.name}.validator")

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Bring the file at ``url`` to the path ``output_file``; raises requests.RequestException."""
        for left in reversed(range(self.attempts)):
            before = self._size()
            try:
                self._go_on(url)
                break
            except requests.HTTPError:
                raise
            except requests.RequestException:
                if left == 0 or self._size() <= before:
                    raise
        os.replace(self.part, output_file)
        self._note.unlink(missing_ok=True)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _go_on(self, url: str) -> None:
        validator = self._note.read_text(encoding="utf-8") if self._note.exists() else ""
        start = self._size() if validator else 0
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": validator}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code == 416 and match and match[2] == str(start):
                return  # all of it had come
            if response.status_code == 416:
                self._begin_again()
                raise requests.ConnectionError("the part does not fit the file any more")
            response.raise_for_status()
            if response.status_code == 206 and not (match and match[1] == str(start)):
                self._begin_again()
                raise requests.ConnectionError("the server sent another range than it was asked for")
            goes_on = response.status_code == 206
            if not goes_on:
                self._begin_again()
                self._note.write_text(_validator(response), encoding="utf-8")
            expected = _total(response, match)
            with self.part.open("ab" if goes_on else "wb") as file:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    self.on_bytes(file.tell(), expected)
            if expected is not None and self._size() != expected:
                raise requests.ConnectionError(f"{self._size()} of {expected} bytes came")

    def _begin_again(self) -> None:
        self.part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def _validator(response: requests.Response) -> str:
    """What If-Range may be given: a strong ETag, else the time of the last change, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _total(response: requests.Response, match: re.Match[str] | None) -> int | None:
    """Bytes of the whole file, where the server tells."""
    total = match[2] if match else response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


# --- archives


def unpack(archive: Path, output: Path, limits: archives.Limits = archives.LIMITS) -> Path:
    """Unpack beside the archive and remove it; returns the folder, which appears whole or not at all.

    The folder is the archive's single top folder, or one named after the archive. Files that begin with ``._``
    (resource forks of macOS) are left out.

    Raises StorageError ``fetch.archive`` for what :func:`workers.sources.archives.unpack` refuses, ``fetch.exists``
    when the folder is there already.
    """
    staging = output / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        archives.unpack(archive, staging, limits)
        whole = archives.content_of(staging)
        target = output / (archives.archive_stem(archive) if whole is staging else whole.name)
        if target.exists():
            raise StorageError("fetch.exists", f"{target} is there already; remove it or name another --output")
        whole.rename(target)
    except ScanError as error:
        raise StorageError(
            "fetch.archive",
            f"{archive.name} is not unpacked: {error.message}; to fetch it once more, remove it first",
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    archive.unlink()
    return target
