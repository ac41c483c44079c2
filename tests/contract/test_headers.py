"""Headers on every response: the request's id, how long it took, and nothing that gives the server away."""

from __future__ import annotations

import re

import httpx
import pytest

from engine.base import EngineDied
from engine.mock import Fault, MockEngine
from tests.support.app import Gateway, Start

pytestmark = pytest.mark.anyio

REQUESTS = [
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/gpt-5", None),
    ("GET", "/v1/nowhere", None),
    ("GET", "/v1/chat/completions", None),
    ("POST", "/v1/chat/completions", b"{"),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}]}'),
    ("POST", "/v1/chat/completions?stream=true", b'{"messages": [{"role": "user", "content": "hi"}]}'),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"x" * 5000)),
]


def check(response: httpx.Response) -> None:
    assert response.headers.get_list("openai-processing-ms") == [response.headers["openai-processing-ms"]]
    assert 0 <= int(response.headers["openai-processing-ms"]) < 5000
    assert len(response.headers.get_list("x-request-id")) == 1
    assert "server" not in response.headers


@pytest.mark.parametrize(("method", "path", "content"), REQUESTS)
@pytest.mark.parametrize("key", [True, False])
async def test_every_response_has_an_id_and_its_time(
    start: Start, method: str, path: str, content: bytes | None, key: bool
) -> None:
    gateway = await start(server={"max_body_bytes": 4096})
    if not key:
        del gateway.client.headers["Authorization"]

    response = await gateway.client.request(method, path, content=content)

    check(response)
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize(("method", "path", "content"), REQUESTS)
async def test_request_id_of_the_client_is_echoed(
    gateway: Gateway, method: str, path: str, content: bytes | None
) -> None:
    response = await gateway.client.request(method, path, content=content, headers={"X-Request-ID": "trace-42"})

    assert response.headers["x-request-id"] == "trace-42"


async def test_failed_stream_has_them_too(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(error=EngineDied("x")))
    response = await gateway.chat(stream=True)

    assert response.status_code == 503
    check(response)


async def test_headers_on_the_wire_are_the_servers_own(serve: Start) -> None:
    gateway = await serve()
    check(await gateway.chat())
    async with gateway.stream() as response:
        await response.aread()
    check(response)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["transfer-encoding"] == "chunked"


async def test_processing_time_covers_the_wait_for_the_first_token(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(first_token_s=0.05))
    response = await gateway.chat(stream=True)

    assert 45 <= int(response.headers["openai-processing-ms"]) < 2000
