"""The store connection: one pipeline for what comes together, one failure for all while it is away, no noise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as aredis
from redis.exceptions import ClusterDownError, MasterDownError, ReadOnlyError, ResponseError

from gateway.errors import StoreError, StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer, opened, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def own(tmp_path: Path) -> Iterator[StoreServer]:
    """A server of the test's own, to stop, freeze and start."""
    with run_store("valkey", tmp_path / "s") as server:
        yield server


class Pipelines:
    """Counts pipelines and the commands in each, in front of a real client."""

    def __init__(self, store: Store) -> None:
        self.sizes: list[int] = []
        self._pipeline = store._client.pipeline
        store._client.pipeline = self._count  # type: ignore[method-assign]

    def _count(self, transaction: bool = True) -> Any:
        pipeline = self._pipeline(transaction=transaction)
        execute = pipeline.execute

        async def counted(*args: Any, **options: Any) -> Any:
            self.sizes.append(len(pipeline))
            return await execute(*args, **options)

        pipeline.execute = counted
        return pipeline


async def test_commands_that_come_together_travel_in_one_pipeline(store_url: str) -> None:
    async with opened(store_url) as store:
        pipelines = Pipelines(store)
        answers = await asyncio.gather(*(store.run("INCR", "x") for _ in range(50)))

        assert answers == list(range(1, 51))
        assert pipelines.sizes == [50]


async def test_pipelines_are_bounded(store_url: str) -> None:
    async with opened(store_url) as store:
        pipelines = Pipelines(store)
        answers = await asyncio.gather(*(store.run("INCR", "x") for _ in range(1000)))

        assert sorted(answers) == list(range(1, 1001))
        assert max(pipelines.sizes) <= 256


async def test_commands_in_order_stay_in_order(store_url: str) -> None:
    async with opened(store_url) as store:
        lists = await asyncio.gather(
            *(
                store.run_in_order([*(("RPUSH", f"l{n}", i) for i in range(20)), ("LRANGE", f"l{n}", 0, -1)])
                for n in range(40)
            )
        )

        assert all(answers[-1] == [str(i) for i in range(20)] for answers in lists)


