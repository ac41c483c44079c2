"""The product's own app around a `SupervisedEngine` of `MockEngine`s, in process or behind a real socket.

    async def test_a_reply(start: Start) -> None:
        gateway = await start(server={"port": 0})
        assert (await gateway.chat()).status_code == 200

The fixtures `start`, `serve` and `gateway` are in `tests/conftest.py`. Nothing here imports vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from engine.base import Usage
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.app import create_app
from gateway.components import build_authenticator, build_store
from gateway.services import Services
from gateway.serving.server import Server
from gateway.settings.config import parse_config
from gateway.telemetry.tracing import Tracing
from tests.support.waiting import until

SECRET = "Zq3" * 14 + "x"
KEY_ID = "TestKey00001"
KEY = f"sk-shannon-{KEY_ID}-{SECRET}"
"""Allowed to use every model."""
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
ROOT = Path(__file__).parents[2]
NOW = 1_700_000_000
"""The Unix time that every app in the tests lives at."""
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
"""Three prompt tokens for the mock engine, which counts words and messages, and four in its reply."""


@dataclass
class Gateway:
    """A running gateway, and the engines behind it."""

    app: FastAPI
    engine: SupervisedEngine
    mocks: list[MockEngine]
    """Every engine built so far; a restart appends one."""
    client: httpx.AsyncClient
    """Bound to the gateway and sends KEY."""
    url: str
    server: Server | None = None
    """None when in process."""
    serving: asyncio.Task[None] | None = None
    """Ends when the server has shut down."""
    announced: list[str] = field(default_factory=list)
    """The URLs that the server said were ready."""

    @property
    def mock(self) -> MockEngine:
        """The engine that answers now."""
        return self.mocks[-1]

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    async def chat(self, **fields: Any) -> httpx.Response:
        """Post a chat completion, for HELLO unless `messages` are given, and read the whole response."""
        return await self.client.post("/v1/chat/completions", json={"messages": HELLO} | fields)

    def stream(self, **fields: Any) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        """Open a streamed chat completion."""
        body = {"messages": HELLO, "stream": True} | fields
        return self.client.stream("POST", "/v1/chat/completions", json=body)

    async def post_by_hand(
        self, body: bytes, announced_bytes: int | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Post a chat completion over a bare connection, which can then be stalled or cut at any byte.

        `announced_bytes` is the Content-Length where it is not that of `body`.
        """
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**14)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Length: {announced_bytes or len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer

    def requests_in_progress(self) -> int:
        """Return how many requests the server is working on, from their first line to their last byte."""
        assert self.server is not None
        return len(self.server.server_state.tasks)

    def writes_are_paused(self) -> bool:
        """Return whether some client reads so slowly that the server has stopped writing to it."""
        assert self.server is not None
        connections: set[Any] = self.server.server_state.connections
        return any(connection.flow.write_paused for connection in connections)

    async def samples(self, metric: str) -> dict[tuple[str, ...], float]:
        """Scrape /metrics and return the samples called `metric`, by their label values in order of label name."""
        page = (await self.client.get("/metrics")).raise_for_status().text
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == metric
        }

    @property
    def key(self) -> str:
        """The key that `client` sends."""
        return KEY

    async def metered(self) -> Usage:
        """Return the tokens that the gateway's metrics say were spent, over all models."""
        samples = await self.samples("shannon_tokens_total")
        kinds = {"prompt": 0, "cached": 0, "completion": 0}
        for (kind, _model), value in samples.items():
            kinds[kind] += int(value)
        return Usage(kinds["prompt"], kinds["completion"], kinds["cached"])

    def spent(self) -> Usage:
        """Return the tokens that the engines themselves counted."""
        total = Usage()
        for mock in self.mocks:
            total.add(mock.counters)
        return total


class Start(Protocol):
    """Builds and opens a gateway, closed at the end of the test."""

    async def __call__(
        self,
        *,
        mock: Callable[[], MockEngine] = MockEngine,
        server: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        tracing: Tracing | None = None,
        ready: bool = True,
        **supervision: Any,
    ) -> Gateway:
        """Return a gateway whose engine answers, or is only on its way when `ready` is False.

        `mock` builds each engine, `server` and `config` override settings, `environment` holds keys, `tracing`
        makes spans, and the rest goes to SupervisedEngine. On a socket, `reload` is called on SIGHUP.
        """


def build_app(
    *,
    mock: Callable[[], MockEngine] = MockEngine,
    server: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    tracing: Tracing | None = None,
    **supervision: Any,
) -> tuple[FastAPI, SupervisedEngine, list[MockEngine]]:
    """Return the product's app around one supervised engine, and the list that each engine built is added to.

    The arguments are those of `Start`.
    """
    tree: dict[str, Any] = {
        "engines": {"main": {"kind": "mock"}},
        "models": {
            "shannon-chat": {"description": "General chat completion"},
            "shannon-complex": {"description": "Multi-agent orchestration"},
        },
        "server": {"port": 0} | (server or {}),
    }
    settings = parse_config(tree | (config or {}))
    mocks: list[MockEngine] = []

    def build_mock() -> MockEngine:
        mocks.append(mock())
        return mocks[-1]

    engine = SupervisedEngine("main", build_mock, **({"check_every_s": 0.01} | supervision))
    variables = {"SHANNON_BOOTSTRAP_KEY": KEY} | (environment or {})
    store = build_store(settings, variables)
    authenticator = build_authenticator(settings, store, variables)
    options: dict[str, Any] = {"clock": lambda: NOW, "environment": variables, "tracing": tracing}
    return create_app(settings, {"main": engine}, store, authenticator, **options), engine, mocks


@contextlib.asynccontextmanager
async def in_process(*, ready: bool = True, **options: Any) -> AsyncGenerator[Gateway]:
    app, engine, mocks = build_app(**options)
    url = "http://gateway.test"
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=url, headers=AUTHORIZATION) as client:
        services: Services = app.state.services
        await services.store.start()
        await services.tools.start()
        if ready:
            await engine.start()
        try:
            yield Gateway(app, engine, mocks, client, url)
        finally:
            await engine.close()
            await services.tools.close()
            await services.ledger.close()
            await services.store.close()


@contextlib.asynccontextmanager
async def on_a_socket(
    *, ready: bool = True, reload: Callable[[], Awaitable[None]] | None = None, **options: Any
) -> AsyncGenerator[Gateway]:
    app, engine, mocks = build_app(**options)
    announced: list[str] = []
    server = Server(app, host="127.0.0.1", port=0, on_ready=announced.append, reload=reload)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: bool(announced) if ready else server.started)
        async with httpx.AsyncClient(base_url=server.url, headers=AUTHORIZATION, timeout=10) as client:
            yield Gateway(app, engine, mocks, client, server.url, server, serving, announced)
    finally:
        server.should_exit = True
        await serving


def at_store(store_url: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `Start` with a store in place, where they name none."""
    environment = {"SHANNON_REDIS_URL": store_url} | options.get("environment", {})
    config = {"store": {"data_dir": str(folder / "data"), "command_timeout_ms": 2000}} | options.get("config", {})
    return options | {"environment": environment, "config": config}
