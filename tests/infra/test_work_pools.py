"""infra/work-pools: how the runs of a pool are started, by what Prefect knows of the pool's type."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import prefect.server.api
import pytest
import yaml

from flows.server.settings import HEARTBEAT_S
from tests.infra.kustomize import build
from tests.walkthrough import REPOSITORY
from workers.settings.site import load_site

INFRA = REPOSITORY / "infra"
KNOWN = Path(prefect.server.api.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"
PLACE = re.compile(r"\{\{ (\w+) \}\}")


def template(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((INFRA / "work-pools" / f"{kind}.json").read_text("utf-8"))
    return found


def of_prefect(kind: str) -> dict[str, Any]:
    """What a pool of this type has when it is made without a template."""
    everything = json.loads(KNOWN.read_text("utf-8"))
    found: dict[str, Any] = everything[f"prefect-{kind}"][kind]["default_base_job_configuration"]
    return found


def filled(value: Any, values: dict[str, Any]) -> Any:
    """A template with its variables; what has no value is left out, as Prefect does it."""
    if isinstance(value, str) and (place := PLACE.fullmatch(value)):
        return values.get(place[1])
    if isinstance(value, str):
        return PLACE.sub(lambda match: str(values.get(match[1], "")), value)
    if isinstance(value, list):
        return [filled(one, values) for one in value]
    if isinstance(value, dict):
        found = {key: filled(one, values) for key, one in value.items()}
        return {key: one for key, one in found.items() if one is not None}
    return value


def defaults(kind: str) -> dict[str, Any]:
    properties = template(kind)["variables"]["properties"]
    return {name: one["default"] for name, one in properties.items() if "default" in one}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_variables_are_those_that_the_worker_knows(kind: str) -> None:
    ours, theirs = template(kind), of_prefect(kind)
    jsonschema.Draft202012Validator.check_schema(ours["variables"])
    known = theirs["variables"]["properties"]
    for name, one in ours["variables"]["properties"].items():
        assert one["type"] == known[name].get("type", "object"), name
        assert one.get("enum") == known[name].get("enum"), name
    places = set(PLACE.findall(json.dumps(ours["job_configuration"])))
    assert places == ours["variables"]["properties"].keys()
    assert ours["job_configuration"].keys() <= theirs["job_configuration"].keys()
    # those of the pool, with what vnet deploy says of each deployment
    values = defaults(kind) | {"env": defaults(kind)["env"] | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}}
    for schema in (ours["variables"], theirs["variables"]):
        jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"env": []}, ours["variables"])


def test_a_job_of_kubernetes_keeps_to_its_schema_and_is_confined_as_the_nights_are() -> None:
    run = {"name": "quick-run", "command": ["prefect", "flow-run", "execute"], "labels": {"prefect.io/flow": "nightly"}}
    values = defaults("kubernetes") | run
    values["env"] = [{"name": name, "value": text} for name, text in values["env"].items()]
    job = filled(template("kubernetes")["job_configuration"]["job_manifest"], values)
    for version in ("1.31", "1.37"):
        kubernetes_validate.validate(job, version, strict=True)
    (nights,) = (
        one
        for one in build(INFRA / "kubernetes" / "base")
        if one["metadata"]["name"] == "nights" and "template" in one["spec"]
    )
    pod, like = job["spec"]["template"], nights["spec"]["template"]
    assert pod["metadata"]["labels"] == like["metadata"]["labels"], "the network policies go by them"
    for key in ("securityContext", "automountServiceAccountToken", "serviceAccountName", "enableServiceLinks"):
        assert pod["spec"][key] == like["spec"][key], key
    (run_in,), (night_in,) = pod["spec"]["containers"], like["spec"]["containers"]
    assert run_in["securityContext"] == night_in["securityContext"]
    assert "command" not in run_in, "it would pass the image's entry by"
    paths = {mount["mountPath"] for mount in night_in["volumeMounts"]}
    assert {mount["mountPath"] for mount in run_in["volumeMounts"]} == paths | {"/run/secrets/ray"}
    assert {mount["name"] for mount in run_in["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    site = load_site(INFRA / "sites" / "cluster.toml")
    assert defaults("kubernetes")["env"]["VNET_JOIN_RAY"] == site.ray_address


def test_a_container_of_docker_sees_what_the_nights_of_compose_see() -> None:
    values = defaults("docker")
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))
    nights = compose["services"]["nights"]
    assert values["networks"] == [f"{compose['name']}_{name}" for name in nights["networks"]]
    targets = {volume.split(":")[1] for volume in values["volumes"]}
    secrets = {f"/run/secrets/{name}" for name in nights["secrets"] if name != "prefect_auth"}
    assert targets == {"/etc/vnet/site.toml", "/scans", "/private", "/var/lib/vnet"} | secrets
    of_nights = {name: text for name, text in nights["environment"].items() if not name.startswith("PREFECT")}
    assert {name: text for name, text in values["env"].items() if not name.startswith("PREFECT")} == of_nights
    assert values["privileged"] is False
