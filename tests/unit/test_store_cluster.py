"""Every kind of command that the gateway sends works on a cluster: all keys of a script lie in one slot."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.base import Delta
from engine.mock import MockEngine
from gateway.access.allowance import Allowance, allowance_of
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.keys import Keys, KeySpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits
from gateway.conversations.sessions import Sessions
from gateway.errors import NotFound, StoreUnavailable
from gateway.settings.config import LimiterSettings, ModelSettings, SessionSettings, StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import free_cluster_port, opened_cluster, run_cluster
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[int]:
    """A cluster of the test's own, to break."""
    with run_cluster(tmp_path) as port:
        yield port


async def test_keys_limits_ledger_and_sessions_work_on_a_cluster(cluster_port: int, tmp_path: Path) -> None:
    async with opened_cluster(cluster_port) as store:
        record, _ = await Keys(store).create(KeySpec(name="ci"))
        assert [found.id for found in await Keys(store).list()] == [record.id]

        principal, model = Principal(record.id), ModelSpec("m", ModelSettings(description="m"), MockEngine())
        limits, ledger = Limits(LimiterSettings(), store, store.metrics), Ledger(store, tmp_path)
        reservations = await asyncio.gather(
            *(limits.reserve(principal, model, f"r{number}", {"requests": 1, "tokens": 100}) for number in range(20))
        )
        assert min(reservation.standing.remaining["requests"] for reservation in reservations) == 40
        allowance = allowance_of(principal, model)
        for reservation in reservations:
            ledger.settle(
                Entry(
                    key_id=record.id,
                    model_id="m",
                    allowance=allowance,
                    requests=1,
                    completion_tokens=10,
                    bucket=reservation.bucket,
                    reserved=reservation.amounts,
                    counted={"requests": 1, "tokens": 10},
                )
            )
        held = await limits.reserve(principal, model, "held", {"requests": 1, "tokens": 100})
        settling = Entry(key_id=record.id, model_id="m", allowance=allowance, reserved=held.amounts)
        settling.reservation, settling.second, settling.counted = held.id, held.second, {"requests": 1}
        limits._leases._report_all()
        await until(lambda: not limits._leases._renewals)
        await ledger.settle(settling)
        limits.close()
        await ledger.close()
        assert (await ledger.totals(record.id))[0]["completion_tokens"] == 200
        standing = await limits.peek(principal, model)
        assert standing is not None
        assert standing.remaining["tokens"] == 200_000 - 200

        rotated, _ = await Keys(store.bulk).rotate(record.id)
        assert (await Keys(store.bulk).revoke(record.id)).secret_sha256 == rotated.secret_sha256
        await store.look()
        assert b"shannon_store_memory_used_bytes 0.0" not in store.metrics.render()

        sessions = Sessions(SessionSettings(), store.bulk, store.metrics)
        session = await sessions.open(principal, "talk", [{"role": "user", "content": "hi"}])
        assert session.announce
        assert (await sessions.show(principal, "talk"))["messages"] == []
        assert (await sessions.delete(principal, "talk"))["deleted"]
        await _use_sessions(store, principal)
        assert store.available


async def _use_sessions(store: Store, principal: Principal) -> None:
    """Keep more than there is room for, in named sessions and in one that gets its name later."""
    sessions = Sessions(SessionSettings(max_bytes=600_000, max_bytes_per_key=700_000), store, store.metrics)

    async def say(session_id: str | None, text: str) -> str:
        messages: list[Any] = [{"role": "user", "content": text}]
        session = await sessions.open(principal, session_id, messages)
        await session.opened()
        session.note(Delta("yes", finish_reason="stop"))
        await session.end_turn(messages)
        assert not session.unavailable
        return session.id

    derived = await say(None, "hi")
    assert len((await sessions.show(principal, derived))["messages"]) == 2
    await say(derived, "more")
    assert len((await sessions.show(principal, derived))["messages"]) == 4
    for number in range(3):
        await say(f"large{number}", "x" * 500_000)
    assert len((await sessions.show(principal, "large2"))["messages"]) == 2
    with pytest.raises(NotFound):
        await sessions.show(principal, "large1")


async def test_cluster_without_a_node_is_a_store_that_is_away() -> None:
    url = f"redis+cluster://127.0.0.1:{free_cluster_port()}"
    store = Store(StoreSettings(url_env="URL", command_timeout_ms=2000), {"URL": url}, Metrics())
    await store.start()
    try:
        assert not store.available
        with pytest.raises(StoreUnavailable):
            await store.run("GET", "sh:schema")
    finally:
        await store.close()


async def test_nobody_waits_for_what_the_client_can_not_send(cluster_port: int) -> None:
    async with opened_cluster(cluster_port) as store:
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(store.run("CONFIG", "GET", "save"), 10)


async def test_node_that_dies_with_a_command_is_a_store_that_is_away(own_cluster: int, tmp_path: Path) -> None:
    """Whether it did what it was asked nobody knows: nothing is taken for refused, usage least of all."""
    async with opened_cluster(own_cluster) as store:
        ledger = Ledger(store, tmp_path)
        allowance = Allowance.of(requests_per_minute=60, tokens_per_minute=1000)
        await ledger.settle(Entry(key_id="TestKey00001", model_id="m", allowance=allowance, requests=1))
        node = (await store.run("INFO", "server"))["process_id"]
        os.kill(node, signal.SIGSTOP)
        settled = ledger.settle(Entry(key_id="TestKey00001", model_id="m", allowance=allowance, requests=1))
        for _ in range(100):  # until it is on its way
            await asyncio.sleep(0)
        os.kill(node, signal.SIGKILL)
        await asyncio.wait_for(settled, 10)

        assert not store.available
        assert b"shannon_usage_refused_total 0.0" in store.metrics.render()
        assert ledger.journal_bytes > 0
        await ledger.close()
