"""The response that carries a generation: an event stream, or one JSON body.

`GenerationResponse` owns the generator that it sends: whatever ends the exchange (the last frame, an error, a client
that left, a drain) closes it inside the request, which is what aborts the engine and settles the usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.base import EngineError, QueuePosition
from gateway.errors import CLIENT_DISCONNECTED, GatewayError, InternalError, from_engine
from gateway.exchange.drain import Drain
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_FAILURE_S = 1.0
"""How long the last bytes may wait for a client that does not read, once the exchange is to end."""

RenderError = Callable[[GatewayError, bool], bytes]
"""Returns the bytes of an error, as a frame of a stream (True) or as a whole body."""


def render_openai(error: GatewayError, in_stream: bool) -> bytes:
    """Return an error in OpenAI's shape."""
    return b"data: " + error.body() + b"\n\n" if in_stream else error.body()


KEEPALIVE = b": keepalive\n\n"
_COMMENT_S = 1.0
"""How often a stream that waits for the engine says so."""
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def queue_comment(waiting: QueuePosition | None) -> bytes | None:
    """Return the comment of a stream whose request waits for the engine."""
    if waiting is None:
        return None
    return b": queued position=%d wait_s=%d\n\n" % (waiting.position, math.ceil(waiting.wait_s))


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
        render_error: RenderError = render_openai,
        comment: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """`headers` is asked for more headers when the status is sent, `comment` every second for what a stream is
        to say meanwhile."""
        media_type = "text/event-stream; charset=utf-8" if stream else "application/json"
        super().__init__(None, 200, _STREAM_HEADERS if stream else None, media_type)
        # For an empty body, starlette would send Content-Length: 0.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._chunks = chunks
        self._more_headers = headers
        self._render_error = render_error
        self._stream = stream
        self._drain = drain
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        self._next_comment = comment
        self._started = False
        self._said = False
        """Nothing but the last bytes is left to send."""
        self._ended = False
        self._reason: GatewayError | None = None
        self._client_left = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_sent = 0.0
        self._comment: asyncio.Task[None] | None = None
        self._state: dict[str, Any] = {}
        """Of the request: `error` in it is what the middleware logs and counts."""

    @property
    def reason(self) -> GatewayError | None:
        """Why the exchange was interrupted, if it was."""
        return self._reason

    def interrupt(self, reason: GatewayError) -> None:
        """End the exchange with `reason` for the client."""
        self._reason = reason
        if self._said:
            asyncio.get_running_loop().call_later(_FAILURE_S, self._cancel)
        else:
            self._cancel()

    def _cancel(self) -> None:
        if self._task is not None and not self._ended:
            self._ended = True
            self._task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = asyncio.current_task()
        self._state = scope.setdefault("state", {})
        self._state["streamed"] = self._stream
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
                raise  # a cancellation from outside
            assert self._task is not None
            self._task.uncancel()
            failure = None if self._said else self._reason
        except GatewayError as error:
            failure = error
        except EngineError as error:
            failure = from_engine(error)
        except Exception:
            log.exception("request failed")
            failure = InternalError()
        self._ended = True  # nothing can interrupt it any more
        self._stop_comments()
        if self._client_left:
            self._state["error"] = CLIENT_DISCONNECTED
        elif failure is not None:
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
        self._last_sent = loop.time()
        self._timer = loop.call_later(min(_COMMENT_S, self._keepalive_s), self._keep_alive, send)
        async for chunk in chunks:
            self._last_sent = loop.time()
            if not self._started:
                await self._start(send)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._said = True
        if not self._started:  # there was nothing to send
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_body(self, chunks: AsyncGenerator[bytes, None], send: Send) -> None:
        body = b"".join([chunk async for chunk in chunks])
        self.raw_headers.append((b"content-length", b"%d" % len(body)))
        self._said = True
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
        self._state["error"] = failure.code
        if self._started:
            self._metrics.stream_failure(failure.code)
        if failure.status >= 500:  # the error of a request may name the client's fields
            request_id = self._state.get("request_id")
            log.log(failure.log_level, "request %s ended with %s: %s", request_id, failure.code, failure)
        body = self._render_error(failure, self._started)
        if not self._started:
            self.status_code = failure.status
            kept = [header for header in self.raw_headers if header[0] not in (b"content-type", b"content-length")]
            own = Response(body, headers=failure.headers(), media_type="application/json").raw_headers
            self.raw_headers = kept + own
            await self._start(send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _keep_alive(self, send: Send) -> None:
        """Runs on the loop's timer, about once a second: a timer per token would cost more than the tokens."""
        loop = asyncio.get_running_loop()
        stuck = self._comment is not None and not self._comment.done()  # behind a client that does not read
        if not self._said and not self._ended and not stuck:
            comment = self._next_comment()
            if comment is None and loop.time() - self._last_sent >= self._keepalive_s:
                comment = KEEPALIVE
            if comment is not None:
                self._last_sent = loop.time()
                self._comment = loop.create_task(self._send_comment(comment, send))
        silence_s = self._keepalive_s - (loop.time() - self._last_sent)
        wait_s = min(_COMMENT_S, silence_s if silence_s > 0 else self._keepalive_s)
        self._timer = loop.call_later(wait_s, self._keep_alive, send)

    async def _send_comment(self, comment: bytes, send: Send) -> None:
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": comment, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        """Cancel the exchange when the client has left. Whatever is wrong with a body that no route reads is none of
        its concern: a second `receive` waits for the departure."""
        left = False
        while not left:
            with contextlib.suppress(GatewayError):
                left = (await receive())["type"] == "http.disconnect"
        if not self._said and not self._ended:
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
