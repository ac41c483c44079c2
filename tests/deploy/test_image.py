"""The container image: what the Dockerfile promises, and a gateway that runs from it as it would in production.

The `gateway` target is built and run by Podman, on a base of Debian's packages. The other two are not built here: they
differ in what is installed, which takes gigabytes, and `cuda` needs a GPU.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import __version__
from gateway.access.keys import make_key
from tests.support.deploy.containers import Podman
from tests.support.frames import chunks
from tests.support.gateway_process import ROOT, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in DOCKERFILE.replace("\\\n", " ").splitlines() if not line.startswith("#")]
CONTEXT = {
    "LICENSE",
    "README.md",
    "configs",
    "engine",
    "gateway",
    "pyproject.toml",
    "requirements-cpu.lock",
    "requirements-cuda.lock",
    "requirements-gateway.lock",
}


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([ROOT / ".venv/bin/hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_targets_are_as_documented() -> None:
    targets = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)

    assert targets[-1] == "cuda", "the last one is what a build without --target makes"
    assert {"cpu", "gateway"} < set(targets)


def test_every_package_is_pinned() -> None:
    installed = [command for line in COMMANDS for command in line.split("&&") if "pip install" in command]
    from_locks = [command for command in installed if "--require-hashes" in command]
    others = [command for command in installed if command not in from_locks]

    assert len(from_locks) == 4
    assert all("--no-deps" in command for command in installed)
    product, torch = others
    assert "torch==${TORCH_CPU}" in torch, "there is no lock for it, as in the Makefile"
    assert "--no-index" in product


def test_torch_for_the_cpu_is_the_makefiles() -> None:
    wanted = dict(
        re.findall(r"^(TORCH_CPU\w*) := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )

    assert dict(re.findall(r"^ARG (TORCH_CPU\w*)=(.+)$", DOCKERFILE, re.MULTILINE)) == wanted


def files(folder: Path) -> set[Path]:
    """Return the files of the working tree that belong to the product."""
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_build_sees_the_product_and_nothing_else(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM scratch\nCOPY . /\n")
    podman("build", f"--file={tmp_path}/Containerfile", "--tag=localhost/context", str(ROOT))
    context = Path(podman("image", "mount", "localhost/context"))

    assert {path.name for path in context.iterdir()} == CONTEXT
    assert {path.name for path in (context / "configs").iterdir()} == {
        path.name for path in ROOT.glob("configs/*.yaml")
    }
    assert files(context) - files(ROOT) == set()
    assert {part for path in context.rglob("*") for part in path.parts} & {
        "__pycache__",
        "tests",
        ".git",
        ".env",
    } == set()
    for package in ("engine", "gateway"):
        assert files(context / package) == files(ROOT / package)


def test_image_says_what_it_is_and_how_it_runs(podman: Podman, image: str) -> None:
    config = podman.inspect(image)["Config"]
    environment = dict(variable.split("=", 1) for variable in config["Env"])

    assert config["User"] == "10001:10001", "Kubernetes can tell only of a number that it isn't root"
    assert (config["Entrypoint"], config["Cmd"]) == (["tini", "--", "shannon"], ["serve"])
    assert set(config["Volumes"]) == {"/cache", "/data", "/models"}
    assert config["WorkingDir"] == "/data", "store.data_dir is relative by default"
    assert set(config["ExposedPorts"]) == {f"{environment['SHANNON_PORT']}/tcp"}
    assert environment["SHANNON_HOST"] == "0.0.0.0"
    labels = {name.rpartition(".")[2]: text for name, text in config["Labels"].items() if "opencontainers" in name}
    assert set(labels) == {"title", "description", "licenses", "revision", "version"}
    assert labels["version"] == __version__


def test_image_runs_as_a_user_that_it_does_not_know(podman: Podman, image: str) -> None:
    assert podman.run(image, "--version", user="23456:0") == f"shannon {__version__}"
    models = json.loads(podman.run(image, "models", "--json", user="23456:0"))
    assert {model["id"] for model in models} == set(
        yaml.safe_load((ROOT / "configs/models.yaml").read_text())["models"]
    )


@dataclass
class Container:
    """A gateway in a container, on a port of this machine's loopback."""

    podman: Podman
    id: str
    url: str
    client: httpx.Client
    """Sends `key`."""
    key: str

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/ready").status_code == 200
        return False


@contextlib.contextmanager
def serving(podman: Podman, image: str, *options: str, **environment: str) -> Iterator[Container]:
    """Run `shannon serve` in a container until it is ready, and kill it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = make_key()
    listening = {"SHANNON_HOST": "127.0.0.1", "SHANNON_PORT": str(port), "SHANNON_BOOTSTRAP_KEY": key}
    started = podman.start(image, listening | environment, *options)
    url = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
    container = Container(podman, started, url, client, key)
    try:
        wait_until(container.ready, "the gateway in the container is not ready", within_s=120)
        yield container
    except BaseException:
        print(podman.try_to("logs", started))
        raise
    finally:
        client.close()
        podman.try_to("rm", "--force", "--time=0", "--volumes", started)


def test_gateway_serves_what_is_elsewhere_from_a_root_that_it_cannot_write(
    podman: Podman, image: str, tmp_path: Path
) -> None:
    deployment = tmp_path / "deployment.yaml"
    with serving(podman, image, SHANNON_CONFIG="/etc/shannon/mock.yaml") as upstream:
        engine: dict[str, Any] = {"kind": "remote", "model": "shannon-chat", "api_key_env": "UPSTREAM_KEY"}
        engine |= {"urls": [f"{upstream.url}/v1"], "max_model_len": 1024}
        deployment.write_text(yaml.safe_dump({"include": "models.yaml", "engines": {"main": engine}}))
        mount = f"--volume={deployment}:/etc/shannon/remote.yaml:ro"
        with serving(podman, image, mount, UPSTREAM_KEY=upstream.key) as gateway:
            body = {"model": "shannon-chat", "messages": [{"role": "user", "content": "hello there"}]}
            answer = gateway.client.post("/v1/chat/completions", json=body)
            page = gateway.client.get("/")
            podman("healthcheck", "run", gateway.id)
            refused = podman.try_to("exec", gateway.id, "touch", "/opt/shannon/new")
            status = podman("exec", gateway.id, "cat", "/proc/1/status")

    assert answer.json()["choices"][0]["message"]["content"] == "You said: hello there"
    assert page.headers["content-type"].startswith("text/html")
    assert "Read-only file system" in refused.stderr
    assert "Uid:\t10001\t10001\t10001\t10001" in status
    assert "CapEff:\t0000000000000000" in status


def test_stopping_the_container_lets_a_stream_finish(podman: Podman, image: str) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    body = {"model": "shannon-chat", "messages": [{"role": "user", "content": words}], "stream": True}
    with serving(podman, image, SHANNON_CONFIG="/etc/shannon/mock.yaml") as gateway:
        with gateway.client.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = response.iter_raw()
            raw = next(pieces)
            podman("kill", "--signal=TERM", gateway.id)
            wait_until(lambda: not gateway.ready(), "the gateway does not drain")
            raw += b"".join(pieces)
        exit_code = podman("wait", gateway.id)

    assert chunks(raw)[-1]["choices"][0]["finish_reason"] == "stop"
    assert exit_code == "0"
