"""Draining: admission ends at once, running requests may finish until the timeout, and the rest get an error."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.errors import GatewayError, Unavailable
from gateway.exchange.drain import Drain
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class Exchange:
    """Runs until it is let go or interrupted."""

    def __init__(self, drain: Drain) -> None:
        self._over = asyncio.Event()
        self.reason: GatewayError | None = None
        self.task = asyncio.create_task(self._run(drain))

    async def _run(self, drain: Drain) -> None:
        with drain.track(self):
            await self._over.wait()

    def finish(self) -> None:
        self._over.set()

    def interrupt(self, reason: GatewayError) -> None:
        self.reason = reason
        self._over.set()


async def running(drain: Drain, count: int) -> list[Exchange]:
    exchanges = [Exchange(drain) for _ in range(count)]
    await asyncio.sleep(0)
    return exchanges


async def test_admission_is_open_before_draining() -> None:
    Drain().admit()


async def test_idle_drain_ends_at_once() -> None:
    assert await Drain().run(timeout_s=3600) == 0


async def test_admission_is_refused_from_the_first_moment() -> None:
    drain = Drain()
    (exchange,) = await running(drain, 1)
    draining = asyncio.create_task(drain.run(timeout_s=3600))
    await until(lambda: drain.draining)

    with pytest.raises(Unavailable, match="shutting down") as caught:
        drain.admit()

    assert caught.value.headers()["Retry-After"] == "1"
    exchange.finish()
    assert await draining == 0


async def test_drain_waits_for_all_that_runs() -> None:
    drain = Drain()
    first, second = await running(drain, 2)
    draining = asyncio.create_task(drain.run(timeout_s=3600))
    first.finish()
    await first.task
    await asyncio.sleep(0)
    assert not draining.done()

    second.finish()

    assert await draining == 0
    assert first.reason is second.reason is None


async def test_drain_interrupts_what_outlasts_the_timeout() -> None:
    drain = Drain()
    exchanges = await running(drain, 3)
    draining = asyncio.create_task(drain.run(timeout_s=0.01))
    exchanges[0].finish()

    assert await draining == 2
    assert [str(exchange.reason) for exchange in exchanges] == [
        "None",
        "The server shut down before the response was complete.",
        "The server shut down before the response was complete.",
    ]


async def test_zero_timeout_interrupts_at_once() -> None:
    drain = Drain()
    (exchange,) = await running(drain, 1)

    assert await drain.run(timeout_s=0) == 1
    assert isinstance(exchange.reason, Unavailable)


async def test_exchange_that_failed_is_no_longer_waited_for() -> None:
    drain = Drain()
    (exchange,) = await running(drain, 1)
    exchange.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await exchange.task

    assert await drain.run(timeout_s=3600) == 0
