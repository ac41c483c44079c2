"""SIGHUP under load: fifty streams run while the file changes under them, and none is cut. A closed terminal still ends
the gateway, as it always did."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.access.keys import make_key
from tests.support.gateway_process import ENVIRONMENT, ROOT, UNLIMITED, GatewayProcess, serve, wait_until

STREAMS = 50
TOKENS = 300
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
LONG = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": TOKENS}
LIMIT = "x-ratelimit-limit-requests"


class Deployment:
    """A running gateway, and the file that it reloads."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self.path = gateway.log.with_name("gateway.yaml")
        self.tree: dict[str, Any] = yaml.safe_load(self.path.read_text())
        self._reloads = 0

    async def reload(self, text: str | None = None) -> None:
        """Write the tree, or `text`, send SIGHUP, and wait until the file was read."""
        self.path.write_text(text or yaml.safe_dump(self.tree))
        self.gateway.process.send_signal(signal.SIGHUP)
        self._reloads += 1
        deadline = time.monotonic() + 30
        while await asyncio.to_thread(self.gateway.metric, "shannon_config_reloads_total") < self._reloads:
            assert time.monotonic() < deadline, self.gateway.log.read_text()[-2000:]
            await asyncio.sleep(0.02)


async def _read(client: httpx.AsyncClient, model: str, key: str, frames: list[str]) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/chat/completions", json=LONG | {"model": model}, headers=headers) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                frames.append(line)


async def _ask(client: httpx.AsyncClient, model: str, key: str) -> httpx.Response:
    body = {"messages": HELLO, "model": model, "max_tokens": 1}
    return await client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})


async def _streams_while_the_file_changes(deployment: Deployment, key_file: Path) -> list[list[str]]:
    """Reload three times in the middle of the streams. Returns the frames of each."""
    gateway, tree = deployment.gateway, deployment.tree
    old, new = key_file.read_text(), make_key()
    limits = httpx.Limits(max_connections=STREAMS + 5)
    async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=120) as client:
        frames: list[list[str]] = [[] for _ in range(STREAMS)]
        models = ("shannon-chat", "shannon-old")
        streams = [
            asyncio.create_task(_read(client, models[number % 2], old, received))
            for number, received in enumerate(frames)
        ]
        while not all(frames):
            await asyncio.sleep(0.01)
            assert not any(stream.done() for stream in streams)

        tree["models"]["shannon-new"] = tree["models"].pop("shannon-old")
        tree["models"]["shannon-chat"]["limits"] = {"requests_per_minute": 40, "tokens_per_minute": 10**9}
        key_file.write_text(new)
        await deployment.reload()
        gone, added = await _ask(client, "shannon-old", new), await _ask(client, "shannon-new", new)
        assert (gone.status_code, added.status_code) == (404, 200)
        assert (await _ask(client, "shannon-new", old)).status_code == 401
        assert (await _ask(client, "shannon-chat", new)).headers[LIMIT] == "40"

        await deployment.reload("models: [")
        assert (await _ask(client, "shannon-chat", new)).headers[LIMIT] == "40"

        tree["models"]["shannon-chat"]["limits"]["requests_per_minute"] = 2
        tree["engines"]["main"]["args"]["token_s"] = 0
        await deployment.reload()
        refused = await _ask(client, "shannon-chat", new)
        assert (refused.status_code, refused.headers[LIMIT]) == (429, "2"), "two have passed since the key is new"

        assert not any(stream.done() for stream in streams), "the streams ended before the reloads: nothing was shown"
        await asyncio.gather(*streams)
    return frames


@pytest.mark.slow
def test_fifty_streams_outlive_reloads(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(make_key())
    tree = {
        "engines": {"main": {"kind": "mock", "args": {"token_s": 0.03, "max_model_len": 4096}}},
        "models": {"shannon-chat": {"limits": UNLIMITED}, "shannon-old": {"description": "Old", "limits": UNLIMITED}},
        "keys": [{"name": "ci", "key_file": str(key_file)}],
        "store": {"command_timeout_ms": 2000},
    }
    with serve(tmp_path / "gateway", tree) as gateway:
        gateway.wait_until_ready()
        frames = asyncio.run(_streams_while_the_file_changes(Deployment(gateway), key_file))

        for received in frames:
            assert received[-1] == "data: [DONE]"
            last = json.loads(received[-2].removeprefix("data: "))
            assert (last["choices"][0]["finish_reason"], last["usage"]["completion_tokens"]) == ("length", TOKENS)
        _, completion = gateway.booked()
        assert completion == STREAMS * TOKENS + 3, "every token of every stream, and of three whole answers"
        metrics = gateway.metrics()
        assert metrics["shannon_config_reloads_total", "applied"] == 2
        assert metrics["shannon_config_reloads_total", "refused"] == 1
        assert metrics["shannon_config_last_reload_successful",] == 1
        assert metrics["shannon_config_restart_pending",] == 1
        log = gateway.log.read_text()
        assert "models.shannon-old removed" in log
        assert "models.shannon-chat.limits.requests_per_minute 40 -> 2" in log
        assert "gateway.yaml: not valid YAML" in log
        assert "needs a restart, and stays as it was until then: engines.main.args.token_s" in log


def test_bootstrap_key_in_a_file_is_rotated_and_never_printed(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(old := make_key())
    tree = {"engines": {"main": {"kind": "mock"}}}
    variables = {"SHANNON_BOOTSTRAP_KEY": "", "SHANNON_BOOTSTRAP_KEY_FILE": str(file)}
    with serve(tmp_path / "gateway", tree, old, **variables) as gateway:
        gateway.wait_until_ready()
        wait_until(lambda: f"Bearer $(cat {file})" in gateway.log.read_text(), "there is no hint how to ask")
        assert gateway.chat(messages=HELLO).status_code == 200

        file.write_text(new := make_key())
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded" in gateway.log.read_text(), "the gateway does not reload")
        assert gateway.chat(messages=HELLO).status_code == 401
        gateway.key = new
        assert gateway.chat(messages=HELLO).status_code == 200
        assert not any(key in gateway.log.read_text() for key in (old, new))


def test_terminal_that_is_closed_ends_the_gateway_and_a_signal_in_one_reloads(tmp_path: Path) -> None:
    path, log = tmp_path / "gateway.yaml", tmp_path / "gateway.log"
    tree = {"engines": {"main": {"kind": "mock"}}, "store": {"data_dir": str(tmp_path / "data")}}
    path.write_text(yaml.safe_dump({"include": str(ROOT / "configs/models.yaml")} | tree))
    master, slave = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", "--config", str(path), "--port", "0"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=slave,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
    try:
        os.close(slave)
        wait_until(lambda: "Ready" in log.read_text(), log.read_text(), within_s=60)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "nothing has changed" in log.read_text(), "the gateway does not reload")

        os.close(master)
        assert process.wait(timeout=30) == 0
        assert "drained, 0 interrupted" in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
