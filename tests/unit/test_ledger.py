"""The ledger: every entry is applied exactly once, whether the store answers, is away, or comes back later."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import resource
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis

from gateway.access.allowance import Allowance
from gateway.access.ledger import _REPLAYED_AT_ONCE, Entry, Ledger
from gateway.errors import StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

KEY_ID = "TestKey00001"
DAY = "2026-02-03"
APPLIED = f"sh:{{k:{KEY_ID}}}:applied"


def entry(**fields: Any) -> Entry:
    defaults: dict[str, Any] = {
        "key_id": KEY_ID,
        "model_id": "shannon-chat",
        "allowance": Allowance.of(requests_per_minute=60, tokens_per_minute=1000),
        "day": DAY,
        "requests": 1,
        "prompt_tokens": 10,
    }
    return Entry(**(defaults | fields))


def line(number: int, **fields: Any) -> bytes:
    """Return an entry as the journal has it."""
    return orjson.dumps(entry(number=number, **fields).journal()) + b"\n"


@contextlib.asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncGenerator[tuple[Store, Ledger]]:
    settings = StoreSettings(command_timeout_ms=2000, breaker_s=0.02)
    store = Store(settings, {"SHANNON_REDIS_URL": url}, Metrics())
    await store.start()
    ledger = Ledger(store, folder)
    try:
        yield store, ledger
    finally:
        await ledger.close()
        await store.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[StoreServer]:
    """A server of the test's own, to stop and start."""
    with run_store("valkey", tmp_path / "s") as server:
        yield server


def journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("ledger-*.jsonl"))


