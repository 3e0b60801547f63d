"""The files for clusters, against the schemas of Kubernetes and KubeRay, and that parts agree."""

import copy
import functools
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from jobs.submit import PATIENCE_S
from pipeline.cluster import CPU_POOL, POOL_LABEL

from .test_documented_commands import check_command

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
SCHEMAS = sorted((ROOT / "tests" / "schemas").glob("kuberay-*.json.gz"))
KUBERAY = {path.name.split("-")[1].removesuffix(".json.gz"): path for path in SCHEMAS}
KUBERNETES = ("1.27", "1.37")  # that the docs ask for, and the newest


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def cluster_specs() -> list[dict[str, Any]]:
    return [read("raycluster.yaml")["spec"], read("rayjob.yaml")["spec"]["rayClusterSpec"]]


def check_pod(template: dict[str, Any]) -> dict[str, Any]:
    """The one container of a pod, all of whose mounts have a volume."""
    spec = template["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
    return container


def pod_templates() -> list[dict[str, Any]]:
    """What KubeRay makes pods of, as the resource that Kubernetes has a schema for."""
    groups = [[s["headGroupSpec"], *s["workerGroupSpecs"]] for s in cluster_specs()]
    meta = {"apiVersion": "v1", "kind": "PodTemplate"}
    return [{**meta, "template": group["template"]} for part in groups for group in part]


def strict(schema: Any) -> Any:
    """A schema of a custom resource that refuses fields it does not know, as `kubectl` does."""
    if not isinstance(schema, dict):
        return [strict(part) for part in schema] if isinstance(schema, list) else schema
    closed = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.parametrize("version", KUBERNETES)
def test_pods_and_the_schedule_are_as_kubernetes_publishes(version: str) -> None:
    cron = read("retrain-cronjob.yaml")
    for document in (cron, *pod_templates()):
        kubernetes_validate.validate(document, version, strict=True)
    for damage in (
        lambda spec: spec.update(backofLimit=1),
        lambda spec: spec.update(backoffLimit="0"),
        lambda spec: spec["template"]["spec"]["containers"][0].pop("name"),
    ):
        damaged = copy.deepcopy(cron)
        damage(damaged["spec"]["jobTemplate"]["spec"])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(damaged, version, strict=True)


@functools.cache
def kuberay_schemas(version: str) -> dict[str, Any]:
    """By kind."""
    schemas = strict(json.loads(gzip.decompress(KUBERAY[version].read_bytes())))
    for schema in schemas.values():
        schema["properties"]["metadata"] = {"type": "object"}  # which Kubernetes checks
    return schemas


@pytest.mark.parametrize("version", KUBERAY)
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_clusters_are_as_kuberay_publishes(name: str, version: str) -> None:
    document = read(f"{name}.yaml")
    validator = Draft202012Validator(kuberay_schemas(version)[document["kind"]])
    assert [error.message for error in validator.iter_errors(document)] == []
    spec = document["spec"]["rayClusterSpec"] if name == "rayjob" else document["spec"]
    for damage in (
        lambda: spec.update(headGroupSpecs={}),
        lambda: spec["workerGroupSpecs"][0].update(minReplicas="1"),
        lambda: spec["headGroupSpec"]["template"]["spec"].pop("containers"),
    ):
        before = len(list(validator.iter_errors(document)))
        damage()
        assert len(list(validator.iter_errors(document))) > before


def test_the_oldest_kuberay_that_the_docs_ask_for_is_checked() -> None:
    oldest = min(KUBERAY, key=lambda version: [int(part) for part in version.split(".")])
    assert f"With KubeRay {oldest} or later" in (ROOT / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize("spec", cluster_specs(), ids=["raycluster", "rayjob"])
def test_clusters_have_a_head_without_cpus_and_two_pools(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == "2.60.0"
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {port["name"]: port["containerPort"] for port in check_pod(head["template"])["ports"]}
    assert ports["dashboard"] == 8265
    cpu, gpu = spec["workerGroupSpecs"]
    assert cpu["labels"] == {POOL_LABEL: CPU_POOL}
    assert gpu["labels"] == {POOL_LABEL: "gpu"}
    for group in (cpu, gpu):
        assert "labels" not in group["rayStartParams"]  # KubeRay refuses them there
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        limits = check_pod(group["template"])["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (group is gpu)


def test_both_clusters_are_the_same_but_for_the_config() -> None:
    cluster, of_job = cluster_specs()
    container = of_job["headGroupSpec"]["template"]["spec"]["containers"][0]
    del container["volumeMounts"], of_job["headGroupSpec"]["template"]["spec"]["volumes"]
    assert of_job == cluster


def test_the_job_and_the_schedule_run_verbs_that_there_are() -> None:
    job, cron = read("rayjob.yaml"), read("retrain-cronjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, words[0]) == ("raydiffusion", "run")
    check_command(words)
    assert (cron["apiVersion"], cron["kind"]) == ("batch/v1", "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert re.fullmatch(r"(\S+ ){4}\S+", cron["spec"]["schedule"])
    job_spec = cron["spec"]["jobTemplate"]["spec"]
    template = job_spec["template"]
    container = check_pod(template)
    # One pod a night: after a refusal that it did not see, a second one would find nothing new.
    assert (job_spec["backoffLimit"], template["spec"]["restartPolicy"]) == (0, "Never")
    program, verb, *words = container["command"]
    assert (program, verb, "retrain" in words) == ("raydiffusion", "submit", True)
    assert float(words[words.index("--patience") + 1]) > PATIENCE_S
    check_command(container["command"][1:])
    name = read("raycluster.yaml")["metadata"]["name"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{name}-head-svc:8265"
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": name, "key": "auth_token"}  # as KubeRay makes it


def test_the_image_is_made_of_what_is_there_and_pinned() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11-", text, re.M)
    assert "--constraint constraints.txt" in text
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    assert {"pyproject.toml", "diffusion_core", "pipeline", "jobs"} <= set(copied)
    let_in = re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(copied) == sorted(let_in)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    images = re.findall(r"image: (\S+)", "".join(p.read_text() for p in DEPLOY.glob("*.yaml")))
    assert set(images) == {f"raydiffusion:{version[1]}"}


def test_the_pools_of_cluster_yaml_are_labelled() -> None:
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["cpu"]["labels"] == {POOL_LABEL: CPU_POOL}
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert min(types["cpu"]["min_workers"], types["gpu"]["min_workers"]) >= 1


def test_the_machines_of_cluster_yaml_have_what_is_pinned() -> None:
    document = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (install,) = (line for line in document["setup_commands"] if "pip install" in line)
    (there,) = re.findall(r"--constraint (\S+)", install)
    assert document["file_mounts"] == {there: "constraints.txt"}
    assert (ROOT / "constraints.txt").is_file()
