"""HTTP to the replicas of a remote engine: probes, whole answers, and streams.

One connection pool for all replicas, without a bound of its own: admission is the gateway's. It is httpx's messages
over a transport, without httpx's client: no cookies, redirects, proxies, or log of every request. What transport and
timeouts fail with leaves as AttemptFailed, refusals as `engine.remote.wire` says. Every wait has a deadline, given by
the caller or set here. Does not choose the replica, and does not read what a stream says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import httpx
import orjson

from engine.base import EngineError, EngineUnavailable, GenerationRequest, Prepared, Request
from engine.remote.event_stream import Frames
from engine.remote.http1 import Http1Transport, Resolve
from engine.remote.pool import AttemptFailed, Outcome, Replica
from engine.remote.reply import read_count
from engine.remote.tls import make_context
from engine.remote.wire import (
    CONTINUOUS_USAGE,
    MAX_TOKENS,
    STREAM_OPTIONS,
    PreparedCall,
    refuse,
    refused_option,
    retry_after_s,
)

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
_KEEPALIVE_S = 4.0  # uvicorn, and so vLLM, closes idle connections after 5 s
_MAX_REFUSAL_BYTES = 65_536
_REFUSAL_TIMEOUT_S = 5.0
"""For the body of an error response. Its status is already known."""
_TAIL_S = 5.0
"""For the usage after the last token. The response is already complete, so missing usage is no failure."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Limit on whole responses except embeddings: ten million token ids."""
_SLICE_BYTES = 4096
_MAX_BYTES_AT_ONCE = 262_144
"""Longer responses are parsed in a thread: parsing takes more than a few milliseconds."""
MAX_EMBEDDINGS_BYTES = 512 * 2**20
"""2,048 vectors of 32,768 numbers in base64."""


class Answer(NamedTuple):
    """A whole response."""

    status: int
    body: Any
    """The parsed JSON, None if it is invalid."""
    retry_after_s: float | None


class Stream(NamedTuple):
    """A stream with status 200."""

    chunks: AsyncIterator[bytes]
    arrived: Callable[[], bytes]
    """Returns the unread bytes without waiting."""
    refused: set[str]
    """Optional fields that were omitted because the replica rejects them."""


