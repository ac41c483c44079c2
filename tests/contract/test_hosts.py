"""The Host header: only configured names are served, on every route, before anything else is looked at."""

from __future__ import annotations

import pytest

from tests.support.app import HELLO, Start

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("host", ["api.example.com", "api.example.com:8080", "eu.api.example.com"])
async def test_configured_host_is_served(start: Start, host: str) -> None:
    gateway = await start(server={"allowed_hosts": ["api.example.com", "*.api.example.com"]})
    response = await gateway.client.post("/v1/chat/completions", json={"messages": HELLO}, headers={"Host": host})

    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/nowhere"])
@pytest.mark.parametrize("host", ["evil.example", "api.example.com.evil.example", "evilapi.example.com"])
async def test_other_host_is_refused_on_every_route(start: Start, path: str, host: str) -> None:
    gateway = await start(server={"allowed_hosts": ["api.example.com", "*.api.example.com"]})
    response = await gateway.client.post(path, json={"messages": HELLO}, headers={"Host": host})

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "The Host header names a host that this server does not serve.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_request",
    }
    assert response.headers["x-should-retry"] == "false"
    assert gateway.mock.requests == []


async def test_any_host_is_served_by_default(start: Start) -> None:
    gateway = await start()

    assert (await gateway.client.get("/v1/models", headers={"Host": "10.1.2.3:8080"})).status_code == 200


async def test_forged_host_does_not_open_a_route(start: Start) -> None:
    gateway = await start()
    del gateway.client.headers["Authorization"]
    for host in ("gateway.test/health?", "gateway.test/ready#", "x@gateway.test/health"):
        response = await gateway.client.get("/v1/models", headers={"Host": host})

        assert response.status_code == 401
