"""A lazy engine: idle until the first request, which loads it for everybody and waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from engine.base import EmbeddingRequest, EngineError, EngineUnavailable, GenerationRequest, Prepared
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from tests.support.app import HELLO
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio


class Gated(MockEngine):
    """Starts when its gate opens; fails then if it has a failure."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.failure = failure
        self.starts = 0
        self.closes = 0

    async def start(self) -> None:
        self.starts += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        await super().start()

    async def close(self) -> None:
        self.closes += 1
        await super().close()


class Unloadable(MockEngine):
    """Fails to start."""

    async def start(self) -> None:
        raise EngineError("no such weights")


class Factory:
    """Builds the given engines in order, then MockEngines, and keeps what it built."""

    def __init__(self, *kinds: Callable[[], MockEngine]) -> None:
        self._kinds = iter(kinds)
        self.built: list[Any] = []

    def __call__(self) -> MockEngine:
        self.built.append(next(self._kinds, MockEngine)())
        engine: MockEngine = self.built[-1]
        return engine


@contextlib.asynccontextmanager
async def lazy(factory: Factory, **settings: Any) -> AsyncIterator[SupervisedEngine]:
    engine = SupervisedEngine("spare", factory, **({"lazy": True, "check_every_s": 0.005} | settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request() -> GenerationRequest:
    return GenerationRequest(request_id="r1", messages=HELLO)


async def loading(engine: SupervisedEngine, gated: Gated, waiting: int = 1) -> list[asyncio.Task[Prepared]]:
    """Return requests that wait for the engine, which is being loaded."""
    tasks = [asyncio.create_task(engine.prepare(request())) for _ in range(waiting)]
    await until(lambda: gated.starts == 1)
    assert engine.state == "loading"
    return tasks


async def test_engine_is_idle_and_ready_until_it_is_asked() -> None:
    factory = Factory()
    async with lazy(factory) as engine:
        assert engine.state == "idle"
        assert engine.ready.is_set(), "a request would be served"
        assert not factory.built[0].started
        assert engine.unfinished_requests == 0
        with pytest.raises(EngineUnavailable, match="not been loaded yet"):
            _ = engine.max_model_len


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.prepare(request()),
        lambda engine: engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"])),
        lambda engine: engine.tokenize(request()),
        lambda engine: engine.load(),
    ],
    ids=["generation", "embedding", "tokenize", "load"],
)
async def test_whatever_is_asked_first_loads_it(ask: Callable[[SupervisedEngine], Awaitable[object]]) -> None:
    async with lazy(Factory()) as engine:
        await ask(engine)

        assert engine.state == "ready"
        assert engine.max_model_len == 1024


async def test_detokenize_loads_it_too() -> None:
    async with lazy(Factory()) as engine:
        with contextlib.suppress(EngineError):  # a mock knows no token that it has not seen
            await engine.detokenize([0])

        assert engine.state == "ready"


async def test_request_waits_for_the_load_and_is_served() -> None:
    factory = Factory(Gated)
    async with lazy(factory) as engine:
        (task,) = await loading(engine, factory.built[0])
        assert not task.done()
        assert engine.ready.is_set(), "whoever comes now waits, and is not sent away"

        factory.built[0].gate.set()
        deltas = [delta async for delta in engine.generate(await task)]

        assert "".join(delta.text for delta in deltas) == "You said: hello there"
        assert engine.state == "ready"


async def test_requests_at_once_load_it_once() -> None:
    factory = Factory(Gated)
    async with lazy(factory) as engine:
        tasks = await loading(engine, factory.built[0], waiting=5)
        factory.built[0].gate.set()

        assert {prepared.prompt_tokens for prepared in await asyncio.gather(*tasks)} == {3}
        await engine.prepare(request())
        assert factory.built[0].starts == 1
        assert len(factory.built) == 1


