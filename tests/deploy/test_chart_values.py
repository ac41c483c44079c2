"""Values that can't work are refused before anything is installed, by the value's name and with what would be right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.deploy.chart import CHART, NAMESPACE, RELEASE, SCENARIOS, HelmError, helm
from tests.support.deploy.kube_api import run_kube_api

VALUES = (CHART / "values.yaml").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
REMOTE = {"main": {"kind": "remote", "model": "m", "urls": ["http://vllm:8000/v1"]}}
EMBEDDED = {"main": {"kind": "embedded", "model": "Qwen/Qwen3-8B"}}
OPEN = {"config", "global", "affinity", "podAffinity", "nodeAffinity", "podAntiAffinity"}
"""Mappings whose names this chart can't know: Kubernetes', or the gateway's, which checks them itself."""


def refusal(folder: Path, values: dict[str, Any]) -> str:
    """Return what helm says to values that it must refuse."""
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(HelmError) as raised:
        helm("template", RELEASE, CHART, "--values", path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "Additional property replica is not allowed"),
        ({"gpu": {"counts": 2}}, "gpu: Additional property counts is not allowed"),
        ({"valkey": {"image": {"registry": "x"}}}, "valkey.image: Additional property registry is not allowed"),
        ({"tolerations": [{"keys": "x"}]}, "tolerations.0: Additional property keys is not allowed"),
        ({"replicas": "two"}, "replicas: Invalid type. Expected: integer, given: string"),
        ({"mode": "proxy"}, 'mode: mode must be one of the following: "embedded", "remote"'),
        ({"workload": "DaemonSet"}, 'workload must be one of the following: "Deployment", "StatefulSet"'),
        ({"drain": {"marginSeconds": 1}}, "drain.marginSeconds: Must be greater than or equal to 5"),
        ({"modelCache": {"size": "lots"}}, "modelCache.size: Does not match pattern"),
        ({"secrets": {"env": {"BRAVE-KEY": "x"}}}, "BRAVE-KEY"),
        ({"secrets": {"env": {"BRAVE_API_KEY": 5}}}, "secrets.env.BRAVE_API_KEY: Invalid type. Expected: string"),
        ({"resources": {"limits": {"memory": None}}}, "resources.limits: memory is required"),
        ({"config": {"engines": {"main": {"model": "m"}}}}, "config.engines.main: kind is required"),
        ({"config": {"engines": {"main": {"kind": "vllm"}}}}, "config.engines.main.kind must be one of the following"),
    ],
)
def test_schema_names_the_value(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mode": "remote", "config": {"engines": EMBEDDED}},
            "mode: remote runs no engine in its pods, but config.engines.main.kind is embedded",
        ),
        ({"mode": "remote"}, "mode: remote needs config.engines of kind remote"),
        ({"config": {"engines": REMOTE}}, "config.engines.main.kind is remote; set mode: remote"),
        ({"mode": "remote", "workload": "StatefulSet", "config": {"engines": REMOTE}}, "must be Deployment"),
        ({"mode": "remote", "download": {"job": True}, "config": {"engines": REMOTE}}, "download.job: there are no"),
        ({"config": {"server": {"port": 9000}}}, "config.server.port is set by this chart"),
        ({"config": {"server": {"drain_timeout_s": 9}}}, "set drain.timeoutSeconds"),
        ({"config": {"limits": {"replicas": 9}}}, "set replicas or autoscaling.maxReplicas"),
        ({"config": {"store": {"data_dir": "/x"}}}, "config.store.data_dir is set by this chart"),
        ({"workload": "LeaderWorkerSet"}, "config.engines must name exactly one engine, of kind embedded"),
        (
            {
                "workload": "LeaderWorkerSet",
                "multiNode": {"size": 3},
                "config": {"engines": {"main": {**EMBEDDED["main"], "args": {"tensor_parallel_size": 16}}}},
            },
            "multiNode.size: 3 nodes can't share 16 GPUs evenly",
        ),
        (
            {
                "workload": "LeaderWorkerSet",
                "config": {"engines": {"main": {**EMBEDDED["main"], "args": {"data_parallel_size": 2}}}},
            },
            "config.engines.main.args.data_parallel_size: over several nodes, set replicas instead",
        ),
        (
            {"workload": "StatefulSet", "download": {"job": True}, "config": {"engines": EMBEDDED}},
            "download.job fills one claim for all pods",
        ),
        ({"download": {"job": True}}, "download.job: no engine's model comes from a hub"),
        ({"replicas": 2, "valkey": {"enabled": False}}, "several replicas need one store: set valkey.enabled: true"),
        (
            {"valkey": {"enabled": False}, "autoscaling": {"type": "keda"}},
            "several replicas need one store: set valkey.enabled: true",
        ),
        ({"secrets": {"env": {"SHANNON_REDIS_URL": "redis://r"}}}, "set valkey.enabled: false"),
        ({"secrets": {"existingSecret": "s", "env": {"A": "b"}}}, "put the variables into that one"),
        ({"secrets": {"acceptPreviousKey": True}}, "secrets.env.SHANNON_PREVIOUS_BOOTSTRAP_KEY"),
        ({"autoscaling": {"type": "hpa", "minReplicas": 5}}, "maxReplicas: must be at least autoscaling.minReplicas"),
        ({"rollingUpdate": {"maxSurge": 0}}, "maxSurge and maxUnavailable can't both be 0"),
        ({"ingress": {"enabled": True, "host": ""}}, "ingress.host: give the name that clients call"),
        ({"image": {"tag": "latest"}}, "image.tag: latest is another image every time"),
    ],
)
def test_contradictions_are_explained(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, values)


