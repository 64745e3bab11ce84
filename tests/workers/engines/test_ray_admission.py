"""Who is let into a Ray cluster, who is refused, and by which name."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.workers.ray_nodes import TOKEN, ray_nodes
from vnet_core.errors import ConfigError, EngineError
from workers.engines.clusters import CONNECT_TIMEOUT_S, ray_session
from workers.engines.ray_admission import check_address, check_admission, refuse_open_mode
from workers.settings.site import Site

JOIN = """
import sys
from vnet_core.errors import VnetError
from workers.engines.clusters import ray_session
from workers.settings.site import Site
try:
    with ray_session(Site(ray_address=sys.argv[1] or None).engines.ray_address, 1):
        import ray
        print(int(ray.cluster_resources()["CPU"]))
except VnetError as error:
    print(error.code, "|", error)
"""
OPEN = """
import sys, ray
ray.init(address="local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, logging_level=40)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Any:
    with ray_nodes(1, cpus=3) as found:
        yield found


def join(address: str, tmp_path: Path, **variables: str) -> tuple[str, float]:
    """What a process with these variables says that joins, and how long it takes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env=kept | {"HOME": str(tmp_path)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    return done.stdout.strip().splitlines()[-1], time.monotonic() - began


def test_a_token_of_the_environment_or_a_file_is_taken(cluster: Any, tmp_path: Path) -> None:
    assert join(cluster.address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)[0] == "3"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    # as a submitted job: no address in the site file
    assert join("", tmp_path, RAY_AUTH_MODE="token", RAY_ADDRESS=cluster.address)[0] == "3"


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}, "is wrong (RAY_AUTH_MODE is token)"),
        ({"RAY_AUTH_MODE": "token"}, "is missing (RAY_AUTH_MODE is token)"),
        ({}, "is wrong (RAY_AUTH_MODE is not set)"),
    ],
)
def test_a_wrong_or_missing_token_is_named_in_time(
    cluster: Any, tmp_path: Path, variables: dict[str, str], found: str
) -> None:
    said, seconds = join(cluster.address, tmp_path, **variables)
    assert said.startswith("ray.token | ")
    assert cluster.address in said
    assert found in said
    assert "RAY_AUTH_TOKEN_PATH" in said
    assert seconds < 60, "the process's own start, and no hang"


def test_another_version_is_named_with_both(cluster: Any, tmp_path: Path) -> None:
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    before = client.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=10)
    try:
        other = json.dumps(json.loads(before) | {"ray_version": "2.40.0", "python_version": "3.9.1"}).encode()
        client.internal_kv_put(b"CLUSTER_METADATA", other, True, b"cluster", timeout=10)
        said, _ = join(cluster.address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    finally:
        client.internal_kv_put(b"CLUSTER_METADATA", before, True, b"cluster", timeout=10)
    assert said.startswith("ray.versions | ")
    import ray

    for version in ("2.40.0", "3.9.1", ray.__version__):
        assert version in said


def test_a_cluster_that_lets_everybody_in_is_refused(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN],
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with pytest.raises(EngineError) as caught:
            check_admission(address, CONNECT_TIMEOUT_S)
        assert caught.value.code == "ray.open"
        assert address in caught.value.message
        assert join(address, tmp_path)[0].startswith("ray.open | ")
        process.communicate("")


@pytest.mark.parametrize("address", ["auto", "ray://10.0.0.5:10001", "http://10.0.0.5:8265", "10.0.0.5", "a b:1", ""])
def test_what_is_no_head_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match=r"no host:port") as caught:
        check_address(address)
    assert caught.value.code == "ray.address"


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "head.example.org:6379", "[fd00::5]:6379"])
def test_what_may_be_a_head(address: str) -> None:
    check_address(address)


def test_a_ray_of_this_machine_is_never_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(EngineError) as caught, ray_session(None, 1):
        pass
    assert caught.value.code == "ray.open"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    refuse_open_mode()
    monkeypatch.delenv("RAY_AUTH_MODE")
    refuse_open_mode()


def test_the_site_file_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert Site().engines.ray_address is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.6:6379")
    assert Site().engines.ray_address == "10.0.0.6:6379"
    assert Site(ray_address="10.0.0.5:6379").engines.ray_address == "10.0.0.5:6379"
