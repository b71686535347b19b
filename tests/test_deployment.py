"""What starts a cluster, against the schemas of those who read it: Ray's launcher, Kubernetes; KubeRay's by its field names."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import ray.autoscaler
import yaml

from faceflow.cli.parser import build_parser
from faceflow.config_loading import load_config

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "jobs" / "kuberay"

# The fields of KubeRay 1.4's types (ray-operator/apis/ray/v1): their schema is not to be had as a package.
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
    "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER_FIELDS = {
    "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "headServiceAnnotations",
    "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_FIELDS = {
    "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
    "scaleStrategy", "suspend", "template",
}  # fmt: skip


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def test_cluster_yaml_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    for name, kind in config["available_node_types"].items():
        assert kind.get("max_workers", 0) <= config["max_workers"], name


def test_rayjob_has_kuberays_fields_and_kubernetes_pods() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER_FIELDS
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= HEAD_FIELDS
    groups = [head, *workers]
    for worker in workers:
        assert set(worker) <= WORKER_FIELDS
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        # As the operator passes it on: quoted for a shell, JSON inside.
        assert isinstance(json.loads(shlex.split(group["rayStartParams"]["resources"])[0]), dict)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1
    # A retry is a new cluster: what resuming needs must lie elsewhere, and the command must find it again by itself.
    assert spec["backoffLimit"] >= 1
    words = shlex.split(spec["entrypoint"])
    assert words[0] == "faceflow"
    arguments = build_parser().parse_args(words[1:])
    settings = {
        key: value for key, value in vars(arguments).items() if isinstance(value, str) and key not in ("command", "log_format")
    }
    config = load_config(settings)
    assert config.run_id is None
    assert config.output.startswith("s3://")
    offered = [json.loads(shlex.split(group["rayStartParams"]["resources"])[0]) for group in groups]
    assert config.detect_resource in offered[0]
    assert any(config.search_resource in item for item in offered[1:])


def test_versions_of_ray_agree() -> None:
    (job,) = documents("rayjob.yaml")
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"rayproject/ray:{version}-" in (KUBERAY / "Dockerfile").read_text()


@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_the_nightly_manifests_fit_kubernetes_schemas(version: str) -> None:
    kinds = []
    for document in documents("nightly.yaml"):
        kubernetes_validate.validate(document, version, strict=True)
        kinds.append(document["kind"])
    assert kinds == ["ServiceAccount", "Role", "RoleBinding", "CronJob"]


def test_the_nightly_job_creates_the_rayjob_beside_it() -> None:
    (kustomization,) = documents("kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    cron = documents("nightly.yaml")[-1]["spec"]
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert pod["volumes"][0]["configMap"]["name"] == generated["name"]
    assert all((KUBERAY / name).exists() for name in [*generated["files"], *kustomization["resources"]])
    script = pod["containers"][0]["args"][0]
    assert f"{pod['containers'][0]['volumeMounts'][0]['mountPath']}/{generated['files'][0]}" in script
    # What it asks of the cluster, its role allows.
    rules = documents("nightly.yaml")[1]["rules"][0]
    assert {"create", "get"} <= set(rules["verbs"])


def test_the_settings_file_is_one() -> None:
    config = load_config({}, str(ROOT / "jobs" / "job.toml"))
    assert config.input.startswith("s3://")
