"""/health reports that the process is alive, /ready whether it accepts requests; neither needs a key or an engine."""

from __future__ import annotations

import asyncio

import pytest

from engine.mock import MockEngine
from gateway import __version__
from tests.support.app import Gateway, Start
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class Loading(MockEngine):
    """Starts when `loaded` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = asyncio.Event()

    async def start(self) -> None:
        await self.loaded.wait()
        await super().start()


@pytest.fixture
async def anonymous(gateway: Gateway) -> Gateway:
    """A gateway whose client sends no key."""
    del gateway.client.headers["Authorization"]
    return gateway


async def test_health_answers(anonymous: Gateway) -> None:
    response = await anonymous.client.get("/health")

    assert response.status_code == 200
    assert response.json() == {"ok": True, "version": __version__}


async def test_ready_names_its_engines(anonymous: Gateway) -> None:
    response = await anonymous.client.get("/ready")

    assert response.status_code == 200
    assert response.json() == {"ready": True, "draining": False, "engines": {"main": "ready"}}


async def test_health_does_not_depend_on_the_engine(start: Start) -> None:
    gateway = await start(ready=False)

    assert (await gateway.client.get("/health")).status_code == 200


async def test_server_listens_while_its_engine_loads(serve: Start) -> None:
    engine = Loading()
    gateway = await serve(mock=lambda: engine, ready=False)

    assert (await gateway.client.get("/health")).status_code == 200
    ready = await gateway.client.get("/ready")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "draining": False, "engines": {"main": "starting"}}
    assert gateway.announced == []

    engine.loaded.set()
    await until(lambda: gateway.announced != [])

    assert (await gateway.client.get("/ready")).status_code == 200
    assert gateway.announced == [gateway.url]


async def test_one_engine_away_is_not_ready(gateway: Gateway) -> None:
    await gateway.engine.close()
    response = await gateway.client.get("/ready")

    assert response.status_code == 503
    assert response.json()["engines"] == {"main": "closed"}


async def test_draining_is_not_ready(gateway: Gateway) -> None:
    await gateway.services.drain.run(0)
    response = await gateway.client.get("/ready")

    assert response.status_code == 503
    assert response.json() == {"ready": False, "draining": True, "engines": {"main": "ready"}}
    assert (await gateway.client.get("/health")).status_code == 200
