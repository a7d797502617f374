"""The manifests that ship, built by kustomize itself: held by Kubernetes' schemas, and by its restricted standard."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy/kubernetes"
BUILDS = ("base", "init", "monitor", "overlays/cuda", "overlays/german")
VERSIONS = ("1.30.0", kubernetes_validate.latest_version())
FOREIGN = {"ServiceMonitor"}  # of the Prometheus operator: no schema of Kubernetes'

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has kustomize")
Resource = Mapping[str, Any]


@cache
def built(name: str) -> tuple[Resource, ...]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def found(name: str, kind: str) -> Resource:
    [one] = [resource for resource in built(name) if resource["kind"] == kind]
    return one


def pods() -> Iterator[tuple[str, Resource]]:
    for name in BUILDS:
        for resource in built(name):
            if "template" in resource.get("spec", {}):
                yield f"{name}: {resource['kind']}", resource["spec"]["template"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BUILDS)
def test_the_schemas_know_every_field(name: str, version: str) -> None:
    for resource in built(name):
        if resource["kind"] not in FOREIGN:
            kubernetes_validate.validate(resource, version, strict=True)


def test_a_wrong_field_would_be_found() -> None:
    wrong = {**found("base", "PersistentVolumeClaim"), "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_pod_is_restricted() -> None:
    """Pod Security Standards, restricted; and a root that is read-only, no token of the cluster, bounded memory."""
    seen = 0
    for where, template in pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] == 10001, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False, where
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where
            seen += 1
    assert seen == 7


def test_there_is_one_daemon_and_readers_that_cannot_write() -> None:
    daemon, serve = found("base", "StatefulSet")["spec"], found("base", "Deployment")["spec"]
    assert daemon["replicas"] == 1 and serve["replicas"] > 1
    mounts = {one["name"]: one for one in serve["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["data"]["readOnly"] is True
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for spec in (daemon, serve)
        for volume in spec["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {found("base", "PersistentVolumeClaim")["metadata"]["name"]}


def test_a_long_tensor_and_a_full_disk_kill_no_daemon() -> None:
    """What can kill it asks for what holds all along; only traffic is kept away by more."""
    [daemon] = found("base", "StatefulSet")["spec"]["template"]["spec"]["containers"]
    paths = {kind: daemon[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}


@pytest.mark.parametrize("name", ["base", "overlays/german"])
def test_what_selects_pods_finds_its_own(name: str) -> None:
    labels = {
        resource["kind"]: resource["spec"]["template"]["metadata"]["labels"]
        for resource in built(name)
        if resource["kind"] in ("StatefulSet", "Deployment")
    }
    affinity = found(name, "Deployment")["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    [near] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    selectors = [
        *(
            (resource["metadata"]["name"], resource["spec"]["selector"])
            for resource in built(name)
            if resource["kind"] == "Service"
        ),
        ("budget", found(name, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]),
        ("affinity", near["labelSelector"]["matchLabels"]),
    ]
    for what, selector in selectors:
        chosen = [kind for kind, own in labels.items() if selector.items() <= own.items()]
        assert chosen == (["Deployment"] if "serve" in what or what == "budget" else ["StatefulSet"]), what
    policy = found(name, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert all(policy.items() <= own.items() for own in labels.values())


def test_two_homes_in_one_namespace_do_not_meet() -> None:
    names = [{(one["kind"], one["metadata"]["name"]) for one in built(name)} for name in ("base", "overlays/german")]
    assert not names[0] & names[1]
    selectors = [found(name, "StatefulSet")["spec"]["selector"]["matchLabels"] for name in ("base", "overlays/german")]
    assert {one["app.kubernetes.io/instance"] for one in selectors} == {"main", "german"}


def test_the_monitor_scrapes_the_daemons_of_all_homes() -> None:
    wanted = found("monitor", "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    for name in ("base", "overlays/german"):
        services = [one for one in built(name) if one["kind"] == "Service"]
        chosen = [one["metadata"]["name"] for one in services if wanted.items() <= one["metadata"]["labels"].items()]
        assert len(chosen) == 1 and "serve" not in chosen[0]


def test_the_card_is_asked_for() -> None:
    [container] = found("overlays/cuda", "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].endswith("-cuda")
