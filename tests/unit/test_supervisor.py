"""The supervisor: a dead or frozen engine is replaced in the same process, within a budget, and then given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from engine.base import Delta, EngineDied, EngineError, EngineUnavailable, GenerationRequest
from engine.mock import Fault, MockEngine
from engine.supervisor import SupervisedEngine
from tests.support.app import HELLO
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

SOON_S = 0.005


class Unstartable(MockEngine):
    """Fails to start."""

    async def start(self) -> None:
        raise EngineError("no such weights")


class Slow(MockEngine):
    """Starts when its gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def start(self) -> None:
        await self.gate.wait()
        await super().start()


class Unclosable(MockEngine):
    """Fails to close after it has died, as a process that is already gone may."""

    async def close(self) -> None:
        await super().close()
        raise EngineError("the core's socket is gone")


class Factory:
    """Builds the given kinds of engine in order, then MockEngines, and keeps what it built."""

    def __init__(self, *kinds: Callable[[], MockEngine]) -> None:
        self._kinds: Iterator[Callable[[], MockEngine]] = iter(kinds)
        self.built: list[MockEngine] = []

    def __call__(self) -> MockEngine:
        self.built.append(next(self._kinds, MockEngine)())
        return self.built[-1]


@contextlib.asynccontextmanager
async def supervised(factory: Factory, *, start: bool = True, **settings: Any) -> AsyncIterator[SupervisedEngine]:
    engine = SupervisedEngine("main", factory, **({"check_every_s": SOON_S} | settings))
    if start:
        await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id="r1", messages=HELLO, stream=True, **fields)


async def generate(engine: SupervisedEngine) -> list[Delta]:
    return [delta async for delta in engine.generate(await engine.prepare(request()))]


async def hanging_generation(engine: SupervisedEngine, mock: MockEngine) -> asyncio.Task[list[Delta]]:
    """Return a generation that runs and will not end by itself."""
    mock.faults.append(Fault(at_token=1))
    task = asyncio.create_task(generate(engine))
    await until(lambda: mock.counters.completion_tokens == 1)
    return task


async def replaced(engine: SupervisedEngine, old: MockEngine) -> None:
    await until(lambda: engine.state == "ready" and engine.current is not old)


async def test_engine_refuses_until_started() -> None:
    async with supervised(Factory(), start=False) as engine:
        assert engine.state == "starting"
        assert not engine.ready.is_set()
        with pytest.raises(EngineUnavailable, match="still starting"):
            await engine.prepare(request())
        with pytest.raises(EngineUnavailable, match="still starting"):
            await engine.check_health()
        with pytest.raises(EngineUnavailable, match="still starting"):
            _ = engine.max_model_len


async def test_started_engine_serves() -> None:
    async with supervised(Factory(lambda: MockEngine(reply="one two", max_model_len=77))) as engine:
        assert engine.state == "ready"
        assert engine.ready.is_set()
        assert engine.max_model_len == 77
        assert [delta.text for delta in await generate(engine)] == ["one", " two"]


async def test_failed_first_start_is_final() -> None:
    factory = Factory(Unstartable)
    async with supervised(factory, start=False) as engine:
        with pytest.raises(EngineError, match="no such weights"):
            await engine.start()

        assert engine.state == "failed"
        assert engine.failed.is_set()
        assert str(engine.failure) == "no such weights"
        assert len(factory.built) == 1
        with pytest.raises(EngineUnavailable, match="has failed"):
            await engine.prepare(request())


async def test_dead_engine_is_replaced() -> None:
    factory = Factory()
    async with supervised(factory) as engine:
        factory.built[0].kill()
        await replaced(engine, factory.built[0])

        assert len(factory.built) == 2
        assert engine.current is factory.built[1]
        assert engine.ready.is_set()
        assert "".join(delta.text for delta in await generate(engine)) == "You said: hello there"


async def test_death_under_a_generation_is_seen_without_waiting_for_the_next_check() -> None:
    factory = Factory()
    async with supervised(factory, check_every_s=3600) as engine:
        task = await hanging_generation(engine, factory.built[0])
        factory.built[0].kill()

        with pytest.raises(EngineDied, match="failed during generation"):
            await task
        await replaced(engine, factory.built[0])


