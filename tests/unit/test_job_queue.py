"""A client's queue: jobs survive the store as they were, each is taken once, and a lost one is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import orjson
import pytest

from gateway.access.auth import Principal
from gateway.durable.event_log import EventLogs, Opened, split_frames
from gateway.durable.job_queue import ClientQueue, Job, JobEvent, error_fields
from gateway.durable.log_writer import Reader
from gateway.errors import RateLimitExceeded, Unavailable
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings, StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CALLER = Principal("KeyOne000001", "ci", "ours", frozenset({"b", "a"}), {"a": {"tokens_per_minute": 5}}, 3, priority=1)


def job(number: int) -> Job:
    return Job(f"job_{number}", CALLER, None, {"prompt": "hello"})


@pytest.fixture
async def logs(store_server: StoreServer) -> AsyncIterator[EventLogs]:
    store_server.client().flushall()
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_server.url}, Metrics())
    await store.start()
    yield EventLogs(store)
    await store.close()


class Ran:
    """Runs jobs, one event each, when they are let."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.let = asyncio.Event()

    async def __call__(self, job: Job) -> AsyncGenerator[JobEvent, None]:
        self.jobs.append(job.id)
        await self.let.wait()
        yield "token", {"text": "hi"}
        yield "done", {"finish_reason": "stop"}


async def queue_of(logs: EventLogs, run: Ran, **settings: float) -> ClientQueue:
    _, writer = await logs.open(Reader("k:c", "k"), process="p", max_bytes=2**20, ttl_s=60)
    assert writer is not None
    return ClientQueue(writer, JobSettings(**settings), run, Drain(), Metrics(), now=0.0)


def events(queue: ClientQueue) -> list[tuple[str, str]]:
    """Return the (name, job id) of what was told."""
    told = []
    for frame in split_frames(queue.writer.frames_after(0) or b""):
        _, name, data = frame.decode().strip().split("\n")
        told.append((name.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))["job_id"]))
    return told


@pytest.mark.parametrize("principal", [CALLER, Principal("KeyTwo000001")])
async def test_job_is_read_as_it_was_written(principal: Principal) -> None:
    written = Job("job_1", principal, "session", {"prompt": "¿qué?", "temperature": 0.5})
    assert Job.from_text(written.text()) == written


async def test_each_job_is_taken_once(logs: EventLogs) -> None:
    run = Ran()
    queue = await queue_of(logs, run)
    queue.add([job(1).text(), job(2).text()])
    queue.add([job(1).text(), job(2).text(), job(3).text()])
    await until(lambda: bool(run.jobs))
    run.let.set()
    await until(lambda: queue.finished == 3)
    queue.add([job(3).text()])

    assert run.jobs == ["job_1", "job_2", "job_3"]
    assert [name for name, id_ in events(queue) if id_ == "job_2"] == ["queued", "started", "token", "done"]
    assert queue.since == queue.writer.last
    await until(lambda: not queue.busy)


async def test_job_that_ran_elsewhere_is_lost_and_told(logs: EventLogs) -> None:
    run = Ran()
    run.let.set()
    queue = await queue_of(logs, run)
    queue.take_over(Opened("taken over", "p", 0, 0, "job_1", [job(1).text(), job(2).text()]))
    await until(lambda: queue.finished == 2)

    assert run.jobs == ["job_2"]
    assert events(queue)[0] == ("error", "job_1")
    await until(lambda: not queue.busy)


async def test_job_that_had_not_started_elsewhere_runs(logs: EventLogs) -> None:
    run = Ran()
    run.let.set()
    queue = await queue_of(logs, run)
    queue.take_over(Opened("taken over", "p", 0, 0, "", [job(1).text()]))
    await until(lambda: queue.finished == 1 and not queue.busy)

    assert run.jobs == ["job_1"]


@pytest.mark.parametrize("quietly", [True, False])
async def test_ending_a_queue_starts_no_other_job(logs: EventLogs, quietly: bool) -> None:
    run = Ran()
    queue = await queue_of(logs, run)
    queue.add([job(1).text(), job(2).text()])
    await until(lambda: bool(run.jobs))

    await (queue.cancel() if quietly else queue.stop(Unavailable("going down")))

    assert run.jobs == ["job_1"]
    assert ("error", "job_1") in events(queue) or quietly
    assert not queue.busy


async def test_reasons_to_close(logs: EventLogs) -> None:
    queue = await queue_of(logs, Ran(), resume_s=10, max_idle_s=100)

    assert queue.reason_to_close(1, reading=True) is None
    assert queue.reason_to_close(2, reading=False) is None
    assert queue.reason_to_close(11.9, reading=False) is None
    assert queue.reason_to_close(12, reading=False) == "left"
    queue.remote_until = 20
    assert queue.reason_to_close(13, reading=False) is None, "it is read elsewhere"
    assert queue.reason_to_close(20, reading=False) is None
    assert queue.reason_to_close(30, reading=False) == "left"
    assert queue.reason_to_close(31, reading=True) is None
    assert queue.reason_to_close(100, reading=True) == "idle"
    queue.add([job(1).text()])
    assert queue.reason_to_close(101, reading=True) is None
    queue.writer.lost = True
    assert queue.reason_to_close(101, reading=True) == "lost"
    await queue.cancel()


async def test_error_events_say_when_to_try_again() -> None:
    fields = error_fields(RateLimitExceeded("Slow down.", retry_after_s=2.5))
    assert fields["error"]["code"] == "rate_limit_exceeded"
    assert fields["retry_after_s"] == 2.5
