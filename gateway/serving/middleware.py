"""ASGI middleware around every request: request id, host check, body limit, timing, access log, last resort.

Starlette's `BaseHTTPMiddleware` is not used: it hides the client's disconnect from the route, so nothing would abort.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import CLIENT_DISCONNECTED, BadRequest, GatewayError, InternalError, RequestTimeout, RequestTooLarge
from gateway.exchange.error_response import ErrorResponse
from gateway.meter import Meter
from gateway.telemetry.logs import without_keys
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Span, Tracing

log = logging.getLogger("shannon.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = ("/health", "/ready")  # a kubelet asks for them by the pod's address
_UNTRACED = (*_PROBES, "/metrics")  # they come every few seconds, and have nothing to trace
_MAX_PATH_CHARS = 200

CLIENT_CLOSED_REQUEST = 499
"""Logged and counted when the client left before any status was sent; nginx's number for it."""
UNMATCHED = "unmatched"
"""Route label for requests that matched no route."""


class RequestMiddleware:
    """Request id, Host check, metrics, trace and access log of every request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_body_bytes: int,
        allowed_hosts: list[str],
        body_timeout_s: float = 60.0,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing or Tracing()
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._allowed_hosts = [host.lower() for host in allowed_hosts]
        self._failing: dict[tuple[str, str | None], int] = {}
        """Probes and scrapes that fail, by path and key, with their status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] in _UNTRACED:
            await self._serve(scope, receive, send, headers, Span())
            return
        with self._tracing.request(scope["method"], scope["scheme"], scope["path"], headers) as span:
            await self._serve(scope, receive, send, headers, span)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: Span) -> None:
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took_ms = (time.perf_counter() - started) * 1000
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % took_ms),
                ]
            elif scope["method"] == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            if scope["path"] not in _PROBES:
                self._check_host(headers.get("host", ""))
            bounded = self._bounded(receive, headers, lambda: status != CLIENT_CLOSED_REQUEST)
            await self._app(scope, bounded, send_with_headers)
        except GatewayError as error:
            await ErrorResponse(error)(scope, receive, send_with_headers)
        except ClientDisconnect:  # it left while sending its body; there is no client to answer
            scope["state"]["error"] = CLIENT_DISCONNECTED
        except Exception:
            log.exception("request %s failed", request_id)
            scope["state"]["error"] = InternalError.code
            if status == CLIENT_CLOSED_REQUEST:
                unexpected = InternalError()
                await ErrorResponse(unexpected)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, started, span)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0].lower() if not host.endswith("]") else host.lower()
        for allowed in self._allowed_hosts:
            if name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])):
                return
        if self._allowed_hosts:
            raise BadRequest("The Host header names a host that this server does not serve.")

    def _bounded(self, receive: Receive, headers: Headers, started: Callable[[], bool]) -> Receive:
        """Return `receive` with bounds on the body's size and time. The announced length is checked before a byte is
        read.

        A body that goes over raises RequestTooLarge or RequestTimeout once; later calls drop what comes and wait for
        the client to leave. So do all calls after the answer has `started`: the body is not read any more, and who
        watches for the departure must not be ended by it.
        """
        announced = headers.get("content-length", "")
        left = self._max_body_bytes
        wait_s = self._body_timeout_s
        """How long the client may still be waited for. Time in which the body is not read does not count."""
        reading = True

        async def receive_bounded() -> Message:
            nonlocal left, wait_s, reading
            if reading and not started():
                reading = False  # where this raises
                if announced.isdecimal() and int(announced) > self._max_body_bytes:
                    raise self._too_large()
                asked_at = time.monotonic()
                try:
                    async with asyncio.timeout(wait_s):
                        message = await receive()
                except TimeoutError:
                    text = f"The request body did not arrive within {self._body_timeout_s:g} seconds."
                    raise RequestTimeout(text) from None
                wait_s -= time.monotonic() - asked_at
                left -= len(message.get("body", b""))
                if left < 0:
                    raise self._too_large()
                reading = message.get("more_body", False)
                return message
            while True:
                with contextlib.suppress(GatewayError):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return message

        return receive_bounded

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than the limit of {self._max_body_bytes} bytes.")

    def _record(self, scope: Scope, status: int, started: float, span: Span) -> None:
        duration_s = time.perf_counter() - started
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.request(route, status, duration_s)
        state = scope["state"]
        error = state.get("error")
        if error not in (None, CLIENT_DISCONNECTED):
            self._metrics.error(error)
        span.asked(state["request_id"], state.get("key_id"))
        sent = None if status == CLIENT_CLOSED_REQUEST else status
        span.answered(scope["method"], route, sent, error)
        level = self._level(scope, status)
        if log.isEnabledFor(level):
            # As it was asked for only where that helps. The server has decoded it: it could hold a line break.
            path = quote(without_keys(scope["path"]), safe="/[]")[:_MAX_PATH_CHARS] if route == UNMATCHED else route
            fields = _fields(scope, route, status, started, duration_s) | {"trace_id": span.trace_id}
            told = {name: value for name, value in fields.items() if value is not None}
            log.log(level, "%s %s %d", scope["method"], path, status, extra={"fields": told})

    def _level(self, scope: Scope, status: int) -> int:
        """Return the level of a request's line in the access log: DEBUG for probes and scrapes.

        They come every few seconds. The first one that fails is INFO, and the first one after that which does not.
        Each key has its own state, because a scraper with a wrong key says nothing about another one.
        """
        path = scope["path"]
        if path not in _UNTRACED or scope["method"] not in ("GET", "HEAD"):
            return logging.INFO
        asker = path, scope["state"].get("key_id")
        before = self._failing.get(asker)
        if status < 400:
            self._failing.pop(asker, None)
            return logging.DEBUG if before is None else logging.INFO
        self._failing[asker] = status
        return logging.DEBUG if before == status else logging.INFO


def _fields(scope: Scope, route: str, status: int, started: float, duration_s: float) -> dict[str, Any]:
    """The access log's fields of a request: who, what, how much and how long, and no text of prompts or answers."""
    state = scope["state"]
    meter: Meter | None = state.get("meter")
    fields = {
        "request_id": state["request_id"],
        "method": scope["method"],
        "path": route,
        "status": status,
        "duration_ms": round(duration_s * 1000, 1),
        "key_id": state.get("key_id"),
        "tenant": state.get("tenant"),
        "error": state.get("error"),
        "streamed": state.get("streamed"),
    }
    if meter is not None:
        fields |= meter.facts()
        if state.get("streamed") and meter.first_token_at is not None:
            fields["time_to_first_token_ms"] = round((meter.first_token_at - started) * 1000, 1)
    return fields


def new_request_id() -> str:
    """Return an id for a request that brings none."""
    return f"req_{secrets.token_hex(16)}"
