"""Events to the wire: chat completion frames as bytes, or one JSON body; and the response that carries them.

Frames are cut from byte templates made once per request, with orjson for the text: no object is built per token.
`GenerationResponse` owns the generator that it sends: whatever ends the exchange (the last frame, an error, a client
that left, a drain) closes it inside the request, which is what aborts the engine and settles the usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.base import Delta, EngineError, TokenLogprob, Usage
from gateway.drain import Drain
from gateway.errors import GatewayError, InternalError, from_engine
from gateway.events import Event, ShannonEvent
from gateway.metrics import Metrics

log = logging.getLogger(__name__)

_FAILURE_S = 1.0
"""How long the error frame may wait for a client that does not read."""

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event_fields(event: ShannonEvent) -> dict[str, Any]:
    """Return the fields of a Shannon event that clients see."""
    return {
        "type": event.type,
        "agent_id": event.agent_id,
        "message": event.message,
        "timestamp": event.timestamp,
        "payload": event.payload,
    }


def _logprob_fields(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes}


def logprobs_fields(entries: list[TokenLogprob]) -> dict[str, Any]:
    """Return OpenAI's logprobs object."""
    content = [_logprob_fields(entry) | {"top_logprobs": list(map(_logprob_fields, entry.top))} for entry in entries]
    return {"content": content, "refusal": None}


class ChatFrames:
    """The frames of one chat completion stream. `usage` is read when the last frames are made."""

    def __init__(
        self, completion_id: str, created: int, model_id: str, usage: Usage, *, include_usage: bool, events: bool
    ) -> None:
        fields = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model_id}
        self._head = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        # With include_usage every frame but the usage frame says "usage": null, as OpenAI's do.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._usage = usage
        self._include_usage = include_usage
        self._events_wanted = events
        self._events: list[ShannonEvent] = []
        self._content_heads: dict[int, bytes] = {}
        self._content_tail = b'},"finish_reason":null}]' + self._tail
        self._finish: bytes | None = None

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return a frame for `event` and those held back, or nothing when they may ride on a later frame."""
        if not self._events_wanted:
            return b""
        self._events.append(event)
        if event.deferrable or self._finish is not None:
            return b""
        if not self._content_heads:
            return self._open(0)
        return self._frame(b'{"index":0,"delta":{},"finish_reason":null}')

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`. A finish frame is held back until it is known what else must ride on it."""
        out = b""
        head = self._content_heads.get(delta.index)
        if head is None:
            out = self._open(delta.index)
            head = self._content_heads[delta.index]
        if self._finish is not None:
            out += self._flush_finish()
        if delta.logprobs is not None:
            fields = {"delta": {"content": delta.text}, "logprobs": logprobs_fields(delta.logprobs)}
            choice = b'{"index":%d,' % delta.index + orjson.dumps(fields)[1:-1] + b',"finish_reason":null}'
            out += self._frame(choice)
        elif self._events and delta.text:
            choice = b'{"index":%d,"delta":{"content":%b},"finish_reason":null}'
            out += self._frame(choice % (delta.index, orjson.dumps(delta.text)))
        elif delta.text:
            out += head + orjson.dumps(delta.text) + self._content_tail
        if delta.finish_reason is not None:
            reason = orjson.dumps(delta.finish_reason)
            self._finish = b'{"index":%d,"delta":{},"finish_reason":%b}' % (delta.index, reason)
        return out

    def close(self) -> bytes:
        """Return the last frames. The usage rides on the finish frame or has a frame of its own, never both."""
        usage = b',"usage":' + orjson.dumps(usage_fields(self._usage)) + b"}\n\n"
        if not self._include_usage:
            return self._flush_finish(usage) + DONE
        return self._flush_finish() + self._head + b"]" + usage + DONE

    def _open(self, index: int) -> bytes:
        """Return the first frame of a choice, which has the role."""
        self._content_heads[index] = self._head + b'{"index":%d,"delta":{"content":' % index
        return self._frame(b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}' % index)

    def _flush_finish(self, tail: bytes | None = None) -> bytes:
        choice, self._finish = self._finish, None
        return self._frame(choice, tail) if choice is not None else b""

    def _frame(self, choice: bytes, tail: bytes | None = None) -> bytes:
        events = b""
        if self._events:
            events = b',"shannon_events":' + orjson.dumps([event_fields(event) for event in self._events])
            self._events.clear()
        return self._head + choice + b"]" + events + (tail or self._tail)


async def stream_chat(events: AsyncGenerator[Event, None], frames: ChatFrames) -> AsyncGenerator[bytes, None]:
    """Yield a chat completion stream as bytes, one or more whole frames at a time."""
    async with contextlib.aclosing(events):
        async for event in events:
            data = frames.add_delta(event) if isinstance(event, Delta) else frames.add_event(event)
            if data:
                yield data
    yield frames.close()


