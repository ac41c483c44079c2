"""A gateway that dies, or stops for a while, under streams that others can take up: nothing is lost without a word."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access.keys import make_key
from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve
from tests.support.job_client import JobClient, submitted
from tests.support.store_server import StoreServer, run_store
from tests.support.taken import Taken
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TREE: dict[str, Any] = {
    "engines": {"main": {"kind": "mock", "args": {"token_s": 0.02, "max_model_len": 4096}}},
    "models": {"shannon-chat": {"limits": UNLIMITED}},
    "jobs": {"resume_s": 30},
    "store": {"command_timeout_ms": 2000},
}
WORDS = " ".join(map(str, range(150)))
WITHIN_S = 20
"""Longer than a lease."""


@dataclass
class Replica:
    """A gateway in a process of its own, and a client of it."""

    process: GatewayProcess
    client: httpx.AsyncClient

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.process.wait()

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.process.pid, number)


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    key = make_key()
    with contextlib.ExitStack() as stack:
        store: StoreServer = stack.enter_context(run_store("valkey", tmp_path / "store"))
        folders = [tmp_path / name for name in ("one", "two")]
        processes = [stack.enter_context(serve(folder, TREE, key, SHANNON_REDIS_URL=store.url)) for folder in folders]
        for process in processes:
            process.wait_until_ready()
        async with contextlib.AsyncExitStack() as clients:
            one, two = [
                Replica(
                    process,
                    await clients.enter_async_context(httpx.AsyncClient(base_url=process.url, timeout=WITHIN_S)),
                )
                for process in processes
            ]
            one.client.headers["Authorization"] = two.client.headers["Authorization"] = f"Bearer {key}"
            yield one, two


async def test_completion_of_a_killed_gateway_is_told_to_be_lost(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    taken = Taken()
    body = {"messages": [{"role": "user", "content": WORDS}], "stream": True, "resumable": True}
    async with one.client.stream("POST", "/v1/chat/completions", json=body) as response:
        await taken.take(response, 3)
        path = response.headers["X-Shannon-Resume"]
        async with two.client.stream("GET", path, params={"starting_after": 3}) as rest:
            numbers, error = [], {}
            async for line in rest.aiter_lines():
                if line.startswith("id: "):
                    numbers.append(int(line.removeprefix("id: ")))
                elif line.startswith("data: "):
                    error = json.loads(line.removeprefix("data: ")).get("error", {})
                if len(numbers) == 10 and one.process.process.poll() is None:
                    one.kill()

    assert numbers == list(range(taken.last + 1, taken.last + 1 + len(numbers))), "all that was stored"
    assert error["code"] == "server_gone"
    gone = await two.client.get(path, params={"starting_after": taken.last + len(numbers)})
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "server_gone")


async def test_jobs_of_a_killed_gateway_go_on_where_the_stream_comes_to(replicas: tuple[Replica, Replica]) -> None:
    one, two = replicas
    client = JobClient("c")
    key = one.client.headers["Authorization"].removeprefix("Bearer ")
    async with client.connected(one, key):
        jobs = [await submitted(one, "c", WORDS, key=key) for _ in range(2)]
        jobs.append(await submitted(two, "c", "the last", key=key))
        await until(lambda: len(client.text(jobs[0])) > 20)
        one.kill()
    async with client.connected(two, key):
        assert client.opened[-1]["resumed"]
        await until(lambda: len(client.in_order()) == 3, WITHIN_S)

    assert client.in_order() == jobs
    assert client.of(jobs[0])[-1][1]["error"]["code"] == "server_gone", "no job runs twice"
    assert client.text(jobs[0]) == f"You said: {WORDS}"[: len(client.text(jobs[0]))]
    assert client.text(jobs[1]) == f"You said: {WORDS}"
    assert client.text(jobs[2]) == "You said: the last"


async def test_gateway_that_stopped_for_a_while_lets_its_clients_go(replicas: tuple[Replica, Replica]) -> None:
    """What it made while it was taken for dead is nobody's: it ends the job, and its tokens are in nobody's stream."""
    one, two = replicas
    client = JobClient("c")
    key = one.client.headers["Authorization"].removeprefix("Bearer ")
    one.client.headers["X-Session-ID"] = two.client.headers["X-Session-ID"] = "talk"
    async with client.connected(one, key):
        jobs = [await submitted(one, "c", WORDS, key=key) for _ in range(2)]
        await until(lambda: len(client.text(jobs[0])) > 20)
        one.send(signal.SIGSTOP)
    try:
        async with client.connected(two, key):
            await until(lambda: client.ended(jobs[0]), WITHIN_S)
            one.send(signal.SIGCONT)
            await until(lambda: client.ended(jobs[1]), WITHIN_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            one.send(signal.SIGCONT)

    assert client.of(jobs[0])[-1][1]["error"]["code"] == "server_gone"
    assert client.text(jobs[1]) == f"You said: {WORDS}"
    running = ("shannon_engine_unfinished_requests", "main")
    async with asyncio.timeout(WITHIN_S):
        while (await asyncio.to_thread(one.process.metrics)).get(running, 0):
            await asyncio.sleep(0.05)
    # It has seen the beginning of the first job and nothing of the second, and keeps nothing of either.
    metrics = await asyncio.to_thread(one.process.metrics)
    completed = sum(
        value for name, value in metrics.items() if name[0] == "shannon_tokens_total" and "completion" in name
    )
    assert 0 < completed < len(WORDS.split())
    messages = (await two.client.get("/v1/sessions/talk")).raise_for_status().json()["messages"]
    assert [message["content"] for message in messages] == [WORDS, f"You said: {WORDS}"]
