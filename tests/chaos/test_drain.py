"""SIGTERM under load with the real engine: streams that can finish do, the others are told, the exit code is 0."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.support.chaos.streaming_client import BODY, Client
from tests.support.gateway_process import serve, wait_until

pytest.importorskip("vllm", reason="this drains a real engine; `make setup` installs vllm")

STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "temperature": 0}


@pytest.mark.slow
def test_sigterm_lets_short_streams_finish_and_tells_long_ones(tmp_path: Path) -> None:
    tree = {
        "engines": {"main": {"kind": "embedded", "model": "demo", "args": {"max_model_len": 4096}}},
        "server": {"drain_timeout_s": 3},
    }
    with serve(tmp_path, tree) as gateway:
        gateway.wait_until_ready()
        long = Client(gateway)
        long.start()
        assert long.streaming.wait(30)
        url = f"{gateway.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=STORY, headers=gateway.authorization, timeout=60) as short:
            lines = short.iter_lines()
            next(lines)
            os.killpg(gateway.process.pid, signal.SIGTERM)  # the core must not hear it
            refused = _until_refused(url, gateway.authorization)
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert httpx.get(f"{gateway.url}/ready").status_code == 503
            assert httpx.get(f"{gateway.url}/health").json()["ok"] is True
            assert [line for line in lines if line][-1] == "data: [DONE]"
        long.join(30)
        error = json.loads(long.frames[-1].removeprefix("data: "))["error"]
        assert "shut down" in error["message"]
        assert gateway.process.wait(timeout=30) == 0
        wait_until(lambda: "Finished" in gateway.log.read_text(), "the log is not complete")
        assert "leaked" not in gateway.log.read_text()


def _until_refused(url: str, headers: dict[str, str]) -> httpx.Response:
    """Send requests until one is refused: the signal takes a moment to arrive."""
    body = BODY | {"max_tokens": 1, "stream": False}
    for _ in range(100):
        response = httpx.post(url, json=body, headers=headers, timeout=30)
        if response.status_code == 503:
            return response
        threading.Event().wait(0.01)
    raise AssertionError("new requests were still served")
