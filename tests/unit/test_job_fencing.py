"""A gateway that was away for longer than its lease neither starts nor finishes what its successor took over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from gateway.access.auth import Principal
from gateway.durable.event_log import LEASE_S, EventLogs
from gateway.durable.job_queue import ClientQueue, Job, JobEvent
from gateway.durable.log_writer import LogWriter, Reader
from gateway.errors import StoreUnavailable
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings, StoreSettings
from gateway.store import layout
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

CALLER = Principal("KeyOne000001")


def job(number: int) -> Job:
    return Job(f"job_{number}", CALLER, None, {"prompt": "hello"})


class Gateway:
    """One gateway's part in a client's jobs: its writer, its queue, and what it ran. `clock` is its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.logs = EventLogs(store)
        self.clock = FakeClock()
        self.ran: list[str] = []
        self.finished: list[str] = []
        self.let = asyncio.Event()
        self.writer: LogWriter
        self.queue: ClientQueue

    async def open(self) -> str:
        opened, writer = await self.logs.open(Reader("k:c", "k"), process="p", max_bytes=2**20, ttl_s=60)
        if writer is not None:
            self.writer, writer.clock = writer, self.clock
            writer.held_until = LEASE_S
            self.queue = ClientQueue(writer, JobSettings(), self._run, Drain(), Metrics(), now=0.0)
            self.queue.take_over(opened)
        return opened.how

    async def _run(self, job: Job) -> AsyncGenerator[JobEvent, None]:
        self.ran.append(job.id)
        yield "token", {"text": "one"}
        await self.let.wait()
        yield "token", {"text": "two"}
        self.finished.append(job.id)
        yield "done", {"finish_reason": "stop"}

    async def submit(self, *numbers: int) -> None:
        texts = [job(number).text() for number in numbers]
        await self.store.run("RPUSH", layout.log("k:c")[2], *texts)
        self.queue.add(texts)

    async def expire(self) -> None:
        """Let the lease end, in the store and by this gateway's clock."""
        await self.store.run("HSET", layout.log("k:c")[0], "lease_until", 1)
        self.clock.advance(LEASE_S + 1)


@pytest.fixture
async def pair(store_server: StoreServer) -> AsyncIterator[tuple[Gateway, Gateway]]:
    store_server.client().flushall()
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_server.url}, Metrics())
    await store.start()
    gateways = Gateway(store), Gateway(store)
    yield gateways
    for gateway in gateways:
        if hasattr(gateway, "queue"):
            await gateway.queue.cancel()
    await store.close()


class Held:
    """Commands of one gateway that wait, as while it is frozen in front of them."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        self._run = gateway.store.run
        monkeypatch.setattr(gateway.writer, "_store", self)

    async def run(self, *command: Any) -> Any:
        self.reached.set()
        await self.go.wait()
        return await self._run(*command)


async def test_job_that_a_successor_took_over_before_it_started_does_not_start(
    pair: tuple[Gateway, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    former, later = pair
    assert await former.open() == "opened"
    held = Held(former, monkeypatch)
    await former.submit(1)
    await held.reached.wait()  # that it starts is on its way to the store
    await former.expire()
    assert await later.open() == "taken over"
    later.let.set()
    await until(lambda: later.finished == ["job_1"])
    held.go.set()
    await until(lambda: not former.queue.busy)

    assert former.ran == []
    assert former.writer.lost


async def test_job_whose_start_was_stored_is_lost_and_does_not_start_later(
    pair: tuple[Gateway, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is frozen between the store's answer and the job."""
    former, later = pair
    await former.open()
    stored = former.writer.stored

    async def stored_and_frozen() -> bool:
        answer = await stored()
        await former.expire()
        await later.open()
        return answer

    monkeypatch.setattr(LogWriter, "stored", lambda _: stored_and_frozen())
    await former.submit(1)
    await until(lambda: former.writer.lost and not former.queue.busy)

    assert (former.ran, later.ran) == ([], [])
    assert later.queue.finished == 1
    await later.writer.flush(5)
    (*_, (_, fields)) = await later.store.run("XRANGE", layout.log("k:c")[1], "-", "+")
    assert "server_gone" in fields["frames"], "it is told"
    assert await later.store.run("LLEN", layout.log("k:c")[2]) == 0


async def test_running_job_ends_at_its_next_event(pair: tuple[Gateway, Gateway]) -> None:
    former, later = pair
    await former.open()
    await former.submit(1, 2)
    await until(lambda: former.ran == ["job_1"])
    await former.expire()
    assert await later.open() == "taken over"
    later.let.set()
    former.let.set()
    await until(lambda: not former.queue.busy and later.finished == ["job_2"])

    assert former.finished == []
    assert (former.ran, later.ran) == (["job_1"], ["job_2"])
    frames = await later.store.run("XRANGE", layout.log("k:c")[1], "-", "+")
    assert sum(fields["frames"].count("event: started") for _, fields in frames) == 2, "each once"


async def test_lease_that_nobody_took_is_renewed_and_the_job_goes_on(pair: tuple[Gateway, Gateway]) -> None:
    former, later = pair
    await former.open()
    await former.submit(1)
    await until(lambda: former.ran == ["job_1"])
    await former.expire()
    former.let.set()
    await until(lambda: former.finished == ["job_1"])
    assert await later.open() == "attached"


async def test_nothing_starts_while_the_store_is_away(
    pair: tuple[Gateway, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.durable.log_writer._RETRY_S", 0.01)
    former, _ = pair
    await former.open()
    away, asked = True, 0
    run = former.store.run

    async def run_if_there(*command: Any) -> Any:
        nonlocal asked
        asked += 1
        if away:
            raise StoreUnavailable("away")
        return await run(*command)

    monkeypatch.setattr(former.writer, "_store", former)
    monkeypatch.setattr(former, "run", run_if_there, raising=False)
    former.queue.add([job(1).text()])
    await until(lambda: asked > 5)
    assert former.ran == []
    away = False
    await until(lambda: former.ran == ["job_1"])


async def test_check_that_gets_no_answer_confirms_nothing(pair: tuple[Gateway, Gateway]) -> None:
    former, _ = pair
    await former.open()

    async def run(*_: Any) -> Any:
        raise StoreUnavailable("away")

    former.writer._store = type("Away", (), {"run": staticmethod(run)})()
    assert await former.writer.holds(), "the lease has not ended"
    former.clock.advance(LEASE_S)
    with pytest.raises(StoreUnavailable):
        await former.writer.holds()


async def test_former_writer_changes_nothing(pair: tuple[Gateway, Gateway]) -> None:
    former, later = pair
    await former.open()
    await former.expire()
    await later.open()
    before = await later.store.run("HGETALL", layout.log("k:c")[0])
    former.writer.append(b"data: late\n\n", done=1, running="job_1")
    former.writer.end()
    await former.writer.flush(5)
    assert not await former.writer.confirm()
    assert await former.logs.renew(former.writer, 60) is None
    assert await former.logs.close_log("k:c", "closed", former.writer) is None

    assert await later.store.run("HGETALL", layout.log("k:c")[0]) == before
    assert await later.store.run("XLEN", layout.log("k:c")[1]) == 0
