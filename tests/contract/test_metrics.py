"""/metrics: counters that agree with the engine's own, under labels that no client can choose."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.base import EngineDied, EngineOverloaded, Usage
from engine.mock import Fault, MockEngine
from engine.remote.engine import RemoteEngine
from tests.support.app import Gateway, Start
from tests.support.store_server import run_store
from tests.support.upstream_server import Connection, chunk, run_upstream
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def test_page_is_prometheus_text(gateway: Gateway) -> None:
    response = await gateway.client.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    ours = {name for name in families if name.startswith("shannon_")}
    assert {
        *("shannon_requests", "shannon_request_duration_seconds", "shannon_time_to_first_token_seconds"),
        *("shannon_tokens", "shannon_streams_open", "shannon_engine_ready"),
    } <= ours
    assert all(families[name].documentation for name in ours)


async def test_tokens_are_counted_by_model_and_kind(gateway: Gateway) -> None:
    await gateway.chat()
    await gateway.chat(model="shannon-complex", stream=True, n=2)

    assert await gateway.samples("shannon_tokens_total") == {
        ("prompt", "shannon-chat"): 3,
        ("cached", "shannon-chat"): 0,
        ("completion", "shannon-chat"): 4,
        ("prompt", "shannon-complex"): 3,
        ("cached", "shannon-complex"): 0,
        ("completion", "shannon-complex"): 8,
    }
    assert await gateway.metered() == gateway.spent() == Usage(6, 12)


async def test_requests_are_counted_by_route_and_status(gateway: Gateway) -> None:
    await gateway.chat()
    await gateway.chat(temperature=9)
    await gateway.client.get("/v1/models/shannon-chat")
    await gateway.client.get("/v1/models/gpt-5")
    await gateway.client.get("/v1/nowhere/at/all")

    assert await gateway.samples("shannon_requests_total") == {
        ("/v1/chat/completions", "200"): 1,
        ("/v1/chat/completions", "400"): 1,
        ("/v1/models/{model:path}", "200"): 1,
        ("/v1/models/{model:path}", "404"): 1,
        ("unmatched", "404"): 1,
    }


async def test_labels_never_hold_what_a_client_typed(gateway: Gateway) -> None:
    typed = "ClientTyped"
    await gateway.chat(model=typed)
    await gateway.chat(user=typed)
    await gateway.client.get(f"/v1/models/{typed}")
    await gateway.client.get(f"/{typed}")
    await gateway.client.request(typed.upper(), "/v1/models")
    await gateway.client.post(f"/v1/chat/completions?stream={typed}", headers={"X-Request-ID": typed})

    assert typed.lower() not in (await gateway.client.get("/metrics")).text.lower()


async def test_first_token_is_timed_per_generation(gateway: Gateway) -> None:
    await gateway.chat()
    await gateway.chat(stream=True)
    gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
    await gateway.chat()
    counts = await gateway.samples("shannon_time_to_first_token_seconds_count")

    assert counts == {("shannon-chat",): 2}


async def test_request_duration_covers_the_whole_stream(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.005))
    async with gateway.stream(ignore_eos=True, max_tokens=20) as response:
        await response.aread()
    await until(lambda: gateway.requests_in_progress() == 0)

    total = await gateway.samples("shannon_request_duration_seconds_sum")
    assert total[("/v1/chat/completions",)] >= 0.08


async def test_open_streams_are_counted(serve: Start) -> None:
    gateway = await serve()
    gateway.mock.faults.extend([Fault(at_token=1), Fault(at_token=1)])
    async with gateway.stream() as first, gateway.stream() as second:
        await anext(first.aiter_raw())
        await anext(second.aiter_raw())
        assert await gateway.samples("shannon_streams_open") == {(): 2}
    await until(lambda: gateway.requests_in_progress() == 0)

    assert await gateway.samples("shannon_streams_open") == {(): 0}


async def test_engine_gauge_follows_its_state(gateway: Gateway) -> None:
    assert await gateway.samples("shannon_engine_ready") == {("main",): 1}

    await gateway.engine.close()

    assert await gateway.samples("shannon_engine_ready") == {("main",): 0}


@pytest.mark.parametrize("cause", ["died", "stalled"])
async def test_engine_restarts_are_counted_by_cause(start: Start, cause: str) -> None:
    gateway = await start(engine_stall_s=0.02)
    assert set((await gateway.samples("shannon_engine_restarts_total")).values()) == {0}

    (gateway.mock.kill if cause == "died" else gateway.mock.freeze)()
    await until(lambda: len(gateway.mocks) == 2 and gateway.engine.state == "ready")

    restarts = await gateway.samples("shannon_engine_restarts_total")
    assert {labels: count for labels, count in restarts.items() if count} == {(cause, "main"): 1}


async def test_failures_are_counted_as_the_streams_only_after_its_status(serve: Start) -> None:
    gateway = await serve()
    gateway.mock.faults += [Fault(error=EngineOverloaded("full")), Fault(at_token=2, error=EngineDied("gone"))]
    for _ in range(2):
        async with gateway.stream() as response:
            await response.aread()

    assert await gateway.samples("shannon_stream_failures_total") == {("engine_unavailable",): 1}
    errors = await gateway.samples("shannon_errors_total")
    assert errors == {("server_overloaded",): 1, ("engine_unavailable",): 1}


async def test_store_that_is_away_shows_with_the_usage_it_lacks(start: Start, tmp_path: Path) -> None:
    with run_store("valkey", tmp_path / "own") as own:
        gateway = await start(environment={"SHANNON_REDIS_URL": own.url})
        await gateway.chat()
        assert await gateway.samples("shannon_store_available") == {(): 1}
        assert await gateway.samples("shannon_usage_journal_bytes") == {(): 0}

        own.stop()
        await gateway.chat()

        assert await gateway.samples("shannon_store_available") == {(): 0}
        assert (await gateway.samples("shannon_usage_journal_bytes"))[()] > 0


async def test_what_a_drain_interrupts_is_told_by_the_gateways_that_stay(serve: Start) -> None:
    stays = await serve()
    goes = await serve(server={"drain_timeout_s": 0.05})  # the one that takes the signal
    goes.mock.faults.append(Fault(at_token=1))
    async with goes.stream() as response:
        pieces = response.aiter_raw()
        await anext(pieces)
        assert await goes.samples("shannon_draining") == {(): 0}
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: goes.services.drain.draining)
        assert b"error" in b"".join([piece async for piece in pieces])
    assert goes.serving is not None
    await asyncio.shield(goes.serving)

    assert await stays.samples("shannon_drain_interrupted_requests_total") == {(): 1}
    assert await stays.samples("shannon_draining") == {(): 0}


async def test_servers_of_a_remote_engine_are_labelled_by_their_place_in_the_configuration(start: Start) -> None:
    async def silent(connection: Connection) -> None:
        await connection.left()

    nowhere = "http://127.0.0.1:9/v1"
    async with run_upstream(silent) as server:
        remote: Any = partial(RemoteEngine, [server.url, nowhere], "demo")
        gateway = await start(mock=remote)
        request = asyncio.create_task(gateway.chat())
        await until(lambda: bool(server.generations))

        available = await gateway.samples("shannon_upstream_available")
        assert available == {("main", "0"): 1, ("main", "1"): 0}
        in_flight = await gateway.samples("shannon_upstream_requests_in_flight")
        assert in_flight == {("main", "0"): 1, ("main", "1"): 0}
        page = (await gateway.client.get("/metrics")).text
        assert "127.0.0.1" not in page, "nor anything else of their addresses"
        request.cancel()


async def test_tokens_that_nobody_got_are_counted_and_on_no_bill(start: Start) -> None:
    async def breaking(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(chunk("Hel", usage=(7, 1)))
        connection.cut()

    async with run_upstream(breaking) as server:
        remote: Any = partial(RemoteEngine, [server.url], "demo", retries=1)
        gateway = await start(mock=remote)
        assert (await gateway.chat()).status_code == 503

        discarded = await gateway.samples("shannon_upstream_discarded_tokens_total")
        assert discarded == {("main", "0"): 16}, "two attempts of seven and one"
        (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
        assert (row["prompt_tokens"], row["completion_tokens"]) == (0, 0)
