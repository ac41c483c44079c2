"""Every manifest of every scenario is what Kubernetes takes, and is what was reviewed.

Kubernetes' own kinds are checked against its schemas, the oldest release that the chart admits and the newest known;
the others against crd_schemas/. What only an API server knows (admission, quotas, whether an image exists) is not.
"""

from __future__ import annotations

from pathlib import Path

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.support.deploy.chart import (
    CHART,
    SCENARIOS,
    SNAPSHOTS,
    Manifest,
    helm,
    manifests,
    pod_templates,
    rendered,
    snapshot,
)

CHART_YAML = yaml.safe_load((CHART / "Chart.yaml").read_text())
VERSIONS = (CHART_YAML["kubeVersion"].removeprefix(">=").removesuffix(".0-0"), kubernetes_validate.latest_version())
CUSTOM = {
    path.stem: jsonschema.Draft202012Validator(yaml.safe_load(path.read_text()))
    for path in Path(__file__).with_name("crd_schemas").glob("*.yaml")
}
GROUPS = {
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}


def _check_in_kubernetes(manifest: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_passes_strict_lint(scenario: str) -> None:
    helm("lint", "--strict", CHART, "--values", CHART / "ci" / f"{scenario}-values.yaml")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_manifests_are_valid(scenario: str) -> None:
    for manifest in manifests(scenario):
        kind = manifest["kind"]
        if kind not in CUSTOM:
            _check_in_kubernetes(manifest)
            continue
        assert manifest["apiVersion"] == GROUPS[kind]
        CUSTOM[kind].validate(manifest["spec"])
        for name, template in pod_templates(manifest):
            metadata = {"name": name.lower().replace("/", "-")}
            _check_in_kubernetes(
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}
            )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_objects_have_names_of_their_own(scenario: str) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests(scenario)]

    assert len(names) == len(set(names))
    assert all(len(name) <= 63 for _, name in names)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_manifests_are_what_was_reviewed(scenario: str) -> None:
    """`python -m tests.support.deploy.chart` writes the snapshots anew."""
    assert snapshot(scenario) == (SNAPSHOTS / f"{scenario}.yaml").read_text()


def test_every_snapshot_has_its_scenario() -> None:
    assert sorted(path.stem for path in SNAPSHOTS.glob("*.yaml")) == SCENARIOS


def test_scenarios_show_every_template() -> None:
    shown = {line for scenario in SCENARIOS for line in rendered(scenario).splitlines() if line.startswith("# Source:")}
    templates = (CHART / "templates").rglob("*.yaml")

    assert shown == {f"# Source: shannon/{path.relative_to(CHART)}" for path in templates}


def test_chart_becomes_a_package(tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path)

    (package,) = tmp_path.glob("*.tgz")
    assert package.name == f"shannon-{CHART_YAML['version']}.tgz"
    assert helm("template", "release", package) != ""
    assert helm("show", "values", package).rstrip() == (CHART / "values.yaml").read_text().rstrip()
