"""A caller may leave at any moment: what was reserved for it comes back to the token, and its leases end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import coroutine
from typing import Any

import pytest
import redis

from engine.base import GenerationRequest, Prepared, Request
from engine.mock import MockEngine
from gateway.access.allowance import today
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Ledger
from gateway.access.limits import Limits
from gateway.conversations.sessions import Session
from gateway.errors import GatewayError
from gateway.exchange.events import Event
from gateway.images import Images, with_images
from gateway.meter import Meter
from gateway.outbound.fetch import Fetched, Fetcher
from gateway.settings.config import (
    FetchSettings,
    ImageSettings,
    LimiterSettings,
    LimitSettings,
    ModelSettings,
    StoreSettings,
)
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from gateway.workflows.chat import chat
from tests.support.pictures import asking, picture
from tests.support.store_server import run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MODEL = "shannon-chat"
KEY_ID = "TestKey00001"
HEAD = f"sh:{{k:{KEY_ID}}}:"
CALLER = Principal(KEY_ID, max_concurrent_requests=100, tokens_per_day=100_000)
LIMITS = LimitSettings(requests_per_minute=1000, tokens_per_minute=50_000, concurrent_requests=100)
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


class Unhurried(MockEngine):
    """Lets others run while it prepares, as engines do whose renderer has threads."""

    async def prepare(self, request: Request) -> Prepared:
        await asyncio.sleep(0)
        return await super().prepare(request)


class Album(Fetcher):
    """Has a picture at every URL."""

    async def fetch(self, text: str, *, max_bytes: int, accept: str = "*/*", admit: Any = None) -> Fetched:
        await asyncio.sleep(0)
        return Fetched(text, "image/png", picture())


@dataclass
class Bench:
    """What one gateway has of a model: an engine, limits, the books, and a client that looks into the store."""

    engine: MockEngine
    limits: Limits
    ledger: Ledger
    store: Store
    raw: redis.Redis

    def meter(self, request_id: str = "r1") -> Meter:
        model = ModelSpec(MODEL, ModelSettings(description="General chat completion", limits=LIMITS), self.engine)
        return Meter(request_id, CALLER, model, self.limits, self.ledger, self.store.metrics)

    def taken(self) -> dict[str, int]:
        """Return what the limits hold to be in use."""
        window: Any = self.raw.hgetall(f"{HEAD}w:{MODEL}")
        return {
            "tokens": sum(int(amount) for bucket, amount in window.items() if bucket.startswith("t")),
            "tokens of the day": int(str(self.raw.get(f"{HEAD}day:{today()}") or 0)),
            "leases of the model": int(str(self.raw.zcard(f"{HEAD}run:{MODEL}"))),
            "leases of the key": int(str(self.raw.zcard(f"{HEAD}run"))),
        }

    def spent(self) -> dict[str, int]:
        """Return what should be in use when nothing runs: the tokens that the engine counted."""
        tokens = self.engine.counters.prompt_tokens + self.engine.counters.completion_tokens
        return {"tokens": tokens, "tokens of the day": tokens, "leases of the model": 0, "leases of the key": 0}

    async def settled(self) -> None:
        """Wait until all that was asked is answered, and all that was noted is written."""
        await self.store.answered()
        await asyncio.sleep(0)
        while self.ledger._writer is not None and not self.ledger._writer.done():
            await self.ledger._writer


@contextlib.asynccontextmanager
async def opened(url: str, folder: Path, **store: float) -> AsyncIterator[Bench]:
    store_ = Store(StoreSettings(**({"command_timeout_ms": 2000} | store)), {"SHANNON_REDIS_URL": url}, Metrics())
    await store_.start()
    engine = Unhurried(takes_images=True, max_model_len=4096)
    await engine.start()
    ledger = Ledger(store_, folder)
    raw: redis.Redis
    with redis.Redis.from_url(url, decode_responses=True) as raw:
        yield Bench(engine, Limits(LimiterSettings(), store_, store_.metrics), ledger, store_, raw)
    await ledger.close()
    await store_.close()


@pytest.fixture
async def bench(store_url: str, tmp_path: Path) -> AsyncIterator[Bench]:
    async with opened(store_url, tmp_path) as bench:
        yield bench


async def answer(meter: Meter) -> None:
    """Answer one request, as a plain chat does."""
    async with contextlib.aclosing(meter.generate(await meter.prepare(_request(meter)))) as deltas:
        async for _ in deltas:
            pass


async def answer_with_agents(meter: Meter) -> None:
    """Answer one request by several generations, some side by side, as a research does."""
    async with meter.counted():
        await meter.count()
        several = [await meter.prepare(_request(meter)) for _ in range(3)]
        async with meter.reserved(several):
            await asyncio.gather(*(_drain(meter, prepared) for prepared in several))
        await asyncio.gather(answer(meter), answer(meter))


async def _drain(meter: Meter, prepared: Any) -> None:
    async for _ in meter.generate(prepared):
        pass


async def answer_about_an_image(meter: Meter) -> None:
    """Answer one request that is counted ahead of its generation, for a client that takes each event in turn."""
    images = Images(ImageSettings(), Album(FetchSettings()))
    request = dataclasses.replace(_request(meter), messages=asking("https://red.test/"))

    def run(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return chat(request, meter, Session(), lambda: 0.0)

    try:
        async with contextlib.aclosing(with_images(run, request, meter, images)) as events:
            async for _ in events:
                await asyncio.sleep(0)
    finally:
        images.close()


def _request(meter: Meter) -> GenerationRequest:
    return GenerationRequest(request_id=meter.request_id, messages=HELLO, max_tokens=100)


class Leave:
    """Cancels a coroutine at its `number`-th await: before the answer comes, or with it, before it could be seen."""

    def __init__(self, number: int, *, answered: bool) -> None:
        self._number = number
        self._answered = answered
        self.left = False

    def from_within(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        @coroutine
        def drive() -> Generator[Any, Any, None]:
            step: Callable[[Any], Any] = work.send
            argument: BaseException | None = None
            for number in count():
                try:
                    awaited = step(argument)
                except StopIteration:
                    return
                if number == self._number:
                    self._cancel(awaited)
                try:
                    yield awaited
                except BaseException as error:
                    step, argument = work.throw, error
                else:
                    step, argument = work.send, None

        return drive()

    def _cancel(self, awaited: Any) -> None:
        self.left = True
        task = asyncio.current_task()
        assert task is not None
        if awaited is None or not self._answered:
            task.cancel()
        else:
            awaited.add_done_callback(lambda _: task.cancel())


@pytest.mark.parametrize("work", [answer, answer_with_agents, answer_about_an_image])
@pytest.mark.parametrize("answered", [False, True], ids=["before-the-answer", "with-the-answer"])
async def test_leaving_at_any_await_takes_nothing(
    bench: Bench, work: Callable[[Meter], Coroutine[Any, Any, None]], answered: bool
) -> None:
    tasks = asyncio.all_tasks()
    for number in range(1000):
        leave = Leave(number, answered=answered)
        request = asyncio.ensure_future(leave.from_within(work(bench.meter(f"r{number}"))))
        await asyncio.gather(request, return_exceptions=True)
        await bench.settled()

        assert bench.taken() == bench.spent(), f"left at await number {number}"
        if not leave.left:
            break
    assert number > 2, "there was nowhere to leave"
    await bench.settled()
    assert asyncio.all_tasks() == tasks


async def test_many_that_leave_at_random_moments_take_nothing(bench: Bench) -> None:
    rng = random.Random(7)

    async def come_and_go(number: int) -> None:
        work = rng.choice([answer, answer_with_agents])
        request = asyncio.create_task(work(bench.meter(f"r{number}")))
        for _ in range(rng.randint(0, 60)):
            await asyncio.sleep(0)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError, GatewayError):
            await request

    await asyncio.gather(*(come_and_go(number) for number in range(300)))
    await bench.settled()

    assert bench.taken() == bench.spent()
    rows = await bench.ledger.totals(KEY_ID)
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows) == bench.spent()["tokens"]


async def test_request_that_left_in_the_queue_of_the_store_is_noted_as_aborted(bench: Bench) -> None:
    request = asyncio.create_task(answer(bench.meter()))
    while not bench.store._flushers:
        await asyncio.sleep(0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await bench.settled()

    (row,) = await bench.ledger.totals(KEY_ID)
    assert (row["requests"], row["aborted_requests"], row["completion_tokens"]) == (1, 1, 0)
    assert bench.taken() == bench.spent()


async def test_refused_request_that_left_gives_nothing_back(bench: Bench) -> None:
    """It had taken nothing."""
    standing = await bench.limits.peek(CALLER, bench.meter().model)
    assert standing is not None
    bench.raw.hset(f"{HEAD}w:{MODEL}", f"t{standing.resets['tokens']}", LIMITS.tokens_per_minute)
    request = asyncio.create_task(answer(bench.meter()))
    while not bench.store._flushers:
        await asyncio.sleep(0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await bench.settled()

    assert bench.taken() == bench.spent() | {"tokens": LIMITS.tokens_per_minute}


async def test_room_of_who_has_left_comes_back_before_the_ledger_closes(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as bench:
        request = asyncio.create_task(answer(bench.meter()))
        while not bench.store._flushers:
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    with redis.Redis.from_url(store_url, decode_responses=True) as raw:
        bench.raw = raw
        assert bench.taken() == bench.spent()


async def test_lease_of_who_left_while_the_store_froze_is_freed_when_it_is_back(tmp_path: Path) -> None:
    """The store may have made the reservation and never told: its tokens leave with the window, the lease at once."""
    with run_store("valkey", tmp_path / "store") as server:
        async with opened(server.url, tmp_path / "data", command_timeout_ms=200, breaker_s=0.05) as bench:
            server.send(signal.SIGSTOP)
            request = asyncio.create_task(answer(bench.meter()))
            while not bench.store._flushers:
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await bench.store.answered()
            assert not bench.store.available
            server.send(signal.SIGCONT)
            await until(lambda: bench.store.available and bench.ledger._journal is None, within_s=30)

            taken = bench.taken()
            assert (taken["leases of the model"], taken["leases of the key"]) == (0, 0)
