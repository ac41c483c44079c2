"""Upgrades of a release: what Kubernetes lets nobody change stays, scaling restarts nobody, keys are kept.

The version before is the newest package in `released/`: each release adds its own there, by `helm package`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import __version__
from tests.support.deploy.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    SCENARIOS,
    HelmError,
    Manifest,
    find,
    gateway_pod,
    helm,
    manifests,
    pod_templates,
)
from tests.support.deploy.kube_api import run_kube_api

RELEASED = sorted(
    (path for path in Path(__file__).with_name("released").glob("shannon-*.tgz") if __version__ not in path.name),
    key=lambda path: [int(part) for part in path.stem.removeprefix("shannon-").split(".")],
)
CHANGES = (
    "image.tag=0.2.0",
    "secrets.rotation=again",
    "drain.timeoutSeconds=240",
    "resources.limits.memory=96Gi",
    "config.server.max_body_bytes=1048576",
    "podLabels.team=search",
    "valkey.image.tag=9.2.0-alpine",
)
"""What operators change, one at a time."""


def immutable(manifest: Manifest) -> Any:
    """Return what Kubernetes refuses to change of an object."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    match kind:
        case "Deployment":
            return spec["selector"]
        case "StatefulSet":
            return [
                spec.get(name) for name in ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates")
            ]
        case "Job":
            return spec["template"]
        case "PersistentVolumeClaim":
            return [spec["accessModes"], spec.get("storageClassName")]
        case "Service":
            return spec.get("clusterIP")
        case "Secret":
            return manifest["type"]
        case "LeaderWorkerSet":
            return spec["leaderWorkerTemplate"]["size"]
        case _:
            return None


def by_name(found: tuple[Manifest, ...]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in found}


def changed_for_good(before: tuple[Manifest, ...], after: tuple[Manifest, ...]) -> list[tuple[str, str]]:
    """Return the objects of both that an upgrade could not change as it must."""
    old, new = by_name(before), by_name(after)
    return [name for name in old.keys() & new.keys() if immutable(old[name]) != immutable(new[name])]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scenario", ["default", "h100", "multi-node"])
def test_upgrade_changes_nothing_that_is_immutable(scenario: str, change: str) -> None:
    before, after = manifests(scenario), manifests(scenario, change)

    assert before != after
    assert not changed_for_good(before, after)
    lost = by_name(before).keys() - by_name(after).keys()
    assert {kind for kind, _ in lost} <= {"Job"}, "another Job downloads what is new"


def test_other_models_make_another_download() -> None:
    jobs = [
        {name for kind, name in by_name(found) if kind == "Job"}
        for found in (manifests("multi-node"), manifests("multi-node", "config.engines.main.model=a/b"))
    ]

    assert jobs[0].isdisjoint(jobs[1])


@pytest.mark.parametrize("scenario", ["h100", "multi-node", "external-redis", "remote"])
def test_scaling_restarts_nobody(scenario: str) -> None:
    before, after = gateway_pod(scenario, "replicas=2"), gateway_pod(scenario, "replicas=6")

    assert before == after


@pytest.mark.parametrize(
    "change",
    ["config.engines.main.args.max_num_seqs=64", "secrets.env.BRAVE_API_KEY=another", "config.images.max_images=1"],
)
def test_what_needs_a_restart_gets_one(change: str) -> None:
    assert gateway_pod("h100") != gateway_pod("h100", change)


def test_reloadable_settings_restart_nobody_where_they_are_reloaded() -> None:
    change = "config.models.shannon-chat.limits.requests_per_minute=5"

    assert gateway_pod("h100") != gateway_pod("h100", change)
    assert gateway_pod("h100", "configRollout=needed") == gateway_pod("h100", "configRollout=needed", change)
    other = "config.engines.main.args.max_num_seqs=64"
    assert gateway_pod("h100", "configRollout=needed") != gateway_pod("h100", "configRollout=needed", other)


def test_one_replica_after_the_other() -> None:
    assert find("h100", "StatefulSet")["spec"]["updateStrategy"] == {"type": "RollingUpdate"}
    strategy = find("remote", "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_autoscalers_own_the_number_of_replicas() -> None:
    for scenario in ("keda", "gateway-api", "remote"):
        assert "replicas" not in find(scenario, "Deployment")["spec"], "an upgrade would scale back"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kubeconfig of a cluster with the Secrets of a release that was installed before."""
    ours = {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
    objects = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "labels": {"app.kubernetes.io/managed-by": "Helm"},
                "annotations": ours,
            },
            "data": {variable: base64.b64encode(variable.lower().encode()).decode() for variable in variables},
        }
        for name, variables in {
            f"{RELEASE}-shannon": ["SHANNON_BOOTSTRAP_KEY", "SHANNON_METRICS_KEY"],
            f"{RELEASE}-shannon-valkey": ["VALKEY_PASSWORD"],
        }.items()
    ]
    with run_kube_api(tmp_path_factory.mktemp("cluster"), objects) as kubeconfig:
        yield kubeconfig


def test_keys_that_were_made_are_kept(cluster: Path) -> None:
    options = (
        "--dry-run=server",
        "--kubeconfig",
        cluster,
        "--namespace",
        NAMESPACE,
        "--is-upgrade",
        "--validate=false",
    )
    made = [m for m in yaml.safe_load_all(helm("template", RELEASE, CHART, *options)) if m and m["kind"] == "Secret"]

    kept = {name: base64.b64decode(value).decode() for secret in made for name, value in secret["data"].items()}
    assert kept == {
        "SHANNON_BOOTSTRAP_KEY": "shannon_bootstrap_key",
        "SHANNON_METRICS_KEY": "shannon_metrics_key",
        "VALKEY_PASSWORD": "valkey_password",
    }


def test_a_key_that_is_given_wins(cluster: Path) -> None:
    options = ("--dry-run=server", "--kubeconfig", cluster, "--namespace", NAMESPACE, "--validate=false")
    out = helm("template", RELEASE, CHART, *options, "--set", "secrets.env.SHANNON_BOOTSTRAP_KEY=given")
    secret = next(m for m in yaml.safe_load_all(out) if m and m["kind"] == "Secret")

    assert base64.b64decode(secret["data"]["SHANNON_BOOTSTRAP_KEY"]) == b"given"


@pytest.mark.skipif(not RELEASED, reason=f"no version was released before {__version__}")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_upgrade_from_the_version_before(scenario: str) -> None:
    try:
        before = manifests(scenario, chart=RELEASED[-1])
    except HelmError:
        pytest.skip("the version before does not know these values")

    after = manifests(scenario)
    assert not changed_for_good(before, after)
    stateful = {name for name in by_name(before) if name[0] in ("StatefulSet", "PersistentVolumeClaim")}
    assert stateful <= by_name(after).keys(), "data would be left behind"
    labels = [{n: t["metadata"]["labels"] for m in found for n, t in pod_templates(m)} for found in (before, after)]
    assert labels[0].items() <= labels[1].items()
