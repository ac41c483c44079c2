"""Several engines in one gateway: each model on its own, started side by side, and those that wait to be asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.base import EngineError
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.app import create_app
from gateway.components import build_authenticator, build_engines, build_store
from gateway.services import Services
from gateway.serving.server import Server
from gateway.settings.config import parse_config
from tests.support.app import AUTHORIZATION, HELLO, KEY, Gateway, Start
from tests.support.frames import chunks, data_lines
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

COMMENT = b": keepalive\n\n"


class Gated(MockEngine):
    """Starts when its gate opens; fails then if it has a failure."""

    def __init__(self, reply: str, failure: str = "") -> None:
        super().__init__(reply=reply)
        self.gate = asyncio.Event()
        self.failure = failure
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        await self.gate.wait()
        if self.failure:
            raise EngineError(self.failure)
        await super().start()


@dataclass
class House:
    """A running gateway with two engines: `main` behind shannon-chat, `spare` behind shannon-complex."""

    services: Services
    engines: dict[str, SupervisedEngine]
    client: httpx.AsyncClient
    server: Server
    serving: asyncio.Task[None]

    async def chat(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": HELLO} | fields
        return await self.client.post("/v1/chat/completions", json=body)

    async def said(self, model: str) -> str:
        response = await self.chat(model)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    async def ready(self) -> tuple[int, dict[str, str]]:
        response = await self.client.get("/ready")
        return response.status_code, response.json()["engines"]

    async def ended(self) -> None:
        async with asyncio.timeout(5):
            await asyncio.shield(self.serving)

    def requests_in_progress(self) -> int:
        return len(self.server.server_state.tasks)


Open = Callable[..., Any]


@pytest.fixture
async def house(store_url: str, tmp_path: Path) -> AsyncIterator[Open]:
    """Open houses with the engines given, on loopback sockets, with the product's server and lifespan."""

    @contextlib.asynccontextmanager
    async def opened(given: dict[str, SupervisedEngine] | None, tree: dict[str, Any]) -> AsyncGenerator[House]:
        config = parse_config(
            {
                "engines": {"main": {"kind": "mock"}, "spare": {"kind": "mock"}},
                "models": {
                    "shannon-chat": {"description": "General chat completion"},
                    "shannon-complex": {"description": "Multi-agent orchestration", "engine": "spare"},
                },
                "store": {"data_dir": str(tmp_path / "data"), "command_timeout_ms": 2000},
            }
            | tree
        )
        variables = {"SHANNON_BOOTSTRAP_KEY": KEY, "SHANNON_REDIS_URL": store_url}
        store = build_store(config, variables)
        engines = build_engines(config) if given is None else given
        app = create_app(config, engines, store, build_authenticator(config, store, variables))
        server = Server(app, host="127.0.0.1", port=0, on_ready=lambda url: None)
        serving = asyncio.create_task(server.serve())
        try:
            await until(lambda: server.started)
            async with httpx.AsyncClient(base_url=server.url, headers=AUTHORIZATION, timeout=10) as client:
                yield House(app.state.services, engines, client, server, serving)
        finally:
            server.should_exit = True
            await serving

    async with contextlib.AsyncExitStack() as stack:

        async def enter(given: dict[str, SupervisedEngine] | None = None, **tree: Any) -> House:
            return await stack.enter_async_context(opened(given, {"server": {"port": 0}} | tree))

        yield enter


def supervised(**builds: Callable[[], MockEngine]) -> dict[str, SupervisedEngine]:
    return {name: SupervisedEngine(name, build, check_every_s=0.01) for name, build in builds.items()}


@dataclass
class Lazy:
    """Engines of which `spare` is lazy, and what it built."""

    built: list[Gated]
    engines: dict[str, SupervisedEngine]

    @property
    def spare(self) -> SupervisedEngine:
        return self.engines["spare"]


def lazy(*failures: str, **settings: Any) -> Lazy:
    """Return engines whose spare one fails to load as often as there are `failures`."""
    built: list[Gated] = []
    left = list(failures)

    def build() -> MockEngine:
        built.append(Gated("from spare", left.pop(0) if left else ""))
        return built[-1]

    spare = SupervisedEngine("spare", build, lazy=True, check_every_s=0.01, **settings)
    return Lazy(built, supervised(main=lambda: MockEngine(reply="from main")) | {"spare": spare})


async def test_each_model_is_served_by_its_engine(house: Open) -> None:
    given = supervised(main=lambda: MockEngine(reply="from main"), spare=lambda: MockEngine(reply="from spare"))
    running = await house(given)
    await until(lambda: all(engine.ready.is_set() for engine in given.values()))

    assert await running.said("shannon-chat") == "from main"
    assert await running.said("shannon-complex") == "from spare"
    rows = (await running.client.get("/v1/usage")).json()["data"]
    assert [(row["model"], row["requests"]) for row in rows] == [("shannon-chat", 1), ("shannon-complex", 1)]


