"""Limits over two gateways on one store: exactly the limit passes, refunds come back, Retry-After is honest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access.keys import make_key
from tests.support.gateway_process import GatewayProcess, serve
from tests.support.store_server import StoreServer, run_store

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(params=["valkey", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with run_store(request.param, tmp_path / "store") as server:
        yield server


def _tree(**limits: int) -> dict[str, Any]:
    return {
        "engines": {"main": {"kind": "mock", "args": {"token_s": 0.002, "max_model_len": 4096}}},
        "models": {"shannon-chat": {"limits": limits}},
        # The store shares two cores with two gateways and their clients here; being slow is not being away.
        "store": {"command_timeout_ms": 2000},
    }


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, store: StoreServer, tmp_path: Path
) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """Two gateways on one store, with one key."""
    key = make_key()
    tree = _tree(**request.param)
    with (
        serve(tmp_path / "a", tree, key, SHANNON_REDIS_URL=store.url) as a,
        serve(tmp_path / "b", tree, key, SHANNON_REDIS_URL=store.url) as b,
    ):
        a.wait_until_ready()
        b.wait_until_ready()
        yield a, b


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(limits=httpx.Limits(max_connections=400), timeout=60)


@pytest.mark.parametrize("pair", [{"requests_per_minute": 60, "tokens_per_minute": 10**9}], indirect=True)
def test_exactly_60_of_300_concurrent_requests_pass(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    async def storm() -> list[httpx.Response]:
        async with _client() as client:
            return await asyncio.gather(
                *(
                    client.post(
                        f"{pair[n % 2].url}/v1/chat/completions",
                        json={"messages": HELLO, "max_tokens": 1},
                        headers=pair[0].authorization,
                    )
                    for n in range(300)
                )
            )

    responses = asyncio.run(storm())
    passed = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 429]
    assert (len(passed), len(refused)) == (60, 240)
    assert sorted(int(r.headers["x-ratelimit-remaining-requests"]) for r in passed)[0] == 0
    for response in refused:
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(response.headers["retry-after"]) <= 61


@pytest.mark.parametrize("pair", [{"requests_per_minute": 10**6, "tokens_per_minute": 20_000}], indirect=True)
def test_tokens_never_exceed_the_limit_and_unused_ones_come_back(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    """Mixed sizes, half of the clients hang up early. What is left must be the limit less what was really spent."""

    async def ask(client: httpx.AsyncClient, number: int, rng: random.Random) -> int:
        body = {
            "messages": [{"role": "user", "content": "word " * rng.randint(1, 200)}],
            "max_tokens": rng.choice([50, 400, 1500]),
            "ignore_eos": True,
            "stream": True,
        }
        url = f"{pair[number % 2].url}/v1/chat/completions"
        async with client.stream("POST", url, json=body, headers=pair[0].authorization) as response:
            if response.status_code == 200:
                pieces = response.aiter_bytes()
                leaves_after = rng.randint(1, 30) if number % 2 else 10**9
                async for _ in pieces:
                    leaves_after -= 1
                    if leaves_after == 0:
                        break
            return response.status_code

    async def storm() -> list[int]:
        rng = random.Random(20)
        async with _client() as client:
            return await asyncio.gather(*(ask(client, number, rng) for number in range(80)))

    statuses = asyncio.run(storm())
    assert set(statuses) == {200, 429}
    spent, remaining = _settled(pair)
    assert 0 < spent <= 20_000
    assert remaining == 20_000 - spent


def _settled(pair: tuple[GatewayProcess, GatewayProcess]) -> tuple[int, int]:
    """Wait until both gateways are idle. Return tokens spent by the ledger and tokens left by the headers."""
    for gateway in pair:
        for _ in range(200):
            if not gateway.metric("shannon_engine_unfinished_requests") + gateway.metric("shannon_streams_open"):
                break
    rows = httpx.get(f"{pair[0].url}/v1/usage", headers=pair[0].authorization).json()["data"]
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    # A request that is refused for its form costs nothing and tells the standing.
    told = pair[1].chat(messages=[])
    assert told.status_code == 400
    return spent, int(told.headers["x-ratelimit-remaining-tokens"])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_client_that_obeys_retry_after_gets_in_at_the_first_retry(tmp_path: Path) -> None:
    """A hundred keys, each over its limit at a random moment, each waits exactly as long as it was told."""

    async def trial(client: httpx.AsyncClient, gateway: GatewayProcess, number: int, rng: random.Random) -> int:
        spec = {"name": f"key {number}", "limits": {"shannon-chat": {"requests_per_minute": 2}}}
        made = await client.post(f"{gateway.url}/admin/keys", json=spec, headers=gateway.authorization)
        headers = {"Authorization": f"Bearer {made.json()['key']}"}
        url, body = f"{gateway.url}/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}
        await asyncio.sleep(rng.uniform(0, 2))
        first = await client.post(url, json=body, headers=headers)
        await asyncio.sleep(rng.uniform(0, 1))
        second = await client.post(url, json=body, headers=headers)
        assert (first.status_code, second.status_code) == (200, 200)
        refused = await client.post(url, json=body, headers=headers)
        assert refused.status_code == 429
        await asyncio.sleep(int(refused.headers["retry-after-ms"]) / 1000)
        return (await client.post(url, json=body, headers=headers)).status_code

    async def trials(gateway: GatewayProcess) -> list[int]:
        rng = random.Random(1)
        async with _client() as client:
            return await asyncio.gather(*(trial(client, gateway, number, rng) for number in range(100)))

    with serve(tmp_path, _tree()) as gateway:
        gateway.wait_until_ready()
        got_in = asyncio.run(trials(gateway)).count(200)
    print(f"{got_in} of 100 got in at the first retry")
    assert got_in >= 99