async def test_command_asked_for_on_the_heels_of_an_answer_is_sent(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller runs before anything that the event loop was told to do when the last pipeline is done."""
    monkeypatch.setattr("gateway.store.client._MAX_FLUSHERS", 1)
    async with opened(store_url) as store:
        assert await store.run("INCR", "x") == 1
        assert await asyncio.wait_for(store.run("INCR", "x"), 5) == 2


async def test_unforeseen_failure_fails_those_who_are_queued_too(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.client._MAX_FLUSHERS", 1)
    async with opened(store_url) as store:
        pipeline = store._client.pipeline
        monkeypatch.setattr(store._client, "pipeline", lambda transaction: 1 / 0)
        asked = [asyncio.ensure_future(store.run("INCR", "x")) for _ in range(300)]
        for one in asked:
            with pytest.raises(StoreUnavailable):
                await asyncio.wait_for(one, 5)

        monkeypatch.setattr(store._client, "pipeline", pipeline)
        assert await store.run("INCR", "x") == 1


async def test_refused_command_fails_its_own_caller_alone(store_url: str) -> None:
    async with opened(store_url) as store:
        await store.run("SET", "text", "x")
        answers = await asyncio.gather(store.run("INCR", "text"), store.run("GET", "text"), return_exceptions=True)

        assert isinstance(answers[0], StoreUnavailable)
        assert answers[1] == "x"
        assert store.available


async def test_caller_that_left_harms_nobody(store_url: str) -> None:
    async with opened(store_url) as store:
        leaving = asyncio.create_task(store.run("GET", "x"))
        staying = asyncio.create_task(store.run("ECHO", "y"))
        await asyncio.sleep(0)
        leaving.cancel()

        assert await staying == "y"


async def test_breaker_opens_on_the_first_failure_and_then_fails_at_once(own: StoreServer) -> None:
    async with opened(own.url, breaker_s=60) as store:
        own.stop()
        with pytest.raises(StoreUnavailable):
            await store.run("PING")
        assert not store.available
        pipelines = Pipelines(store)
        started = time.perf_counter()
        for _ in range(200):
            with pytest.raises(StoreUnavailable):
                await store.run("PING")

        assert time.perf_counter() - started < 0.5
        assert pipelines.sizes == []


async def test_frozen_store_costs_one_timeout_once(own: StoreServer) -> None:
    async with opened(own.url, breaker_s=60, command_timeout_ms=50) as store:
        own.send(signal.SIGSTOP)
        started = time.perf_counter()
        failures = await asyncio.gather(*(store.run("PING") for _ in range(50)), return_exceptions=True)
        with pytest.raises(StoreUnavailable):
            await store.run("PING")
        took_s = time.perf_counter() - started
        own.send(signal.SIGCONT)

        assert all(isinstance(failure, StoreUnavailable) for failure in failures)
        assert 0.04 < took_s < 0.5


async def test_probe_closes_the_breaker(own: StoreServer) -> None:
    async with opened(own.url) as store:
        await store.run("SET", "x", "kept")
        own.stop()
        with pytest.raises(StoreUnavailable):
            await store.run("PING")
        own.start()
        await until(lambda: store.available)

        assert await store.run("GET", "x") == "kept"


async def test_failure_is_logged_once_and_without_a_traceback(
    own: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(own.url) as store:
        own.stop()
        for _ in range(20):
            await asyncio.gather(*(store.run("PING") for _ in range(5)), return_exceptions=True)
            await asyncio.sleep(0.005)
        own.start()
        await until(lambda: store.available)
    records = [record for record in caplog.records if record.name.startswith("gateway")]

    assert [record.levelno for record in records] == [logging.ERROR, logging.WARNING]
    assert all(record.exc_info is None and "Traceback" not in record.getMessage() for record in caplog.records)


async def test_store_that_is_away_at_start_is_used_when_it_comes(own: StoreServer) -> None:
    own.stop()
    async with opened(own.url) as store:
        assert not store.available
        own.start()
        await until(lambda: store.available)

        assert await store.run("GET", "sh:schema") == "1"


async def test_store_of_another_layout_is_refused(store_url: str, store_server: StoreServer) -> None:
    with store_server.client() as raw:
        raw.set("sh:schema", "2")
    async with opened(store_url, start=False) as store:
        with pytest.raises(StoreError, match=r"layout version 2.*needs 1"):
            await store.start()


async def test_store_of_another_layout_that_comes_back_is_not_overwritten(own: StoreServer) -> None:
    async with opened(own.url) as store:
        with own.client() as raw:
            raw.set("sh:schema", "2")
        own.stop()
        with pytest.raises(StoreUnavailable):
            await store.run("PING")
        own.start()
        await asyncio.sleep(0.05)
        with contextlib.suppress(TimeoutError):
            await until(lambda: store.available, within_s=0.3)
        with own.client() as raw:
            assert raw.get("sh:schema") == "2"


@pytest.mark.parametrize(
    "answer",
    [
        MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        ClusterDownError("The cluster is down"),
        ReadOnlyError("You can't write against a read only replica."),
    ],
    ids=lambda answer: type(answer).__name__,
)
async def test_server_that_can_not_serve_counts_as_away(store_url: str, answer: ResponseError) -> None:
    """The errors are as redis-py hands them over, which takes some of the codes in front of the message away."""
    async with opened(store_url, breaker_s=60) as store:

        class Refusing:
            def execute_command(self, *command: Any) -> None: ...

            async def execute(self, raise_on_error: bool = True) -> list[Any]:
                return [answer]

        store._client.pipeline = lambda transaction=True: Refusing()  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            await store.run("EVAL")
        assert not store.available


async def test_busy_event_loop_is_not_taken_for_a_store_that_is_away(store_url: str) -> None:
    async with opened(store_url, command_timeout_ms=50) as store:
        running = asyncio.create_task(store.run("PING"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(0.12)  # noqa: ASYNC251  # the loop is to be busy

        assert await running in ("PONG", True)
        assert store.available


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://10.0.0.1:6380/2", aredis.Redis),
        ("rediss://:secret@valkey.example:6379", aredis.Redis),
        ("unix:///run/valkey.sock", aredis.Redis),
        ("redis+cluster://10.0.0.1:7000", aredis.RedisCluster),
        ("rediss+cluster://:secret@10.0.0.1:7000", aredis.RedisCluster),
        ("redis+sentinel://10.0.0.1:26379,10.0.0.2/mymaster", aredis.Redis),
    ],
)
async def test_urls_of_every_kind_are_understood(url: str, kind: type) -> None:
    async with opened(url, start=False) as store:
        assert isinstance(store._client, kind)


async def test_tls_and_password_reach_the_connection() -> None:
    async with opened("rediss://:secret@valkey.example:6379/3", start=False) as store:
        pool: Any = store._client.connection_pool  # type: ignore[attr-defined]

        assert pool.connection_class is aredis.SSLConnection
        assert (pool.connection_kwargs["password"], pool.connection_kwargs["db"]) == ("secret", 3)


@pytest.mark.parametrize("password", ["secret", "p%40ss%2Fword"])
async def test_sentinels_service_and_password_are_read(password: str) -> None:
    url = f"redis+sentinel://:{password}@10.0.0.1:26380,10.0.0.2/mymaster"
    async with opened(url, start=False) as store:
        pool: Any = store._client.connection_pool  # type: ignore[attr-defined]
        hosts = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]

        assert pool.service_name == "mymaster"
        assert [(host["host"], host["port"]) for host in hosts] == [("10.0.0.1", 26380), ("10.0.0.2", 26379)]
        assert pool.connection_kwargs["password"] == {"secret": "secret"}.get(password, "p@ss/word")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "redis://host:port",
        "valkey",
        "redis+sentinel://10.0.0.1:26379",
        "redis+sentinel://h:x/svc",
    ],
)
async def test_unusable_url_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(StoreSettings(), {"SHANNON_REDIS_URL": url}, Metrics())

    assert "\n" not in str(caught.value)


async def test_bundled_server_is_started_where_no_url_is_given_and_keeps_its_data(tmp_path: Path) -> None:
    for expected in (None, "kept"):
        store = Store(StoreSettings(data_dir=tmp_path, command_timeout_ms=2000), {}, Metrics())
        await store.start()
        try:
            assert await store.run("GET", "x") == expected
            await store.run("SET", "x", "kept")
        finally:
            await store.close()
    assert not any(b"SIGKILL" in log.read_bytes() for log in tmp_path.glob("*.log"))


async def test_bundled_server_that_died_is_started_again(tmp_path: Path) -> None:
    settings = StoreSettings(data_dir=tmp_path, command_timeout_ms=2000, breaker_s=0.05)
    store, guest = (Store(settings, {}, Metrics()) for _ in range(2))
    await store.start()
    await guest.start()
    try:
        for one in (store, guest):
            await one.run("SET", "x", "kept")
            assert store._embedded is not None
            process = store._embedded._process
            assert process is not None
            process.kill()
            process.wait()
            with pytest.raises(StoreUnavailable):
                await one.run("GET", "x")
            await until(lambda one=one: one.available, within_s=15)  # type: ignore[misc]
            if one is store:
                assert await one.run("GET", "x") == "kept"
    finally:
        await guest.close()
        await store.close()
