"""A pod of the chart in a container of the image, run by Podman as a kubelet would run it.

User, capabilities, root, environment, command and mounts are those of the rendered manifests, of the `mock` scenario
without Valkey; volumes are laid out on this machine as a kubelet lays them out. Only the port is another. Probes and
hooks, which are a kubelet's own work, are not run.
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access.keys import make_key
from tests.support.deploy.chart import RELEASE, Manifest, find, gateway_container, gateway_pod
from tests.support.deploy.containers import Podman
from tests.support.gateway_process import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SETTINGS = ("valkey.enabled=false", "monitoring.serviceMonitor.enabled=true")
LIMITS = ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]
"""Podman's own are higher than root within a container may set."""


def secrets() -> dict[str, str]:
    data = find("mock", "Secret", f"{RELEASE}-shannon", *SETTINGS)["data"]
    return {name: base64.b64decode(value).decode() for name, value in data.items()}


def project(volume: Path, files: dict[str, str]) -> None:
    """Lay out a ConfigMap's or a Secret's volume: links through `..data`, by which a kubelet replaces all at once."""
    files_of = volume / "..2026_11_28"
    files_of.mkdir(parents=True)
    (volume / "..data").symlink_to(files_of.name)
    for name, text in files.items():
        (files_of / name).write_text(text)
        (volume / name).symlink_to(f"..data/{name}")


def make_volume(volume: dict[str, Any], path: Path, group: int) -> None:
    """Make what a volume of the pod is, as `path`."""
    if "configMap" in volume:
        project(path, find("mock", "ConfigMap", volume["configMap"]["name"], *SETTINGS)["data"])
    elif "secret" in volume:
        assert volume["secret"]["secretName"] == f"{RELEASE}-shannon"
        project(path, secrets())
    else:
        assert "emptyDir" in volume
        path.mkdir()
        os.chown(path, 0, group)
        path.chmod(0o2775)


def options(pod: Manifest, container: Manifest) -> list[str]:
    """Return Podman's options for the security contexts of a pod and its container."""
    context = pod["securityContext"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    hardened = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
    return [f"--user={context['runAsUser']}:{context['runAsGroup']}", *hardened, "--network=host", *LIMITS]


@dataclass
class Pod:
    """A gateway that runs."""

    podman: Podman
    id: str
    url: str
    key: str
    secrets: Path
    """The Secret's volume."""

    def status(self, path: str, key: str) -> int:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=10).status_code

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        done = self.podman.try_to("logs", self.id)
        return done.stdout + done.stderr


@pytest.fixture
def pod(podman: Podman, image: str, tmp_path: Path) -> Iterator[Pod]:
    """The scenario's pod, ready."""
    spec, container = gateway_pod("mock", *SETTINGS)["spec"], gateway_container("mock", *SETTINGS)
    for volume in spec["volumes"]:
        make_volume(volume, tmp_path / volume["name"], spec["securityContext"]["fsGroup"])
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # pytest's are its user's alone
    (source,) = container["envFrom"]
    assert source == {"secretRef": {"name": f"{RELEASE}-shannon"}}
    environment = secrets() | {variable["name"]: variable["value"] for variable in container["env"]}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment["SHANNON_PORT"] = str(port)
    mounts = [
        f"--volume={tmp_path / mount['name']}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"
        for mount in container["volumeMounts"]
    ]
    variables = [f"--env={name}={value}" for name, value in environment.items()]
    started = podman("run", "--detach", *options(spec, container), *mounts, *variables, image, *container["args"])
    key = secrets()["SHANNON_BOOTSTRAP_KEY"]
    running = Pod(podman, started, f"http://127.0.0.1:{port}", key, tmp_path / "secrets")
    try:
        wait_until(running.answers, "the pod is not ready", within_s=120)
        yield running
    except BaseException:
        print(running.log())
        raise
    finally:
        podman.try_to("rm", "--force", "--time=0", started)


def helm_test(pod: Pod, image: str) -> subprocess.CompletedProcess[str]:
    """Run the container of the chart's test Pod."""
    spec = find("mock", "Pod", f"{RELEASE}-shannon-test-chat", *SETTINGS)["spec"]
    (container,) = spec["containers"]
    variables = [f"--env=SHANNON_URL={pod.url}", f"--env=SHANNON_BOOTSTRAP_KEY={pod.key}"]
    program, *arguments = container["command"]
    entry = f"--entrypoint={program}"
    command = ["run", "--rm", *options(spec, container), *variables, entry, image, *arguments, *container["args"]]
    return pod.podman.try_to(*command, timeout_s=120)


def test_pod_serves_and_its_operators_commands_work(pod: Pod, image: str) -> None:
    """One pod for all of it: starting one takes a while."""
    tested = helm_test(pod, image)
    assert tested.returncode == 0, tested.stderr
    assert "answer: You said: What are you?" in tested.stdout

    made = pod.podman.try_to("exec", pod.id, "shannon", "keys", "create", "alice", "--json")
    assert made.returncode == 0, made.stderr
    assert pod.status("/metrics", secrets()["SHANNON_METRICS_KEY"]) == 200

    new = make_key()
    (pod.secrets / "..data" / "SHANNON_BOOTSTRAP_KEY").write_text(new)
    pod.podman("exec", pod.id, "sh", "-c", "kill -HUP 1")
    wait_until(lambda: pod.status("/v1/models", new) == 200, "the new key is not taken on SIGHUP")
    assert pod.status("/v1/models", pod.key) == 401

    log = pod.log()
    assert pod.key not in log
    assert new not in log

    pod.podman("stop", "--time=60", pod.id, timeout_s=120)
    assert pod.podman("inspect", "--format={{.State.ExitCode}}", pod.id) == "0"
    assert "drained, 0 interrupted" in pod.log()