def test_values_are_few_and_commented() -> None:
    lines = VALUES.splitlines()
    assert len(lines) < 250

    # A comment stands on the line, or above it and at most three others that it speaks of as well.
    keys = [number for number, line in enumerate(lines) if re.match(r" *[\w.\-/]+:", line)]
    assert not [lines[n] for n in keys if not any("#" in line for line in lines[max(0, n - 4) : n + 1])]


def test_schema_knows_every_value() -> None:
    def known(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        if "$ref" in schema:
            schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
        for name, value in values.items():
            assert name in schema.get("properties", {}), f"{path}{name}"
            if isinstance(value, dict) and value and schema["properties"][name].get("properties"):
                known(value, schema["properties"][name], f"{path}{name}.")

    values = yaml.safe_load(VALUES)
    assert values.pop("config").keys() == {"include", "engines", "logging"}  # the gateway's own, checked by itself
    known(values, SCHEMA, "")


def test_schema_refuses_what_it_does_not_know() -> None:
    def closed(schema: Any, name: str) -> None:
        if not isinstance(schema, dict):
            return
        if "properties" in schema and name not in OPEN and name != "engine":
            assert schema.get("additionalProperties") is False, name
        for key in ("properties", "definitions"):
            for child, below in schema.get(key, {}).items():
                closed(below, child)
        closed(schema.get("items"), name)

    closed(SCHEMA, "values")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kubeconfig of a cluster without any objects."""
    with run_kube_api(tmp_path_factory.mktemp("cluster"), []) as kubeconfig:
        yield kubeconfig


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_notes_tell_the_next_command(scenario: str, cluster: Path) -> None:
    values = CHART / "ci" / f"{scenario}-values.yaml"
    options = ("--dry-run=server", "--disable-openapi-validation", "--kubeconfig", cluster, "--namespace", NAMESPACE)
    notes = helm("install", RELEASE, CHART, *options, "--values", values).partition("NOTES:")[2]

    assert f"helm --namespace {NAMESPACE} test {RELEASE} --logs" in notes
    assert f"kubectl --namespace {NAMESPACE} " in notes
    assert "shannon keys create" in notes
    assert "<no value>" not in notes