async def test_totals_are_by_day_and_model(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as (_, ledger):
        for fields in (
            {"completion_tokens": 5, "cached_tokens": 8},
            {"completion_tokens": 7, "aborted_requests": 1},
            {"error": "engine_unavailable"},
            {"error": "rate_limit_exceeded", "prompt_tokens": 0},
            {"error": "rate_limit_exceeded", "prompt_tokens": 0, "requests": 0},
            {"model_id": "shannon-complex"},
            {"day": "2026-01-31"},
            {"key_id": "OtherKey0001"},
        ):
            await ledger.settle(entry(**fields))
        empty = {"prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": 0, "aborted_requests": 0}

        assert await ledger.totals(KEY_ID) == [
            {"date": "2026-01-31", "model": "shannon-chat", "requests": 1, "errors": {}} | empty,
            {
                "date": DAY,
                "model": "shannon-chat",
                "requests": 4,
                "prompt_tokens": 30,
                "cached_tokens": 8,
                "completion_tokens": 12,
                "aborted_requests": 1,
                "errors": {"engine_unavailable": 1, "rate_limit_exceeded": 2},
            },
            {"date": DAY, "model": "shannon-complex", "requests": 1, "errors": {}} | empty,
        ]
        assert await ledger.key_ids() == ["OtherKey0001", KEY_ID]
        assert await ledger.totals("UnknownKey01") == []


async def test_entry_that_is_sent_twice_counts_once(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as (store, ledger):
        command = entry(number=1).command("process-a")
        answers = [(await store.run(*command))[0] for _ in range(2)]
        assert answers == [1, 0]
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1

        assert (await store.run(*entry(number=1).command("process-b")))[0] == 1, "another gateway's number 1"
        assert (await store.run(*entry(number=3).command("process-a")))[0] == 1
        assert (await store.run(*entry(number=2).command("process-a")))[0] == 0, "numbers only rise"


async def test_entry_that_is_sent_twice_gives_back_once(
    store_url: str, store_server: StoreServer, tmp_path: Path
) -> None:
    window = f"sh:{{k:{KEY_ID}}}:w:shannon-chat"
    async with opened(store_url, tmp_path) as (store, _):
        with store_server.client() as raw:
            answer: Any = raw.time()
            raw.hset(window, f"t{answer[0]}", 100)
            for _ in range(2):
                await store.run(*entry(number=1, bucket=int(answer[0]), reserved={"tokens": 60}).command("process-a"))

            assert raw.hget(window, f"t{answer[0]}") == "40"


async def test_entries_of_one_process_carry_rising_numbers(
    store_url: str, store_server: StoreServer, tmp_path: Path
) -> None:
    async with opened(store_url, tmp_path) as (_, ledger):
        await asyncio.gather(*(ledger.settle(entry()) for _ in range(300)))
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 300
    with store_server.client() as raw:
        assert raw.hvals(APPLIED) == ["300"]


async def test_settle_returns_the_standing(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as (_, ledger):
        standing = await ledger.settle(entry())

        assert standing is not None
        assert (standing.remaining["requests"], standing.remaining["tokens"]) == (60, 1000)


async def test_entries_go_to_a_journal_while_the_store_is_away_and_count_once_when_it_is_back(
    own: StoreServer, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    async with opened(own.url, folder) as (_, ledger):
        await ledger.settle(entry())
        own.stop()
        standings = [await ledger.settle(entry()) for _ in range(200)]
        assert standings == [None] * 200
        assert len(journals(folder)) == 1
        assert journals(folder)[0].read_bytes().count(b"\n") == 200
        assert ledger.journal_bytes == journals(folder)[0].stat().st_size

        own.start()
        await until(lambda: not journals(folder))
        assert ledger.journal_bytes == 0
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 201
        assert await ledger.settle(entry()) is not None
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 202


async def test_replay_that_fails_for_another_reason_is_tried_again(
    own: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    async with opened(own.url, folder) as (_, ledger):
        own.stop()
        await ledger.settle(entry())
        replay, failures = ledger._replay, 3

        async def fail_at_first(*arguments: Any) -> AsyncGenerator[int, None]:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.EMFILE, "Too many open files")
            async for reached in replay(*arguments):
                yield reached

        monkeypatch.setattr(ledger, "_replay", fail_at_first)
        own.start()
        await until(lambda: not journals(folder), within_s=15)
        assert caplog.text.count("can't be replayed yet") == 1
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1


@pytest.mark.parametrize("left_behind", [False, True], ids=["own journal", "adopted"])
async def test_replay_goes_on_where_the_store_went_away_again(
    own: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: bool
) -> None:
    """A store that answers every other batch would otherwise be sent the first ones for ever."""
    sent: list[int] = []
    send = Ledger._send

    async def every_other(self: Ledger, entries: list[Entry], *arguments: Any) -> list[Any]:
        sent.append(len(entries))
        if len(sent) % 2 == 0:
            raise StoreUnavailable("again")
        return await send(self, entries, *arguments)

    folder = tmp_path / "data"
    if left_behind:
        folder.mkdir()
        (folder / "ledger-dead.jsonl").write_bytes(b"".join(line(number) for number in range(1, 1001)))
        monkeypatch.setattr(Ledger, "_send", every_other)
    async with opened(own.url, folder) as (_, ledger):
        if left_behind:
            await ledger.start()
        else:
            own.stop()
            for _ in range(1000):
                await ledger.settle(entry())
            monkeypatch.setattr(Ledger, "_send", every_other)
            own.start()
        await until(lambda: not journals(folder), within_s=30)

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1000
    assert len(sent) <= 2 * -(-1000 // _REPLAYED_AT_ONCE)


async def test_ledger_closes_though_its_journal_can_not_be_read(
    own: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    async with opened(own.url, folder) as (_, ledger):
        own.stop()
        await ledger.settle(entry())

        def fail(*arguments: Any) -> AsyncIterator[int]:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(ledger, "_replay", fail)
    assert len(journals(folder)) == 1


async def test_entry_that_was_applied_though_its_answer_was_lost_counts_once(own: StoreServer, tmp_path: Path) -> None:
    """The worst case of a timeout: the journal replays what the store has already."""
    async with opened(own.url, tmp_path) as (store, ledger):
        command = entry(number=1).command(ledger._process)
        await store.run(*command)
        own.stop()
        await ledger.settle(entry())  # its number is 1 as well
        own.start()
        await until(lambda: not journals(tmp_path))

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1


async def test_entries_that_come_during_the_replay_are_not_lost(own: StoreServer, tmp_path: Path) -> None:
    async with opened(own.url, tmp_path) as (_, ledger):
        own.stop()
        for _ in range(500):
            await ledger.settle(entry())
        own.start()
        sent = 500
        while journals(tmp_path):
            await ledger.settle(entry())
            sent += 1
            await asyncio.sleep(0.001)
        await asyncio.gather(*(ledger.settle(entry()) for _ in range(10)))

        assert (await ledger.totals(KEY_ID))[0]["requests"] == sent + 10


async def test_journal_of_a_ledger_that_closed_without_its_store_is_adopted_by_the_next(
    own: StoreServer, tmp_path: Path
) -> None:
    async with opened(own.url, tmp_path) as (_, ledger):
        await ledger.settle(entry())
        own.stop()
        for _ in range(3):
            await ledger.settle(entry())
    assert len(journals(tmp_path)) == 1

    async with opened(own.url, tmp_path) as (_, ledger):  # the store is still away
        await ledger.start()
        own.start()
        await until(lambda: not journals(tmp_path))
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 4


async def test_closing_ledger_writes_what_waits(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as (_, ledger):
        for _ in range(5):
            ledger.settle(entry())
    async with opened(store_url, tmp_path) as (_, ledger):
        assert (await ledger.totals(KEY_ID))[0]["requests"] == 5


async def test_ledger_that_closes_as_its_store_goes_leaves_a_journal(own: StoreServer, tmp_path: Path) -> None:
    async with opened(own.url, tmp_path) as (_, ledger):
        own.stop()
        ledger.settle(entry())
        await ledger.close()
        replayers = [task for task in asyncio.all_tasks() if "_replay_when_back" in repr(task)]

        assert journals(tmp_path)[0].read_bytes().count(b"\n") == 1
        assert replayers == [], "nothing goes on after close"


async def test_journal_of_a_dead_process_is_replayed_once(store_url: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger-deadprocess.jsonl"
    path.write_bytes(b"".join(line(number) for number in range(1, 301)))
    async with opened(store_url, tmp_path) as (store, ledger):
        for number in range(1, 11):  # the dead process got this far by itself
            await store.run(*entry(number=number).command("deadprocess"))
        await ledger.start()
        await until(lambda: not path.exists())

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 300


def test_line_of_an_older_release_is_read() -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": 1000, "concurrent_requests": 0}
    limits |= {"concurrent_requests_of_key": 2, "tokens_per_day": 500}
    fields = {"key_id": KEY_ID, "model_id": "m", "allowance": limits, "day": DAY, "requests": 1, "prompt_tokens": 10}
    fields |= {
        "completion_tokens": 4,
        "bucket": 99,
        "refund": 86,
        "reservation": "p:1",
        "held_requests": 1,
        "number": 7,
    }
    read = Entry.from_journal(orjson.dumps(fields))

    assert read.allowance.fields() == limits
    assert (read.reserved, read.counted) == ({"requests": 1, "tokens": 100}, {"requests": 1, "tokens": 14})
    assert Entry.from_journal(orjson.dumps(read.journal())) == read


async def test_torn_last_line_of_a_journal_is_ignored(store_url: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger-deadprocess.jsonl"
    path.write_bytes(line(1) + line(2)[:40])
    async with opened(store_url, tmp_path) as (_, ledger):
        await ledger.start()
        await until(lambda: not path.exists())

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1


async def test_journal_that_a_living_process_holds_is_left_alone(store_url: str, tmp_path: Path) -> None:
    held, dead = tmp_path / "ledger-alive.jsonl", tmp_path / "ledger-dead.jsonl"
    for path in (held, dead):
        path.write_bytes(line(1))
    with held.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with opened(store_url, tmp_path) as (_, ledger):
            await ledger.start()
            await until(lambda: not dead.exists())

            assert held.exists()
            assert (await ledger.totals(KEY_ID))[0]["requests"] == 1


async def test_unreadable_journals_do_not_keep_others_from_being_replayed(store_url: str, tmp_path: Path) -> None:
    (tmp_path / "ledger-a.jsonl").write_bytes(b"{}\n")
    (tmp_path / "ledger-aa.jsonl").mkdir()  # can't be opened, as another user's can't
    good = tmp_path / "ledger-b.jsonl"
    good.write_bytes(line(1))
    async with opened(store_url, tmp_path) as (_, ledger):
        await ledger.start()
        with contextlib.suppress(TimeoutError):
            await until(lambda: not good.exists(), within_s=1.0)

        assert not good.exists()


async def test_store_that_is_out_of_memory_loses_no_usage(own: StoreServer, tmp_path: Path) -> None:
    raw: redis.Redis = own.client()
    async with opened(own.url, tmp_path) as (_, ledger):
        raw.config_set("maxmemory", "1")
        async with asyncio.timeout(2):
            await ledger.settle(entry())
        raw.config_set("maxmemory", "0")
        await until(lambda: not journals(tmp_path))

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1
    raw.close()


async def test_entry_that_the_store_refuses_is_logged_and_holds_up_no_other(
    store_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store_url, tmp_path) as (store, ledger):
        await store.run("SET", f"sh:{{k:{KEY_ID}}}:u:{DAY}:shannon-chat", "no hash")
        others = [entry(model_id="shannon-complex") for _ in range(2)]
        await asyncio.gather(*map(ledger.settle, [others[0], entry(), others[1]]))  # in one batch

        assert b"shannon_usage_refused_total 1.0" in store.metrics.render()
        assert "usage that the store refuses" in caplog.text
        assert await store.run("HGET", f"sh:{{k:{KEY_ID}}}:u:{DAY}:shannon-complex", "requests") == "2"


async def test_entry_beyond_64_bits_is_logged_and_holds_up_no_other(
    store_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store_url, tmp_path) as (store, ledger):
        entries = [entry(), entry(prompt_tokens=2**70, counted={"tokens": 2**70}), entry()]
        await asyncio.wait_for(asyncio.gather(*map(ledger.settle, entries)), 10)
        await asyncio.wait_for(ledger.settle(entry()), 10)

        assert (await ledger.totals(KEY_ID))[0]["requests"] >= 3, "the script may break off half-way"
        assert b"shannon_usage_refused_total 1.0" in store.metrics.render()
    assert f'"prompt_tokens":{2**70}' in caplog.text


async def test_defect_of_the_writer_leaves_nobody_waiting(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(store_url, tmp_path) as (store, ledger):

        def command(*args: object) -> object:
            raise RuntimeError("a defect")

        with monkeypatch.context() as patched:
            patched.setattr(Entry, "command", command)
            await asyncio.wait_for(asyncio.gather(ledger.settle(entry()), ledger.settle(entry())), 10)
        await asyncio.wait_for(ledger.settle(entry()), 10)

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 1
        assert b"shannon_usage_refused_total 2.0" in store.metrics.render()


async def test_journal_is_for_its_owner_only(own: StoreServer, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with opened(own.url, folder) as (_, ledger):
        own.stop()
        await ledger.settle(entry())

        assert folder.stat().st_mode & 0o077 == 0


async def test_entries_stay_in_memory_where_no_journal_can_be_made(
    own: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    async with opened(own.url, tmp_path / "file") as (store, ledger):
        own.stop()
        async with asyncio.timeout(30):
            assert await ledger.settle(entry()) is None
            assert await ledger.settle(entry()) is None
        own.start()
        await until(lambda: store.available and not ledger._waiting, within_s=30)
        await ledger.settle(entry())

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 3
    assert caplog.text.count("usage stays in memory") == 1


async def test_ledger_that_closes_without_store_and_disk_leaves_its_entries_to_the_log(
    own: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    async with asyncio.timeout(30), opened(own.url, tmp_path / "file") as (store, ledger):
        own.stop()
        await ledger.settle(entry(prompt_tokens=4711))

    assert "usage that neither the store nor the disk takes" in caplog.text
    assert '"prompt_tokens":4711' in caplog.text
    assert b"shannon_usage_refused_total 1.0" in store.metrics.render()


async def test_entry_that_a_full_disk_cuts_is_logged_and_spoils_no_other(
    own: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(own.url, tmp_path) as (store, ledger):
        own.stop()
        await ledger.settle(entry())
        (journal,) = journals(tmp_path)
        with full_disk(journal.stat().st_size + 20):
            await ledger.settle(entry(prompt_tokens=4711))
        await ledger.settle(entry())
        own.start()
        await until(lambda: not journals(tmp_path), within_s=30)

        assert (await ledger.totals(KEY_ID))[0]["requests"] == 2
        assert b"shannon_usage_refused_total 1.0" in store.metrics.render()
    assert "usage that the journal can't take" in caplog.text
    assert '"prompt_tokens":4711' in caplog.text


@contextlib.contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: writes are cut there, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
