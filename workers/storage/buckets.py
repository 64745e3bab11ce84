"""A prefix of an S3 bucket as a place for objects.

Who may do what is found as the AWS tools find it: variables, shared files, container or machine roles
(https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html). No key is ever an argument, a
message or a log line: of what a server answers, only its error code is told.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from vnet_core.errors import ConfigError, StorageError
from workers.storage.folders import raise_if_full
from workers.storage.objects import Stored

if TYPE_CHECKING:
    from obstore.store import S3Store

RETRY_S = 45.0
"""How long a request is tried again, with jitter: a server that is killed takes half a minute to be back."""
ANSWER_S = 30.0
"""How long one request may take."""
CONNECT_S = 5.0
_PIECE_BYTES = 8 << 20
_CODE = re.compile(r"<Code>([A-Za-z]+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_WRITER = "vnet-writer"
"""Metadata of an object that was created exclusively: tells a writer whose answer got lost that it was the one."""


class Bucket:
    """Objects of one bucket below one prefix. A put is whole or not at all, and the server checks its SHA-256."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """Nothing is asked yet. ConfigError ``store.bucket`` for what is no name of a bucket."""
        if not _NAME.fullmatch(bucket):
            raise ConfigError("store.bucket", f"{bucket!r} is no name of a bucket; write s3://bucket/prefix")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")

    @property
    def store(self) -> S3Store:
        """The connection, shared by all who use this place in this process."""
        return _connected(self.bucket, self.prefix)

    def below(self, prefix: str) -> S3Store:
        """A connection to what lies below a prefix of this place."""
        return _connected(self.bucket, f"{self.prefix}/{prefix}".strip("/"))

    def put(self, key: str, content: bytes) -> None:
        import obstore

        with self._answers(key):
            obstore.put(self.store, key, content)

    def create(self, key: str, content: bytes) -> bool:
        import obstore

        writer = uuid4().hex
        with self._answers(key):
            try:
                obstore.put(self.store, key, content, mode="create", attributes={_WRITER: writer})
            except obstore.exceptions.AlreadyExistsError:
                # also what a writer is told whose first answer got lost on the way
                try:
                    return obstore.get(self.store, key).attributes.get(_WRITER) == writer
                except FileNotFoundError:
                    return False
        return True

    def get(self, key: str) -> bytes:
        import obstore

        with self._answers(key):
            found = obstore.get(self.store, key)
            content = bytes(found.bytes())
        _refuse_short(key, len(content), found.meta["size"])
        return content

    def pieces(self, key: str) -> Iterator[bytes]:
        import obstore

        seen = 0
        with self._answers(key):
            found = obstore.get(self.store, key)
            for some in found.stream(min_chunk_size=_PIECE_BYTES):
                seen += len(some)
                yield bytes(some)
        _refuse_short(key, seen, found.meta["size"])

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.get(key))

    def is_object(self, key: str) -> bool:
        import obstore

        with self._answers(key):
            try:
                obstore.head(self.store, key)
            except FileNotFoundError as error:
                self._refuse_missing_bucket(error)
                return False
        return True

    def exists(self, key: str) -> bool:
        return next(iter(self.walk(key)), None) is not None

    def names(self, prefix: str) -> list[str]:
        import obstore

        with self._answers(prefix):
            found = obstore.list_with_delimiter(self.store, prefix)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        # some stores list an emptied prefix as lying in itself
        names = {path.rstrip("/").rpartition("/")[2] for path in paths if path.startswith(f"{prefix}/")}
        return sorted(name for name in names if not name.startswith("."))

    def walk(self, prefix: str) -> Iterator[Stored]:
        import obstore

        with self._answers(prefix):
            if prefix:
                # a listing goes by whole names, and leaves out an object of the very key
                try:
                    yield _stored(obstore.head(self.store, prefix))
                    return
                except FileNotFoundError as error:
                    self._refuse_missing_bucket(error)
            for some in obstore.list(self.store, prefix or None):
                yield from map(_stored, some)

    def links(self, prefix: str) -> list[str]:
        return []

    def leftovers(self) -> Iterator[Stored]:
        client, start = _client(), f"{self.prefix}/" if self.prefix else ""
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=start)
        with _told_by_boto(self.url):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    key = upload["Key"].removeprefix(start)
                    yield Stored(f"{key}?uploadId={upload['UploadId']}", 0, upload["Initiated"].astimezone(UTC))

    def discard(self, leftover: Stored) -> None:
        key, _, upload = leftover.key.partition("?uploadId=")
        full = f"{self.prefix}/{key}" if self.prefix else key
        client = _client()
        with _told_by_boto(self.url), suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=self.bucket, Key=full, UploadId=upload)

    def delete(self, key: str) -> None:
        import obstore

        gone = [stored.key for stored in self.walk(key)]
        if gone:
            with self._answers(key):
                obstore.delete(self.store, gone)

    def tidy(self, prefix: str) -> None:
        """There is none without an object."""

    def sync(self, prefix: str) -> None:
        """What a server has acknowledged is durable by its own rules."""

    @contextmanager
    def at_hand(self, key: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="vnet-") as folder:
            target = Path(folder) / key.rpartition("/")[2]
            found = False
            for stored in self.walk(key):
                found = True
                path = target if stored.key == key else target / stored.key.removeprefix(f"{key}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fetch(stored, path)
            if not found:
                raise FileNotFoundError(key)
            yield target

    def fetch(self, stored: Stored, path: Path) -> None:
        """Write an object to a file of this machine.

        StorageError ``store.short`` when not all of it came, ``store.full`` when this machine has no room for it.
        """
        with _room_here(path.parent), path.open("wb") as file:
            for some in self.pieces(stored.key):
                file.write(some)
        _refuse_short(stored.key, path.stat().st_size, stored.size)

    @contextmanager
    def written(self, key: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="vnet-") as folder:
            target = Path(folder) / key.rpartition("/")[2]
            yield target
            paths = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
            for path in paths:
                below = path.relative_to(target).as_posix()
                self._send(key if path == target else f"{key}/{below}", path)

    def _send(self, key: str, path: Path) -> None:
        import obstore

        with self._answers(key):
            obstore.put(self.store, key, path)

    @contextmanager
    def room(self) -> Iterator[None]:
        with _room_here(Path(tempfile.gettempdir())), self._answers("what is written"):
            yield

    def space(self) -> tuple[int, int] | None:
        return None

    @contextmanager
    def _answers(self, key: str) -> Iterator[None]:
        """Turn what the server and the way to it do into StorageErrors without anybody's keys."""
        import obstore

        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            self._refuse_missing_bucket(error)
            raise FileNotFoundError(key) from None
        except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
            raise StorageError(
                "store.denied",
                f"the object store refuses {key or 'the root'} in {self.url} ({_code(error)}); give this machine's"
                " identity leave to list, read, write and delete there, or mend its AWS credentials",
            ) from None
        except obstore.exceptions.InvalidPathError:
            raise StorageError(
                "store.key",
                f"an object of {self.url} at or below {key or 'the root'} has a name that is no path, with empty or"
                " dotted parts; rename it",
            ) from None
        except (obstore.exceptions.BaseError, OSError) as error:
            self._refuse_missing_bucket(error)
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's own, of a file of this machine
            raise StorageError(
                "store.unavailable",
                f"the object store of {self.url} did not answer for {key or 'the root'} ({_code(error)}) although it"
                f" was asked for {RETRY_S:.0f} s; run again when it does",
            ) from None

    def _refuse_missing_bucket(self, error: Exception) -> None:
        if _code(error) == "NoSuchBucket":
            raise StorageError(
                "store.no-bucket", f"there is no bucket {self.bucket}; make it, or name another"
            ) from None


