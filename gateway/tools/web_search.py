"""The tool `web_search`: one query to the service that the operator chose.

The service is trusted to be what it says, its results are not: their texts are cut and freed of markup, and an address
is only kept if it can be fetched. Does not handle paging. Raises ToolError; what the operator has to fix (a wrong key,
a plan used up) is logged by its kind, never with what the service said, which may hold the key.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field, StringConstraints

from gateway.outbound.fetch import USER_AGENT
from gateway.settings.config import ConfigError, WebSearchSettings
from gateway.tools.base import Observation, ToolError
from gateway.tools.search_providers import PROVIDERS, Meaning, Provider, sources

log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 4 * 2**20
_MAX_BYTES_AT_ONCE = 2**18
_MAX_PACE_S = 20.0
"""Longest wait for a turn. An agent that would wait longer has better uses for its time."""
_OPERATORS: dict[Meaning, str] = {
    "key": "the search service refused the gateway's API key",
    "plan": "the gateway's plan at the search service is used up",
    "format": "the search server does not allow JSON: add `json` to `search.formats` in its settings.yml",
    "address": "there is no search service at the address in `tools.web_search.url`",
}
"""Faults that only the operator can fix."""


class WebSearchArguments(BaseModel):
    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
    max_results: int | None = Field(None, ge=1, le=20)


class WebSearch:
    """The tool. One instance serves all agents of this process, and keeps to `requests_per_s` over all of them."""

    name = "web_search"
    description = "Search the web. Returns titles, addresses and short excerpts; read a page with web_fetch."
    arguments = WebSearchArguments

    def __init__(
        self,
        settings: WebSearchSettings,
        environment: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], datetime.date] = datetime.date.today,
    ) -> None:
        """Raises ConfigError where the key is missing."""
        self._settings = settings
        self._provider = _provider(settings, environment)
        self._clock = clock
        self._today = today
        self._next_turn = 0.0
        self._client = httpx.AsyncClient(
            trust_env=False,  # proxies and .netrc are for people's own tools
            timeout=settings.timeout_s,
            headers={"Accept": "application/json", "User-Agent": USER_AGENT},
        )
        self.timeout_s = settings.timeout_s + _MAX_PACE_S

    async def run(self, arguments: WebSearchArguments) -> Observation:
        """The results, as sources that are not read yet. Raises ToolError."""
        limit = arguments.max_results or self._settings.max_results
        await self._wait_for_turn()
        body = await self._ask(self._provider.request(arguments.query, limit))
        try:
            found = sources(self._provider.results(body), limit, self._today())
            nothing = not found and self._provider.failure(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.error("%s answers a search in another shape than documented: %r", self._provider.name, error)
            raise ToolError("the search service returned an unreadable response.", out_of_order=True) from error
        if nothing:
            raise ToolError("the search engines behind the search server do not answer.", may_pass=True)
        lines = [
            f"{number}. {source.title}\n{source.url}{f' ({source.published})' if source.published else ''}\n"
            f"{source.snippet}"
            for number, source in enumerate(found, 1)
        ]
        return Observation("\n\n".join(lines) or "Nothing was found. Try other words.", found)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _wait_for_turn(self) -> None:
        """Keep to `requests_per_s`, over all agents of this process."""
        if self._settings.requests_per_s is None:
            return
        now = self._clock()
        turn = max(now, self._next_turn)
        if turn - now > _MAX_PACE_S:
            raise ToolError("too many searches are waiting for their turn.", out_of_order=False)
        self._next_turn = turn + 1 / self._settings.requests_per_s
        await asyncio.sleep(turn - now)

    async def _ask(self, request: dict[str, Any]) -> Any:
        """Return the JSON of the answer. Raises ToolError."""
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._client.stream(**request) as response:
                content = await _read(response)
        except (httpx.TimeoutException, TimeoutError) as error:
            message = f"the search service did not answer within {self._settings.timeout_s:g} s."
            raise ToolError(message, may_pass=True) from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            log.warning("%s can't be reached: %s", self._provider.name, type(error).__name__)
            raise ToolError("the search service can't be reached.", may_pass=True) from error
        try:
            # A long answer is parsed beside the event loop.
            small = len(content) <= _MAX_BYTES_AT_ONCE
            body = json.loads(content) if small else await asyncio.to_thread(json.loads, content)
        except (ValueError, RecursionError):
            body = None
        if response.status_code == 200 and isinstance(body, dict):
            return body
        raise self._refusal(response, body if isinstance(body, dict) else None)

    def _refusal(self, response: httpx.Response, body: Any) -> ToolError:
        status = response.status_code
        meaning: Meaning = "busy" if status == 200 else self._provider.meaning(status, body)
        if meaning in _OPERATORS:
            log.error("web_search: %s (%s, status %d)", _OPERATORS[meaning], self._provider.name, status)
            return ToolError("web_search is misconfigured; the operator has to fix it.", out_of_order=True)
        log.warning("%s answered a search with status %d", self._provider.name, status)
        if meaning == "busy":
            message = "the search service has no room at the moment." if status == 429 else "the search service failed."
            return ToolError(message, may_pass=True, retry_after_s=_retry_after_s(response))
        return ToolError("the search service refused the query; try a shorter or simpler one.")


def _provider(settings: WebSearchSettings, environment: Mapping[str, str]) -> Provider:
    kind = PROVIDERS[settings.provider]
    variable = settings.api_key_env or kind.default_api_key_env
    api_key = environment.get(variable, "").strip() if variable else ""
    if variable and not api_key:
        raise ConfigError(f"tools.web_search: {variable} is not set; {kind.name} needs its API key there")
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError(f"tools.web_search: {variable} does not contain an API key")
    return kind((settings.url or kind.default_url).rstrip("/"), api_key, settings.language)


async def _read(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _MAX_ANSWER_BYTES:
            raise ToolError("the search service returned a response that is too long.", out_of_order=True)
    return bytes(content)


def _retry_after_s(response: httpx.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() else None
