"""What all tests share: a gateway around scripted engines, in process or behind a real socket, and ways to wait.

    start    await start(...)   the app in process, for whole requests; httpx hands bodies over when they are complete
    serve    await serve(...)   the same app in `gateway.server.Server` on a loopback port, for anything about time
    gateway                     `await start()` with nothing changed

Both build the product's own `create_app` around a `SupervisedEngine` of `MockEngine`s. Nothing here imports vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import redis
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from engine.base import Usage
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.api.dependencies import Services
from gateway.app import build_authenticator, build_store, create_app
from gateway.config import parse_config
from gateway.server import Server
from gateway.tracing import Tracing
from tests.store_server import StoreServer, run_cluster, run_store

SECRET = "Zq3" * 14 + "x"
KEY_ID = "TestKey00001"
KEY = f"sk-shannon-{KEY_ID}-{SECRET}"
"""Allowed to use every model."""
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
ROOT = Path(__file__).parents[1]
NOW = 1_700_000_000
"""The Unix time that every app in the tests lives at."""
HELLO = [{"role": "user", "content": "hello there"}]
"""Three prompt tokens for the mock engine, which counts words and messages, and four in its reply."""


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for a condition that has no event of its own. Raises TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


def data_lines(raw: bytes) -> list[bytes]:
    """Return what follows `data: ` in each frame of an event stream, comments left out; every frame is one line."""
    assert raw.endswith(b"\n\n"), raw[-80:]
    frames = [frame for frame in raw[:-2].split(b"\n\n") if not frame.startswith(b":")]
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames), frames
    return [frame.removeprefix(b"data: ") for frame in frames]


def chunks(raw: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a complete event stream, whose last frame must be [DONE]."""
    *objects, done = data_lines(raw)
    assert done == b"[DONE]"
    return [json.loads(line) for line in objects]


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
async def _in_process(*, ready: bool = True, **options: Any) -> AsyncGenerator[Gateway]:
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
async def _on_a_socket(
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


def _at(store_url: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `Start` with a store in place, where they name none."""
    environment = {"SHANNON_REDIS_URL": store_url} | options.get("environment", {})
    config = {"store": {"data_dir": str(folder / "data"), "command_timeout_ms": 2000}} | options.get("config", {})
    return options | {"environment": environment, "config": config}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run async tests on the event loop that the product runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The bundled Valkey, shared by all tests that don't break it."""
    with run_store("valkey", tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def store_url(store_server: StoreServer) -> str:
    """The URL of an empty store."""
    store_server.client().flushall()
    return store_server.url


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    # It takes two seconds until a node trusts itself.
    with run_cluster(tmp_path_factory.mktemp("cluster")) as port:
        yield port


@pytest.fixture
def cluster_port(_cluster: int) -> int:
    """The port of an empty cluster of one node, shared by all tests that don't break it."""
    with redis.Redis(port=_cluster) as node:
        node.flushall()
    return _cluster


@pytest.fixture
async def start(store_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Open gateways in process. Their lifespan does not run, so the engine is started here."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**options: Any) -> Gateway:
            return await stack.enter_async_context(_in_process(**_at(store_url, tmp_path, options)))

        yield start


@pytest.fixture
async def serve(store_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Open gateways on loopback sockets, with the product's server and lifespan."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(**options: Any) -> Gateway:
            return await stack.enter_async_context(_on_a_socket(**_at(store_url, tmp_path, options)))

        yield serve


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway in process with default settings."""
    return await start()