async def test_engine_is_not_replaced_while_it_is_healthy() -> None:
    checks = 0

    class Healthy(MockEngine):
        async def check_health(self) -> None:
            nonlocal checks
            checks += 1
            await super().check_health()

    factory = Factory(Healthy)
    async with supervised(factory) as engine:
        await until(lambda: checks >= 5)

        assert len(factory.built) == 1
        assert engine.state == "ready"


async def test_failed_request_alone_does_not_replace_the_engine() -> None:
    factory = Factory()
    async with supervised(factory) as engine:
        factory.built[0].faults.append(Fault(error=EngineDied("one bad request")))
        with pytest.raises(EngineDied, match="one bad request"):
            await generate(engine)

        assert await generate(engine)
        assert len(factory.built) == 1


async def test_frozen_engine_is_replaced_and_its_generations_end() -> None:
    factory = Factory()
    async with supervised(factory, engine_stall_s=0.02) as engine:
        task = await hanging_generation(engine, factory.built[0])
        factory.built[0].freeze()

        with pytest.raises(EngineDied):
            await task
        await replaced(engine, factory.built[0])
        assert factory.built[0].unfinished_requests == 0
        assert await generate(engine)


class Busy(MockEngine):
    """Gives no answer, and uses CPU time as `share` of the time that passes between two looks at it says."""

    share = 1.0

    def cpu_time_s(self) -> float | None:
        if self.cpu_time is not None:
            self.cpu_time += SOON_S * self.share
        return self.cpu_time


async def test_engine_that_gives_no_answer_but_works_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    factory = Factory(Busy)
    async with supervised(factory, engine_stall_s=4 * SOON_S, engine_busy_s=60) as engine:
        busy = factory.built[0]
        busy.cpu_time = 1.0
        busy.freeze()
        await until(lambda: (busy.cpu_time or 0) > 1.0 + 40 * SOON_S)
        assert (engine.state, len(factory.built)) == ("ready", 1)
        assert caplog.text.count("but works") == 1, "once, not with every look"

        busy._frozen = False  # it has compiled
        busy._dead.set()
        await until(lambda: engine.state == "ready")
        assert len(factory.built) == 1


@pytest.mark.parametrize(
    ("cpu_time", "share"), [(None, 0.0), (1.0, 0.0), (1.0, 0.02)], ids=["stopped", "idle", "ticks"]
)
async def test_engine_that_gives_no_answer_and_does_not_work_is_replaced(cpu_time: float | None, share: float) -> None:
    factory = Factory(Busy)
    async with supervised(factory, engine_stall_s=4 * SOON_S, engine_busy_s=60) as engine:
        busy = factory.built[0]
        assert isinstance(busy, Busy)
        busy.cpu_time, busy.share = cpu_time, share
        busy.freeze()
        await replaced(engine, busy)
        assert engine.restarts["stalled"] == 1


async def test_engine_that_spins_for_too_long_is_replaced() -> None:
    factory = Factory(Busy)
    async with supervised(factory, engine_stall_s=4 * SOON_S, engine_busy_s=10 * SOON_S) as engine:
        factory.built[0].cpu_time = 1.0
        factory.built[0].freeze()
        await replaced(engine, factory.built[0])
        assert engine.restarts["stalled"] == 1


async def test_requests_are_refused_while_restarting() -> None:
    slow = Slow()
    factory = Factory(MockEngine, lambda: slow)
    async with supervised(factory) as engine:
        factory.built[0].kill()
        await until(lambda: engine.state == "restarting" and len(factory.built) == 2)

        assert not engine.ready.is_set()
        with pytest.raises(EngineUnavailable, match="restarting after a failure"):
            await engine.prepare(request())
        slow.gate.set()
        async with asyncio.timeout(5):
            await engine.ready.wait()
        assert await generate(engine)


async def test_restarts_beyond_the_budget_set_failed() -> None:
    factory = Factory()
    async with supervised(factory, max_engine_restarts=2, restart_window_s=600, clock=FakeClock()) as engine:
        for number in range(2):
            factory.built[number].kill()
            await replaced(engine, factory.built[number])
        factory.built[2].kill()
        async with asyncio.timeout(5):
            await engine.failed.wait()

        assert len(factory.built) == 3
        assert engine.state == "failed"
        assert not engine.ready.is_set()
        assert str(engine.failure) == "Engine main failed 3 times in 600 s."


