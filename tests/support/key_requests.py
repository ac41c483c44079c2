"""A connection that sends an API key.

Example:

    principal = await authenticator.authenticate(sending(key))
"""

from __future__ import annotations

from starlette.requests import HTTPConnection


def sending(key: str, host: str = "203.0.113.7") -> HTTPConnection:
    return HTTPConnection({"type": "http", "headers": [(b"x-api-key", key.encode())], "client": (host, 50_000)})
