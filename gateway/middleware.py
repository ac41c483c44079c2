"""What happens around every request, in pure ASGI: request id, host check, body cap, timing, access log, last resort.

Starlette's `BaseHTTPMiddleware` is not used: it hides the client's disconnect from the route, so nothing would abort.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import BadRequest, GatewayError, InternalError, RequestTooLarge
from gateway.metrics import Metrics

log = logging.getLogger("shannon.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = ("/health", "/ready")  # a kubelet asks for them by the pod's address
CLIENT_CLOSED_REQUEST = 499
"""Logged and counted when the client left before any status was sent; nginx's number for it."""


class RequestMiddleware:
    """See the module."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int, allowed_hosts: list[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._allowed_hosts = [host.lower() for host in allowed_hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(16)}"
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
            await send(message)

        try:
            if scope["path"] not in _PROBES:
                self._check_host(headers.get("host", ""))
            await self._app(scope, self._capped(receive, headers), send_with_headers)
        except GatewayError as error:
            await error_response(error)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass  # it left while sending its body; there is nobody to answer
        except Exception:
            log.exception("request %s failed", request_id)
            if status == CLIENT_CLOSED_REQUEST:
                unexpected = InternalError("The server had an error while processing your request.")
                await error_response(unexpected)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0].lower() if not host.endswith("]") else host.lower()
        for allowed in self._allowed_hosts:
            if name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])):
                return
        if self._allowed_hosts:
            raise BadRequest("The Host header names a host that this server does not serve.")

    def _capped(self, receive: Receive, headers: Headers) -> Receive:
        """Return `receive` with the body cap. The announced length is checked first, before a byte is read."""
        left = self._max_body_bytes
        announced = headers.get("content-length", "")

        async def receive_capped() -> Message:
            nonlocal left
            if announced.isdecimal() and int(announced) > self._max_body_bytes:
                raise self._too_large()
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return receive_capped

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than the limit of {self._max_body_bytes} bytes.")

    def _record(self, scope: Scope, status: int, duration_s: float) -> None:
        route: Any = scope.get("route")
        self._metrics.request(getattr(route, "path", "unmatched"), status, duration_s)
        state = scope["state"]
        log.info(
            "%s %s %d %.1f ms request_id=%s key=%s",
            scope["method"],
            quote(scope["path"]),  # decoded by the server: it could hold a line break
            status,
            duration_s * 1000,
            state["request_id"],
            state.get("key_id", "-"),
        )


def error_response(error: GatewayError) -> Response:
    """Return the response for an error that was raised before any status was sent."""
    headers = error.headers()
    if isinstance(error, RequestTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not worth reading
    return Response(error.body(), error.status, headers, "application/json")
