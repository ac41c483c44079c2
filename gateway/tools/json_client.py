"""HTTP requests to a service that answers in JSON, within bounds of time and size.

Follows no redirects and uses no proxies, cookies or .netrc. Raises ToolError, whose message names the service and
nothing that it said; what a status means is the caller's to know.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from gateway.outbound.fetch import USER_AGENT
from gateway.tools.base import ToolError

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 8 * 2**20
_MAX_BYTES_AT_ONCE = 2**18


@dataclass(frozen=True, slots=True)
class Answer:
    """A service's response."""

    status: int
    body: dict[str, Any]
    retry_after_s: float | None = None


class JsonClient:
    """Connections to one service."""

    def __init__(self, whom: str, timeout_s: float) -> None:
        self._whom = whom
        self._timeout_s = timeout_s

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        # Made at the first use, because it reads hundreds of certificates.
        headers = {"Accept": "application/json", "User-Agent": USER_AGENT}
        return httpx.AsyncClient(trust_env=False, timeout=self._timeout_s, headers=headers)

    async def ask(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request, with `body` as JSON or with a form. Raises ToolError."""
        request = self._client.build_request(method, url, params=params, json=body, data=form, headers=headers)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.send(request, stream=True)
                try:
                    content = await self._read(response)
                finally:
                    await response.aclose()
        except (httpx.TimeoutException, TimeoutError) as error:
            message = f"{self._whom} did not answer within {self._timeout_s:g} s."
            raise ToolError(message, may_pass=True) from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            log.warning("%s can't be reached: %s", self._whom, type(error).__name__)
            raise ToolError(f"{self._whom} can't be reached.", may_pass=True) from error
        # A long answer is parsed beside the event loop.
        parsed = _parsed(content) if len(content) <= _MAX_BYTES_AT_ONCE else await asyncio.to_thread(_parsed, content)
        return Answer(response.status_code, parsed, _retry_after_s(response))

    async def close(self) -> None:
        """Close the connections. Idempotent; the next request opens new ones."""
        client = self.__dict__.pop("_client", None)
        if client is not None:
            await client.aclose()

    async def _read(self, response: httpx.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise ToolError(f"{self._whom} returned a response that is too long.", out_of_order=True)
        return bytes(content)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _retry_after_s(response: httpx.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() else None