async def collect_chat(
    events: AsyncGenerator[Event, None],
    completion_id: str,
    created: int,
    model_id: str,
    usage: Usage,
    *,
    with_events: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield one chat completion as a JSON body, once the events have ended."""
    choices: dict[int, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                _append(choices, event)
            else:
                seen.append(event_fields(event))
    body = {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model_id,
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage_fields(usage),
    }
    if with_events:
        body["shannon_events"] = seen
    yield orjson.dumps(body)


def _append(choices: dict[int, dict[str, Any]], delta: Delta) -> None:
    choice = choices.get(delta.index)
    if choice is None:
        message = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": delta.index, "message": message, "logprobs": None, "finish_reason": None}
        choices[delta.index] = choice
    choice["message"]["content"] += delta.text
    if delta.logprobs is not None:
        fields = logprobs_fields(delta.logprobs)
        if choice["logprobs"] is None:
            choice["logprobs"] = fields
        else:
            choice["logprobs"]["content"] += fields["content"]
    choice["finish_reason"] = delta.finish_reason or choice["finish_reason"]


class GenerationResponse(Response):
    """Sends a generator of bytes: an event stream, or one JSON body when `stream` is False.

    The status waits for the first bytes, so that an early failure has its real one; but not for ever: a stream that is
    silent for `keepalive_s` starts with a comment. A failure after the status is one error frame, then the end.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        stream: bool,
        drain: Drain,
        metrics: Metrics,
        keepalive_s: float,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`headers` is asked for more headers when the status is sent."""
        media_type = "text/event-stream; charset=utf-8" if stream else "application/json"
        super().__init__(None, 200, _STREAM_HEADERS if stream else None, media_type)
        # An empty body made starlette announce its length.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._chunks = chunks
        self._more_headers = headers
        self._stream = stream
        self._drain = drain
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        self._started = False
        self._ended = False
        self._reason: GatewayError | None = None
        self._client_left = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_sent = 0.0
        self._comment: asyncio.Task[None] | None = None

    def interrupt(self, reason: GatewayError) -> None:
        """End the exchange with `reason` for the client."""
        self._reason = reason
        self._cancel()

    def _cancel(self) -> None:
        if self._task is not None and not self._ended:
            self._ended = True
            self._task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = asyncio.current_task()
        watch = asyncio.create_task(self._watch(receive))
        try:
            with self._drain.track(self), self._counted():
                await self._exchange(send)
        finally:
            watch.cancel()
            self._stop_comments()

    async def _exchange(self, send: Send) -> None:
        failure: GatewayError | None = None
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                await (self._send_stream(chunks, send) if self._stream else self._send_body(chunks, send))
        except asyncio.CancelledError:
            if not self._client_left and self._reason is None:
                raise  # somebody else's cancellation
            assert self._task is not None
            self._task.uncancel()
            failure = self._reason
        except GatewayError as error:
            failure = error
        except EngineError as error:
            failure = from_engine(error)
        except Exception:
            log.exception("request failed")
            failure = InternalError("The server had an error while processing your request.")
        self._ended = True  # nothing can interrupt it any more
        self._stop_comments()
        if failure is not None and not self._client_left:
            # A client that reads nothing must not keep the exchange open for ever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAILURE_S):
                    await self._send_failure(failure, send)

    def _stop_comments(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._comment is not None:
            self._comment.cancel()

    async def _send_stream(self, chunks: AsyncGenerator[bytes, None], send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._keepalive_s, self._keep_alive, send)
        async for chunk in chunks:
            self._last_sent = loop.time()
            if not self._started:
                await self._start(send)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._ended = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_body(self, chunks: AsyncGenerator[bytes, None], send: Send) -> None:
        body = b"".join([chunk async for chunk in chunks])
        self.raw_headers.append((b"content-length", b"%d" % len(body)))
        self._ended = True
        await self._start(send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        present = {name for name, _ in self.raw_headers}
        for name, value in self._more_headers().items():
            header = name.lower().encode(), value.encode()
            if header[0] not in present:  # an error's own figures are the fresher ones
                self.raw_headers.append(header)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _send_failure(self, failure: GatewayError, send: Send) -> None:
        self._metrics.error(failure.code)
        log.log(failure.log_level, "request ended with %s: %s", failure.code, failure)
        if self._started:
            body = b"data: " + failure.body() + b"\n\n"
        else:
            body = failure.body()
            self.status_code = failure.status
            kept = [header for header in self.raw_headers if header[0] not in (b"content-type", b"content-length")]
            own = Response(body, headers=failure.headers(), media_type="application/json").raw_headers
            self.raw_headers = kept + own
            await self._start(send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _keep_alive(self, send: Send) -> None:
        """Runs on the loop's timer, once per `keepalive_s`: a timer per token would cost more than the tokens."""
        loop = asyncio.get_running_loop()
        quiet_s = loop.time() - self._last_sent
        stuck = self._comment is not None and not self._comment.done()  # behind a client that does not read
        if quiet_s >= self._keepalive_s and not self._ended and not stuck:
            self._last_sent = loop.time()
            quiet_s = 0.0
            self._comment = loop.create_task(self._send_comment(send))
        self._timer = loop.call_later(
            max(0.0, self._keepalive_s - quiet_s) or self._keepalive_s, self._keep_alive, send
        )

    async def _send_comment(self, send: Send) -> None:
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        """Cancel the exchange when the client has left."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._ended:
            self._client_left = True
            self._cancel()

    @contextlib.contextmanager
    def _counted(self) -> Any:
        if not self._stream:
            yield
            return
        self._metrics.streams_open.inc()
        try:
            yield
        finally:
            self._metrics.streams_open.dec()