def _refuse_short(key: str, came_bytes: int, size_bytes: int) -> None:
    if came_bytes != size_bytes:
        raise StorageError(
            "store.short",
            f"{key} came with {came_bytes} bytes of {size_bytes}; run again, and check what lies between here and the"
            " object store",
        )


@contextmanager
def _room_here(folder: Path) -> Iterator[None]:
    """A full disk of this machine is none of the object store."""
    try:
        yield
    except OSError as error:
        raise_if_full(error, folder)
        raise


def _stored(meta: Any) -> Stored:
    return Stored(meta["path"], meta["size"], meta["last_modified"])


def _code(error: Exception) -> str:
    """The server's own code, or its status, or the kind of error: never its text, which may repeat keys."""
    text = str(error)
    if found := _CODE.search(text):
        return found[1]
    if found := _STATUS.search(text):
        return f"HTTP {found[1]}"
    return "no connection" if "error sending request" in text else type(error).__name__


@lru_cache(maxsize=32)
def _connected(bucket: str, prefix: str) -> S3Store:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    meta = _client().meta
    return S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=meta.endpoint_url,
        region=meta.region_name,
        virtual_hosted_style_request=False,
        checksum_algorithm="sha256",
        client_options={
            "allow_http": meta.endpoint_url.startswith("http://"),
            "timeout": timedelta(seconds=ANSWER_S),
            "connect_timeout": timedelta(seconds=CONNECT_S),
        },
        retry_config={
            # the time ends it, not the number
            "max_retries": 1000,
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=5),
                # the next pause is anything up to so many times the last: with 2 or less they would not grow
                "base": 4,
            },
            "retry_timeout": timedelta(seconds=RETRY_S),
        },
        credential_provider=Boto3CredentialProvider(_session()),
    )


@lru_cache(maxsize=1)
def _session() -> Any:
    import boto3

    return boto3.Session()


@lru_cache(maxsize=1)
def _client() -> Any:
    """Knows address and region by the usual chain, and what the connection cannot do: unfinished uploads."""
    from botocore.config import Config

    config = Config(connect_timeout=CONNECT_S, read_timeout=ANSWER_S, retries={"mode": "standard", "max_attempts": 8})
    return _session().client("s3", config=config)


@contextmanager
def _told_by_boto(url: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code == "NoSuchBucket":
            raise StorageError("store.no-bucket", f"there is no bucket for {url}; make it, or name another") from None
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            raise _silent(url, code) from None
        raise StorageError(
            "store.denied",
            f"the object store of {url} refuses to list or end unfinished uploads ({code}); give this machine's"
            " identity leave for both",
        ) from None
    except BotoCoreError as error:
        raise _silent(url, type(error).__name__) from None


def _silent(url: str, why: str) -> StorageError:
    return StorageError(
        "store.unavailable",
        f"the object store of {url} did not answer for unfinished uploads ({why}); run again when it does",
    )