async def test_engines_start_side_by_side_and_each_serves_when_it_is_up(house: Open) -> None:
    gates = {"main": Gated("from main"), "spare": Gated("from spare")}
    running = await house(supervised(main=lambda: gates["main"], spare=lambda: gates["spare"]))
    await until(lambda: gates["main"].starts == gates["spare"].starts == 1)
    assert await running.ready() == (503, {"main": "starting", "spare": "starting"})

    gates["spare"].gate.set()
    await until(lambda: running.engines["spare"].ready.is_set())

    assert await running.ready() == (503, {"main": "starting", "spare": "ready"})
    assert await running.said("shannon-complex") == "from spare"
    refused = await running.chat("shannon-chat")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    gates["main"].gate.set()
    await until(lambda: running.engines["main"].ready.is_set())
    assert await running.ready() == (200, {"main": "ready", "spare": "ready"})


async def test_engine_that_fails_to_start_names_itself_and_its_reason(
    house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Gated("never", "no such weights")
    running = await house(supervised(main=lambda: MockEngine(reply="from main"), spare=lambda: bad))
    assert await running.said("shannon-chat") == "from main"

    bad.gate.set()
    await running.ended()

    assert "engine spare has failed permanently: no such weights" in caplog.text
    assert running.server.exit_code == 1
    assert {name: engine.state for name, engine in running.engines.items()} == {"main": "closed", "spare": "closed"}


async def test_engine_that_dies_leaves_the_other_alone(house: Open) -> None:
    spare = MockEngine(reply="from spare")
    running = await house(supervised(main=lambda: MockEngine(reply="one two three", token_s=0.05), spare=lambda: spare))
    await until(lambda: all(engine.ready.is_set() for engine in running.engines.values()))
    stream = asyncio.create_task(running.chat("shannon-chat", stream=True))
    await until(lambda: running.engines["main"].unfinished_requests == 1)

    spare.kill()

    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks((await stream).content))
    assert text == "one two three"
    await until(lambda: running.engines["spare"].ready.is_set() and spare.started)
    assert await running.said("shannon-complex") == "from spare"


async def test_metrics_tell_the_engines_apart(house: Open) -> None:
    given = lazy()
    running = await house(given.engines)
    page = (await running.client.get("/metrics")).text

    for name in ("main", "spare"):
        assert f'shannon_engine_ready{{engine="{name}"}} 1.0' in page
        assert f'shannon_engine_unfinished_requests{{engine="{name}"}} 0.0' in page


async def test_configuration_builds_them_with_a_queue_each(house: Open) -> None:
    engines = {
        "main": {"kind": "mock", "args": {"reply": "from main", "token_s": 0.002}, "admission": {"max_in_flight": 1}},
        "spare": {"kind": "mock", "args": {"reply": "from spare"}, "lazy": True, "admission": {"max_in_flight": 1}},
    }
    running = await house(engines=engines)
    await until(lambda: running.engines["main"].ready.is_set())
    assert await running.ready() == (200, {"main": "ready", "spare": "idle"})

    endless = [asyncio.create_task(running.chat("shannon-chat", ignore_eos=True, max_tokens=900)) for _ in range(2)]
    await until(lambda: running.engines["main"].unfinished_requests == 2)

    assert await running.said("shannon-complex") == "from spare", "a full engine holds up only its own models"
    for task in endless:
        task.cancel()
    await asyncio.wait(endless)


async def test_lazy_engine_is_ready_and_loads_at_its_first_request(house: Open) -> None:
    given = lazy()
    running = await house(given.engines)
    await until(lambda: given.engines["main"].ready.is_set())
    assert await running.ready() == (200, {"main": "ready", "spare": "idle"})
    assert await running.said("shannon-chat") == "from main"
    assert given.built[0].starts == 0

    request = asyncio.create_task(running.said("shannon-complex"))
    await until(lambda: given.built[0].starts == 1)
    assert await running.ready() == (200, {"main": "ready", "spare": "loading"})
    assert await running.said("shannon-chat") == "from main", "others go on"
    given.built[0].gate.set()

    assert await request == "from spare"
    assert await running.ready() == (200, {"main": "ready", "spare": "ready"})


