"""A gateway before remote servers, one of them a real vLLM that is killed: what clients see, and what is counted.

Beside vLLM stands a replica that says it is well and breaks every generation before its first token.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.demo import WEIGHTS
from tests.support.gateway_process import ROOT, UNLIMITED, GatewayProcess, serve, wait_until
from tests.support.upstream_server import Connection, UpstreamServer, run_upstream_beside

pytest.importorskip("vllm", reason="this kills a real vLLM server; `make setup` installs vllm")

START_TIMEOUT_S = 120
HELLO = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
ANSWER = "Hello! I am the Shannon demo model."
STORY = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "ignore_eos": True,
    "max_tokens": 1500,
    "stream": True,
}
STREAMS = 4


class VllmServer:
    """vLLM's own OpenAI server with the demo model, on a port that stays the same."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it listens many seconds later."""
        from engine.local.async_llm import build_defaults

        environment, args = build_defaults()
        args = args | {"model": WEIGHTS, "served_model_name": "demo", "max_model_len": 2048, "max_num_seqs": 16}
        args |= {"host": "127.0.0.1", "port": self.port, "uvicorn_log_level": "error"}
        flags = [word for name, value in args.items() for word in _flag(name, value)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill it with all that belongs to it, as the kernel does when memory runs out."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def check_alive(self) -> None:
        """Fail with the end of its log if it has ended by itself."""
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()[-4000:]

    def tokens(self) -> tuple[int, int]:
        """Return vLLM's own counts of prompt and generated tokens."""
        page = httpx.get(f"{self.root}/metrics", timeout=10).text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

        def count(kind: str) -> int:
            return sum(int(sample.value) for sample in samples if sample.name == f"vllm:{kind}_tokens_total")

        return count("prompt"), count("generation")


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


@dataclass
class Site:
    """Everything that runs."""

    gateway: GatewayProcess
    vllm: VllmServer
    broken: UpstreamServer

    def chat_until_served(self) -> str:
        """Ask until there is an answer, and return it. Nothing but 503 may come before."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (response := self.gateway.chat(**HELLO)).status_code != 200:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
            assert time.monotonic() < deadline
            self.vllm.check_alive()
            time.sleep(0.2)
        return str(response.json()["choices"][0]["message"]["content"])

    def ledger(self) -> tuple[int, int]:
        """Return the prompt and completion tokens of /v1/usage."""
        rows = httpx.get(f"{self.gateway.url}/v1/usage", headers=self.gateway.authorization, timeout=10).json()["data"]
        return sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)


async def _break_off(connection: Connection) -> None:
    await connection.begin()
    connection.cut()


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[Site]:
    """Start vLLM and, without waiting for it, a gateway in front of it and of the broken replica."""
    vllm = VllmServer(folder / "vllm.log")
    vllm.start()
    try:
        with run_upstream_beside(_break_off, max_model_len=2048) as broken:
            engine = {
                "kind": "remote",
                "model": "demo",
                "urls": [f"{vllm.root}/v1", broken.url],
                "breaker_open_s": 0.2,
                "breaker_max_open_s": 0.5,
            }
            tree = {"engines": {"main": engine}, "models": {"shannon-chat": {"limits": UNLIMITED}}}
            with serve(folder / "gateway", tree) as gateway:
                yield Site(gateway, vllm, broken)
    finally:
        vllm.kill()


class Reader(threading.Thread):
    """A client that reads a stream to its end, or leaves after some frames."""

    def __init__(self, gateway: GatewayProcess, leave_after: int | None = None) -> None:
        super().__init__(daemon=True)
        self._gateway = gateway
        self._leave_after = leave_after
        self.streaming = threading.Event()
        self.status = 0
        self.frames: list[str] = []

    def run(self) -> None:
        url, headers = f"{self._gateway.url}/v1/chat/completions", self._gateway.authorization
        with httpx.stream("POST", url, json=STORY, headers=headers, timeout=60) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.frames.append(line)
                if len(self.frames) > 2:
                    self.streaming.set()
                if self._leave_after is not None and len(self.frames) >= self._leave_after:
                    return


def _read(gateway: GatewayProcess, **options: Any) -> list[Reader]:
    readers = [Reader(gateway, **options) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    return readers


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_servers_come_break_and_come_back_under_one_gateway(tmp_path: Path) -> None:
    with _running(tmp_path) as site:
        # vLLM is not up yet, and the other replica breaks whatever it is given: 503, and no more.
        assert site.chat_until_served() == ANSWER

        _check_failover_before_the_first_token(site)
        _check_books(site)
        _check_death_under_streams(site)

        site.vllm.start()
        assert site.chat_until_served() == ANSWER
        assert site.gateway.metric("shannon_engine_unfinished_requests") == 0
        assert site.gateway.process.poll() is None


def _check_failover_before_the_first_token(site: Site) -> None:
    already = len(site.broken.generations)
    for _ in range(12):
        response = site.gateway.chat(**HELLO)
        assert response.json()["choices"][0]["message"]["content"] == ANSWER
    assert len(site.broken.generations) > already, "the broken replica was never tried"


def _check_books(site: Site) -> None:
    """Compare the ledger with vLLM's own counters: equal for what ended; for what was left, but for the way there."""
    wait_until(lambda: site.ledger() == site.vllm.tokens(), "the ledger is not what the server counted")
    prompt, completion = site.ledger()

    for reader in _read(site.gateway, leave_after=20):
        reader.join(30)
    wait_until(lambda: site.gateway.metric("shannon_engine_unfinished_requests") == 0, "requests are unfinished")
    wait_until(lambda: site.ledger()[0] == site.vllm.tokens()[0] > prompt, "the prompt is not in the ledger")
    told, generated = site.ledger()[1] - completion, site.vllm.tokens()[1] - completion
    print(f"left streams: {told} tokens in the ledger, {generated} generated")
    assert STREAMS * 15 < told <= generated < STREAMS * 1500


def _check_death_under_streams(site: Site) -> None:
    before = site.ledger()
    readers = _read(site.gateway)
    for reader in readers:
        assert reader.streaming.wait(30)
    site.vllm.kill()
    killed_at = time.monotonic()
    for reader in readers:
        reader.join(30)
    print(f"streams ended {time.monotonic() - killed_at:.2f} s after the server was killed")

    for reader in readers:
        error = json.loads(reader.frames[-1].removeprefix("data: "))["error"]
        assert reader.status == 200
        assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
        assert error["message"] == "The engine failed during generation."
        assert not any('"error"' in frame for frame in reader.frames[:-1])
    wait_until(lambda: site.gateway.metric("shannon_engine_unfinished_requests") == 0, "requests are unfinished")
    prompt, completion = (after - earlier for after, earlier in zip(site.ledger(), before, strict=True))
    contents = sum('"content":"' in frame and '"content":""' not in frame for r in readers for frame in r.frames)
    assert prompt == STREAMS * 14
    assert contents <= completion <= STREAMS * 1500

    refused = site.gateway.chat(**HELLO)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert refused.headers["x-should-retry"] == "true"
    assert httpx.get(f"{site.gateway.url}/health", timeout=10).status_code == 200
