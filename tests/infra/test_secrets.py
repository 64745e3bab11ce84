"""infra/make-secrets: what it makes, for whom, and that Dask started as infra/compose.yaml says lets in nobody else."""

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest
from distributed.security import Security

from tests.flows.command import until
from tests.infra.programs import with_files
from tests.infra.test_compose import composed
from tests.walkthrough import REPOSITORY, environment

SCRIPT = REPOSITORY / "infra" / "make-secrets"


def test_they_are_the_owners_different_each_time_and_never_made_twice(secrets: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o444}
    again = subprocess.run([SCRIPT, secrets], capture_output=True, text=True)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    other = tmp_path / "other"
    made = subprocess.run([SCRIPT, other], capture_output=True, text=True, check=True)
    for path in other.iterdir():
        assert path.read_bytes() != (secrets / path.name).read_bytes(), path.name
        assert path.read_text("utf-8") not in made.stdout + made.stderr
    password = (secrets / "postgres_password").read_text("utf-8")
    assert (secrets / "prefect_database").read_text("utf-8") == (
        f"postgresql+asyncpg://prefect:{password}@postgres:5432/prefect"
    )
    assert not list(secrets.parent.glob("*.part"))


@pytest.fixture(scope="module")
def dask(secrets: Path) -> Iterator[str]:
    """Address of a scheduler with a worker, both started by the commands of the file, but for ports and names."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tls://127.0.0.1:{port}"
    changed = {
        "--port=8786": f"--port={port}",
        "--dashboard-address=127.0.0.1:8787": "--dashboard-address=127.0.0.1:0",
        "tls://dask-scheduler:8786": address,
        "--nworkers=4": "--nworkers=1",
        "--memory-limit=4GB": "--memory-limit=1GB",
        "--local-directory=/tmp/dask": f"--local-directory={secrets.parent}/dask",
    }
    services = composed("compose.yaml")["services"]
    with contextlib.ExitStack() as running:
        log = running.enter_context((secrets.parent / "dask.log").open("w"))
        for name in ("dask-scheduler", "dask-worker"):
            command = [changed.get(word, word) for word in with_files(services[name]["command"], secrets)]
            env = environment() | {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}
            process = running.enter_context(
                subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            )
            running.callback(process.terminate)
        yield address


def listens(address: str) -> bool:
    host, _, port = address.removeprefix("tls://").partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def test_dask_works_with_the_certificates_and_refuses_all_others(dask: str, secrets: Path, tmp_path: Path) -> None:
    until(lambda: listens(dask), 60)

    def security(folder: Path) -> Security:
        return Security(
            tls_ca_file=str(folder / "dask_ca"),
            tls_client_cert=str(folder / "dask_cert"),
            tls_client_key=str(folder / "dask_key"),
            require_encryption=True,
        )

    with distributed.Client(dask, security=security(secrets), timeout=30) as client:
        client.wait_for_workers(1, timeout=60)
        pid = client.submit(os.getpid).result(timeout=30)
        assert pid != os.getpid()

    async def try_in(address: str, **options: object) -> None:
        async with distributed.Client(address, asynchronous=True, timeout=5, **options):
            pass

    # without TLS, and with the certificates of another installation
    other = tmp_path / "other"
    subprocess.run([SCRIPT, other], check=True, capture_output=True)
    for address, options in ((dask.replace("tls", "tcp"), {}), (dask, {"security": security(other)})):
        with pytest.raises(OSError):  # noqa: PT011
            asyncio.run(try_in(address, **options))
