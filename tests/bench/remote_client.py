"""`python -m tests.bench.remote_client`: CPU time of a remote engine over three HTTP clients, interleaved.

- http1: `engine.remote.http1`
- aiohttp: `aiohttp.ClientSession` without cookies, decompression and a bound on connections
- httpx: `httpx.AsyncHTTPTransport` (h11 and anyio)

All serve the same `RemoteEngine` on uvloop, against a server in another process that sends one token per chunk as vLLM
does, with the usage in every frame. `bytes` reads the chunks of the same streams without parsing their frames, and so
shows the client alone. Times are CPU time of the client's process, medians over rounds; they are never asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import aiohttp
import httpx
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from engine.base import GenerationRequest
from engine.messages import Message
from engine.remote.engine import RemoteEngine
from engine.remote.http1 import Http1Transport

TICK_S = 0.004
"""Time between two tokens of a stream."""
CONCURRENCY = 16
LOADS = {"stream of 256 tokens": (256, 32), "answer of 1 token": (1, 1600)}
"""Tokens per request and requests."""


class Server(asyncio.Protocol):
    """Answers /tokenize, /models and /health at once, and /chat/completions with a token per tick."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) < int(length or 0):
            return
        self._received = b""
        if b"/chat/completions" in head:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
            self._transport.write(b"Transfer-Encoding: chunked\r\n\r\n")
            self._send(0, orjson.loads(body)["max_tokens"])
            return
        card = {"id": "m", "owned_by": "vllm", "max_model_len": 4096}
        answer = orjson.dumps({"count": 7, "max_model_len": 4096, "tokens": [1] * 7, "data": [card]})
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

    def _send(self, number: int, tokens: int) -> None:
        frame = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
            "usage": {"prompt_tokens": 7, "total_tokens": 8 + number, "completion_tokens": 1 + number},
        }
        if number + 1 == tokens:
            frame["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
        data = b"data: %b\n\n" % orjson.dumps(frame)
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        if number + 1 == tokens:
            chunk += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        self._transport.write(chunk)
        if number + 1 < tokens:
            asyncio.get_running_loop().call_later(TICK_S, self._send, number + 1, tokens)


class AiohttpTransport(httpx.AsyncBaseTransport):
    """aiohttp in the place of `Http1Transport`."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._session.request(
            request.method,
            str(request.url),
            headers=dict(request.headers),
            data=await request.aread() or None,
            allow_redirects=False,
        )
        body = _AiohttpBody(response)
        return httpx.Response(response.status, headers=response.raw_headers, stream=body, extensions={})

    async def aclose(self) -> None:
        await self._session.close()


class _AiohttpBody(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self._response.content.readany():
            yield data

    async def aclose(self) -> None:
        self._response.close()  # keeps the connection if the response has ended


CLIENTS: dict[str, Callable[[], httpx.AsyncBaseTransport]] = {
    "http1": lambda: Http1Transport(None, keepalive_s=4.0),
    "aiohttp": AiohttpTransport,
    "httpx": lambda: httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, keepalive_expiry=4.0)),
}


async def serve() -> None:
    """Serve on a free port, which is printed, until standard input ends."""
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """Start the server in a process of its own and give its URL."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "tests.bench.remote_client", "--serve")
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        await process.wait()


async def measure(requests: int, run: Callable[[], Awaitable[None]]) -> float:
    """Return the CPU seconds of `requests` runs, `CONCURRENCY` at a time."""
    numbers = iter(range(requests))

    async def work() -> None:
        for _ in numbers:
            await run()

    began = time.process_time()
    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return time.process_time() - began


async def measure_engine(url: str, transport: httpx.AsyncBaseTransport, tokens: int, requests: int) -> float:
    """Return the CPU seconds of generations of a `RemoteEngine`."""
    engine = RemoteEngine([url], "m", transport=transport)
    await engine.start()

    async def run() -> None:
        messages: list[Message] = [{"role": "user", "content": "Tell me about the gateway."}]
        request = GenerationRequest(request_id="r", messages=messages, stream=True, max_tokens=tokens)
        prepared = await engine.prepare(request)
        assert sum([1 async for _ in engine.generate(prepared)]) == tokens == prepared.usage.completion_tokens

    try:
        return await measure(requests, run)
    finally:
        await engine.close()


async def measure_bytes(url: str, transport: httpx.AsyncBaseTransport, tokens: int, requests: int) -> float:
    """Return the CPU seconds of the same streams, read and dropped."""
    content = orjson.dumps({"model": "m", "max_tokens": tokens})

    async def run() -> None:
        request = httpx.Request("POST", f"{url}/chat/completions", content=content)
        response = await transport.handle_async_request(request)
        async for _ in response.stream:  # type: ignore[union-attr]
            pass
        await response.aclose()

    try:
        return await measure(requests, run)
    finally:
        await transport.aclose()


async def compare(rounds: int) -> None:
    """Print CPU microseconds per token of each client, and its ratio to http1."""
    kinds = {"engine": measure_engine, "bytes": measure_bytes}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    async with server() as url:
        for number in range(rounds + 1):
            for load, (tokens, requests) in LOADS.items():
                for kind, measured in kinds.items():
                    for client, make in CLIENTS.items():
                        used_s = await measured(url, make(), tokens, requests)
                        if number:  # the first round warms up
                            seconds.setdefault((load, kind, client), []).append(used_s)
    table = Table("load", "what", "client", "CPU us per token", "x http1")
    for (load, kind, client), values in seconds.items():
        tokens, requests = LOADS[load]
        ratio = statistics.median(values) / statistics.median(seconds[load, kind, "http1"])
        used_us = statistics.median(values) / tokens / requests * 1e6
        table.add_row(load, kind, client, f"{used_us:.1f}", f"{ratio:.2f}")
    Console().print(table)


def main() -> None:
    """Measure, or serve as the child process."""
    parser = argparse.ArgumentParser(description="CPU time of HTTP clients under a remote engine.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    uvloop.run(serve() if arguments.serve else compare(arguments.rounds))


if __name__ == "__main__":
    main()
