"""The answer to a request that failed before any status was sent."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import GatewayError, RequestTooLarge


class ErrorResponse(Response):
    """The response for an error before any status was sent. Records its code for the access log."""

    def __init__(self, error: GatewayError, body: bytes | None = None) -> None:
        """`body` replaces OpenAI's."""
        headers = error.headers()
        if isinstance(error, RequestTooLarge):
            headers["Connection"] = "close"  # the rest of the body is not worth reading
        super().__init__(error.body() if body is None else body, error.status, headers, "application/json")
        self._code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["error"] = self._code
        await super().__call__(scope, receive, send)