class Upstream:
    """The HTTP client of one remote engine. `model` is the model's name at the replicas."""

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
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`tls`: some URL is https. `transport` replaces the network. Raises EngineError."""
        self._resolve = resolve
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
        """Whether there is no connection pool."""
        return self._transport is None

    def running(self) -> httpx.AsyncBaseTransport:
        """Return the connection pool. Raises EngineUnavailable when closed."""
        if self._transport is None:
            raise EngineUnavailable()
        return self._transport

    def open(self) -> None:
        """Create the connection pool. Connections are opened on demand."""
        self._transport = self._network or Http1Transport(
            self._context, keepalive_s=_KEEPALIVE_S, resolve=self._resolve
        )

    async def close(self) -> None:
        """Close all connections; pending reads raise AttemptFailed. Idempotent."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def probe(self, replica: Replica) -> None:
        """Check the health of a replica, and read its model card. Raises AttemptFailed."""
        with transport_failures():
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                health, *_ = await self._ask("GET", f"{replica.root}/health")  # 404 where there is none, as at OpenAI
                status, models, _ = await self._ask("GET", f"{replica.url}/models")
        if health >= 500 or status in (401, 403) or status >= 500:
            raise AttemptFailed("unreachable", f"answers /health with {health}, /models with {status}")
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            cards = {card["id"]: card for card in models["data"]}
            if self.model not in cards and replica.lists_model:
                log.error("replica %s does not list the model %s", replica.url, self.model)
            replica.lists_model = self.model in cards
            card = cards.get(self.model, {})
            replica.max_model_len = read_count(card, "max_model_len") or replica.max_model_len
            replica.is_vllm = card.get("owned_by") == "vllm"

    async def post(
        self,
        url: str,
        body: dict[str, Any],
        timeout_s: float,
        prepared: Prepared | None = None,
        *,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """Return the whole response to a POST. Raises AttemptFailed, also for more than `max_bytes`."""
        with transport_failures():
            async with asyncio.timeout(timeout_s):
                return await self._ask("POST", url, orjson.dumps(body), prepared, max_bytes)

    async def _ask(
        self,
        method: str,
        url: str,
        content: bytes = b"",
        prepared: Prepared | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        async with contextlib.aclosing(await self._send(method, url, content, prepared)) as response:
            body = await _read(response, max_bytes)
            if body is None:
                raise AttemptFailed("failed", f"sent more than {max_bytes} bytes")
            parsed = _parsed(body) if len(body) <= _MAX_BYTES_AT_ONCE else await asyncio.to_thread(_parsed, body)
            return Answer(response.status_code, parsed, retry_after_s(response.headers))

    async def _send(self, method: str, url: str, content: bytes, prepared: Prepared | None) -> httpx.Response:
        """Send a request. The caller closes the response. Raises httpx.TransportError, AttemptFailed."""
        headers = self._headers
        if prepared is not None:
            # By its id the replica's log can be matched with ours. It is made by the server.
            headers = headers | {"X-Request-Id": prepared.request_id} | dict(prepared.trace_headers or {})
        extensions = {"timeout": {"connect": self._connect_timeout_s}}
        request = httpx.Request(method, url, headers=headers, content=content, extensions=extensions)
        response = await self.running().handle_async_request(request)
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding == "identity":
            return response
        assert isinstance(response.stream, httpx.AsyncByteStream)
        if coding not in ("gzip", "deflate"):
            await response.aclose()
            raise AttemptFailed("failed", "used a content-encoding that was not requested")
        response.stream = _Slices(response.stream)
        return response

    @contextlib.asynccontextmanager
    async def stream(self, replica: Replica, prepared: Prepared, deadline: float) -> AsyncIterator[Stream]:
        """Post a generation and yield the stream of its response.

        Exiting closes the connection, which aborts the generation there. Options that the replica rejects as unknown
        are omitted. `deadline` is in the event loop's time, for the head of the response. Raises AttemptFailed,
        InvalidRequest.
        """
        call: PreparedCall = prepared.payload
        assert isinstance(call.request, GenerationRequest)
        url = f"{replica.url}/{'chat/completions' if call.request.prompt is None else 'completions'}"
        refused = set(replica.refused)
        while True:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout_at(deadline):
                    content = orjson.dumps(self._generation_body(replica, call, refused))
                    response = await self._send("POST", url, content, prepared)
                stack.push_async_callback(response.aclose)
                if response.status_code == 200:
                    yield _stream(response, refused)
                    return
                answer = await _refusal(response)
            option = refused_option(response.status_code, answer)
            if option is None or option in refused:
                refuse(response.status_code, answer, call.request, retry_after_s(response.headers))
            refused.add(option)

    def _generation_body(self, replica: Replica, call: PreparedCall, refused: set[str]) -> dict[str, Any]:
        body = call.body | self.vllm_fields(replica, call.request)
        if STREAM_OPTIONS not in refused:
            continuous = {} if CONTINUOUS_USAGE in refused else {CONTINUOUS_USAGE: True}
            body[STREAM_OPTIONS] = {"include_usage": True} | continuous
        if MAX_TOKENS in refused and MAX_TOKENS in body:
            body["max_completion_tokens"] = body.pop(MAX_TOKENS)
        return body

    def vllm_fields(self, replica: Replica, request: Request) -> dict[str, Any]:
        """Return the fields that only vLLM takes, and only from those who may set them."""
        fields: dict[str, Any] = {}
        if request.cache_salt and (replica.is_vllm if self._cache_salt is None else self._cache_salt):
            fields["cache_salt"] = request.cache_salt
        if request.priority and self._priority:
            fields["priority"] = request.priority
        return fields


@contextlib.contextmanager
def transport_failures(is_answering: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what httpx and timeouts raise into AttemptFailed. A silence while it `is_answering` is a stall."""
    try:
        yield
    except TimeoutError as error:
        outcome: Outcome = "stalled" if is_answering() else "slow"
        raise AttemptFailed(outcome, "fell silent" if is_answering() else "did not answer in time") from error
    except httpx.DecodingError as error:
        raise AttemptFailed("failed", "sent data that does not match its content-encoding") from error
    except httpx.HTTPError as error:
        raise AttemptFailed("unreachable", f"could not be reached ({type(error).__name__})") from error


def _stream(response: httpx.Response, refused: set[str]) -> Stream:
    """Return the body as it arrives. Without a content-encoding, httpx's decoding generators are bypassed."""
    if "content-encoding" in response.headers:
        return Stream(response.aiter_bytes(), bytes, refused)
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return Stream(aiter(response.stream), response.extensions.get("arrived", bytes), refused)


class _Slices(httpx.AsyncByteStream):
    """A compressed body in slices that stay small when decoded, which is at most 1,032 times the size."""

    def __init__(self, body: httpx.AsyncByteStream) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            for at in range(0, len(piece), _SLICE_BYTES):
                yield piece[at : at + _SLICE_BYTES]

    async def aclose(self) -> None:
        await self._body.aclose()


class Patience:
    """The deadline for the next bytes of a stream."""

    def __init__(self, first_token_s: float, idle_s: float, queue_s: float, clock: Callable[[], float]) -> None:
        """`gateway.settings.config.RemoteSettings` has the timeouts. `clock` is the event loop's."""
        self._silence_s = first_token_s
        self._idle_s = idle_s
        self._queue_s = max(queue_s, first_token_s)
        self._clock = clock
        self._last_token = clock()
        self._finished = False
        self.deadline = self._last_token + first_token_s
        """In the event loop's time."""

    def note(self, *, got_token: bool, finished: bool) -> None:
        """Extend the deadline after new bytes. SSE comments extend it too, but not without limit."""
        now = self._clock()
        if finished:
            if not self._finished:
                self._finished = True
                self.deadline = now + _TAIL_S
            return
        if got_token:
            self._last_token = now
            self._silence_s = self._idle_s
        self.deadline = min(now + self._silence_s, self._last_token + self._queue_s)


async def read_some(chunks: AsyncIterator[bytes], deadline: float, *, complete: bool) -> bytes:
    """Return the next bytes of a stream, empty at its end. If it is `complete`, any failure counts as the end."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(chunks)
    except StopAsyncIteration:
        return b""
    except (TimeoutError, httpx.HTTPError):
        if not complete:
            raise
        return b""


async def _read(response: httpx.Response, max_bytes: int) -> bytes | None:
    """Return the body, or None if it is longer than `max_bytes`."""
    pieces: list[bytes] = []
    size = 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            return None
    return b"".join(pieces)


async def _refusal(response: httpx.Response) -> Any:
    """Return the parsed body of an error response, None if it is not JSON, too long, too slow, or incomplete."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_REFUSAL_TIMEOUT_S):
            body = await _read(response, _MAX_REFUSAL_BYTES)
            return None if body is None else _parsed(body)
    return None


def _parsed(body: bytes) -> Any:
    """Return the JSON of a body, or of the first frame if the body is a stream."""
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(body)
    with contextlib.suppress(AttemptFailed):
        frames = Frames()
        return next(iter(frames.feed(body) + frames.end()), None)
    return None