async def test_first_failure_is_final_without_a_budget() -> None:
    factory = Factory()
    async with supervised(factory, max_engine_restarts=0) as engine:
        factory.built[0].kill()
        async with asyncio.timeout(5):
            await engine.failed.wait()

        assert len(factory.built) == 1


async def test_restarts_older_than_the_window_are_forgotten() -> None:
    clock = FakeClock()
    factory = Factory()
    async with supervised(factory, max_engine_restarts=1, restart_window_s=600, clock=clock) as engine:
        for number in range(4):
            factory.built[number].kill()
            await replaced(engine, factory.built[number])
            clock.advance(600.5)

        assert not engine.failed.is_set()
        assert len(factory.built) == 5


async def test_restart_within_the_window_still_counts() -> None:
    clock = FakeClock()
    factory = Factory()
    async with supervised(factory, max_engine_restarts=1, restart_window_s=600, clock=clock) as engine:
        factory.built[0].kill()
        await replaced(engine, factory.built[0])
        clock.advance(599.5)
        factory.built[1].kill()
        async with asyncio.timeout(5):
            await engine.failed.wait()

        assert len(factory.built) == 2


async def test_failed_restart_is_tried_again() -> None:
    factory = Factory(MockEngine, Unstartable, Unstartable)
    async with supervised(factory, max_engine_restarts=3) as engine:
        factory.built[0].kill()
        await replaced(engine, factory.built[0])

        assert [type(mock) for mock in factory.built] == [MockEngine, Unstartable, Unstartable, MockEngine]
        assert await generate(engine)


async def test_failed_restarts_count_against_the_budget() -> None:
    factory = Factory(MockEngine, Unstartable, Unstartable, Unstartable)
    async with supervised(factory, max_engine_restarts=2) as engine:
        factory.built[0].kill()
        async with asyncio.timeout(5):
            await engine.failed.wait()

        assert len(factory.built) == 3
        assert engine.state == "failed"


async def test_engine_that_fails_to_close_is_replaced_too() -> None:
    factory = Factory(Unclosable)
    engine = SupervisedEngine("main", factory, check_every_s=SOON_S)
    await engine.start()
    factory.built[0].kill()

    await replaced(engine, factory.built[0])

    await engine.close()


async def test_engine_that_cannot_be_built_again_sets_failed() -> None:
    def unbuildable() -> MockEngine:
        raise EngineError("the weights were deleted")

    async with supervised(Factory(MockEngine, unbuildable, unbuildable), max_engine_restarts=2) as engine:
        mock = engine.current
        assert isinstance(mock, MockEngine)
        mock.kill()
        async with asyncio.timeout(5):
            await engine.failed.wait()


async def test_close_ends_running_generations() -> None:
    factory = Factory()
    async with supervised(factory) as engine:
        task = await hanging_generation(engine, factory.built[0])
        await engine.close()

        with pytest.raises(EngineDied):
            await task
        assert engine.state == "closed"
        assert not engine.ready.is_set()
        assert not factory.built[0].started
        with pytest.raises(EngineUnavailable, match="shut down"):
            await engine.prepare(request())


async def test_closed_engine_is_not_replaced() -> None:
    factory = Factory()
    async with supervised(factory) as engine:
        await engine.close()
        await engine.close()

        assert engine.state == "closed"
        assert len(factory.built) == 1
        assert not engine.failed.is_set()


async def test_close_ends_a_restart() -> None:
    slow = Slow()
    factory = Factory(MockEngine, lambda: slow)
    async with supervised(factory) as engine:
        factory.built[0].kill()
        await until(lambda: len(factory.built) == 2)
        async with asyncio.timeout(5):
            await engine.close()

        assert engine.state == "closed"
        assert not slow.started


async def test_leaving_a_generation_aborts_it_in_the_engine() -> None:
    factory = Factory(lambda: MockEngine(reply="one two three"))
    async with supervised(factory) as engine:
        prepared = await engine.prepare(request())
        async with contextlib.aclosing(engine.generate(prepared)) as deltas:
            await anext(deltas)
            assert factory.built[0].unfinished_requests == 1

        assert factory.built[0].unfinished_requests == 0
        assert prepared.usage.completion_tokens == 1
