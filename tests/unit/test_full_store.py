"""A store that answers and takes no writes, because it is full or its disk can't be written: reads go on, it is not
called away, and what limits and keys need is written all the same where the server allows it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import gateway
from engine.messages import texts_of
from engine.mock import MockEngine
from gateway.access.auth import Authenticator, Principal
from gateway.access.catalog import ModelSpec
from gateway.access.keys import Keys, KeySpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits
from gateway.errors import InvalidApiKey, StoreUnavailable, Unavailable, WritesRefused
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings, StoreSettings
from gateway.store import layout
from gateway.store.client import Store
from gateway.store.script import Script
from gateway.telemetry.metrics import Metrics
from tests.support.app import HELLO, KEY_ID, Gateway, Start
from tests.support.job_client import JobClient, submit
from tests.support.key_requests import sending
from tests.support.store_server import StoreServer, opened, run_store
from tests.support.waiting import until

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
        raw.config_set("maxmemory", used // 2)  # buffers of connections come and go


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
        reservation = await limits.reserve(caller, MODEL, "r", {"requests": 1, "tokens": 100})
        standing = await ledger.settle(
            Entry(
                key_id="TestKey00001",
                model_id="m",
                allowance=reservation.standing.allowance,
                requests=1,
                completion_tokens=40,
                bucket=reservation.bucket,
                reserved=reservation.amounts,
                counted={"requests": 1, "tokens": 40},
                reservation=reservation.id,
                second=reservation.second,
            )
        )
        assert not reservation.standing.local
        assert standing is not None
        assert standing.remaining["tokens"] == 200_000 - 40
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
        version = int(await store.run("GET", layout.API_KEYS_VERSION))
        _, new = await keys.rotate(rotated.id)
        await keys.revoke(revoked.id)
        assert int(await store.run("GET", layout.API_KEYS_VERSION)) == version + 2, "other gateways learn of it"
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


def prompted(gateway: Gateway) -> list[str]:
    return [text for message in gateway.mock.requests[-1].messages for text in texts_of(message)]


async def stored_of_each_kind(gateway: Gateway) -> tuple[str, str]:
    """Store a session `named`, a derived one and a response, each with the word pelican. Returns the ids of two."""
    ask = {"messages": [{"role": "user", "content": "a pelican"}]}
    await gateway.client.post("/v1/chat/completions", json=ask, headers={"X-Session-ID": "named"})
    derived = (await gateway.client.post("/v1/chat/completions", json=ask)).headers["x-session-id"]
    response = (await gateway.client.post("/v1/responses", json={"input": "a pelican"})).json()["id"]
    return derived, response


async def assert_reads_are_served(gateway: Gateway, derived: str, response: str) -> None:
    for path in (f"sessions/{derived}", "sessions/named", f"responses/{response}", f"responses/{response}/input_items"):
        answer = await gateway.client.get(f"/v1/{path}")
        assert answer.status_code == 200, answer.text
        assert "pelican" in answer.text
    for session in ("named", derived):
        answer = await gateway.client.post(
            "/v1/chat/completions", json={"messages": HELLO}, headers={"X-Session-ID": session}
        )
        assert answer.headers["x-shannon-session"] == "read-only"
        assert "pelican" in prompted(gateway)[0], "the history is read"
        assert "pelican" in (await gateway.client.get(f"/v1/sessions/{session}")).text, "and kept"
    body = {"input": "go on", "previous_response_id": response, "store": False}
    assert (await gateway.client.post("/v1/responses", json=body)).status_code == 200
    assert "pelican" in prompted(gateway)[0]


async def test_full_store_serves_what_is_stored_and_lets_it_be_deleted(own: StoreServer, start: Start) -> None:
    gateway = await start(environment={"SHANNON_REDIS_URL": own.url})
    derived, response = await stored_of_each_kind(gateway)
    fill(own)
    await gateway.services.store.look()
    with own.client() as raw:
        before = set(raw.keys("*"))
        for headers in ({"X-Session-ID": "another"}, dict[str, str]()):
            answer = await gateway.client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
            assert answer.headers["x-shannon-session"] == "unavailable"
        assert set(raw.keys("*")) == before, "what is new takes no room"
    await assert_reads_are_served(gateway, derived, response)
    for path in (f"sessions/{derived}", "sessions/named", f"responses/{response}"):
        assert (await gateway.client.delete(f"/v1/{path}")).status_code == 200
        assert (await gateway.client.get(f"/v1/{path}")).status_code == 404
    with own.client() as raw:
        assert not raw.exists(f"sh:{{k:{KEY_ID}}}:kept:b")
    refused = [
        await gateway.client.post("/v1/responses", json={"input": "x", "background": True}),
        await gateway.chat(stream=True, resumable=True),
        await gateway.client.get("/api/v1/chat/stream/c"),
    ]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in refused] == [(503, "store_full")] * 3


async def test_stream_of_jobs_outlives_a_full_store(own: StoreServer, serve: Start) -> None:
    gateway = await serve(environment={"SHANNON_REDIS_URL": own.url})
    client = JobClient("c")
    async with client.connected(gateway):
        pass
    fill(own)
    await gateway.services.store.look()
    async with client.connected(gateway):
        assert client.opened[-1]["resumed"]
        assert (await submit(gateway, "c", "hello")).json()["error"]["code"] == "store_full"
        assert (await gateway.client.delete("/api/v1/chat/stream/c")).status_code == 200
        await until(lambda: client.ends == ["closed"])


async def test_store_without_a_disk_serves_what_is_stored(own: StoreServer, start: Start) -> None:
    gateway = await start(environment={"SHANNON_REDIS_URL": own.url})
    derived, response = await stored_of_each_kind(gateway)
    with own.client() as raw:
        await lose_disk(own, raw)
        await assert_reads_are_served(gateway, derived, response)
        refused = await gateway.client.delete("/v1/sessions/named")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_read_only")
        raw.config_set("stop-writes-on-bgsave-error", "no")
        raw.config_set("save", "")
        await until(lambda: gateway.services.store.state.refusal is None)


def scripts() -> dict[str, Script]:
    """Return all scripts of the gateway."""
    rooms = ("access", "conversations", "durable", "store")
    modules = [
        importlib.import_module(info.name)
        for room in rooms
        for info in pkgutil.iter_modules([f"{gateway.__path__[0]}/{room}"], f"gateway.{room}.")
    ]
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Script)
    }


def test_full_server_refuses_every_script_that_may_store_more(own: StoreServer) -> None:
    """As a whole, whatever its first command is: one that begins with a deletion would run to its end otherwise."""
    fill(own)
    refused, served = set(), set()
    with own.client() as raw:
        for name, script in scripts().items():
            try:
                raw.eval(script.text, 12, *(f"sh:none:{number}" for number in range(12)), *["1"] * 24)
            except redis.OutOfMemoryError:
                refused.add(name)
            except redis.ResponseError:
                served.add(name)
            else:
                served.add(name)
    assert {name for name, script in scripts().items() if script.text.startswith("#!lua\n")} == refused
    assert len(refused) > 8
    assert len(served) > 12


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
            reservation = await limits.reserve(Principal("TestKey00001"), MODEL, "r", {"requests": 1, "tokens": 100})
            assert reservation.standing.local, "the scripts write, and may not"
            with pytest.raises(Unavailable) as told:
                await closed.reserve(Principal("TestKey00001"), MODEL, "r", {"requests": 1, "tokens": 100})
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
    monkeypatch.setattr("gateway.store.client._OLDEST_REDIS", 99)
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
