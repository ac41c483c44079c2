"""CORS: configured origins only, and they may read the session, the request id, when to retry and the rate limits."""

from __future__ import annotations

import httpx
import pytest

from engine.base import EngineOverloaded, GenerationRequest
from engine.mock import Fault, MockEngine
from tests.support.app import HELLO, Gateway, Start

pytestmark = pytest.mark.anyio

ORIGIN = "https://app.example.com"
EXPOSED = {
    "x-session-id",
    "x-request-id",
    *("retry-after", "retry-after-ms", "x-should-retry"),
    *(f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
}


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway that one origin may call from a browser."""
    return await start(server={"cors_origins": [ORIGIN]})


async def preflight(gateway: Gateway, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type, x-session-id, x-stainless-lang",
    }
    del gateway.client.headers["Authorization"]  # browsers send no key with a preflight
    return await gateway.client.options("/v1/chat/completions", headers=headers)


async def test_preflight_of_a_configured_origin_allows_the_sdks_headers(gateway: Gateway) -> None:
    response = await preflight(gateway, ORIGIN)

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    allowed = {name.strip().lower() for name in response.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-session-id", "x-stainless-lang"} <= allowed


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.com.evil.example", "http://app.example.com", "null"]
)
async def test_preflight_of_another_origin_is_refused(gateway: Gateway, origin: str) -> None:
    response = await preflight(gateway, origin)

    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


async def test_response_to_a_configured_origin_exposes_our_headers(gateway: Gateway) -> None:
    response = await gateway.client.get("/v1/models", headers={"Origin": ORIGIN})

    assert response.headers["access-control-allow-origin"] == ORIGIN
    exposed = {name.strip().lower() for name in response.headers["access-control-expose-headers"].split(",")}
    assert exposed >= EXPOSED
    assert "origin" in response.headers["vary"].lower()


async def test_response_to_another_origin_allows_nothing(gateway: Gateway) -> None:
    response = await gateway.client.get("/v1/models", headers={"Origin": "https://evil.example"})

    assert "access-control-allow-origin" not in response.headers


async def test_no_origin_is_allowed_by_default(start: Start) -> None:
    gateway = await start()

    response = await gateway.client.get("/v1/models", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers
    assert "access-control-allow-origin" not in (await preflight(gateway, ORIGIN)).headers


async def test_stream_and_errors_are_readable_by_a_configured_origin(gateway: Gateway) -> None:
    async def post(body: dict[str, object], **headers: str) -> httpx.Response:
        return await gateway.client.post("/v1/chat/completions", json=body, headers={"Origin": ORIGIN} | headers)

    gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
    responses = [
        await post({"messages": HELLO, "stream": True}),
        await post({"messages": HELLO, "stream": True}),
        await post({"messages": []}),
        await post({"messages": HELLO, "model": "gpt-5"}),
        await post({"messages": HELLO}, Authorization="Bearer wrong"),
        await gateway.client.get("/v1/nowhere", headers={"Origin": ORIGIN}),
    ]

    assert [response.status_code for response in responses] == [503, 200, 400, 404, 401, 404]
    assert {response.headers["access-control-allow-origin"] for response in responses} == {ORIGIN}


async def test_error_500_is_readable_by_a_configured_origin(start: Start) -> None:
    def broken(request: GenerationRequest) -> str:
        raise RuntimeError("boom")

    gateway = await start(server={"cors_origins": [ORIGIN]}, mock=lambda: MockEngine(reply=broken))
    response = await gateway.client.post("/v1/chat/completions", json={"messages": HELLO}, headers={"Origin": ORIGIN})

    assert response.status_code == 500
    assert response.headers["access-control-allow-origin"] == ORIGIN
