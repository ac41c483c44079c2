"""vLLM's core killed and frozen under running streams: what clients see, and how the gateway comes back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.chaos.streaming_client import Client
from tests.support.gateway_process import GatewayProcess, serve

pytest.importorskip("vllm", reason="this kills a real engine; `make setup` installs vllm")

STALL_S = 4.0
TREE = {
    "engines": {
        "main": {
            "kind": "embedded",
            "model": "demo",
            "engine_stall_s": STALL_S,
            "max_engine_restarts": 2,
            "args": {"max_model_len": 4096},
        }
    }
}


def _break_engine(gateway: GatewayProcess, number: signal.Signals) -> tuple[list[Client], float]:
    """Send a signal to the engine core under four streams. Returns the clients and when it was sent."""
    clients = [Client(gateway) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.streaming.wait(30)
    core = gateway.engine_core()
    sent_at = time.monotonic()
    core.send_signal(number)
    for client in clients:
        client.join(30)
    return clients, sent_at


def _check_clients(clients: list[Client], deadline: float) -> None:
    for client in clients:
        assert 0 < client.ended_at <= deadline, "the stream did not end in time"
        error = json.loads(client.frames[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
        assert all('"error"' not in frame for frame in client.frames[:-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_and_frozen_engines_come_back_until_the_budget_is_spent(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with serve(tmp_path, TREE) as gateway:
        gateway.wait_until_ready()

        for number, notice_s in ((signal.SIGKILL, 0.0), (signal.SIGSTOP, STALL_S + 1.0)):
            clients, sent_at = _break_engine(gateway, number)
            _check_clients(clients, sent_at + notice_s + 2.0)
            assert not gateway.ready()
            refused = gateway.chat(messages=[{"role": "user", "content": "Say hello."}])
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert refused.headers["x-should-retry"] == "true"
            gateway.wait_until_ready()
            back_s = time.monotonic() - sent_at
            print(
                f"{number.name}: streams ended after {clients[0].ended_at - sent_at:.2f} s, ready after {back_s:.1f} s"
            )
            answer = gateway.chat(messages=[{"role": "user", "content": "Say hello."}], temperature=0).json()
            assert answer["choices"][0]["message"]["content"] == "Hello! I am the Shannon demo model."
            assert gateway.metric("shannon_engine_unfinished_requests") == 0

        gateway.engine_core().kill()
        assert gateway.process.wait(timeout=30) != 0, "a supervisor must see the failure in the exit code"
        assert "failed 3 times" in gateway.log.read_text()


@pytest.mark.slow
def test_engine_core_and_store_do_not_outlive_a_killed_gateway(tmp_path: Path) -> None:
    with serve(tmp_path, TREE) as gateway:
        gateway.wait_until_ready()
        children = psutil.Process(gateway.process.pid).children(recursive=True)
        assert len(children) >= 2, "the engine core and the bundled Valkey"
        gateway.process.kill()
        _, alive = psutil.wait_procs([child for child in children if "resource_tracker" not in str(child)], timeout=5)
        assert not alive
