"""HTTP to the replicas of a remote engine: probes, whole answers, and streams.

One connection pool for all replicas, without a bound of its own: admission is the gateway's. It is httpx's messages
over a transport, without httpx's client: no cookies, redirects, proxies, or log of every request. What transport and
timeouts fail with leaves as AttemptFailed, refusals as `engine.wire` says. Leaves out which replica to ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import orjson

from engine.base import EmbeddingRequest, EngineError, EngineUnavailable, GenerationRequest, Prepared
from engine.http1 import Http1Transport, make_context
from engine.pool import AttemptFailed, Replica
from engine.reply import read_count
from engine.wire import CONTINUOUS_USAGE, MAX_TOKENS, STREAM_OPTIONS, Call, refuse, refused_option

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
_KEEPALIVE_S = 4.0  # uvicorn, and so vLLM, closes idle connections after 5 s
_MAX_REFUSAL_BYTES = 65_536


class Upstream:
    """See the module. `model` is the model's name at the replicas."""

    def __init__(
        self,
        model: str,
        *,
        api_key: str,
        connect_timeout_s: float,
        cache_salt: bool | None,
        priority: bool,
        tls: bool,
        tls_verify: bool,
        tls_ca_file: str | None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`tls` tells whether it is needed, `transport` stands in for the network. Raises EngineError."""
        self.model = model
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect_timeout_s = connect_timeout_s
        self._network = transport
        self._cache_salt = cache_salt
        self._priority = priority
        try:
            self._context = make_context(tls_verify, tls_ca_file) if tls else None
        except OSError as error:  # ssl.SSLError is one
            raise EngineError(f"tls_ca_file: {error.strerror or error}") from error
        self._transport: httpx.AsyncBaseTransport | None = None

    @property
    def closed(self) -> bool:
        """Whether there is no connection pool, so that nothing can be asked."""
        return self._transport is None

    def running(self) -> httpx.AsyncBaseTransport:
        """Return the connection pool. Raises EngineUnavailable when closed."""
        if self._transport is None:
            raise EngineUnavailable("The engine is not running.")
        return self._transport

    def open(self) -> None:
        """Make the connection pool; connections come as they are needed."""
        self._transport = self._network or Http1Transport(self._context, keepalive_s=_KEEPALIVE_S)

    async def close(self) -> None:
        """Close all connections; whoever reads from one gets AttemptFailed. Idempotent."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def probe(self, replica: Replica) -> None:
        """Ask for health, and learn about the model and its server. Raises AttemptFailed."""
        with transport_failures():
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                health, _ = await self._ask("GET", f"{replica.root}/health")  # 404 where there is none, as at OpenAI
                status, models = await self._ask("GET", f"{replica.url}/models")
        if health >= 500 or status in (401, 403) or status >= 500:
            raise AttemptFailed(f"answers /health with {health}, /models with {status}")
        replica.tokenizes = True
        replica.refused.clear()
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            cards = {card["id"]: card for card in models["data"]}
            if self.model not in cards:
                log.error("replica %s does not list the model %s", replica.url, self.model)
            card = cards.get(self.model, {})
            replica.max_model_len = read_count(card, "max_model_len")
            replica.is_vllm = card.get("owned_by") == "vllm"

    async def post(
        self, url: str, body: dict[str, Any], timeout_s: float, prepared: Prepared | None = None
    ) -> tuple[int, Any]:
        """Return the status and the parsed body (None if it is not JSON) of an answer. Raises AttemptFailed."""
        with transport_failures():
            async with asyncio.timeout(timeout_s):
                return await self._ask("POST", url, orjson.dumps(body), prepared)

    async def _ask(
        self, method: str, url: str, content: bytes = b"", prepared: Prepared | None = None
    ) -> tuple[int, Any]:
        async with contextlib.aclosing(await self._send(method, url, content, prepared)) as response:
            return response.status_code, _parsed(await response.aread())

    async def _send(self, method: str, url: str, content: bytes, prepared: Prepared | None) -> httpx.Response:
        """Send a request and return its response, which the caller closes. Raises httpx.TransportError."""
        headers = self._headers
        if prepared is not None:
            # By its id the replica's log can be matched with ours. It is made by the server.
            headers = headers | {"X-Request-Id": prepared.request_id} | dict(prepared.trace_headers or {})
        extensions = {"timeout": {"connect": self._connect_timeout_s}}
        request = httpx.Request(method, url, headers=headers, content=content, extensions=extensions)
        return await self.running().handle_async_request(request)

    @contextlib.asynccontextmanager
    async def stream(
        self, replica: Replica, prepared: Prepared, deadline: float
    ) -> AsyncIterator[tuple[AsyncIterator[bytes], Callable[[], bytes]]]:
        """Post a generation; give the bytes of its stream, and a function for those that arrived but were not read.

        Leaving closes the connection, which aborts the generation there. Options that the replica does not know are
        left out and remembered. `deadline` is the event loop's time, for the head of the response. Raises
        AttemptFailed, InvalidRequest.
        """
        call: Call = prepared.payload
        assert isinstance(call.request, GenerationRequest)
        url = f"{replica.url}/{'chat/completions' if call.request.prompt is None else 'completions'}"
        refused = set(replica.refused)
        while True:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout_at(deadline):
                    content = orjson.dumps(self._generation_body(replica, call, refused))
                    response = await self._send("POST", url, content, prepared)
                    stack.push_async_callback(response.aclose)
                    answer = None if response.status_code == 200 else await _refusal(response)
                if response.status_code == 200:
                    if not response.headers.get("content-type", "").startswith("text/event-stream"):
                        raise AttemptFailed("answered with something else than a stream", misconfigured=True)
                    replica.refused |= refused
                    yield _chunks(response), response.extensions.get("arrived", bytes)
                    return
            option = refused_option(response.status_code, answer)
            if option is None or option in refused:
                refuse(response.status_code, answer, call.request, response.headers.get("retry-after", ""))
            # Remembered only if it helps: a refusal may quote a client, who could turn our counting off by it.
            refused.add(option)

    def _generation_body(self, replica: Replica, call: Call, refused: set[str]) -> dict[str, Any]:
        body = call.body | self.vllm_fields(replica, call.request)
        if STREAM_OPTIONS not in refused:
            continuous = {} if CONTINUOUS_USAGE in refused else {CONTINUOUS_USAGE: True}
            body[STREAM_OPTIONS] = {"include_usage": True} | continuous
        if MAX_TOKENS in refused and MAX_TOKENS in body:
            body["max_completion_tokens"] = body.pop(MAX_TOKENS)
        return body

    def vllm_fields(self, replica: Replica, request: GenerationRequest | EmbeddingRequest) -> dict[str, Any]:
        """Return the fields that only vLLM takes, and only from those who may set them."""
        fields: dict[str, Any] = {}
        if request.cache_salt and (replica.is_vllm if self._cache_salt is None else self._cache_salt):
            fields["cache_salt"] = request.cache_salt
        if request.priority and self._priority:
            fields["priority"] = request.priority
        return fields


@contextlib.contextmanager
def transport_failures() -> Iterator[None]:
    """Turn what httpx and timeouts raise into AttemptFailed."""
    try:
        yield
    except TimeoutError as error:
        raise AttemptFailed("did not answer in time") from error
    except httpx.HTTPError as error:
        raise AttemptFailed(f"could not be reached ({type(error).__name__})", again=True) from error


def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    """Return the body as it arrives; without httpx's layers of generators where there is nothing to decode."""
    if "content-encoding" in response.headers:
        return response.aiter_bytes()
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return aiter(response.stream)


async def read_some(chunks: AsyncIterator[bytes], deadline: float, *, complete: bool) -> bytes:
    """Return the next bytes of a stream, or none at its end: where it is `complete`, any failure is an end."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(chunks)
    except StopAsyncIteration:
        return b""
    except (TimeoutError, httpx.HTTPError):
        if not complete:
            raise
        return b""


async def _refusal(response: httpx.Response) -> Any:
    """Return the parsed body of a refusal, if it is short enough to be one."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MAX_REFUSAL_BYTES:
            break
    return _parsed(body)


def _parsed(body: bytes) -> Any:
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(body)
    return None
