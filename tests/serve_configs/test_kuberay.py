"""The RayService manifest: what it asks of Serve, of pods, and of KubeRay's own schema.

The schema, of a megabyte, is KubeRay's: give the file ray-operator/config/crd/bases/
ray.io_rayservices.yaml of a release in the environment variable RAYSERVICE_CRD to check it too.
"""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from app.args import SLoRAArgs, parse_args
from app.build import with_absolute_paths
from app.config_place import ConfigPlace

PATH = Path(__file__).resolve().parents[2] / "serve_configs" / "kuberay" / "rayservice.yaml"
CRD = os.environ.get("RAYSERVICE_CRD")
CONSTRAINTS = PATH.parents[2] / "constraints-cpu.txt"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


@pytest.fixture(scope="module")
def args(manifest) -> SLoRAArgs:
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    [application] = config.applications
    assert application.import_path == "app.build:build"
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    return parse_args(application.args)


def pods(manifest) -> dict[str, dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {
        name: group["template"]["spec"]
        for name, group in {"head": cluster["headGroupSpec"], **groups}.items()
    }


def test_it_is_a_rayservice_of_the_version_of_ray_that_was_tested(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    version = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in CONSTRAINTS.read_text().splitlines()
    assert manifest["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_its_paths_need_no_place_and_lie_on_volumes(manifest, args):
    assert with_absolute_paths(args, ConfigPlace(None)).adapters_dir == args.adapters_dir
    worker = pods(manifest)["gpu"]["containers"][0]
    mounts = {mount["mountPath"] for mount in worker["volumeMounts"]}
    assert args.adapters_dir in mounts and "/dev/shm" in mounts
    assert any(args.packed_cache_dir.startswith(f"{mount}/") for mount in mounts)
    for pod in pods(manifest).values():
        named = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == named


def test_its_replicas_have_gpus(manifest, args):
    [group] = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    per_pod = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * per_pod >= args.num_replicas * args.gpus_per_replica
    surge = -(-args.num_replicas * args.max_surge_percent // 100)
    num_gpus = group["maxReplicas"] * per_pod
    assert num_gpus >= (args.num_replicas + surge) * args.gpus_per_replica
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > (
        args.graceful_shutdown_timeout_s
    )


def test_its_pods_are_probed_and_nobody_is_root(manifest):
    worker = pods(manifest)["gpu"]["containers"][0]
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(worker)
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    for pod in pods(manifest).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.skipif(CRD is None, reason="RAYSERVICE_CRD names no schema")
def test_it_is_what_kuberay_takes(manifest):
    definition = yaml.safe_load(Path(CRD).read_text())
    [schema] = [
        version["schema"]["openAPIV3Schema"]
        for version in definition["spec"]["versions"]
        if version["name"] == "v1"
    ]
    closed = without_unknown_fields(schema)
    jsonschema.Draft7Validator(closed).validate(manifest)
    # A guard of the guard: a field that Kubernetes would drop without a word is seen.
    manifest["spec"]["rayClusterConfig"]["authOption"] = {}
    with pytest.raises(jsonschema.ValidationError, match="'authOption' was unexpected"):
        jsonschema.Draft7Validator(closed).validate(manifest)


def without_unknown_fields(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as a JSON schema that refuses fields it does not name."""
    if isinstance(schema, list):
        return [without_unknown_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: without_unknown_fields(value) for key, value in schema.items()}
    # Of kind, apiVersion and metadata the API server itself knows what they hold.
    if schema.get("type") == "object" and schema.get("properties"):
        closed.setdefault("additionalProperties", False)
    return closed
