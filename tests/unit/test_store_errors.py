"""Every way in which a server that can be reached refuses to serve: nothing that was spent is lost, the log has a line
and not one per request, and the store is used again when it serves again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from engine.mock import MockEngine
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits
from gateway.errors import Unavailable
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings
from tests.support.store_server import StoreServer, opened, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MODEL = ModelSpec("m", ModelSettings(description="d", limits=LimitSettings(requests_per_minute=1000)), MockEngine())
Undo = Callable[[], object]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[StoreServer]:
    with run_store("valkey", tmp_path / "s") as server:
        yield server


def admin(server: StoreServer) -> Any:
    """Return a client whose rights outlive those of the default user."""
    with server.client() as raw:
        raw.acl_setuser("admin", enabled=True, passwords=["+p"], keys=["*"], channels=["*"], categories=["+@all"])
    return redis.Redis.from_url(server.url, username="admin", password="p", decode_responses=True)


def lack_replicas(server: StoreServer) -> Undo:
    raw: Any = server.client()
    raw.config_set("min-replicas-to-write", 1)
    return lambda: raw.config_set("min-replicas-to-write", 0)


def _forbid(server: StoreServer, *rules: str) -> Undo:
    raw = admin(server)
    raw.execute_command("ACL", "SETUSER", "default", *rules)
    return lambda: raw.execute_command("ACL", "SETUSER", "default", "+@all")


def forbid_scripts(server: StoreServer) -> Undo:
    return _forbid(server, "-eval", "-evalsha")


def forbid_in_scripts(server: StoreServer) -> Undo:
    return _forbid(server, "-hset", "-hincrby", "-setnx")


def forbid_all(server: StoreServer) -> Undo:
    return _forbid(server, "-@all", "+ping")


def change_password(server: StoreServer) -> Undo:
    raw = admin(server)
    raw.config_set("requirepass", "another")
    raw.execute_command("CLIENT", "KILL", "USER", "default")
    return lambda: raw.config_set("requirepass", "")


def become_replica(server: StoreServer) -> Undo:
    raw: Any = server.client()
    raw.execute_command("REPLICAOF", "127.0.0.1", "1")
    return lambda: raw.execute_command("REPLICAOF", "NO", "ONE")


def become_stale_replica(server: StoreServer) -> Undo:
    server.client().config_set("replica-serve-stale-data", "no")
    return become_replica(server)


def run_long_script(server: StoreServer) -> Undo:
    raw: Any = server.client()
    raw.config_set("busy-reply-threshold", 1)

    def spin() -> None:
        with contextlib.suppress(redis.RedisError), server.client() as other:
            cast(Any, other).eval("while true do end", 0)

    thread = threading.Thread(target=spin)
    thread.start()
    while True:
        try:
            raw.ping()
        except redis.ResponseError:
            break

    def undo() -> None:
        raw.script_kill()
        thread.join()

    return undo


def take_all_places(server: StoreServer) -> Undo:
    raw: Any = server.client()
    raw.config_set("maxclients", 1)
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    return lambda: raw.config_set("maxclients", 1000)


@pytest.mark.parametrize(
    "begin",
    [
        lack_replicas,
        forbid_scripts,
        forbid_in_scripts,
        forbid_all,
        change_password,
        become_replica,
        become_stale_replica,
        run_long_script,
        take_all_places,
    ],
)
async def test_usage_survives_a_server_that_refuses(
    own: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, begin: Callable[[StoreServer], Undo]
) -> None:
    caplog.set_level(logging.WARNING)
    caller = Principal("TestKey00001", tokens_per_day=100_000)
    async with opened(own.url, bulk_timeout_ms=300, command_timeout_ms=300) as store:
        limits, ledger = Limits(LimiterSettings(), store, store.metrics), Ledger(store, tmp_path)
        closed = Limits(LimiterSettings(on_store_failure="closed"), store, store.metrics)
        ledger.on_charged = limits.charged

        async def spend(number: int) -> bool:
            reservation = await limits.reserve(caller, MODEL, f"r{number}", {"requests": 1, "tokens": 100})
            entry = Entry(key_id="TestKey00001", model_id="m", allowance=reservation.standing.allowance, requests=1)
            entry.completion_tokens, entry.bucket, entry.reserved = 40, reservation.bucket, reservation.amounts
            entry.counted = {"requests": 1, "tokens": 40}
            released = limits.release(reservation, entry.counted)
            entry.reservation, entry.second = reservation.id, reservation.second
            entry.uncertain, entry.pending = released.uncertain, released.pending
            await ledger.settle(entry)
            return reservation.standing.local

        assert not await spend(0)
        undo = begin(own)
        decided_locally = [await spend(number) for number in range(1, 11)]
        with pytest.raises(Unavailable):
            await closed.reserve(caller, MODEL, "closed", {"requests": 1, "tokens": 100})
        lines = len(caplog.records)
        undo()
        await until(lambda: store.available and store.state.refusal is None and not ledger.journal_bytes)
        assert all(decided_locally)
        assert not await spend(11)
        rows = await ledger.totals("TestKey00001")
        assert [(row["requests"], row["completion_tokens"]) for row in rows] == [(12, 12 * 40)]
        with own.client() as raw:
            (day,) = list(raw.scan_iter("*:day:*"))
            assert raw.get(day) == str(12 * 40)
        limits.close()
        closed.close()
        await ledger.close()
    assert lines <= 6, caplog.text
    assert "the store refuses" not in caplog.text


async def test_value_that_is_no_text_spoils_no_other_answer(own: StoreServer) -> None:
    async with opened(own.url) as store:
        with own.client() as raw:
            raw.set("odd", b"\xff\xfe")
            raw.set("even", "text")
        odd, even = await store.run_in_order([("GET", "odd"), ("GET", "even")])
        assert even == "text"
        assert odd != even
        assert store.available


async def test_server_that_gives_no_information_about_itself_is_used(own: StoreServer) -> None:
    raw = admin(own)
    raw.execute_command("ACL", "SETUSER", "default", "-info", "-time")
    async with opened(own.url) as store:
        assert store.available
        assert store.patient.available
        assert await store.run("SET", "x", "y")
