"""Event logs: every frame once and in order, for any reader, on every kind of store that the gateway speaks to."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from gateway.durable.event_log import EventLogs, LogClosed, LogGone, LogOrphaned, Opened, split_frames
from gateway.durable.log_writer import LogWriter, Reader
from gateway.errors import InternalError, StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store import layout
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer, opened_cluster, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

FRAME = b"data: %d\n\n"


@pytest.fixture(params=["valkey", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    with run_store(request.param, tmp_path / "s") as server:
        async with connected(server) as store:
            yield store


class connected:
    """A store connected to a server, inside the block."""

    def __init__(self, server: StoreServer, timeout_ms: int = 2000) -> None:
        settings = StoreSettings(command_timeout_ms=timeout_ms, breaker_s=0.05)
        self._store = Store(settings, {"SHANNON_REDIS_URL": server.url}, Metrics())

    async def __aenter__(self) -> Store:
        await self._store.start()
        return self._store

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()


@pytest.fixture
async def one(store_server: StoreServer) -> AsyncIterator[Store]:
    """The shared store, emptied."""
    store_server.client().flushall()
    async with connected(store_server) as store:
        yield store


async def open_log(
    logs: EventLogs, reader: Reader, held: LogWriter | None = None, max_bytes: int = 2**20
) -> tuple[Opened, LogWriter | None]:
    return await logs.open(reader, process="p", held=held, max_bytes=max_bytes, ttl_s=60)


async def written(logs: EventLogs, log_id: str = "log", max_bytes: int = 2**20) -> LogWriter:
    _, writer = await open_log(logs, Reader(log_id, "me"), max_bytes=max_bytes)
    assert writer is not None
    return writer


async def read(logs: EventLogs, reader: Reader) -> list[bytes]:
    """Return the frames that a reader gets until the log ends, without their numbers, which must be the next ones."""
    frames: list[bytes] = []
    after = reader.after
    async for chunk in logs.read(reader):
        for frame in split_frames(chunk):
            number, _, rest = frame.partition(b"\n")
            after += 1
            assert number == b"id: %d" % after
            frames.append(rest)
        assert reader.after == after
    return frames


async def test_log_is_read_from_memory_and_from_the_store(store: Store) -> None:
    here, elsewhere = EventLogs(store), EventLogs(store)
    writer = await written(here)
    following = [
        asyncio.create_task(read(logs, Reader("log", "me", after))) for logs in (here, elsewhere) for after in (0, 2)
    ]
    for number in range(1, 8):
        writer.append(FRAME % number)
        await asyncio.sleep(0.01 * (number % 3))
    writer.end()
    await writer.release()
    here.release(writer)

    everything = [FRAME % number for number in range(1, 8)]
    expected = [everything, everything[2:], everything, everything[2:]]
    assert await asyncio.gather(*following) == expected
    assert await read(here, Reader("log", "me")) == everything, "now from the store as well"
    assert await read(here, Reader("log", "me", 7)) == []
    with pytest.raises(LogGone):
        await read(elsewhere, Reader("log", "someone else"))
    assert await here.last(Reader("log", "me")) == ("ended", 7)


async def test_writer_without_a_lease_is_taken_over(store: Store) -> None:
    former, later = EventLogs(store), EventLogs(store)
    writer = await written(former)
    writer.append(FRAME % 1, running="a")
    await writer.flush(5)
    await store.run("RPUSH", layout.log("log")[2], "a", "b")
    told, none = await open_log(later, Reader("log", "me", 0))
    assert (told.how, told.number, none) == ("attached", 1, None)
    following = asyncio.create_task(read(later, Reader("log", "me")))

    await former.renew(writer, 60, lease_s=0)
    with pytest.raises(LogOrphaned):
        await following
    told, heir = await open_log(later, Reader("log", "me", 3))

    assert heir is not None
    assert told == Opened("taken over", "p", 3, 0, "a", ["a", "b"]), "behind what the client has seen"
    heir.append(FRAME % 4, done=1)
    await heir.flush(5)
    assert await store.run("LRANGE", layout.log("log")[2], 0, -1) == ["b"]
    writer.append(FRAME % 2)
    await writer.flush(5)
    assert writer.lost
    assert await former.renew(writer, 60) is None
    assert await store.run("XLEN", layout.log("log")[1]) == 2


async def test_writer_learns_what_others_do(store: Store) -> None:
    logs, others = EventLogs(store), EventLogs(store)
    writer = await written(logs)
    queue = layout.log("log")[2]
    await store.run("RPUSH", queue, "a", "b", "c")
    newest = Reader("log", "me", token="newest")
    await open_log(others, newest)

    renewal = await logs.renew(writer, 60, known=1)
    assert renewal is not None
    assert (renewal.reader, renewal.queue, renewal.closed) == ("newest", ["b", "c"], "")
    assert renewal.reader_left_s > 0
    older = Reader("log", "me", token="older")
    assert await read(others, older) == []
    assert older.stopped == "replaced"
    assert await others.leave(older) is None
    assert await others.leave(newest) == "p"
    assert (await logs.renew(writer, 60) or renewal).reader_left_s == 0

    assert await others.close_log("log", "closed") == "p"
    assert await others.close_log("log", "closed") is None, "once"
    renewal = await logs.renew(writer, 60)
    assert renewal is not None
    assert (renewal.closed, renewal.queue) == ("closed", [])
    with pytest.raises(LogClosed, match="closed"):
        await read(others, Reader("log", "me"))
    told, fresh = await open_log(others, Reader("log", "me", 5))
    assert (told.how, told.number, told.queue) == ("opened", 5, [])
    assert fresh is not None


async def test_every_command_works_on_a_cluster(cluster_port: int) -> None:
    async with opened_cluster(cluster_port) as store:
        logs, elsewhere = EventLogs(store), EventLogs(store)
        writer = await written(logs)
        writer.append(FRAME % 1, done=1, running="")
        await writer.flush(5)
        assert await logs.renew(writer, 60) is not None
        assert await elsewhere.last(Reader("log", "me")) == ("running", 1)
        assert await elsewhere.leave(Reader("log", "me")) == "p"
        writer.end()
        await writer.release()
        assert await read(elsewhere, Reader("log", "me")) == [FRAME % 1]
        assert await logs.close_log("log", "closed") == "p"
        await logs.forget("log")
        with pytest.raises(LogGone):
            await logs.last(Reader("log", "me"))


async def test_log_is_bounded_and_says_so(store: Store) -> None:
    logs, elsewhere = EventLogs(store), EventLogs(store)
    writer = await written(logs, max_bytes=200_000)
    for number in range(100):
        writer.append(b"data: %b%d\n\n" % (b"x" * 10_000, number))
        await writer.flush(5)
    writer.end()
    await writer.release()
    logs.release(writer)

    assert await store.run("XLEN", layout.log("log")[1]) == 19
    for reader in (logs, elsewhere):
        with pytest.raises(LogGone, match="oldest"):
            await read(reader, Reader("log", "me"))
        assert len(await read(reader, Reader("log", "me", 81))) == 19


async def test_batch_that_is_sent_twice_is_stored_once(one: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    await one.run("RPUSH", layout.log("log")[2], "a", "b")
    run = one.run
    lost = 2

    async def run_and_lose_the_answer(*command: object) -> object:
        nonlocal lost
        answer = await run(*command)
        if lost:
            lost -= 1
            raise StoreUnavailable("the answer was lost")
        return answer

    monkeypatch.setattr(one, "run", run_and_lose_the_answer)
    writer.append(FRAME % 1)
    writer.append(FRAME % 2, done=1)
    writer.end()
    await writer.release()
    logs.release(writer)

    assert not lost
    assert await read(logs, Reader("log", "me")) == [FRAME % 1, FRAME % 2]
    assert await one.run("LRANGE", layout.log("log")[2], 0, -1) == ["b"]


async def test_frames_travel_in_batches(one: Store) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    for number in range(1000):
        writer.append(FRAME % number)
    writer.end()
    await writer.release()

    assert await one.run("XLEN", layout.log("log")[1]) == 1


async def test_end_is_stored_even_if_the_last_frame_went_before(one: Store) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    writer.append(FRAME % 1)
    await writer.flush(5)
    writer.end()
    await writer.release()
    logs.release(writer)

    assert await read(EventLogs(one), Reader("log", "me")) == [FRAME % 1]


async def test_failure_is_raised_to_readers_here(one: Store) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    following = asyncio.create_task(read(logs, Reader("log", "me")))
    await until(lambda: bool(writer.readers))

    writer.end(InternalError("no"))

    with pytest.raises(InternalError, match="no"):
        await following
    assert not writer.readers


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_stopped_reader_ends_between_frames(one: Store, elsewhere: bool) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    writer.append(FRAME % 1)
    await writer.flush(5)
    reader = Reader("log", "me")
    following = asyncio.create_task(read(EventLogs(one) if elsewhere else logs, reader))
    await until(lambda: reader.after == 1)

    reader.stop("enough")
    reader.stop("more than that")

    assert await following == [FRAME % 1]
    assert reader.stopped == "enough"


async def test_released_writer_lets_its_readers_go(one: Store) -> None:
    logs = EventLogs(one)
    writer = await written(logs)
    following = asyncio.create_task(read(logs, Reader("log", "me")))
    await until(lambda: bool(writer.readers))

    logs.release(writer)

    assert await following == []


async def test_readers_and_writer_wait_for_a_store_that_is_away(store_server: StoreServer) -> None:
    async with connected(store_server, timeout_ms=200) as one, connected(store_server, timeout_ms=200) as other:
        logs = EventLogs(one)
        writer = await written(logs, "bridged")
        writer.append(FRAME % 1)
        reader = Reader("bridged", "me")
        following = asyncio.create_task(read(EventLogs(other), reader))
        await until(lambda: reader.after == 1)
        store_server.send(signal.SIGSTOP)
        try:
            writer.append(FRAME % 2)
            await until(lambda: not one.available and not other.available)
            writer.append(FRAME % 3)
            with pytest.raises(StoreUnavailable):
                await logs.last(reader)
        finally:
            store_server.send(signal.SIGCONT)
        writer.append(FRAME % 4)
        writer.end()
        await writer.release()

        assert await following == [FRAME % number for number in range(1, 5)]


async def test_writer_gives_up_what_grows_too_large_without_the_store(store_server: StoreServer) -> None:
    async with connected(store_server, timeout_ms=100) as store:
        logs = EventLogs(store)
        writer = await written(logs, "overflown", max_bytes=100_000)
        store_server.send(signal.SIGSTOP)
        try:
            for number in range(20):
                writer.append(b"data: %b%d\n\n" % (b"x" * 10_000, number))
            assert writer.lost, "a gap in the log would be worse"
            assert writer.frames_after(19) is not None
            assert writer.frames_after(0) is None
            await writer.release(0.1)
        finally:
            store_server.send(signal.SIGCONT)


async def test_writer_that_lost_frames_while_some_were_stored_writes_no_more(one: Store) -> None:
    writer = await written(EventLogs(one), "gap", max_bytes=300_000)
    writer.append(b"data: 1\n\n")
    stored: list[list[Any]] = []
    run = one.run

    async def burst(*command: Any) -> Any:
        stored.append(list(command))
        answer = await run(*command)
        for number in range(2, 9):
            writer.append(b"data: %b%d\n\n" % (b"x" * 60_000, number))
        return answer

    one.run = burst  # type: ignore[method-assign]
    try:
        await writer.flush(5)
    finally:
        del one.run
    assert writer.lost
    assert len(stored) == 1
    await writer.release(0.1)


@pytest.mark.parametrize("seed", range(6))
async def test_readers_that_come_and_go_get_every_frame_once(one: Store, seed: int) -> None:
    chosen = random.Random(seed)
    here, elsewhere = EventLogs(one), EventLogs(one)
    writer = await written(here)
    count = 300

    async def write() -> None:
        for number in range(1, count + 1):
            writer.append(FRAME % number if number % 7 else b"data: %d %b\n\n" % (number, b"x" * 3000))
            if chosen.random() < 0.2:
                await asyncio.sleep(chosen.random() * 0.01)
        writer.end()
        await writer.release()
        here.release(writer)

    async def follow() -> list[int]:
        """Read in pieces, each a new reader on either side, from the last number that was seen."""
        numbers: list[int] = []
        while not numbers or numbers[-1] < count:
            reader = Reader("log", "me", numbers[-1] if numbers else 0)
            most = chosen.randint(1, 8)
            frames = chosen.choice([here, elsewhere]).read(reader)
            async for chunk in frames:
                numbers += [int(frame.split(b"\n")[0].removeprefix(b"id: ")) for frame in split_frames(chunk)]
                most -= 1
                if not most:
                    break
            await frames.aclose()
        return numbers

    *got, _ = await asyncio.gather(*(follow() for _ in range(5)), write())
    assert all(numbers == list(range(1, count + 1)) for numbers in got)


@hypothesis.given(strategies.lists(strategies.binary(max_size=20).map(lambda text: text.hex().encode())))
def test_chunks_split_into_their_frames(texts: list[bytes]) -> None:
    frames = [b"data: %b\n\n" % text for text in texts]
    assert split_frames(b"".join(frames)) == frames
