"""infra/kubernetes: manifests by the schemas of Kubernetes, and what they promise about access, limits and secrets."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml

from tests.infra.kuberay import RAY_CLUSTER, head_service, start_commands
from tests.infra.kustomize import Manifest, build, containers, manifests, pods
from tests.infra.programs import read, with_files
from tests.walkthrough import REPOSITORY
from workers.settings.site import load_site

FOLDER = REPOSITORY / "infra" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.31", "1.37")
"""The oldest and the newest Kubernetes whose schemas are asked."""


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(FOLDER / "overlays" / request.param)


def named(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in manifests}


def specs(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod, with the name of its manifest."""
    for one in manifests:
        for pod in pods(one):
            yield one["metadata"]["name"], pod["spec"]


def asked(manifest: Manifest) -> list[Manifest]:
    """The manifests by which the schemas of Kubernetes judge one."""
    if manifest["kind"] != "RayCluster":
        return [manifest]
    jsonschema.validate(manifest, RAY_CLUSTER)
    return [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-ray"}, "template": pod}
        for pod in pods(manifest)
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_keeps_to_the_schema(overlay: list[Manifest], version: str) -> None:
    for manifest in overlay:
        for one in asked(manifest):
            kubernetes_validate.validate(one, version, strict=True)
    broken = json.loads(json.dumps(named(overlay)["Deployment/nights"]))
    broken["spec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="contaners"):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_operator_of_ray_takes_the_cluster_and_ray_what_it_makes_of_it(
    overlay: list[Manifest], request: pytest.FixtureRequest
) -> None:
    cluster = named(overlay)["RayCluster/vnet-ray"]
    jsonschema.validate(cluster, RAY_CLUSTER)
    head, workers = start_commands(cluster)
    for command in (head, workers):
        read(command)
    assert {"--head", "--num-cpus=0", "--include-dashboard=false", "--block"} <= set(head)
    assert {"--num-cpus=4", "--block"} <= set(workers)
    assert ("--num-gpus=1" in workers) == (request.node.callspec.params["overlay"] == "gpu")
    for broken in (
        {"headGroupSpec": {**cluster["spec"]["headGroupSpec"], "rayStartParam": {}}},
        {"headGroupSpec": {**cluster["spec"]["headGroupSpec"], "rayStartParams": {"num-cpus": 0}}},
        {"workerGroupSpecs": [{**cluster["spec"]["workerGroupSpecs"][0], "replicas": "4"}]},
        {"workerGroups": []},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**cluster, "spec": cluster["spec"] | broken}, RAY_CLUSTER)


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_makes_the_same_of_an_overlay(name: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here")
    done = subprocess.run(
        ["kubectl", "kustomize", FOLDER / "overlays" / name], capture_output=True, text=True, check=True
    )
    theirs = named(list(yaml.safe_load_all(done.stdout)))
    assert theirs == named(build(FOLDER / "overlays" / name))


def test_no_container_may_do_more_than_it_must(overlay: list[Manifest]) -> None:
    names = [name for name, _ in specs(overlay)]
    assert sorted(names) == ["dask-scheduler", "dask-worker", "nights", "postgres", "prefect", "vnet-ray", "vnet-ray"]
    for name, spec in specs(overlay):
        assert spec["serviceAccountName"] == "vnet", name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == (999 if name == "postgres" else 10001)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], "nothing else can be written"
            assert ":" in container["image"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claims = {"data"} if name == "postgres" else set()
            assert mounted == {volume["name"] for volume in spec["volumes"]} | claims, name
    labels = named(overlay)["Namespace/vnet"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_are_named_and_have_no_values(overlay: list[Manifest]) -> None:
    examples = {one["metadata"]["name"]: one["stringData"] for one in manifests(FOLDER / "secrets.example.yaml")}
    assert {value for keys in examples.values() for value in keys.values()} == {""}
    used: dict[str, set[str]] = {}
    for _, spec in specs(overlay):
        for volume in spec["volumes"]:
            if "secret" in volume:
                items = volume["secret"].get("items", ())
                used.setdefault(volume["secret"]["secretName"], set()).update(item["key"] for item in items)
        for container in spec["containers"]:
            for source in container.get("envFrom", ()):
                used.setdefault(source["secretRef"]["name"], set())
            for variable in container.get("env", ()):
                if "valueFrom" in variable:
                    key = variable["valueFrom"]["secretKeyRef"]
                    used.setdefault(key["name"], set()).add(key["key"])
                else:
                    assert not any(part in variable["name"] for part in ("AUTH_STRING", "AUTH_TOKEN", "CONNECTION_URL"))
    assert used.keys() == examples.keys()
    for name, keys in used.items():
        assert keys <= examples[name].keys(), name
    page = (REPOSITORY / "docs" / "deploy.md").read_text("utf-8")
    listed = page.partition("`s3.env` holds ")[2].partition(", one to a")[0].replace(" and ", ", ").replace("\n", " ")
    assert set(listed.split(", ")) == examples["vnet-s3"].keys()
    paths = {f"/run/secrets/dask/{key}" for key in examples["vnet-dask"]}
    site = (REPOSITORY / "infra" / "sites" / "cluster.toml").read_text("utf-8")
    assert all(f'"{path}"' in site for path in paths)


def test_the_programs_know_what_they_are_told(overlay: list[Manifest], secrets: Path) -> None:
    told = 0
    for name, spec in specs(overlay):
        for container in spec["containers"]:
            assert "command" not in container, "it would pass the image's entry by"
            if "args" in container:
                read(with_files(container["args"], secrets))
                told += 1
            else:
                assert name in ("postgres", "vnet-ray"), name
    assert told == 4
    cluster = named(overlay)["RayCluster/vnet-ray"]["spec"]
    (head,), (worker,) = (
        group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    for probe in ("readinessProbe", "livenessProbe"):
        # without them the operator adds its own, which need more of Ray than the image has
        read(head[probe]["exec"]["command"])
        python, option, program = worker[probe]["exec"]["command"]
        assert (python, option) == ("python", "-c")
        own = repr(psutil.Process().name())
        assert subprocess.run([sys.executable, "-c", program.replace("'raylet'", own)]).returncode == 0
        assert subprocess.run([sys.executable, "-c", program.replace("'raylet'", "'no-such'")]).returncode == 1


def test_ray_and_dask_ask_who_is_there(overlay: list[Manifest]) -> None:
    for name, spec in specs(overlay):
        for container in spec["containers"]:
            variables = {one["name"]: one.get("value") for one in container.get("env", ())}
            if name in ("vnet-ray", "nights"):
                assert variables["RAY_AUTH_MODE"] == "token"
                assert "RAY_AUTH_TOKEN" in variables
            if name.startswith("dask"):
                assert variables["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
                assert "--protocol=tls" in container["args"]
                assert any(word.startswith("--dashboard-address=127.0.0.1:") for word in container["args"])
            if name == "prefect":
                assert "PREFECT_SERVER_API_AUTH_STRING" in variables


def reached(policies: list[Manifest], component: str) -> set[tuple[str, int | None]]:
    """Which pods of ours may come in to one, and at which port (None: any)."""
    found = set()
    for policy in policies:
        spec = policy["spec"]
        if "Ingress" not in spec["policyTypes"] or component not in chosen(spec["podSelector"]):
            continue
        for rule in spec.get("ingress", ()):
            ports = [port["port"] for port in rule.get("ports", ())] or [None]
            for peer in rule["from"]:
                others = chosen(peer["podSelector"]) if "podSelector" in peer else {"an ingress"}
                found |= {(other, port) for other in others for port in ports}
    return found


def chosen(selector: dict[str, Any]) -> set[str]:
    if not selector:
        return {"postgres", "prefect", "nights", "dask-scheduler", "dask-worker", "ray"}
    labels = selector.get("matchLabels", {})
    found = {labels["app.kubernetes.io/component"]} if labels else set()
    for expression in selector.get("matchExpressions", ()):
        found |= set(expression["values"])
    return found


def test_nobody_reaches_anybody_but_those_who_work_together(overlay: list[Manifest]) -> None:
    policies = [one for one in overlay if one["kind"] == "NetworkPolicy"]
    nobody = named(overlay)["NetworkPolicy/nobody"]["spec"]
    assert nobody == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    dask = {("dask-scheduler", None), ("dask-worker", None), ("nights", 8786)}
    ray = {("ray", None), ("nights", None)}
    assert {component: reached(policies, component) for component in sorted(chosen({}))} == {
        "postgres": {("prefect", 5432)},
        "prefect": {("nights", 4200), ("an ingress", 4200)},
        "dask-scheduler": dask,
        "dask-worker": dask,
        "ray": ray,
        "nights": ray,
    }
    for policy in policies:
        for rule in policy["spec"].get("egress", ()):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    assert peer["ipBlock"]["except"] == ["169.254.0.0/16"], "the machine's metadata"
                    assert rule["ports"]
    # every pod has the label by which the policies know it
    found = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for one in overlay for pod in pods(one)}
    assert found == chosen({})


def test_services_reach_the_ports_of_their_pods(overlay: list[Manifest]) -> None:
    open_ports = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: {
            port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", ())
        }
        for one in overlay
        for pod in pods(one)
        if one["kind"] != "RayCluster"
    }
    for one in overlay:
        if one["kind"] == "Service":
            component = one["spec"]["selector"]["app.kubernetes.io/component"]
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= open_ports[component]
            assert one["spec"].get("type", "ClusterIP") == "ClusterIP", "nothing is open to the outside"


def test_gpus_are_where_the_overlay_has_them(overlay: list[Manifest], request: pytest.FixtureRequest) -> None:
    gpu = request.node.callspec.params["overlay"] == "gpu"
    (group,) = named(overlay)["RayCluster/vnet-ray"]["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if gpu else None)
    assert container["image"] == ("vnet-cohort:gpu" if gpu else "vnet-cohort:cpu")
    images = {one["image"] for manifest in overlay for one in containers(manifest)} - {container["image"]}
    assert images == ({"postgres:17.6-bookworm"} | ({"vnet-cohort:cpu"} if gpu else set()))


def test_the_site_file_names_the_services_and_every_worker_of_ray_holds_an_actor(overlay: list[Manifest]) -> None:
    site = load_site(REPOSITORY / "infra" / "sites" / "cluster.toml")
    found = named(overlay)
    assert site.dask_address == "tls://dask-scheduler:8786"
    assert "Service/dask-scheduler" in found
    assert site.ray_address == f"{head_service(found['RayCluster/vnet-ray'])}:6379"
    (nights,) = containers(found["Deployment/nights"])
    variables = {one["name"]: one.get("value") for one in nights["env"]}
    assert variables["VNET_JOIN_RAY"] == site.ray_address
    (group,) = found["RayCluster/vnet-ray"]["spec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert group["replicas"] == site.segment_workers == site.train_workers
    assert int(nights["resources"]["limits"]["cpu"]) // site.segment_workers <= int(
        worker["resources"]["limits"]["cpu"]
    )
