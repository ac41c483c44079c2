"""Fixtures that all tests share.

    start    await start(...)   the app in process, for whole requests; httpx hands bodies over when they are complete
    serve    await serve(...)   the same app in the product's `Server` on a loopback port, for anything about time
    gateway                     `await start()` with nothing changed

`tests/support/app.py` builds the app. Nothing here imports vllm.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.app import Gateway, Start, at_store, in_process, on_a_socket
from tests.support.store_server import StoreServer, run_cluster, run_store


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
            return await stack.enter_async_context(in_process(**at_store(store_url, tmp_path, options)))

        yield start


@pytest.fixture
async def serve(store_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Open gateways on loopback sockets, with the product's server and lifespan."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(**options: Any) -> Gateway:
            return await stack.enter_async_context(on_a_socket(**at_store(store_url, tmp_path, options)))

        yield serve


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway in process with default settings."""
    return await start()
