"""What KubeRay's operator takes, and what it makes of it; its schema is in no package of Kubernetes' schemas.

The fields are those of ``ray-operator/apis/ray/v1/raycluster_types.go`` in KubeRay at commit 3275ee09, before 1.4, that
versions since then have too; the commands are those of ``ray-operator/controllers/ray/common/pod.go``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
"""Every value is text, numbers and yes or no too."""
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["spec"]}
"""Judged by the schema of Kubernetes."""


def _group(required: list[str], **more: Any) -> dict[str, Any]:
    properties = {"rayStartParams": PARAMETERS, "template": POD, **more}
    return {
        "type": "object",
        "required": ["rayStartParams", "template", *required],
        "properties": properties,
        "additionalProperties": False,
    }


HEAD = _group([], headService={"type": "object"}, enableIngress={"type": "boolean"}, serviceType={"type": "string"})
WORKERS = _group(
    ["groupName", "minReplicas", "maxReplicas"],
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    scaleStrategy={"type": "object"},
    suspend={"type": "boolean"},
)
RAY_CLUSTER = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["headGroupSpec"],
            "properties": {
                "headGroupSpec": HEAD,
                "workerGroupSpecs": {"type": "array", "items": WORKERS},
                "rayVersion": {"type": "string"},
                "suspend": {"type": "boolean"},
                "managedBy": {"type": "string"},
                "enableInTreeAutoscaling": {"type": "boolean"},
                "autoscalerOptions": {"type": "object"},
                "headServiceAnnotations": {"type": "object"},
                "gcsFaultToleranceOptions": {"type": "object"},
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}

TAKE_A_VALUE = ("include-dashboard", "log-color")
"""Options of yes or no whose value is written out; of others the name alone, where it is yes."""


def start_commands(cluster: dict[str, Any]) -> Iterator[list[str]]:
    """The ``ray start`` that the operator writes for the head and for every group of workers."""
    spec = cluster["spec"]
    yield [
        "ray",
        "start",
        "--head",
        *_options({"dashboard-host": "0.0.0.0", **_started(spec["headGroupSpec"])}),
    ]
    for group in spec["workerGroupSpecs"]:
        address = f"{head_service(cluster)}.vnet.svc.cluster.local:6379"
        yield ["ray", "start", *_options({"address": address, **_started(group)})]


def head_service(cluster: dict[str, Any]) -> str:
    """The name of the service that it makes for the head."""
    return f"{cluster['metadata']['name']}-head-svc"


def _started(group: dict[str, Any]) -> dict[str, str]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    found = {"num-cpus": limits["cpu"], "memory": str(int(limits["memory"].removesuffix("Gi")) << 30)}
    if "nvidia.com/gpu" in limits:
        found["num-gpus"] = limits["nvidia.com/gpu"]
    own = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true"}
    return found | own | group["rayStartParams"]


def _options(parameters: dict[str, str]) -> list[str]:
    found = []
    for name, value in sorted(parameters.items()):
        if value in ("true", "false") and name not in TAKE_A_VALUE:
            found += [f"--{name}"] if value == "true" else []
        else:
            found.append(f"--{name}={value}")
    return found
