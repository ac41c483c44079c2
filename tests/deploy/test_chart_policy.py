"""What every pod of every scenario keeps to: Kubernetes' restricted profile, and what whoever is on call relies on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.support.deploy.chart import SCENARIOS, Manifest, gateway_container, gateway_pod, manifests, pod_templates

VOLATILE_LABELS = {"helm.sh/chart", "app.kubernetes.io/version", "pod-template-hash"}
"""Labels that an upgrade changes."""
SECRET = re.compile(r"sk-shannon-|hf_[A-Za-z0-9]{8}|redis://[^$\s]*@|password['\"]?\s*[:=]", re.IGNORECASE)
ONE_SHOT = {"Job", "Pod"}


def _pods(scenario: str) -> Iterator[tuple[str, Manifest]]:
    for manifest in manifests(scenario):
        yield from pod_templates(manifest)


def _containers(scenario: str) -> Iterator[tuple[str, Manifest]]:
    for name, template in _pods(scenario):
        spec = template["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name}/{container['name']}", container


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    spec = manifest.get("spec", {})
    for selector in (spec.get("selector"), spec.get("podSelector")):
        if isinstance(selector, dict):
            yield (
                selector.get("matchLabels", {})
                if "matchLabels" in selector or "matchExpressions" in selector
                else selector
            )
    for _, template in pod_templates(manifest):
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            yield constraint["labelSelector"]["matchLabels"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pods_are_restricted(scenario: str) -> None:
    for name, template in _pods(scenario):
        spec = template["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"], name
        assert context["runAsUser"] == context["fsGroup"] == 10001, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, f"{name}: a Service named shannon would set SHANNON_PORT"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}, name


def test_user_may_be_left_to_the_cluster() -> None:
    """OpenShift runs each namespace under numbers of its own."""
    context = gateway_pod("default", "user=null")["spec"]["securityContext"]

    assert context.keys() == {"runAsNonRoot", "seccompProfile"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_containers_are_restricted(scenario: str) -> None:
    for name, container in _containers(scenario):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["runAsNonRoot"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert "privileged" not in context, name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_images_are_pinned(scenario: str) -> None:
    for name, container in _containers(scenario):
        tag = container["image"].rpartition(":")[2]
        assert re.fullmatch(r"[\w.-]+", tag), name
        assert tag != "latest", name
        assert tag[0].isdigit(), name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_resources_are_set(scenario: str) -> None:
    for name, container in _containers(scenario):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), name
        assert "memory" in resources["limits"], name
        assert "cpu" not in resources["limits"], f"{name}: throttling would stall streams"
        extended = {resource for resource in resources["limits"] if "/" in resource}
        assert all(resources["requests"][resource] == resources["limits"][resource] for resource in extended), name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_long_running_containers_have_probes(scenario: str) -> None:
    for manifest in manifests(scenario):
        if manifest["kind"] in ONE_SHOT:
            continue
        for name, template in pod_templates(manifest):
            for container in template["spec"]["containers"]:
                # A worker of several nodes listens to nobody, and its group starts anew when any of its pods does.
                wanted = set() if container["name"] == "worker" else {"startupProbe", "livenessProbe", "readinessProbe"}
                assert wanted <= container.keys(), name
                assert all(container[probe]["timeoutSeconds"] > 1 for probe in wanted), name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_outlive_upgrades(scenario: str) -> None:
    for manifest in manifests(scenario):
        for selector in _selectors(manifest):
            assert selector.keys().isdisjoint(VOLATILE_LABELS), manifest["metadata"]["name"]
            assert not any("checksum" in label for label in selector), manifest["metadata"]["name"]
            assert {"app.kubernetes.io/name", "app.kubernetes.io/instance"} <= selector.keys(), manifest["metadata"][
                "name"
            ]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_services_and_policies_select_pods_that_exist(scenario: str) -> None:
    pods = [template["metadata"]["labels"] for _, template in _pods(scenario)]
    for manifest in manifests(scenario):
        if manifest["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            for selector in _selectors(manifest):
                assert any(selector.items() <= labels.items() for labels in pods), manifest["metadata"]["name"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_services_of_clients_select_the_gateway_alone(scenario: str) -> None:
    gateway = gateway_pod(scenario)["metadata"]["labels"]
    for manifest in manifests(scenario):
        if manifest["kind"] == "Service" and "valkey" not in manifest["metadata"]["name"]:
            matching = [
                t for _, t in _pods(scenario) if manifest["spec"]["selector"].items() <= t["metadata"]["labels"].items()
            ]
            assert [t["metadata"]["labels"] for t in matching] == [gateway], manifest["metadata"]["name"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_secrets_stand_in_secrets_alone(scenario: str) -> None:
    for manifest in manifests(scenario):
        if manifest["kind"] != "Secret":
            text = json.dumps(manifest)
            assert not SECRET.search(text), SECRET.search(text)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pods_know_of_secrets_by_reference_alone(scenario: str) -> None:
    for name, container in _containers(scenario):
        for variable in container.get("env", []):
            if re.search(r"KEY$|TOKEN$|PASSWORD$|REDIS_URL$", variable["name"]) and variable.get("value"):
                assert "$(VALKEY_PASSWORD)" in variable["value"], f"{name}: {variable['name']}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_writable_paths_are_volumes(scenario: str) -> None:
    mounts = {mount["mountPath"]: mount for mount in gateway_container(scenario)["volumeMounts"]}

    assert {"/cache", "/data", "/tmp"} <= mounts.keys()
    assert mounts["/etc/shannon/release"]["readOnly"]
    config = yaml.safe_load(_config_map(scenario)["data"]["shannon.yaml"])
    assert config["store"]["data_dir"] in mounts
    for engine in config["engines"].values():
        if engine["kind"] in ("embedded", "pooling"):
            assert config["weights"]["cache_dir"] in mounts


def _config_map(scenario: str) -> Manifest:
    return next(m for m in manifests(scenario) if m["kind"] == "ConfigMap" and "shannon.yaml" in m["data"])
