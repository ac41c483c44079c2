"""What the chart mounts is what the gateway takes, and agrees with the manifests around it.

Each scenario's ConfigMap is read by gateway.config itself. What vLLM would say to an engine's arguments is asked of
vLLM where it is installed.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import __version__
from gateway.access.keys import split_key
from gateway.settings.config import Config, RemoteSettings, load_config
from tests.support.deploy.chart import (
    CHART,
    RELEASE,
    ROOT,
    SCENARIOS,
    config_text,
    find,
    gateway_container,
    gateway_pod,
    manifests,
    pod_templates,
)

CATALOG = "/etc/shannon/models.yaml"
"""Where the image has configs/models.yaml."""
SECRETS = "/etc/shannon/secrets"
"""Where the Secret's variables are files."""
OWN_STORE = [
    name for name in SCENARIOS if any(m["metadata"]["name"] == f"{RELEASE}-shannon-valkey" for m in manifests(name))
]


def load(folder: Path, scenario: str, *settings: str) -> Config:
    """Return the configuration of a scenario as the gateway reads it."""
    path = folder / "shannon.yaml"
    text = config_text(scenario, *settings)
    path.write_text(text.replace(CATALOG, str(ROOT / "configs/models.yaml")))
    return load_config(path, {})


def environment(scenario: str) -> dict[str, Any]:
    """Return the variables of the gateway's container: literal values, and references as they are."""
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in gateway_container(scenario)["env"]}


def secret(scenario: str) -> dict[str, str]:
    """Return the variables of the Secret that the chart makes."""
    data = find(scenario, "Secret")["data"]
    return {name: base64.b64decode(value).decode() for name, value in data.items()}


def own_secret(scenario: str) -> bool:
    return any((m["kind"], m["metadata"]["name"]) == ("Secret", f"{RELEASE}-shannon") for m in manifests(scenario))


def test_chart_carries_the_version_of_the_product() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["version"] == chart["appVersion"] == __version__


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_config_is_taken_by_the_gateway(scenario: str, tmp_path: Path) -> None:
    config = load(tmp_path, scenario)

    assert len(config.models) == 8
    assert config.logging.format == "json", "as text the bootstrap key would be in the pod's log"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_address_agrees_with_ports_and_probes(scenario: str, tmp_path: Path) -> None:
    server = load(tmp_path, scenario).server
    container = gateway_container(scenario)

    assert server.host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": server.port}]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")} == {"http"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health", "a restart would not help an engine that loads"
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    service = find(scenario, "Service")["spec"]["ports"]
    assert [port["targetPort"] for port in service] == ["http"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_grace_period_covers_the_drain(scenario: str, tmp_path: Path) -> None:
    drain_s = load(tmp_path, scenario).server.drain_timeout_s
    pre_stop_s = gateway_container(scenario)["lifecycle"]["preStop"]["sleep"]["seconds"]
    for manifest in manifests(scenario):
        for name, template in pod_templates(manifest):
            if "shannon-valkey" not in name and manifest["kind"] not in ("Job", "Pod"):
                margin_s = template["spec"]["terminationGracePeriodSeconds"] - drain_s - pre_stop_s
                assert margin_s >= 10, f"{name}: closing the engine and writing the ledger takes a while"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_probes_leave_time_to_load(scenario: str) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values |= yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text())
    container = gateway_container(scenario)
    startup = container["startupProbe"]

    assert startup["failureThreshold"] * startup["periodSeconds"] >= values["probes"]["startupSeconds"]
    deadlines = [
        m["spec"].get("progressDeadlineSeconds", math.inf) for m in manifests(scenario) if m["kind"] == "Deployment"
    ]
    assert all(deadline > values["probes"]["startupSeconds"] for deadline in deadlines)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_store_is_where_the_environment_says(scenario: str, tmp_path: Path) -> None:
    variable = load(tmp_path, scenario).store.url_env
    url = environment(scenario).get(variable)

    if scenario in OWN_STORE:
        service = find(scenario, "Service", f"{RELEASE}-shannon-valkey")
        assert (
            url == f"redis://:$(VALKEY_PASSWORD)@{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/0"
        )
        names = [v["name"] for v in gateway_container(scenario)["env"]]
        assert names.index("VALKEY_PASSWORD") < names.index(variable), "Kubernetes expands only what stands before"
    elif own_secret(scenario):
        assert url is None, "the bundled store"
        assert find(scenario, "Deployment")["spec"]["replicas"] == 1
    else:
        assert url == {"secretKeyRef": {"name": "shannon-credentials", "key": variable}}


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if own_secret(name)])
def test_secret_holds_every_variable_that_the_config_names(scenario: str, tmp_path: Path) -> None:
    config = load(tmp_path, scenario)
    variables = secret(scenario)

    files = [key.key_file for key in config.keys if key.key_file] + [
        Path(environment(scenario)["SHANNON_BOOTSTRAP_KEY_FILE"])
    ]
    assert {file.parent for file in files} == {Path(SECRETS)}
    wanted = {file.name for file in files} | {key.key_env for key in config.keys if key.key_env}
    wanted |= {e.api_key_env for e in config.engines.values() if isinstance(e, RemoteSettings) and e.api_key_env}
    assert wanted <= variables.keys()
    for name in ("SHANNON_BOOTSTRAP_KEY", "SHANNON_METRICS_KEY"):
        key_id, key_secret = split_key(variables[name])
        assert (len(key_id), len(key_secret)) == (12, 43)


