"""The two lanes to the store: what is large or slow never costs the limits their exactness, and nobody waits out a
timeout for a server that is gone.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.mock import MockEngine
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.limits import Limits
from gateway.errors import StoreUnavailable
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings
from gateway.store.client import Script
from tests.support.store_server import StoreServer, opened, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HANGS_S = 10
MODEL = ModelSpec("m", ModelSettings(description="d", limits=LimitSettings(requests_per_minute=10_000)), MockEngine())


@pytest.fixture
def own(tmp_path: Path) -> Iterator[StoreServer]:
    with run_store("valkey", tmp_path / "s") as server:
        yield server


@pytest.mark.parametrize("policy", ["local", "closed"])
async def test_readers_of_large_values_leave_the_limits_exact(store_url: str, policy: str) -> None:
    """Twelve readers of 4 MiB each, again and again, by the cheapest and by the dearest way there is to read them."""
    read = Script("log_read")
    async with opened(store_url, command_timeout_ms=300) as store:
        limits = Limits(LimiterSettings(on_store_failure=policy), store, store.metrics)
        await store.bulk.run("SET", "large", "x" * 2**22)
        await store.bulk.run("HSET", "log", "owner", "o", "last", 64, "lease_until", 2**50, "reader_until", 2**50)
        for number in range(64):
            await store.bulk.run("XADD", "entries", f"{number + 1}-0", "first", number + 1, "frames", "x" * 2**16)
        done = asyncio.Event()

        async def reader(command: tuple[Any, ...]) -> int:
            reads = 0
            while not done.is_set():
                await store.bulk.run(*command)
                reads += 1
            return reads

        log = read.call(["log", "entries"], ["o", 0, 64, "", 30_000])
        readers = [asyncio.create_task(reader(log if number % 2 else ("GET", "large"))) for number in range(12)]
        standings = []
        for number in range(300):
            made = await limits.reserve(Principal("k"), MODEL, f"r{number}", {"requests": 1, "tokens": 1})
            standings.append(made.standing)
            await asyncio.sleep(0)
        done.set()
        reads = await asyncio.wait_for(asyncio.gather(*readers), HANGS_S)
        limits.close()

        assert sum(reads) > 12
        assert not any(standing.local for standing in standings)
        assert [standing.remaining["requests"] for standing in standings] == list(range(9_999, 9_699, -1))
        assert b"shannon_store_failures_total 0.0" in store.metrics.render()


async def test_lane_that_waits_holds_up_the_other_in_neither_direction(store_url: str) -> None:
    async with opened(store_url) as store:
        for slow, other in ((store.bulk, store), (store, store.bulk)):
            send, waiting = slow._send, asyncio.Event()

            async def hang(commands: list[Any], send: Any = send, waiting: asyncio.Event = waiting) -> Any:
                await waiting.wait()
                return await send(commands)

            slow._send = hang  # type: ignore[method-assign]
            asked = [asyncio.create_task(slow.run("ECHO", "x")) for _ in range(8)]
            for _ in range(50):
                assert await asyncio.wait_for(other.run("ECHO", "y"), HANGS_S) == "y"
            waiting.set()
            assert await asyncio.gather(*asked) == ["x"] * 8
            slow._send = send  # type: ignore[method-assign]


async def test_bulk_timeout_opens_the_bulk_breaker_alone(store_url: str) -> None:
    async with opened(store_url, bulk_timeout_ms=50, breaker_s=60) as store:

        async def hang(commands: list[Any]) -> Any:
            await asyncio.Event().wait()

        store.bulk._send = hang  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            await store.bulk.run("PING")

        assert not store.bulk.available
        assert store.available
        assert await store.run("ECHO", "x") == "x"
        page = store.metrics.render()
        assert b"shannon_store_bulk_breaker_openings_total 1.0" in page
        assert b"shannon_store_breaker_openings_total 0.0" in page


async def test_fast_failure_opens_the_fast_breaker_alone(store_url: str) -> None:
    async with opened(store_url, breaker_s=60) as store:

        async def fail(commands: list[Any]) -> Any:
            raise ConnectionResetError("gone")

        store._send = fail  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            await store.run("PING")

        assert not store.available
        assert await store.bulk.run("ECHO", "x") == "x"


async def test_nobody_waits_out_the_bulk_timeout_for_a_frozen_server(own: StoreServer) -> None:
    async with opened(own.url, command_timeout_ms=50, bulk_timeout_ms=60_000, breaker_s=0.02) as store:
        own.send(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await asyncio.wait_for(store.bulk.run("PING"), HANGS_S)
            assert not store.available
        finally:
            own.send(signal.SIGCONT)
        await until(lambda: store.available and store.bulk.available, HANGS_S)


async def test_few_bulk_commands_are_under_way_at_once(store_url: str) -> None:
    async with opened(store_url) as store:
        send, under_way, most = store.bulk._send, 0, 0

        async def count(commands: list[Any]) -> Any:
            nonlocal under_way, most
            under_way += len(commands)
            most = max(most, under_way)
            answer = await send(commands)
            under_way -= len(commands)
            return answer

        store.bulk._send = count  # type: ignore[method-assign]
        await asyncio.gather(*(store.bulk.run("GET", "x") for _ in range(100)))

        assert most == 2


async def test_command_that_waited_too_long_in_the_queue_is_not_sent(store_url: str) -> None:
    async with opened(store_url, bulk_timeout_ms=20) as store:
        store.bulk._patience_s = 0.0
        blocked = [asyncio.create_task(store.bulk.run("SET", f"x{number}", 1)) for number in range(50)]
        outcomes = await asyncio.wait_for(asyncio.gather(*blocked, return_exceptions=True), HANGS_S)

        refused = [one for one in outcomes if isinstance(one, StoreUnavailable)]
        assert refused
        assert all(not one.sent for one in refused)
        assert store.bulk.available


async def test_failure_tells_whether_the_command_was_sent(own: StoreServer) -> None:
    async with opened(own.url, command_timeout_ms=50, breaker_s=60) as store:
        own.send(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable) as sent:
            await store.run("PING")
        with pytest.raises(StoreUnavailable) as unsent:
            await store.run("PING")
        own.send(signal.SIGCONT)

        assert (sent.value.sent, unsent.value.sent) == (True, False)


async def test_caller_in_the_bulk_lane_may_leave(store_url: str) -> None:
    async with opened(store_url) as store:
        leaving = asyncio.create_task(store.bulk.run("GET", "x"))
        staying = asyncio.create_task(store.bulk.run("ECHO", "y"))
        await asyncio.sleep(0)
        leaving.cancel()

        assert await staying == "y"
        assert store.bulk.available
