"""Dask by address on real schedulers: with certificates, with other versions, and without anybody to work."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import pytest
from distributed.comm import connect

from tests.walkthrough import REPOSITORY
from tests.workers.certificates import Authority
from tests.workers.dask_processes import Dask, dask_processes
from vnet_core.errors import ConfigError, EngineError
from workers.engines.dask_engine import DaskExecutor, dask_executor
from workers.engines.tries import Supervised

LIMIT_BYTES = 3 << 30


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def encrypted(authority: Authority) -> Iterator[Dask]:
    """A scheduler and a worker that ask everybody for a certificate."""
    with dask_processes(authority.signed("cluster")) as dask:
        dask.add_worker("--memory-limit", str(LIMIT_BYTES))
        yield dask


def test_work_goes_to_a_scheduler_with_certificates(encrypted: Dask, authority: Authority) -> None:
    assert encrypted.address.startswith("tls://127.0.0.1:")
    with dask_executor(encrypted.address, 1, authority.signed("client")) as executor:
        assert isinstance(executor, Supervised)
        assert executor.submit(pow, 2, 5).result(60) == 32
        worker = executor.submit(executor.this_worker).result(60)
        assert worker.name.startswith("tls://127.0.0.1:")
        assert worker.memory_limit_bytes == LIMIT_BYTES
        assert executor.memory_at_end(worker) is None
        assert executor.loss() is not None, "what is dropped now was dropped by the scheduler"
        executor.check()
    assert executor.loss() is None
    assert executor.submit(pow, 2, 5).cancelled(), "closed"


class Late:
    """An answer that can be read at the second time alone."""

    times = 0

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return read_late, ()


def read_late() -> str:
    Late.times += 1
    if Late.times == 1:
        raise OSError("it did not come through")
    return "read"


def test_an_answer_that_cannot_be_fetched_is_asked_for_again(encrypted: Dask, authority: Authority) -> None:
    with dask_executor(encrypted.address, 1, authority.signed("client")) as executor:
        assert executor.submit(Late).result(60) == "read"
    assert Late.times == 2


def test_who_closes_an_executor_ends_what_was_asked(encrypted: Dask, authority: Authority) -> None:
    with dask_executor(encrypted.address, 1, authority.signed("client")) as executor:
        asked = [executor.submit(time.sleep, 1.0) for _ in range(3)]
    assert all(future.cancelled() for future in asked)


def test_who_shows_no_certificate_is_refused(encrypted: Dask) -> None:
    """Neither over tcp, nor over TLS without one; the program does not even try."""
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        asyncio.run(connect(f"tcp://{encrypted.address.removeprefix('tls://')}", timeout=3))
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        asyncio.run(connect(encrypted.address, timeout=3, ssl_context=stranger))
    with pytest.raises(ConfigError) as caught, dask_executor(encrypted.address, 1):
        pass
    assert caught.value.code == "dask.tls-files"


def test_a_certificate_of_another_authority_is_refused(encrypted: Dask, tmp_path: Path) -> None:
    stranger = Authority(tmp_path).signed("client")
    with pytest.raises(EngineError) as caught, dask_executor(encrypted.address, 1, stranger):
        pass
    assert caught.value.code == "dask.unreachable"
    assert encrypted.address in caught.value.message


def test_an_address_that_others_reach_is_refused_before_it_is_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(ConfigError) as caught, dask_executor(f"0.0.0.0:{listener.getsockname()[1]}", 1):
            pass
        assert caught.value.code == "dask.plain-tcp"
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_another_version_on_a_worker_is_named_before_work_starts(tmp_path: Path) -> None:
    """A worker that finds the metadata of another numpy, and of another release of ours, before the real ones."""
    for name, version in (("numpy", "1.26.4"), ("vnet_cohort", "0.0.1")):
        facts = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    with dask_processes() as dask:
        with dask_executor(dask.address, 1) as executor:
            # it joins after the others were compared
            dask.add_worker(PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
            error = executor.submit(executor.this_worker).exception(60)
        assert isinstance(error, EngineError)
        assert error.code == "dask.versions"
        assert "numpy is " in error.message
        with pytest.raises(EngineError) as caught, dask_executor(dask.address, 1):
            pass
    assert caught.value.code == "dask.versions"
    assert "numpy is " in caught.value.message
    assert "here and 1.26.4 on 1 worker (tcp://127.0.0.1:" in caught.value.message
    assert "and 0.0.1 on 1 worker" in caught.value.message
    assert "torch" not in caught.value.message


def test_a_scheduler_without_workers_is_told_after_a_while() -> None:
    with dask_processes() as dask, distributed.Client(dask.address) as client:
        executor = DaskExecutor(client, dask.address, patience_s=0.0)
        with pytest.raises(EngineError) as caught:
            executor.check()
        assert caught.value.code == "dask.no-workers"
        assert dask.address in caught.value.message
        DaskExecutor(client, dask.address).check()
        executor.close()
        executor.check()