def test_metrics_key_may_use_no_model(tmp_path: Path) -> None:
    (key,) = load(tmp_path, "h100").keys

    assert (key.key_file, key.models, key.admin) == (Path(SECRETS, "SHANNON_METRICS_KEY"), [], False)
    assert key.metrics
    credentials = find("h100", "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert credentials == {"name": f"{RELEASE}-shannon", "key": "SHANNON_METRICS_KEY"}


def test_previous_key_is_accepted_during_a_rotation(tmp_path: Path) -> None:
    (key,) = load(tmp_path, "external-redis").keys

    assert (key.key_file, key.admin) == (Path(SECRETS, "SHANNON_PREVIOUS_BOOTSTRAP_KEY"), True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_own_keys_are_files_and_not_in_the_environment(scenario: str) -> None:
    assert environment(scenario)["SHANNON_BOOTSTRAP_KEY"] == "", "a file can be rotated without a restart"
    mounts = {mount["mountPath"]: mount["name"] for mount in gateway_container(scenario)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in gateway_pod(scenario)["spec"]["volumes"]}
    (source,) = gateway_container(scenario)["envFrom"]
    assert volumes[mounts[SECRETS]]["secret"]["secretName"] == source["secretRef"]["name"]


def test_rotation_replaces_the_pods() -> None:
    before = gateway_pod("external-redis")["metadata"]["annotations"]
    after = gateway_pod("external-redis", "secrets.rotation=2026-12")["metadata"]["annotations"]

    assert before != after


@pytest.mark.parametrize(
    ("scenario", "settings", "replicas"),
    [("h100", (), 2), ("keda", (), 8), ("gateway-api", (), 4), ("default", ("replicas=5",), 5), ("default", (), 1)],
)
def test_shares_of_limits_count_the_most_replicas(
    scenario: str, settings: tuple[str, ...], replicas: int, tmp_path: Path
) -> None:
    assert load(tmp_path, scenario, *settings).limits.replicas == replicas


@pytest.mark.parametrize(
    ("scenario", "gpus"),
    [("default", 1), ("h100", 8), ("keda", 2), ("multi-node", 8), ("multi-node-ray", 8), ("dev", 0), ("remote", 0)],
)
def test_pods_get_the_gpus_that_their_engines_ask_for(scenario: str, gpus: int) -> None:
    pods = [
        (name, template)
        for manifest in manifests(scenario)
        for name, template in pod_templates(manifest)
        if any(c["name"] in ("gateway", "worker") for c in template["spec"]["containers"])
    ]
    for name, template in pods:
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus, name
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert ("shm" in volumes) == bool(gpus), name
        assert bool(template["spec"].get("tolerations")) == bool(gpus), name


@pytest.mark.parametrize(("scenario", "variant"), [("default", ""), ("dev", "-cpu"), ("remote", "-gateway")])
def test_image_is_the_target_for_the_mode(scenario: str, variant: str) -> None:
    assert gateway_container(scenario)["image"] == f"shannon-gateway:{__version__}{variant}"


def test_digest_wins_over_the_tag() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4

    assert gateway_container("default", f"image.digest={digest}")["image"] == f"shannon-gateway@{digest}"


@pytest.mark.parametrize("scenario", ["h100", "external-redis", "multi-node"])
def test_weights_are_there_before_the_server_starts(scenario: str) -> None:
    (download,) = gateway_pod(scenario)["spec"]["initContainers"]

    assert download["args"] == ["download"]
    assert download["image"] == gateway_container(scenario)["image"]
    assert {"name": "models", "mountPath": "/models"} in download["volumeMounts"]


@pytest.mark.parametrize("scenario", ["default", "dev", "mock", "remote"])
def test_nothing_is_downloaded_where_no_model_comes_from_a_hub(scenario: str) -> None:
    assert "initContainers" not in gateway_pod(scenario)["spec"]


class TestSeveralNodes:
    """A model over two nodes of eight GPUs."""

    def test_leader_holds_the_meeting_point(self, tmp_path: Path) -> None:
        args = load(tmp_path, "multi-node").model_dump()["engines"]["main"]["args"]

        assert args | {"nnodes": 2, "node_rank": 0, "distributed_executor_backend": "mp"} == args
        # torch's store listens on every address; only its own worker asks for it by this one.
        assert (args["master_addr"], args["master_port"]) == ("127.0.0.1", 29501)

    def test_sizes_do_not_depend_on_who_asks_vllm(self, tmp_path: Path) -> None:
        """vLLM's defaults differ between its command line, which workers run, and its engine in the gateway."""
        args = load(tmp_path, "multi-node").model_dump()["engines"]["main"]["args"]

        assert {"max_num_seqs", "max_num_batched_tokens"} <= args.keys()

    def test_ray_needs_no_node_numbers(self, tmp_path: Path) -> None:
        args = load(tmp_path, "multi-node-ray").model_dump()["engines"]["main"]["args"]

        assert args["distributed_executor_backend"] == "ray"
        assert args.keys().isdisjoint({"nnodes", "node_rank", "master_addr", "master_port"})

    @pytest.mark.vllm
    def test_workers_run_the_leaders_engine(self, tmp_path: Path) -> None:
        """vLLM's own command line makes of the worker's options what the leader's gateway asks for."""
        arg_utils = pytest.importorskip("vllm.engine.arg_utils")
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        leader = load(tmp_path, "multi-node").model_dump()["engines"]["main"]
        path = tmp_path / "worker.yaml"
        path.write_text(find("multi-node", "ConfigMap")["data"]["worker.yaml"])
        parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
        options = parser.parse_args(["--config", str(path), "--node-rank", "1", "--master-addr", "release-0"])

        assert options.headless
        worker = arg_utils.AsyncEngineArgs.from_cli_args(options)
        differing = {"node_rank": 1, "master_addr": "release-0"}
        for name, value in {"model": leader["model"], **leader["args"], **differing}.items():
            assert getattr(worker, name) == value, name

    def test_workers_hold_no_secrets(self) -> None:
        worker = find("multi-node", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        (container,) = worker["spec"]["containers"]

        assert "envFrom" not in container
        assert not [variable for variable in container["env"] if "secretKeyRef" in variable.get("valueFrom", {})]

    def test_group_restarts_together(self, tmp_path: Path) -> None:
        engine = load(tmp_path, "multi-node").engines["main"]
        assert engine.max_engine_restarts == 0, "a new engine in the leader would find no workers"
        group = find("multi-node", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]

        assert (group["size"], group["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")

    def test_budget_counts_workers(self) -> None:
        (expression,) = find("multi-node", "PodDisruptionBudget")["spec"]["selector"]["matchExpressions"]

        assert expression["values"] == ["gateway", "worker"]