async def test_stream_says_that_it_lives_while_the_engine_loads(house: Open) -> None:
    given = lazy()
    running = await house(given.engines, server={"port": 0, "keepalive_s": 0.05})
    body = {"model": "shannon-complex", "messages": HELLO, "stream": True}
    async with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        pieces = response.aiter_raw()
        raw = b""
        while raw.count(COMMENT) < 3:
            raw += await anext(pieces)
        assert given.spare.state == "loading"
        given.built[0].gate.set()
        raw += b"".join([piece async for piece in pieces])

    assert raw.startswith(COMMENT * 3)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(raw)) == "from spare"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HELLO}),
    ],
)
async def test_every_endpoint_loads_it(house: Open, path: str, body: dict[str, Any]) -> None:
    given = lazy()
    running = await house(given.engines)
    request = asyncio.create_task(running.client.post(path, json=body | {"model": "shannon-complex"}))
    await until(lambda: given.built[0].starts == 1)
    given.built[0].gate.set()

    assert (await request).status_code == 200


async def test_first_requests_at_once_load_it_once(house: Open) -> None:
    given = lazy()
    running = await house(given.engines)
    requests = [asyncio.create_task(running.said("shannon-complex")) for _ in range(4)]
    await until(lambda: running.requests_in_progress() == 4)
    given.built[0].gate.set()

    assert await asyncio.gather(*requests) == ["from spare"] * 4
    assert (len(given.built), given.built[0].starts) == (1, 1)


async def test_load_goes_on_when_the_client_that_asked_leaves(house: Open) -> None:
    given = lazy()
    running = await house(given.engines)
    request = asyncio.create_task(running.chat("shannon-complex"))
    await until(lambda: given.built[0].starts == 1)

    request.cancel()
    await until(lambda: running.requests_in_progress() == 0)
    assert given.spare.state == "loading"
    given.built[0].gate.set()

    assert await running.said("shannon-complex") == "from spare"
    assert given.built[0].starts == 1
    (row,) = (await running.client.get("/v1/usage")).json()["data"]
    assert (row["requests"], row["errors"]) == (1, {}), "whoever left before anything ran has spent nothing"


@pytest.mark.parametrize("stream", [False, True])
async def test_failed_load_is_a_503_and_the_next_request_tries_again(house: Open, stream: bool) -> None:
    given = lazy("no weights at /srv/models")
    running = await house(given.engines)
    given.built[0].gate.set()
    refused = await running.chat("shannon-complex", stream=stream)

    assert refused.status_code == 503
    error = refused.json()["error"]
    assert (error["code"], error["message"]) == (
        "engine_unavailable",
        "The engine could not be loaded. Try again shortly.",
    )
    assert (refused.headers["x-should-retry"], refused.headers["retry-after"]) == ("true", "5")
    assert await running.ready() == (200, {"main": "ready", "spare": "idle"})

    request = asyncio.create_task(running.said("shannon-complex"))
    await until(lambda: len(given.built) == 2 and given.built[1].starts == 1)
    given.built[1].gate.set()
    assert await request == "from spare"


async def test_load_that_fails_after_a_comment_is_an_error_frame(house: Open) -> None:
    given = lazy("no weights")
    running = await house(given.engines, server={"port": 0, "keepalive_s": 0.02})
    body = {"model": "shannon-complex", "messages": HELLO, "stream": True}
    async with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        given.built[0].gate.set()
        raw += b"".join([piece async for piece in pieces])

    assert raw.startswith(COMMENT)
    (line,) = data_lines(raw)
    assert json.loads(line)["error"]["code"] == "engine_unavailable"


async def test_loads_that_fail_too_often_end_the_process_and_name_engine_and_reason(
    house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    given = lazy("no weights", "no weights", max_engine_restarts=1)
    running = await house(given.engines)
    for number in range(2):
        request = asyncio.create_task(running.chat("shannon-complex"))
        await until(lambda number=number: len(given.built) > number and given.built[number].starts == 1)  # type: ignore[misc]
        given.built[number].gate.set()
        assert (await request).status_code == 503

    await running.ended()

    assert running.server.exit_code == 1
    assert "engine spare has failed permanently: Engine spare failed 2 times in 600 s: no weights" in caplog.text


async def test_drain_while_it_loads_does_not_hang(house: Open) -> None:
    given = lazy()
    running = await house(given.engines, server={"port": 0, "drain_timeout_s": 0.05})
    whole = asyncio.create_task(running.chat("shannon-complex"))
    streamed = asyncio.create_task(running.chat("shannon-complex", stream=True))
    await until(lambda: running.requests_in_progress() == 2 and given.built[0].starts == 1)

    signal.raise_signal(signal.SIGTERM)

    for response in await asyncio.gather(whole, streamed):
        assert response.status_code == 503
        assert "shut down" in response.json()["error"]["message"]
    await running.ended()
    assert running.server.exit_code == 0
    assert not given.built[0].started
    assert given.spare.state == "closed"


async def test_request_that_names_no_model_goes_to_the_default_models_engine(serve: Start) -> None:
    gateway: Gateway = await serve(mock=lambda: MockEngine(reply="from main"))

    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "from main"
