"""A store that answers and takes no writes, because it is full or its disk can't be written: reads go on, it is not
called away, and what limits and keys need is written all the same where the server allows it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from engine.mock import MockEngine
from gateway.auth import Authenticator, Principal
from gateway.catalog import ModelSpec
from gateway.config import LimiterSettings, LimitSettings, ModelSettings, StoreSettings
from gateway.errors import InvalidApiKey, StoreUnavailable, Unavailable, WritesRefused
from gateway.keys import VERSION_KEY, Keys, KeySpec
from gateway.limits import Limits
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.usage import Entry, Ledger
from tests.conftest import Start, until
from tests.store_server import StoreServer, opened, run_store
from tests.unit.test_keys import sending

pytestmark = pytest.mark.anyio

MODEL = ModelSpec("m", ModelSettings(description="d", limits=LimitSettings()), MockEngine())


@pytest.fixture(params=["valkey", "redis"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with run_store(request.param, tmp_path / "s") as server:
        yield server


def fill(server: StoreServer) -> None:
    """Leave no room at all: a server is full with its last bytes long before that."""
    with server.client() as raw:
        used: Any = raw.info("memory")["used_memory"]
        raw.config_set("maxmemory", used - 50_000)


def empty(server: StoreServer) -> None:
    with server.client() as raw:
        raw.config_set("maxmemory", 0)


async def become_full(store: Store, server: StoreServer) -> None:
    fill(server)
    with pytest.raises(WritesRefused) as caught:
        await store.bulk.run("SET", "big", "x")
    assert caught.value.reason == "full"


async def test_full_store_is_called_full_and_not_away(own: StoreServer, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(own.url) as store:
        await become_full(store, own)
        for _ in range(5):
            with pytest.raises(WritesRefused):
                await store.run("SET", "x", "y")
        await store.look()
        page = store.metrics.render().decode()
        assert store.available
        assert store.bulk.available
        assert 'shannon_store_writes_refused{reason="full"} 1.0' in page
        assert "shannon_store_failures_total 0.0" in page
        assert "shannon_store_memory_max_bytes 0.0" not in page
        assert await store.run("GET", "x") is None, "reads go on"
        empty(own)
        await store.look()
        assert await store.run("SET", "x", "y")
        assert 'shannon_store_writes_refused{reason="full"} 0.0' in store.metrics.render().decode()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    assert len(said) == 2
    assert said[0].startswith("the store is full")
    assert said[1].startswith("the store takes writes again")
    assert "away" not in " ".join(said)


async def test_full_store_is_noticed_without_a_write_of_anybody(own: StoreServer) -> None:
    async with opened(own.url) as store:
        fill(own)
        await store.look()
        assert store.state.refusal == "full"
        empty(own)
        await until(lambda: store.state.refusal is None)


async def test_gateway_starts_with_a_full_store(own: StoreServer) -> None:
    fill(own)
    async with opened(own.url) as store:
        assert store.available
        assert store.state.refusal == "full"


async def test_limits_and_ledger_stay_exact_in_a_full_store(own: StoreServer, tmp_path: Path) -> None:
    async with opened(own.url) as store:
        limits, ledger = (
            Limits(LimiterSettings(on_store_failure="closed"), store, store.metrics),
            Ledger(store, tmp_path),
        )
        await become_full(store, own)
        caller = Principal("TestKey00001", tokens_per_day=1000)
        reservation = await limits.reserve(caller, MODEL, "r", requests=1, tokens=100)
        standing = await ledger.settle(
            Entry(
                key_id="TestKey00001",
                model_id="m",
                allowance=reservation.standing.allowance,
                requests=1,
                completion_tokens=40,
                bucket=reservation.bucket,
                refund=60,
                reservation=reservation.id,
                second=reservation.second,
                held_requests=1,
            )
        )
        assert not reservation.standing.local
        assert standing is not None
        assert standing.remaining_tokens == 200_000 - 40
        assert (await ledger.totals("TestKey00001"))[0]["completion_tokens"] == 40
        assert await ledger.key_ids() == ["TestKey00001"]
        assert ledger.journal_bytes == 0
        limits.close()
        await ledger.close()


async def test_keys_are_checked_rotated_and_revoked_in_a_full_store(own: StoreServer) -> None:
    async with opened(own.url) as store:
        keys = Keys(store.bulk)
        (_, seen), (rotated, _), (revoked, dead) = [await keys.create(KeySpec(name=name)) for name in "abc"]
        await become_full(store, own)
        authenticator = Authenticator(store)
        assert (await authenticator.authenticate(sending(seen))).name == "a"
        version = int(await store.run("GET", VERSION_KEY))
        _, new = await keys.rotate(rotated.id)
        await keys.revoke(revoked.id)
        assert int(await store.run("GET", VERSION_KEY)) == version + 2, "other gateways learn of it"
        assert (await authenticator.authenticate(sending(new))).name == "b"
        with pytest.raises(InvalidApiKey):
            await authenticator.authenticate(sending(dead))
        with pytest.raises(WritesRefused):
            await keys.create(KeySpec(name="d"))
        assert len(await keys.list()) == 3


async def test_gateway_over_a_full_store_serves(own: StoreServer, start: Start) -> None:
    gateway = await start(environment={"SHANNON_REDIS_URL": own.url})
    made = (await gateway.client.post("/admin/keys", json={"name": "ci"})).json()
    fill(own)
    await gateway.services.store.look()
    headers = {"Authorization": f"Bearer {made['key']}"}
    for _ in range(2):
        answer = await gateway.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}, headers=headers
        )
        assert answer.status_code == 200, answer.text
        assert "x-shannon-limits" not in answer.headers
    assert (await gateway.client.get("/ready")).status_code == 200
    usage = (await gateway.client.get("/v1/usage", headers=headers)).json()["data"]
    assert usage[0]["requests"] == 2
    refused = await gateway.client.post("/admin/keys", json={"name": "more"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_full")
    assert "full" in refused.json()["error"]["message"]
    assert (await gateway.client.delete(f"/admin/keys/{made['id']}")).status_code == 200
    assert (await gateway.samples("shannon_store_available")) == {(): 1}
    assert (await gateway.samples("shannon_store_writes_refused"))[("full",)] == 1


async def lose_disk(server: StoreServer, raw: redis.Redis) -> None:
    """Let a snapshot fail, after which the server takes no writes."""
    raw.config_set("appendonly", "no")
    raw.config_set("save", "3600 1")
    shutil.rmtree(server._data)
    raw.set("x", "y")
    with contextlib.suppress(redis.ResponseError):
        raw.bgsave()
    await until(lambda: bool(raw.info("persistence")["rdb_last_bgsave_status"] == "err"))


async def test_server_that_can_not_write_to_its_disk_answers_reads(
    own: StoreServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(own.url) as store:
        _, key = await Keys(store.bulk).create(KeySpec(name="ci"))
        limits, ledger = Limits(LimiterSettings(), store, store.metrics), Ledger(store, tmp_path)
        closed = Limits(LimiterSettings(on_store_failure="closed"), store, store.metrics)
        ledger.on_charged = limits.charged
        with own.client() as raw:
            await lose_disk(own, raw)
            with pytest.raises(WritesRefused) as refused:
                await store.run("SET", "x", "z")
            assert refused.value.reason == "disk"
            assert store.available
            assert await store.run("GET", "x") == "y"
            assert (await Authenticator(store).authenticate(sending(key))).name == "ci"
            reservation = await limits.reserve(Principal("TestKey00001"), MODEL, "r", requests=1, tokens=100)
            assert reservation.standing.local, "the scripts write, and may not"
            with pytest.raises(Unavailable) as told:
                await closed.reserve(Principal("TestKey00001"), MODEL, "r", requests=1, tokens=100)
            assert told.value.code == "store_read_only"
            allowance = reservation.standing.allowance
            await ledger.settle(Entry(key_id="TestKey00001", model_id="m", allowance=allowance, requests=1))
            assert ledger.journal_bytes > 0
            raw.config_set("stop-writes-on-bgsave-error", "no")
            raw.config_set("save", "")  # so that it can be stopped
            await until(lambda: store.state.refusal is None and not ledger.journal_bytes)
            assert (await ledger.totals("TestKey00001"))[0]["requests"] == 1
        limits.close()
        await ledger.close()
    assert "the store is away" not in caplog.text
    assert caplog.text.count("can't write to its disk") == 1


async def test_store_that_is_too_old_is_refused(own: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older servers know no scripts that may write when they are full."""
    monkeypatch.setattr("gateway.store._OLDEST_REDIS", 99)
    with pytest.raises(Exception, match=r"the store is Redis .*; Redis 99 or Valkey is needed"):
        async with opened(own.url):
            pass


async def test_bundled_server_has_a_bound_and_evicts_nothing(tmp_path: Path) -> None:
    store = Store(StoreSettings(data_dir=tmp_path, max_memory_mb=16, command_timeout_ms=2000), {}, Metrics())
    await store.start()
    try:
        info = await store.run("INFO", "memory")
        assert info["maxmemory"] == 16 * 2**20
        assert info["maxmemory_policy"] == "noeviction"
        writes = [("SET", f"x{number}", "x" * 2**20) for number in range(64)]
        with pytest.raises(StoreUnavailable, match="full"):
            await store.bulk.run_in_order(writes)
        assert await store.bulk.run("STRLEN", "x0") == 2**20
    finally:
        await store.close()
