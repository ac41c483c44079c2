"""A server that answers with given bytes, and a client with the product's transport.

Example:

    async with served(raw(OK)) as server, client() as http:
        assert (await http.get(server.url)).text == "ok"
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import httpx

from engine.remote.http1 import Http1Transport

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers request number n, over all connections, with `answers[n]`; the last answers all that follow."""

    answers: list[Answer]
    url: str = ""
    connections: int = 0
    requests: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0"
                await reader.readexactly(int(length))
                self.requests += 1
                await self.answers[min(self.requests, len(self.answers)) - 1](reader, writer)


def raw(*pieces: bytes, close: bool = False) -> Answer:
    """Return an answer: these bytes, piece by piece."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return answer


@contextlib.asynccontextmanager
async def served(*answers: Answer, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(list(answers))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    scheme = "http" if context is None else "https"
    server.url = f"{scheme}://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    try:
        yield server
    finally:
        listening.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def client(keepalive_s: float = 60.0, context: ssl.SSLContext | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = Http1Transport(context, keepalive_s=keepalive_s)
    async with httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(None, connect=2.0)) as client:
        yield client
