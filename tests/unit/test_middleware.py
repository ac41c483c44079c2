"""What happens around every request: its id, the Host header, and one line in the access log."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.serving.middleware import RequestMiddleware
from gateway.telemetry.logs import TextFormatter
from gateway.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


async def _ok(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.state.request_id)


async def _broken(request: Request) -> PlainTextResponse:
    raise KeyError("secret detail")


def wrapped(metrics: Metrics | None = None, **settings: Any) -> ASGIApp:
    options: dict[str, Any] = {"metrics": metrics or Metrics(), "max_body_bytes": 1024, "allowed_hosts": []} | settings
    return Starlette(
        routes=[Route("/ok/{name:path}", _ok), Route("/broken", _broken)],
        middleware=[Middleware(RequestMiddleware, **options)],
    )


async def get(app: ASGIApp, path: str = "/ok/1", **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway.test") as client:
        return await client.get(path, headers=sent)


@pytest.mark.parametrize("request_id", ["abc", "req_1.2:3-4", "x" * 128])
async def test_request_id_of_the_client_is_echoed(request_id: str) -> None:
    response = await get(wrapped(), x_request_id=request_id)

    assert response.headers["x-request-id"] == request_id
    assert response.text == request_id


@pytest.mark.parametrize("request_id", ["", "has space", "x" * 129, "<script>", "a/b", 'quote"'])
async def test_request_id_of_another_form_is_replaced(request_id: str) -> None:
    response = await get(wrapped(), x_request_id=request_id)

    assert response.headers["x-request-id"] == response.text
    assert response.text.startswith("req_")
    assert len(response.text) == 36


@pytest.mark.parametrize(
    "host",
    [
        "api.example.com",
        "API.Example.Com",
        "api.example.com:8080",
        "eu.shannon.test",
        "a.b.shannon.test:1",
        "[::1]:80",
        "[::1]",
    ],
)
async def test_allowed_host_is_served(host: str) -> None:
    app = wrapped(allowed_hosts=["api.example.com", "*.Shannon.test", "[::1]"])

    assert (await get(app, host=host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.test",
        "api.example.com.evil.test",
        "evil-api.example.com",
        "shannon.test",
        "evilshannon.test",
        "[::2]:80",
        "",
    ],
)
async def test_other_host_is_refused(host: str) -> None:
    app = wrapped(allowed_hosts=["api.example.com", "*.shannon.test", "[::1]"])
    response = await get(app, host=host)

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The Host header names a host that this server does not serve."
    assert response.headers["x-request-id"].startswith("req_")


async def test_any_host_is_served_when_none_is_configured() -> None:
    assert (await get(wrapped(), host="whatever.test")).status_code == 200


async def test_unhandled_exception_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    response = await get(wrapped(), "/broken", x_request_id="r1")

    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-request-id"] == "r1"
    assert "request r1 failed" in caplog.text
    assert "secret detail" in caplog.text, "the operator sees the cause"


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "shannon.access"]
    return [TextFormatter().format(record) for record in records]


async def test_access_log_has_one_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await get(wrapped(), "/ok/x?api_key=hidden", x_request_id="r1")

    (line,) = access_lines(caplog)
    assert " INFO shannon.access: GET /ok/{name:path} 200 request_id=r1 method=GET path=/ok/{name:path} " in line
    assert "hidden" not in line


class Probed:
    """A gateway whose probes answer what they are told to."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        self._caplog = caplog
        self.status = 200
        paths = ("/health", "/ready", "/metrics")
        routes = [Route(path, self._answer, methods=["GET", "POST"]) for path in paths]
        middleware = [Middleware(RequestMiddleware, metrics=Metrics(), max_body_bytes=1024, allowed_hosts=[])]
        self._app = Starlette(routes=routes, middleware=middleware)

    async def _answer(self, request: Request) -> PlainTextResponse:
        if key := request.headers.get("key"):
            request.state.key_id = key
        return PlainTextResponse("", self.status)

    async def ask(self, path: str, status: int = 200, method: str = "GET", **headers: str) -> str:
        """Ask once. Returns the level of the line in the access log."""
        self.status = status
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self._app), base_url="http://gateway.test"
        ) as client:
            await client.request(method, path, headers=headers)
        return [record.levelname for record in self._caplog.records if record.name == "shannon.access"][-1]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probe_is_a_line_of_debug(caplog: pytest.LogCaptureFixture, path: str, method: str) -> None:
    probed = Probed(caplog)

    assert [await probed.ask(path, method=method) for _ in range(3)] == ["DEBUG"] * 3
    assert await probed.ask(path, method="POST") == "INFO", "no probe does that"


async def test_probe_is_a_line_of_info_when_its_answer_changes(caplog: pytest.LogCaptureFixture) -> None:
    probed = Probed(caplog)
    statuses = [503, 503, 503, 200, 200, 503, 503, 500, 500, 200, 200]

    levels = [await probed.ask("/ready", status) for status in statuses]

    changes = [True, False, False, True, False, True, False, True, False, True, False]
    assert levels == ["INFO" if change else "DEBUG" for change in changes]
    assert await probed.ask("/health", 503) == "INFO", "each has a state of its own"


async def test_scraper_with_a_wrong_key_does_not_hide_in_the_others_scrapes(caplog: pytest.LogCaptureFixture) -> None:
    probed = Probed(caplog)

    levels = [
        await probed.ask("/metrics", status, key=key) for _ in range(3) for key, status in (("", 401), ("k", 200))
    ]

    assert levels == ["INFO", *["DEBUG"] * 5]


async def test_path_cannot_forge_a_line_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await get(wrapped(), "/nowhere/x%0AGET%20/forged%20200%20key_id=admin%1b%5b2J")

    (line,) = access_lines(caplog)
    assert "\n" not in line
    assert "\x1b" not in line
    assert " key_id=" not in line


async def test_request_is_counted_by_route_template() -> None:
    metrics = Metrics()
    app = wrapped(metrics)
    await get(app, "/nowhere/else")

    page = metrics.render().decode()
    assert 'shannon_requests_total{route="unmatched",status="404"} 1.0' in page
    assert "nowhere" not in page