async def test_load_goes_on_when_whoever_asked_leaves() -> None:
    factory = Factory(Gated)
    async with lazy(factory) as engine:
        first, second = await loading(engine, factory.built[0], waiting=2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert engine.state == "loading"

        factory.built[0].gate.set()

        assert (await second).prompt_tokens == 3
        assert factory.built[0].starts == 1


async def test_load_goes_on_when_everybody_leaves() -> None:
    factory = Factory(Gated)
    async with lazy(factory) as engine:
        (task,) = await loading(engine, factory.built[0])
        task.cancel()
        await asyncio.wait([task])

        factory.built[0].gate.set()
        await until(lambda: engine.state == "ready")


async def test_failed_load_is_told_to_all_and_tried_again_by_the_next() -> None:
    factory = Factory(lambda: Gated(EngineError("no such weights")))
    async with lazy(factory) as engine:
        tasks = await loading(engine, factory.built[0], waiting=3)
        factory.built[0].gate.set()

        for task in tasks:
            with pytest.raises(EngineUnavailable, match="could not be loaded"):
                await task
        assert engine.state == "idle"
        assert engine.ready.is_set()
        assert not engine.failed.is_set()
        assert factory.built[0].closes == 1, "what it had taken is given back"

        assert (await engine.prepare(request())).prompt_tokens == 3
        assert len(factory.built) == 2


async def test_failure_of_any_type_is_a_failed_load() -> None:
    factory = Factory(lambda: Gated(RuntimeError("CUDA out of memory at /srv/models")))
    async with lazy(factory) as engine:
        (task,) = await loading(engine, factory.built[0])
        factory.built[0].gate.set()

        with pytest.raises(EngineUnavailable) as refusal:
            await task
        assert "/srv" not in str(refusal.value), "the reason is for the log"
        assert engine.state == "idle"


async def test_engine_that_cannot_even_be_built_again_is_a_failed_load() -> None:
    def broken() -> MockEngine:
        raise RuntimeError("no more of them")

    async with lazy(Factory(Unloadable, broken)) as engine:
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="could not be loaded"):
                await engine.prepare(request())

        assert (await engine.prepare(request())).prompt_tokens == 3


async def test_failed_loads_count_as_restarts_and_the_last_names_engine_and_reason() -> None:
    async with lazy(Factory(Unloadable, Unloadable, Unloadable), max_engine_restarts=2) as engine:
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="could not be loaded"):
                await engine.prepare(request())
            assert not engine.failed.is_set()

        with pytest.raises(EngineUnavailable, match="has failed"):
            await engine.prepare(request())

        assert engine.state == "failed"
        assert engine.failed.is_set()
        assert not engine.ready.is_set()
        assert str(engine.failure) == "Engine spare failed 3 times in 600 s: no such weights"
        with pytest.raises(EngineUnavailable, match="has failed"):
            await engine.prepare(request())


async def test_failed_loads_are_forgiven_after_the_window() -> None:
    clock = FakeClock()
    settings = {"max_engine_restarts": 1, "restart_window_s": 60, "clock": clock}
    async with lazy(Factory(Unloadable, Unloadable), **settings) as engine:
        with pytest.raises(EngineUnavailable):
            await engine.prepare(request())
        clock.advance(61)
        with pytest.raises(EngineUnavailable):
            await engine.prepare(request())

        assert engine.state == "idle"
        assert (await engine.prepare(request())).prompt_tokens == 3


async def test_closing_while_it_loads_tells_those_who_wait() -> None:
    factory = Factory(Gated)
    async with lazy(factory) as engine:
        tasks = await loading(engine, factory.built[0], waiting=2)

        async with asyncio.timeout(1):
            await engine.close()
            for task in tasks:
                with pytest.raises(EngineUnavailable):
                    await task

        assert engine.state == "closed"
        assert not factory.built[0].started
        assert factory.built[0].closes == 1


async def test_closing_an_idle_engine_is_quick_and_final() -> None:
    factory = Factory()
    async with lazy(factory) as engine:
        await engine.close()

        with pytest.raises(EngineUnavailable, match="shut down"):
            await engine.prepare(request())
        assert not factory.built[0].started


async def test_loaded_engine_is_watched_like_any_other() -> None:
    factory = Factory()
    async with lazy(factory) as engine:
        await engine.prepare(request())
        factory.built[0].kill()
        await until(lambda: engine.state == "ready" and engine.current is not factory.built[0])

        assert (await engine.prepare(request())).prompt_tokens == 3


async def test_load_of_an_engine_that_is_not_lazy_waits_for_nothing() -> None:
    factory = Factory(Gated)
    engine = SupervisedEngine("main", factory)
    with pytest.raises(EngineUnavailable, match="still starting"):
        await engine.load()

    assert factory.built[0].starts == 0
    await engine.close()
