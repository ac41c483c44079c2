"""Cut streams and submitted jobs with the real engine: the same words as in one go, and books that balance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.gateway_process import GatewayProcess
from tests.support.job_client import JobClient, submitted
from tests.support.taken import Taken
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("books")]

STORY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}


class Client:
    """The gateway as a client reaches it."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client


@pytest.fixture
async def reached(gateway: GatewayProcess) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.authorization, timeout=60) as client:
        yield Client(client)


async def test_stream_that_is_cut_says_what_it_would_have(reached: Client, gateway: GatewayProcess) -> None:
    whole = (await reached.client.post("/v1/chat/completions", json=STORY)).json()
    taken = Taken()
    body = STORY | {"stream": True, "resumable": True}
    async with reached.client.stream("POST", "/v1/chat/completions", json=body) as response:
        path = response.headers["X-Shannon-Resume"]
        await taken.take(response, 5)
    while taken.events[taken.last] != "[DONE]":
        async with reached.client.stream("GET", path, headers={"Last-Event-ID": str(taken.last)}) as response:
            await taken.take(response, 10)

    assert taken.text == whole["choices"][0]["message"]["content"]
    assert taken.frames[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_jobs_are_answered_in_turn(reached: Client, gateway: GatewayProcess) -> None:
    whole = (await reached.client.post("/v1/chat/completions", json=STORY)).json()["choices"][0]["message"]["content"]
    clients = [JobClient(f"client-{number}") for number in range(3)]

    async def work(client: JobClient) -> None:
        async with client.connected(reached, gateway.key):
            jobs = [
                await submitted(reached, client.id, "Tell me a story.", temperature=0, key=gateway.key)
                for _ in range(3)
            ]
            await until(lambda: client.in_order() == jobs, within_s=60)
        client.check_turns()
        assert [client.text(job_id) for job_id in jobs] == [whole] * 3

    await asyncio.gather(*(work(client) for client in clients))
