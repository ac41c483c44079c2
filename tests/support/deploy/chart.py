"""The chart, rendered by a real helm with its defaults and with each file of `helm/shannon/ci`.

Example:

    deployment = find("default", "Deployment")

`python -m tests.support.deploy.chart` rewrites the snapshots: read their diff before you commit it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm/shannon"
SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
SNAPSHOTS = ROOT / "tests/deploy/snapshots"
RELEASE = "release"
NAMESPACE = "ai"

Manifest = dict[str, Any]

_HELM = Path(sys.executable).with_name("helm")
_MADE_BY_CHANCE = re.compile(r"^(  (?:SHANNON_BOOTSTRAP_KEY|SHANNON_METRICS_KEY|VALKEY_PASSWORD): )[\w+/=]+$", re.M)
_COPIES = tuple(f"# Source: shannon/templates/{name}.yaml" for name in ("dashboard", "prometheusrule"))


class HelmError(Exception):
    """helm refused. The message is what it said."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would take the last, and Kubernetes refuse both."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: {sorted(map(str, keys))}"
        return super().construct_mapping(node, deep)


def helm(*arguments: str | Path) -> str:
    """Run helm. Raises HelmError."""
    done = subprocess.run([_HELM, *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


@cache
def rendered(scenario: str, *settings: str, chart: Path = CHART) -> str:
    """Return the manifests of a scenario as text. `settings` are helm's `--set`."""
    values = CHART / "ci" / f"{scenario}-values.yaml"
    options = [option for setting in settings for option in ("--set", setting)]
    return helm("template", RELEASE, chart, "--namespace", NAMESPACE, "--values", values, *options)


@cache
def manifests(scenario: str, *settings: str, chart: Path = CHART) -> tuple[Manifest, ...]:
    """Return the manifests of a scenario."""
    # A C loader would be faster, but takes no subclass.
    documents = yaml.load_all(rendered(scenario, *settings, chart=chart), _Loader)
    return tuple(document for document in documents if document)


def find(scenario: str, kind: str, name: str = f"{RELEASE}-shannon", *settings: str) -> Manifest:
    """Return one manifest of a scenario."""
    (found,) = (m for m in manifests(scenario, *settings) if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield the templates of the pods that a manifest makes, by name; each has metadata and spec."""
    spec, kind = manifest.get("spec", {}), manifest["kind"]
    name = f"{kind}/{manifest['metadata']['name']}"
    if kind == "Pod":
        yield name, manifest
    elif kind == "LeaderWorkerSet":
        for role in ("leader", "worker"):
            yield f"{name}/{role}", spec["leaderWorkerTemplate"][f"{role}Template"]
    elif "template" in spec:
        yield name, spec["template"]


def gateway_pod(scenario: str, *settings: str) -> Manifest:
    """Return the template of the gateway's pods."""
    for manifest in manifests(scenario, *settings):
        for _, template in pod_templates(manifest):
            if any(container["name"] == "gateway" for container in template["spec"]["containers"]):
                return template
    raise LookupError(scenario)


def gateway_container(scenario: str, *settings: str) -> Manifest:
    """Return the gateway's container."""
    containers: list[Manifest] = gateway_pod(scenario, *settings)["spec"]["containers"]
    return next(container for container in containers if container["name"] == "gateway")


def config_text(scenario: str, *settings: str) -> str:
    """Return the gateway's configuration as the ConfigMap holds it."""
    text: str = find(scenario, "ConfigMap", f"{RELEASE}-shannon", *settings)["data"]["shannon.yaml"]
    return text


def snapshot(scenario: str) -> str:
    """Return a scenario's manifests as they are kept: without what is made by chance, and without copies of files."""
    parts = [part for part in rendered(scenario).split("---\n") if not part.startswith(_COPIES)]
    return _MADE_BY_CHANCE.sub(r"\1(made by chance)", "---\n".join(parts))


def main() -> None:
    for path in SNAPSHOTS.glob("*.yaml"):
        path.unlink()
    for scenario in SCENARIOS:
        (SNAPSHOTS / f"{scenario}.yaml").write_text(snapshot(scenario))


if __name__ == "__main__":
    main()
