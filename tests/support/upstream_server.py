"""An OpenAI-compatible server whose every byte is scripted. It records the requests.

Example:

    async def answer(connection: Connection) -> None:
        await connection.stream(chunk("Hello"), chunk("", "stop"))

    async with run_upstream(answer) as server:
        ...  # a remote engine with server.url
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENIZE = "/tokenize"
SECRET_WORDS = "kubernetes pod vllm-7f at 10.0.0.7 says Traceback"
"""What no client may ever read."""


@dataclass
class Received:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Connection:
    """One request's way back."""

    def __init__(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self._reader = reader
        self._writer = writer

    async def reply(self, status: int, body: Any = None, **headers: str) -> None:
        """Send a whole answer; `body` is JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Because", f"content-length: {len(content)}", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self._send("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    async def begin(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Begin a stream."""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
        await self._send(head.encode())

    async def send(self, *pieces: bytes) -> None:
        """Send pieces of a stream, each in a chunk of its own."""
        for piece in pieces:
            await self._send(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def frames(self, *frames: Any) -> None:
        """Send JSON frames of a stream."""
        await self.send(*(b"data: %b\n\n" % json.dumps(frame).encode() for frame in frames))

    async def end(self, *, done: bool = True) -> None:
        """End a stream."""
        if done:
            await self.send(b"data: [DONE]\n\n")
        await self._send(b"0\r\n\r\n")

    async def stream(self, *frames: Any) -> None:
        """Send a whole stream."""
        await self.begin()
        await self.frames(*frames)
        await self.end()

    def cut(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()

    async def left(self) -> None:
        """Wait until the client has left."""
        with contextlib.suppress(ConnectionError):
            assert await self._reader.read(1) == b""

    async def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self._send(data)

    async def _send(self, data: bytes) -> None:
        if self._writer.is_closing():  # uvloop's would raise no ConnectionError
            raise ConnectionResetError
        self._writer.write(data)
        await self._writer.drain()


Answer = Callable[[Connection], Awaitable[None]]


@dataclass
class UpstreamServer:
    """Behaves like vLLM in what is not scripted. `chat` answers generations, `routes` anything by path."""

    chat: Answer
    routes: dict[str, Answer] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    max_model_len: int | None = 1000
    owned_by: str = "vllm"
    prompt_tokens: int = 7
    port: int = 0
    connections: int = 0
    """Made so far."""
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def generations(self) -> list[Received]:
        """The generations asked for so far."""
        return [request for request in self.received if request.path.endswith("completions")]

    @property
    def probes(self) -> int:
        """How often it was asked for its health."""
        return sum(request.path == "/health" for request in self.received)

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Die: stop listening and break all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                request = await _read(reader)
                self.received.append(request)
                answer = self.routes.get(request.path) or self._default(request)
                await answer(Connection(request, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _default(self, request: Received) -> Answer:
        if request.path.endswith("completions"):
            return self.chat
        answers: dict[str, Any] = {
            "/health": {},
            "/v1/models": {
                "data": [{"id": "demo", "owned_by": self.owned_by, "max_model_len": self.max_model_len}],
            },
            TOKENIZE: {
                "count": self.prompt_tokens,
                "tokens": list(range(self.prompt_tokens)),
                "max_model_len": self.max_model_len,
            },
        }
        found = answers.get(request.path)
        if found is None:
            return lambda connection: connection.reply(404, {"detail": "Not Found"})
        return lambda connection: connection.reply(200, found)


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    is_form = headers.get("content-type", "").endswith("form-urlencoded")
    return Received(method, path, headers, json.loads(body) if body and not is_form else body or None)


@contextlib.asynccontextmanager
async def run_upstream(chat: Answer, **fields: Any) -> AsyncIterator[UpstreamServer]:
    """Run a scripted server on a port of 127.0.0.1."""
    server = UpstreamServer(chat, **fields)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.contextmanager
def run_upstream_beside(chat: Answer, **fields: Any) -> Iterator[UpstreamServer]:
    """Run a scripted server in a thread of its own."""
    server = UpstreamServer(chat, **fields)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def chunk(
    content: str | None = None,
    finish_reason: str | None = None,
    *,
    index: int = 0,
    usage: tuple[int, int] | None = None,
    logprobs: Any = None,
    **delta: Any,
) -> dict[str, Any]:
    """Return a frame of a chat completion stream; `usage` is (prompt_tokens, completion_tokens)."""
    delta = ({"content": content} if content is not None else {}) | delta
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]} | _usage(usage)


def summary(prompt_tokens: int, completion_tokens: int, **details: Any) -> dict[str, Any]:
    """Return the usage frame at the end of a stream."""
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": []}
    frame |= _usage((prompt_tokens, completion_tokens))
    frame["usage"] |= details  # type: ignore[operator]
    return frame


def _usage(usage: tuple[int, int] | None) -> dict[str, Any]:
    if usage is None:
        return {}
    return {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}}


def error(message: str = SECRET_WORDS, **fields: Any) -> dict[str, Any]:
    """Return an error body in OpenAI's shape."""
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None} | fields}


HELLO_STREAM = (
    chunk("", role="assistant", usage=(7, 0)),
    chunk("Hello", usage=(7, 1)),
    chunk(" there", usage=(7, 2)),
    chunk("", "stop", usage=(7, 3)),
    summary(7, 3),
)
"""What vLLM streams: three tokens, the last of which is the end."""
