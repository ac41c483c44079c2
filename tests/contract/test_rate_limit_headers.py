"""The six rate limit headers: on every metered response, success or error, with figures that a client can act on."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.base import EngineDied
from engine.mock import Fault, MockEngine
from gateway.access.keys import KeySpec
from tests.support.app import Gateway, Start
from tests.support.rate_limits import SIX, assert_six, remaining
from tests.support.store_server import run_store

pytestmark = pytest.mark.anyio


def models(**limits: int) -> dict[str, Any]:
    """Return a configuration in which both models have `limits`."""
    return {
        "models": {
            "shannon-chat": {"description": "General chat completion", "limits": limits},
            "shannon-complex": {"description": "Multi-agent orchestration", "limits": limits},
        }
    }


async def test_whole_response_has_the_six(gateway: Gateway) -> None:
    response = await gateway.chat()

    assert_six(response)
    assert response.headers["x-ratelimit-limit-requests"] == "60"
    assert response.headers["x-ratelimit-limit-tokens"] == "200000"


async def test_stream_has_the_six(serve: Start) -> None:
    gateway = await serve()
    async with gateway.stream() as response:
        assert_six(response)
        await response.aread()


async def test_unused_tokens_are_back_in_remaining_after_a_whole_response(gateway: Gateway) -> None:
    responses = [await gateway.chat(max_tokens=500) for _ in range(2)]
    spent = gateway.spent()

    assert remaining(responses[0]) == (59, 200_000 - (spent.prompt_tokens + spent.completion_tokens) // 2)
    assert remaining(responses[1]) == (58, 200_000 - spent.prompt_tokens - spent.completion_tokens)


async def test_stream_shows_its_reservation_and_gives_back_the_rest(serve: Start) -> None:
    gateway = await serve()
    async with gateway.stream(max_tokens=500) as response:
        assert remaining(response) == (59, 200_000 - 3 - 500)
        await response.aread()
    spent = gateway.spent()

    after = await gateway.chat(max_tokens=1)
    assert remaining(after)[1] == 200_000 - spent.prompt_tokens - spent.completion_tokens - 4


async def test_stream_that_its_client_leaves_gives_back_the_rest(serve: Start) -> None:
    gateway = await serve()
    gateway.mock.faults.append(Fault(at_token=2))  # hangs
    async with gateway.stream(max_tokens=500) as response:
        await anext(response.aiter_raw())
    async with asyncio.timeout(5):
        while gateway.requests_in_progress():
            await asyncio.sleep(0.002)
    spent = gateway.spent()

    after = await gateway.chat(max_tokens=1)
    assert remaining(after)[1] == 200_000 - spent.prompt_tokens - spent.completion_tokens - 4


async def test_failed_generation_has_the_six_and_gives_back_the_rest(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("boom")))
    response = await gateway.chat(max_tokens=500)

    assert response.status_code == 503
    assert_six(response)
    assert remaining(response) == (59, 200_000 - 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_refused_request_has_the_six_and_when_to_come_back(start: Start, stream: bool) -> None:
    gateway = await start(config=models(requests_per_minute=2))
    for _ in range(2):
        await gateway.chat()
    response = await gateway.chat(stream=stream)

    assert response.status_code == 429
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert_six(response)
    assert remaining(response)[0] == 0
    assert response.headers["x-should-retry"] == "true"
    wait_ms = int(response.headers["retry-after-ms"])
    assert 55_000 < wait_ms <= 61_000
    assert int(response.headers["retry-after"]) == -(-wait_ms // 1000)
    reset = datetime.fromisoformat(response.headers["x-ratelimit-reset-requests"]).timestamp()
    assert abs(reset - datetime.now(UTC).timestamp() - wait_ms / 1000) < 2


async def test_refused_requests_cost_nothing(start: Start) -> None:
    gateway = await start(config=models(tokens_per_minute=100))
    await gateway.chat(max_tokens=50)
    before = remaining(await gateway.chat(max_tokens=50))
    for _ in range(5):
        response = await gateway.chat(max_tokens=97)
        assert response.status_code == 429

    assert remaining(response) == before


async def test_only_as_many_as_the_limit_pass_at_once(start: Start) -> None:
    gateway = await start(config=models(requests_per_minute=10))
    responses = await asyncio.gather(*(gateway.chat() for _ in range(40)))

    assert sorted(response.status_code for response in responses) == [200] * 10 + [429] * 30


async def test_tokens_that_could_never_fit_are_no_endless_429(start: Start) -> None:
    gateway = await start(config=models(tokens_per_minute=100))
    response = await gateway.chat(max_tokens=98)

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "tokens_exceed_limit"
    assert_six(response)
    assert response.headers["x-should-retry"] == "false"
    assert (await gateway.chat()).status_code == 200, "a request that names no maximum is made to fit"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"messages": []}, {}),
        ({"messages": [{"role": "user", "content": "hi"}], "temperature": 9}, {}),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, {}),
        ({"messages": [{"role": "user", "content": "hi"}]}, {"X-Session-ID": "not an id"}),
    ],
    ids=["empty", "field", "context", "session"],
)
async def test_bad_request_has_the_six(gateway: Gateway, body: dict[str, Any], headers: dict[str, str]) -> None:
    response = await gateway.client.post("/v1/chat/completions", json=body, headers=headers)

    assert response.status_code == 400
    assert_six(response)
    assert remaining(response) == (60, 200_000)


async def test_body_that_is_not_json_has_the_six(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=b"{")

    assert response.status_code == 400
    assert_six(response)


async def test_body_that_is_too_large_or_too_slow_has_the_six(start: Start) -> None:
    gateway = await start(server={"max_body_bytes": 2048, "body_timeout_s": 0.05})

    async def stalling() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    for content, status in ((b"x" * 2049, 413), (stalling(), 408)):
        response = await gateway.client.post("/v1/chat/completions", content=content)
        assert response.status_code == status
        assert_six(response)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
        ("/api/v1/chat/submit", {"prompt": "hi", "client_id": "c"}),
    ],
)
async def test_draining_gateway_tells_the_standing_with_the_model_that_was_meant(
    start: Start, path: str, fields: dict[str, Any]
) -> None:
    config = models(requests_per_minute=7)
    config["models"]["shannon-chat"]["limits"] = {"requests_per_minute": 5}
    gateway = await start(config=config)
    gateway.services.drain.draining = True
    response = await gateway.client.post(path, json=fields | {"model": "shannon-complex"})

    assert response.status_code == 503
    assert_six(response)
    assert response.headers["x-ratelimit-limit-requests"] == "7"
    assert response.headers["retry-after"] == "1"


async def test_job_for_nobody_has_the_six(gateway: Gateway) -> None:
    response = await gateway.client.post("/api/v1/chat/submit", json={"prompt": "hi", "client_id": "nobody"})

    assert response.status_code == 404
    assert_six(response)


async def test_bad_request_of_a_key_without_the_default_model_is_still_about_the_request(gateway: Gateway) -> None:
    _, key = await gateway.services.keys.create(KeySpec(name="narrow", models=["shannon-complex"]))
    response = await gateway.client.post(
        "/v1/chat/completions",
        json={"model": "shannon-complex", "messages": []},
        headers={"Authorization": f"Bearer {key}"},
    )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/shannon-chat", "/v1/usage"])
async def test_other_routes_are_not_metered(start: Start, path: str) -> None:
    gateway = await start(config=models(requests_per_minute=2))
    for _ in range(5):
        response = await gateway.client.get(path)
        assert response.status_code == 200
        assert not [name for name in SIX if name in response.headers]

    assert remaining(await gateway.chat())[0] == 1


async def test_unauthenticated_request_has_none(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions", json={}, headers={"Authorization": "Bearer wrong"})

    assert response.status_code == 401
    assert not [name for name in SIX if name in response.headers]


async def test_models_and_keys_are_limited_apart(start: Start) -> None:
    gateway = await start(config=models(requests_per_minute=1))
    _, key = await gateway.services.keys.create(KeySpec(name="other"))
    other = {"Authorization": f"Bearer {key}"}
    assert (await gateway.chat()).status_code == 200
    assert (await gateway.chat()).status_code == 429

    assert (await gateway.chat(model="shannon-complex")).status_code == 200
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await gateway.client.post("/v1/chat/completions", json=body, headers=other)).status_code == 200


async def test_concurrent_requests_of_a_key_are_limited(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.02), config=models(concurrent_requests=1))
    async with gateway.stream() as response:
        assert response.status_code == 200
        refused = await gateway.chat()
        assert refused.status_code == 429
        assert "concurrent requests" in refused.json()["error"]["message"]
        await response.aread()

    assert (await gateway.chat()).status_code == 200


async def test_limits_that_are_off_refuse_nobody(start: Start) -> None:
    config = models(requests_per_minute=1, tokens_per_minute=10) | {"limits": {"enabled": False}}
    gateway = await start(config=config)

    assert [(await gateway.chat()).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(("behaviour", "status"), [("local", 200), ("closed", 503)])
async def test_limits_without_their_store(start: Start, tmp_path: Path, behaviour: str, status: int) -> None:
    with run_store("valkey", tmp_path / "own") as own:
        gateway = await start(
            environment={"SHANNON_REDIS_URL": own.url}, config={"limits": {"on_store_failure": behaviour}}
        )
        own.stop()
        response = await gateway.chat()

    assert response.status_code == status
    if status == 200:
        assert_six(response)
        assert response.headers["x-shannon-limits"] == "local"
    else:
        assert response.headers["retry-after"] == "1"
