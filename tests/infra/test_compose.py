"""infra/compose.yaml by the rules of the Compose specification: what it starts, who may reach it and with what."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.infra.programs import read, with_files
from tests.object_store import ObjectStore
from tests.walkthrough import REPOSITORY
from workers.settings.site import load_site

INFRA = REPOSITORY / "infra"
GIVEN = {"VNET_SCANS": "/srv/scans"}
"""Variables that a person sets."""
OF_OTHERS = {"postgres", "s3"}
"""Services whose images are not ours."""
ONCE = {"bucket"}
VARIABLE = re.compile(r"\$\{(\w+)(:-|:\?)?([^}]*)\}")


def composed(*names: str) -> dict[str, Any]:
    """The files as one, variables filled in; as Compose joins those parts that ours have."""
    found: dict[str, Any] = {}
    for name in names:
        text = VARIABLE.sub(value, (INFRA / name).read_text("utf-8"))
        found = joined(found, yaml.safe_load(text))
    return {key: value for key, value in found.items() if not key.startswith("x-")}


def value(match: re.Match[str]) -> str:
    return GIVEN.get(match[1]) or (match[3] if match[2] == ":-" else "")


def joined(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: joined(below[key], value) if key in below else value for key, value in above.items()}
    return above


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return composed("compose.yaml")


@pytest.mark.parametrize(
    "names", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=lambda names: names[-1]
)
def test_the_file_keeps_to_the_specification(names: tuple[str, ...]) -> None:
    read_back = PyCompose.from_json(json.dumps(composed(*names)))
    assert set(read_back.service_names()) == set(composed(*names)["services"])
    wrong = composed(*names)
    wrong["services"]["nights"]["volums"] = []
    with pytest.raises(ValueError, match="volums"):
        PyCompose.from_json(json.dumps(wrong))


def test_only_the_prefect_server_has_a_port_and_only_on_this_machine(compose: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert ports == {"prefect": ["127.0.0.1:4200:4200"]}
    inside = {name for name, network in compose["networks"].items() if network.get("internal")}
    assert inside == {"database", "engines"}
    for name, service in compose["services"].items():
        assert service["networks"], f"{name} would be on a network of its own choice"
        assert set(service["networks"]) <= inside or name == "prefect"
        assert not {"network_mode", "privileged", "devices", "pid", "ipc"} & service.keys()
    database = {name for name, service in compose["services"].items() if "database" in service["networks"]}
    assert database == {"postgres", "prefect"}


def test_every_service_is_confined_limited_watched_and_started_again(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits.keys() == {"cpus", "memory", "pids"}, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert re.search(r":\d[\w.-]*$|^vnet-cohort:cpu$", service["image"]), f"{name} has no version"
        for other, condition in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert condition == {"condition": wanted}
            assert other in ONCE or "healthcheck" in compose["services"][other], other
    volumes = [volume for service in compose["services"].values() for volume in service.get("volumes", ())]
    named = {volume.partition(":")[0] for volume in volumes if isinstance(volume, str)}
    assert named == compose["volumes"].keys()
    assert all(volume["read_only"] for volume in volumes if not isinstance(volume, str))


def test_secrets_are_files_that_the_script_makes(compose: dict[str, Any], secrets: Path) -> None:
    assert {Path(one["file"]).parent.as_posix() for one in compose["secrets"].values()} == {"secrets"}
    assert all(name == Path(one["file"]).name for name, one in compose["secrets"].items())
    assert compose["secrets"].keys() == {path.name for path in secrets.iterdir()}
    for name, service in compose["services"].items():
        given = set(service.get("secrets", ()))
        assert given <= compose["secrets"].keys(), name
        said = json.dumps([service.get("environment", {}), service.get("command", [])])
        assert set(re.findall(r"/run/secrets/(\w+)", said)) <= given, f"{name} reads a secret that it is not given"
        for variable, text in service.get("environment", {}).items():
            secret = re.search(r"PASSWORD|AUTH_STRING|CONNECTION_URL|TOKEN|SECRET|CREDENTIALS", variable)
            assert not secret or str(text).startswith("/run/secrets/"), variable
    # the site file names them too
    site = (INFRA / "sites" / "server.toml").read_text("utf-8")
    assert set(re.findall(r"/run/secrets/(\w+)", site)) <= set(compose["services"]["nights"]["secrets"])


def test_the_programs_know_what_they_are_told(compose: dict[str, Any], secrets: Path) -> None:
    read_by_programs = 0
    for name, service in compose["services"].items():
        if name in OF_OTHERS | ONCE:
            continue
        read(with_files(service["command"], secrets))
        test = service.get("healthcheck", {}).get("test", [])
        if test[1:2] == ["ray"]:
            read(test[1:])
        read_by_programs += 1
    assert read_by_programs == 6
    gpu = composed("compose.yaml", "compose.gpu.yaml")["services"]["ray-worker"]
    read(gpu["command"])
    assert gpu["image"] == "vnet-cohort:gpu"
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu["deploy"]["resources"]["limits"]["memory"] == "24g"


def test_every_engine_that_is_started_asks_for_its_secret(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in ("ray-head", "ray-worker", "nights"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token", name
    for name in ("dask-scheduler", "dask-worker"):
        assert services[name]["environment"]["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
        assert {"--protocol=tls", "--tls-ca-file=/run/secrets/dask_ca"} <= set(services[name]["command"])
        (pages,) = (word for word in services[name]["command"] if word.startswith("--dashboard-address="))
        assert pages.startswith("--dashboard-address=127.0.0.1:")
    assert "PREFECT_SERVER_API_AUTH_STRING_FILE" in services["prefect"]["environment"]
    assert "-s3.config=/run/secrets/s3_identities" in services["s3"]["command"]
    assert "-ip.bind=127.0.0.1" in services["s3"]["command"]


def test_the_site_file_names_the_services_and_a_worker_of_ray_can_hold_an_actor(compose: dict[str, Any]) -> None:
    site = load_site(INFRA / "sites" / "server.toml")
    services = compose["services"]
    assert site.dask_address == "tls://dask-scheduler:8786"
    assert site.ray_address == services["nights"]["environment"]["VNET_JOIN_RAY"] == "ray-head:6379"
    cores = int(services["nights"]["deploy"]["resources"]["limits"]["cpus"]) // site.segment_workers
    assert f"--num-cpus={cores}" in services["ray-worker"]["command"]
    assert services["nights"]["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
    mounts = {volume["target"] for volume in services["nights"]["volumes"] if not isinstance(volume, str)}
    assert mounts == {"/etc/vnet/site.toml", "/scans"}
    assert services["nights"]["environment"]["VNET_SITE"] == "/etc/vnet/site.toml"


def test_the_bucket_is_made_once(
    compose: dict[str, Any], writable_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the program of the file, on a real object store."""
    python, option, program = compose["services"]["bucket"]["command"]
    assert (python, option) == ("python", "-c")
    for _ in range(2):
        exec(compile(program, "compose.yaml", "exec"), {})
    assert "vnet" in [bucket["Name"] for bucket in writable_store.client().list_buckets()["Buckets"]]
