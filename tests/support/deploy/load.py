"""Clients that send requests continuously, each in its own way, and record what a user would have noticed.

Example:

    load = Load(cluster.url, cluster.key)
    await load.run(plan, [load.stream(), load.whole()])
    assert load.failed == []
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx2
import openai

from tests.support.frames import data_lines

TIMEOUT_S = 60


@dataclass
class Request:
    """One request and how it went."""

    key_id: str
    started: float
    ended: float = 0.0
    status: int = 0
    """0 until a replica has answered."""
    replicas: str = ""
    """The replicas that nginx asked."""
    failure: str = ""
    """What was wrong with it; empty where it was answered whole, or refused by a limit."""
    usage: dict[str, int] = field(default_factory=dict)
    longest_gap_s: float = 0.0
    """Between two frames of a stream, the head of the response being the first."""

    def answered(self, response: httpx.Response | httpx2.Response) -> None:
        self.status = response.status_code
        self.replicas = response.headers["x-replicas"]


class Load:
    """Sends requests until told to stop, each a conversation of its own, on a connection of its own.

    A reload of nginx closes idle connections, and a request that was on its way into one is lost whatever is behind
    nginx; ingress controllers change endpoints without a reload.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        self._numbers = itertools.count()
        self._stopping = asyncio.Event()
        self.requests: list[Request] = []

    def on_the_way(self, since: float) -> bool:
        """Return whether a request that was sent before `since` may not have come to a replica yet."""
        return any(request.started < since and not request.ended and not request.status for request in self.requests)

    @property
    def failed(self) -> list[str]:
        return [request.failure for request in self.requests if request.failure]

    async def run(self, plan: Coroutine[Any, Any, None], clients: list[Coroutine[Any, Any, None]]) -> None:
        """Run clients until `plan` has ended; requests that are under way then are read to their end."""

        async def planned() -> None:
            try:
                await plan
            finally:
                self._stopping.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(planned())
            for client in clients:
                group.create_task(client)

    async def stream(self) -> None:
        """Be a client that streams, and checks every frame."""
        async with self._client() as client:
            while not self._stopping.is_set():
                await self._note(self._key, lambda request: self._stream_once(client, request))

    async def whole(self) -> None:
        """Be a client that waits for whole answers."""
        async with self._client() as client:
            while not self._stopping.is_set():
                await self._note(self._key, lambda request: self._ask_once(client, request, self._key))

    async def sdk(self) -> None:
        """Be OpenAI's SDK, which is not to try anything twice here."""
        http = httpx2.AsyncClient(timeout=TIMEOUT_S, limits=httpx2.Limits(max_keepalive_connections=0))
        async with openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key=self._key, max_retries=0, http_client=http
        ) as client:
            while not self._stopping.is_set():
                await self._note(self._key, lambda request: self._sdk_once(client, request))

    async def limited(self, key: str, every_s: float) -> None:
        """Be a client that runs into its key's limit, and asks again and again."""
        async with self._client() as client:
            while not self._stopping.is_set():
                await self._note(key, lambda request: self._ask_once(client, request, key))
                await asyncio.sleep(every_s)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))

    async def _note(self, key: str, send: Callable[[Request], Coroutine[Any, Any, None]]) -> None:
        request = Request(key.split("-")[2], time.monotonic())
        self.requests.append(request)
        try:
            await send(request)
        except (httpx.HTTPError, openai.OpenAIError, AssertionError) as error:
            request.failure = f"{request.status} {error!r}"
        request.ended = time.monotonic()

    def _ask(self, most_words: int = 60) -> tuple[str, dict[str, str]]:
        """Return what no other request says, a few words or many, and the headers that make it a new session's."""
        number = next(self._numbers)
        said = " ".join(f"{number}-{word}" for word in range(random.Random(number).randint(2, most_words)))
        return said, {"X-Session-ID": f"session-{number}"}

    async def _ask_once(self, client: httpx.AsyncClient, request: Request, key: str) -> None:
        said, headers = self._ask(most_words=10)
        response = await client.post(
            f"{self._url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": said}]},
            headers=headers | {"Authorization": f"Bearer {key}"},
        )
        request.answered(response)
        if request.status == 429:
            return
        assert request.status == 200, response.text
        body = response.json()
        assert body["choices"][0]["message"]["content"] == f"You said: {said}"
        request.usage = body["usage"]

    async def _stream_once(self, client: httpx.AsyncClient, request: Request) -> None:
        said, headers = self._ask()
        body = {"messages": [{"role": "user", "content": said}], "stream": True}
        headers |= {"Authorization": f"Bearer {self._key}"}
        async with client.stream("POST", f"{self._url}/v1/chat/completions", json=body, headers=headers) as response:
            request.answered(response)
            assert request.status == 200, await response.aread()
            raw = b"".join([piece async for piece in timed(response.aiter_bytes(), request)])
        *frames, done = data_lines(raw)
        assert done == b"[DONE]", raw[-200:]
        chunks = [json.loads(frame) for frame in frames]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == f"You said: {said}"
        request.usage = chunks[-1]["usage"]

    async def _sdk_once(self, client: openai.AsyncOpenAI, request: Request) -> None:
        said, headers = self._ask()
        stream = await client.chat.completions.create(
            model="shannon-chat", messages=[{"role": "user", "content": said}], stream=True, extra_headers=headers
        )
        request.answered(stream.response)
        chunks = [chunk async for chunk in timed(stream, request)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == f"You said: {said}"
        assert chunks[-1].usage is not None, "the end is missing"
        request.usage = chunks[-1].usage.model_dump()


async def timed(pieces: AsyncIterator[Any], request: Request) -> AsyncIterator[Any]:
    """Pass on what comes, and note the longest silence."""
    last = time.monotonic()
    async for piece in pieces:
        now = time.monotonic()
        request.longest_gap_s = max(request.longest_gap_s, now - last)
        last = now
        yield piece


def most_in_a_minute(requests: list[Request]) -> int:
    """Return how many of these certainly were let in within some 60 s: begun after its start, ended before its end."""
    return max(
        sum(first.started <= other.started and other.ended <= first.started + 60 for other in requests)
        for first in requests
    )
