"""A remote engine over scripted servers, and the answers of such servers.

Example:

    async with run_upstream(hello) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)
        assert "".join(delta.text for delta in deltas) == "Hello there"
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from engine.base import (
    Delta,
    GenerationRequest,
    Prepared,
)
from engine.remote.engine import RemoteEngine
from tests.support.app import HELLO
from tests.support.upstream_server import (
    HELLO_STREAM,
    Connection,
    UpstreamServer,
)

DEAD = "http://127.0.0.1:9/v1"
"""Where nothing listens."""


def request(**fields: Any) -> GenerationRequest:
    given: dict[str, Any] = {"request_id": "r1", "messages": HELLO, "stream": True} | fields
    return GenerationRequest(**given)


@contextlib.asynccontextmanager
async def remote(*servers: UpstreamServer | str, **settings: Any) -> AsyncIterator[RemoteEngine]:
    """Start an engine over servers or URLs, whose breakers stay open for the length of a test."""
    urls = [server if isinstance(server, str) else server.url for server in servers]
    engine = RemoteEngine(urls, "demo", **({"breaker_open_s": 60.0, "connect_timeout_s": 2.0} | settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def generate(engine: RemoteEngine, **fields: Any) -> tuple[Prepared, list[Delta]]:
    prepared = await engine.prepare(request(**fields))
    return prepared, [delta async for delta in engine.generate(prepared)]


async def hello(connection: Connection) -> None:
    await connection.stream(*HELLO_STREAM)


def saying(*frames: Any) -> Callable[[Connection], Awaitable[None]]:
    """Return an answer: these frames as a whole stream."""
    return lambda connection: connection.stream(*frames)


def refusing(status: int, body: Any = None, **headers: str) -> Callable[[Connection], Awaitable[None]]:
    """Return an answer: this refusal."""
    return lambda connection: connection.reply(status, body, **headers)


async def stuck(connection: Connection) -> None:
    """Answer nothing."""
    await connection.left()


Answer = Callable[[Connection], Awaitable[None]]


def sending(*pieces: bytes, cut: bool = True) -> Answer:
    """Return an answer: these bytes, which may be no HTTP, and the end of the connection or silence."""

    async def answer(connection: Connection) -> None:
        for piece in pieces:
            await connection.write(piece)
        if cut:
            connection.cut()
        else:
            await connection.left()

    return answer
