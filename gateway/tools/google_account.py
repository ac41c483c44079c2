"""A Google service account: its key file in, access tokens out.

The assertion is signed here, which takes a millisecond, and exchanged over the caller's own HTTP client, so that
nothing blocks the event loop and everything can be cancelled (RFC 7523, as Google documents it for service accounts).
google-auth signs. The public asynchronous credentials of its version 2.62 (`google.auth.aio`) have no service accounts.
Does not handle other kinds of credentials. Raises ValueError on a file that is no service account's key, whose message
is for the operator, and ToolError if Google gives no token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.auth import crypt, jwt

from engine.plain_file import read_plain_file
from gateway.tools.base import ToolError
from gateway.tools.json_client import JsonClient

log = logging.getLogger(__name__)

_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_TOKEN_URL = "https://oauth2.googleapis.com/token"
_ASSERTION_S = 3600
"""Longest lifetime that Google allows."""
_SPARE_S = 60.0
"""A token is renewed this long before it expires, so that none expires in transit."""


class ServiceAccount:
    """Caches one access token until shortly before it expires. Concurrent callers wait for one exchange."""

    def __init__(self, info: dict[str, Any], scope: str, *, clock: Callable[[], float] = time.time) -> None:
        """`info` is the content of the key file. Raises ValueError."""
        self._email = info.get("client_email")
        if info.get("type") != "service_account" or not isinstance(self._email, str):
            raise ValueError("it is not the key file of a service account")
        # Raises ValueError on a key that can't be read.
        self._signer = crypt.RSASigner.from_service_account_info(info)  # type: ignore[no-untyped-call]
        self._token_url = str(info.get("token_uri") or _TOKEN_URL)
        self._scope = scope
        self._clock = clock
        self._token = ""
        self._expires = 0.0
        self._exchange = asyncio.Lock()

    @classmethod
    def from_file(cls, path: Path, scope: str) -> ServiceAccount:
        """Read a key file made by Google's console. Raises ValueError."""
        try:
            info = json.loads(read_plain_file(path))
        except OSError as error:
            raise ValueError(f"it can't be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError("it is not JSON") from error
        return cls(info if isinstance(info, dict) else {}, scope)

    async def token(self, client: JsonClient) -> str:
        """Return an access token. Raises ToolError."""
        async with self._exchange:
            if self._clock() >= self._expires - _SPARE_S:
                self._token, life_s = await self._fetch(client)
                self._expires = self._clock() + life_s
            return self._token

    def forget(self, token: str) -> None:
        """Drop a token that was refused, unless there is a newer one."""
        if token == self._token:
            self._expires = 0.0

    async def _fetch(self, client: JsonClient) -> tuple[str, float]:
        now = int(self._clock())
        claims = {"iss": self._email, "scope": self._scope, "aud": self._token_url, "iat": now}
        claims["exp"] = now + _ASSERTION_S
        assertion: bytes = jwt.encode(self._signer, claims)  # type: ignore[no-untyped-call]
        form = {"grant_type": _GRANT, "assertion": assertion.decode()}
        answer = await client.ask("POST", self._token_url, form=form)
        if answer.status != 200:
            # 4xx says that the key was revoked or the machine's clock is wrong, which waiting does not fix.
            log.error("Google gives no access token for the service account (status %d)", answer.status)
            raise ToolError(
                "Google refuses the service account's key.", may_pass=answer.status >= 500, out_of_order=True
            )
        token, life_s = answer.body.get("access_token"), answer.body.get("expires_in", _ASSERTION_S)
        if not isinstance(token, str) or not isinstance(life_s, int | float):
            raise ToolError("Google's answer has no access token.", may_pass=True)
        return token, float(life_s)
