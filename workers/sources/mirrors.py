"""Sources in buckets: what lies below ``s3://bucket/prefix``, kept as files of the private folder in step with it.

Scans name patients, so their copies lie where only the private folder's owner looks. Bucket and prefix come from a
person's command; no manifest and no header can name one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vnet_core.errors import ConfigError, ScanError
from vnet_core.plan import digest_of
from workers.storage.buckets import Bucket
from workers.storage.locks import alone
from workers.storage.objects import Stored
from workers.storage.store import FETCHED_AT_ONCE, Root

PREFIX = "mirrors"
"""Where in the private folder they lie."""
_PART = ".part-"
"""How the names of half-fetched files begin."""
_NAME_BYTES = 255


def is_remote(source: str) -> bool:
    """Whether a source lies in a bucket."""
    return source.startswith("s3://")


def mirror_key(source: str) -> str:
    """Where in the private folder the copy of a source lies."""
    return f"{PREFIX}/{digest_of(source.rstrip('/'))[:40]}"


def listed(source: str) -> list[Stored]:
    """What lies at or below a source, by key below it; an object of that very name has its own name.

    StorageError as for a root; ScanError ``scan.unsafe-name`` for a name that is no path below a folder.
    """
    _, start, found = _look(source)
    return [Stored(stored.key.removeprefix(start), stored.size, stored.modified) for stored in found]


def mirrored(private: Root, source: str) -> Path:
    """The copy of a source: a folder, or a file where the source is one object.

    What has its size and time of the last look is not fetched again, and what has left the bucket leaves the copy.
    ConfigError ``source.missing`` when nothing lies there; others as :func:`listed`.
    """
    bucket, start, found = _look(source)
    if not found:
        raise ConfigError("source.missing", f"nothing lies at {source}; correct bucket and prefix")
    folder = private.home / mirror_key(source)
    with private.room():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # half-fetched files of another process would be taken for what has left the bucket
    with private.room(), alone(folder.with_name(f".{folder.name}.lock")):
        wanted = {folder / stored.key.removeprefix(start): stored for stored in found}
        _remove_others(folder, set(wanted))
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
            list(threads.map(lambda pair: _bring(bucket, *pair), wanted.items()))
    is_one = found[0].key == unquote(urlsplit(source).path).strip("/")
    return folder / found[0].key.removeprefix(start) if is_one else folder


def _look(source: str) -> tuple[Bucket, str, list[Stored]]:
    """The bucket, what the keys of the source's objects begin with, and these objects.

    What consoles make to show an empty folder is listed under the folder's own name, and is no object of that name.
    """
    parts = urlsplit(source)
    bucket, prefix = Bucket(parts.netloc, ""), unquote(parts.path).strip("/")
    found = [stored for stored in bucket.walk(prefix) if stored.size or bucket.is_object(stored.key)]
    above = prefix.rpartition("/")[0] if [stored.key for stored in found] == [prefix] else prefix
    start = f"{above}/" if above else ""
    unsafe = [stored for stored in found if not _is_safe(stored.key.removeprefix(start))]
    if unsafe:
        raise ScanError(
            "scan.unsafe-name",
            f"{len(unsafe)} of {len(found)} objects of the source have names that are no path below a folder, with"
            f" empty or dotted parts or over {_NAME_BYTES} bytes; rename them",
        )
    return bucket, start, found


def _is_safe(key: str) -> bool:
    parts = key.split("/")
    return not any(p in ("", ".", "..") or "\0" in p or len(os.fsencode(p)) > _NAME_BYTES for p in parts)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    kept = wanted | {parent for path in wanted for parent in path.parents}
    for place, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            path = Path(place, name)
            if path in kept and path.is_dir() == (path not in wanted):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                folders.remove(name)
            else:
                path.unlink()


def _bring(bucket: Bucket, path: Path, stored: Stored) -> None:
    """Fetch one object, unless its copy has its size and time."""
    modified = stored.modified.timestamp()
    if path.exists() and (path.stat().st_size, path.stat().st_mtime) == (stored.size, modified):
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PART)
    os.close(handle)
    temporary = Path(name)
    try:
        bucket.fetch(stored, temporary)
        os.utime(temporary, (modified, modified))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
