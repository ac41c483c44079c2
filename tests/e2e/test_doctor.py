"""`shannon doctor` as a user runs it: before the first start, beside a running gateway, and where things are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.keys import make_key
from tests.support.gateway_process import ENVIRONMENT, ROOT, GatewayProcess, serve

MOCK: dict[str, Any] = {"engines": {"main": {"kind": "mock"}}}


def doctor(config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", "doctor", "--config", str(config), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | {"COLUMNS": "100"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_demo_deployment_is_fit_for_its_first_start(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(f"include: {ROOT}/configs/demo.yaml\nstore: {{data_dir: {tmp_path}/data}}\nserver: {{port: 0}}\n")
    done = doctor(path, "--json")

    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for check in ("vllm", "weights", "memory", "store", "engine_settings"):
        assert findings[check]["verdict"] == "ok", findings[check]
    assert "ships with the gateway" in findings["weights"]["text"]
    assert list(tmp_path.iterdir()) == [path]


def test_settings_that_vllm_does_not_take_are_told_in_its_words(tmp_path: Path) -> None:
    engines = (
        "{main: {kind: embedded, args: {max_model_length: 512}}, long: {kind: embedded, args: {max_model_len: 99999}}}"
    )
    path = tmp_path / "demo.yaml"
    path.write_text(f"include: {ROOT}/configs/models.yaml\nengines: {engines}\nserver: {{port: 0}}\n")
    done = doctor(path, "--json")

    found = {f["subject"]: f["text"] for f in json.loads(done.stdout) if f["check"] == "engine_settings"}
    assert done.returncode == 1
    assert "Did you mean 'max_model_len'?" in found["engines.main"]
    assert "greater than the derived max_model_len" in found["engines.long"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with serve(tmp_path_factory.mktemp("gateway"), MOCK) as gateway:
        gateway.wait_until_ready()
        yield gateway


def test_running_gateway_is_found_and_left_alone(running: GatewayProcess) -> None:
    port = running.url.rpartition(":")[2]
    done = doctor(running.log.with_name("gateway.yaml"), "--json", SHANNON_PORT=port)

    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held by a gateway" in findings["port"]["text"]
    assert "the bundled server" in findings["store"]["text"]
    assert running.chat(model="shannon-chat", messages=[{"role": "user", "content": "hi"}]).status_code == 200


def test_faults_are_told_with_what_to_do_and_without_secrets(running: GatewayProcess, tmp_path: Path) -> None:
    port = running.url.rpartition(":")[2]
    key = make_key()
    path = tmp_path / "remote.yaml"
    path.write_text(
        f"include: {ROOT}/configs/models.yaml\n"
        f"engines: {{main: {{kind: remote, model: shannon-chat, urls: ['{running.url}/v1'], api_key_env: UPSTREAM}}}}\n"
        "keys: [{name: ci, key_env: CI_KEY}]\n"
        f"store: {{data_dir: {tmp_path}/data}}\n"
        "server: {host: 0.0.0.0, port: 0}\n"
    )
    store = f"redis://:hunter-22@127.0.0.1:{port}"  # it answers, but not as a store
    done = doctor(path, UPSTREAM=key, SHANNON_REDIS_URL=store)

    said = done.stdout.replace("\n", " ")
    assert done.returncode == 1
    for words in ("CI_KEY", "refuses the key", "does not answer", "server.allowed_hosts", "3 failed"):
        assert words in " ".join(said.split()), done.stdout
    assert "->" in said
    assert key not in done.stdout + done.stderr
    assert "hunter-22" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

    right = doctor(path, "--json", UPSTREAM=running.key, CI_KEY=key, SHANNON_REDIS_URL="")
    (replica,) = [finding for finding in json.loads(right.stdout) if finding["check"] == "replica"]
    assert replica["verdict"] in ("ok", "warning"), replica
    assert right.returncode == 0, right.stdout
