"""Which addresses a scheduler may have, and which files it is joined with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.certificates import Authority
from vnet_core.errors import ConfigError
from workers.engines.dask_address import NO_TLS, DaskTls, Tls, checked_address


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DaskTls:
    return Authority(tmp_path_factory.mktemp("authority")).signed("client")


def refused(address: str, files: DaskTls = NO_TLS) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        checked_address(address, files)
    return caught.value.code, caught.value.message


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("127.0.0.1:4444", "tcp://127.0.0.1:4444"),
        ("tcp://127.8.9.1", "tcp://127.8.9.1:8786"),
        ("localhost", "tcp://localhost:8786"),
        ("tcp://[::1]:1234", "tcp://[::1]:1234"),
    ],
)
def test_plain_tcp_goes_to_this_machine(address, url):
    assert checked_address(address, NO_TLS) == (url, None)


@pytest.mark.parametrize("address", ["tcp://10.0.0.5:8786", "10.0.0.5:8786", "dask.example", "tcp://0.0.0.0:8786"])
def test_plain_tcp_goes_nowhere_else(address):
    code, message = refused(address)
    assert code == "dask.plain-tcp"
    host = address.removeprefix("tcp://").partition(":")[0]
    assert f"write tls://{host}:8786" in message
    assert "dask_tls" in message


@pytest.mark.parametrize("address", ["tls://10.0.0.5:8786", "10.0.0.5", "tls://127.0.0.1:8786"])
def test_tls_takes_the_three_files(address, files):
    host = address.removeprefix("tls://").partition(":")[0]
    assert checked_address(address, files) == (
        f"tls://{host}:8786",
        Tls(files.ca_file, files.cert_file, files.key_file),
    )


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tcp://10.0.0.5:8786"])
def test_files_beside_plain_tcp_are_a_contradiction(address, files):
    code, message = refused(address, files)
    assert code == "dask.tls-address"
    assert f"tls://{address.removeprefix('tcp://')}" in message


@pytest.mark.parametrize(
    "address", ["wss://10.0.0.5:8786", "tls://", "tcp://127.0.0.1:port", "tls://10.0.0.5:8786/x", "tls://me@10.0.0.5"]
)
def test_what_is_no_address_is_named(address, files):
    code, message = refused(address, files)
    assert code == "dask.address"
    assert address in message


@pytest.mark.parametrize("left_out", DaskTls.model_fields)
def test_a_file_that_is_not_named_is_asked_for(left_out, files):
    code, message = refused("tls://10.0.0.5:8786", files.model_copy(update={left_out: ""}))
    assert code == "dask.tls-files"
    assert f"needs {left_out} in section dask_tls" in message


def test_tls_without_the_section_asks_for_all():
    code, message = refused("tls://10.0.0.5:8786")
    assert code == "dask.tls-files"
    assert "ca_file, cert_file, key_file" in message


@pytest.mark.parametrize("absent", DaskTls.model_fields)
def test_a_file_that_is_not_there_is_named(absent, files, tmp_path: Path):
    path = tmp_path / "absent.pem"
    code, message = refused("tls://10.0.0.5:8786", files.model_copy(update={absent: str(path)}))
    assert code == "dask.tls-files"
    assert f"dask_tls.{absent} {path} cannot be read (No such file or directory)" in message


def test_files_that_do_not_fit_are_named(files, tmp_path: Path):
    other = Authority(tmp_path / "other").signed("client")
    for wrong in ({"key_file": other.key_file}, {"ca_file": files.key_file}, {"cert_file": files.key_file}):
        code, message = refused("tls://10.0.0.5:8786", files.model_copy(update=wrong))
        assert code == "dask.tls-files"
        assert next(iter(wrong.values())) in message


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path):
    locked = Authority(tmp_path / "authority").signed("client", passphrase=b"secret")
    assert refused("tls://10.0.0.5:8786", locked)[0] == "dask.tls-files"
