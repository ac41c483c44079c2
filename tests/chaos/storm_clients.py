"""The clients of a storm: requests of every protocol, and every way of sending them and of leaving."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MODEL = "shannon-chat"
WEIGHTS = {
    "free": 10,
    "few requests": 2,
    "few tokens": 2,
    "few at once": 2,
    "few at once, all models": 1,
    "small budget": 2,
}
"""How often each key is used."""
_READ_S = 60.0
"""An answer that takes longer has hung."""


@dataclass(frozen=True)
class Request:
    """One request, as bytes."""

    head: bytes
    body: bytes
    streamed: bool = False

    @property
    def whole(self) -> bytes:
        return self.head + self.body


def request(method: str, path: str, key: str | None, fields: Any = None, *, headers: str = "") -> Request:
    """Return a request; `fields` is sent as JSON unless it is bytes."""
    body = b"" if fields is None else fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: storm\r\n{headers}"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    if fields is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    streamed = isinstance(fields, dict) and bool(fields.get("stream"))
    return Request(head.encode() + b"\r\n", body, streamed)


class Requests:
    """Makes requests at random."""

    def __init__(self, rng: random.Random, *, mock: bool) -> None:
        self._rng = rng
        self._mock = mock

    def good(self, key: str, *, tokens: int | None = None) -> Request:
        """Return a request of any protocol that generates."""
        rng = self._rng
        text = " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randint(1, 30)))
        most = tokens or rng.choice((1, 4, 16, 40))
        stream = rng.random() < 0.6
        messages = [{"role": "user", "content": text}]
        sampling: dict[str, Any] = {
            "max_tokens": most,
            "stream": stream,
            "temperature": 0,
            "ignore_eos": rng.random() < 0.5,
        }
        path, fields = rng.choice(
            [
                ("/v1/chat/completions", {"messages": messages} | sampling),
                ("/v1/chat/completions", {"messages": messages} | sampling),
                ("/v1/completions", {"prompt": text, "n": 1} | sampling),
                ("/v1/messages", {"messages": messages, "max_tokens": most, "stream": stream, "model": MODEL}),
                ("/v1/responses", {"input": text, "max_output_tokens": max(16, most), "stream": stream}),
                ("/tokenize", {"messages": messages}),
            ]
        )
        headers = "X-Session-ID: storm\r\n" if rng.random() < 0.1 else ""
        return request("POST", path, key, fields | {"model": MODEL}, headers=headers)

    def failing(self, key: str) -> Request:
        """Return a request that the engine fails."""
        words = ("fail:overloaded", "fail:error", "fail:invalid") if self._mock else ("once",)
        text = f"{self._rng.choice(words)} and so it goes on"
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": self._rng.random() < 0.5}
        return request("POST", "/v1/chat/completions", key, fields | {"max_tokens": 20})

    def wrong(self, key: str) -> Request:
        """Return a request that is refused, for any of many reasons."""
        chat, rng = "/v1/chat/completions", self._rng
        said = [{"role": "user", "content": "hello"}]
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        return rng.choice(
            [
                request("POST", chat, key, b"{"),
                request("POST", chat, key, b"[1, 2]"),
                request("POST", chat, key, {"messages": []}),
                request("POST", chat, key, {"messages": said, "temperature": 9}),
                request("POST", chat, key, {"messages": said, "max_tokens": 10**6}),
                request("POST", chat, key, {"messages": said, "model": "gpt-9"}),
                request("POST", chat, key, {"messages": [{"role": "user", "content": "x " * 9000}]}),
                request("POST", chat, key, {"messages": [{"role": "user", "content": [image]}]}),
                request("POST", chat, f"{key}x", {"messages": said}),
                request("POST", chat, "nonsense", {"messages": said}),
                request("POST", chat, None, {"messages": said}),
                request("GET", chat, key),
                request("GET", "/v1/nowhere", key),
                request("GET", "/v1/sessions/none", key),
                request("GET", "/admin/keys", key),
            ]
        )

    def cheap(self, key: str) -> Request:
        return request("GET", self._rng.choice(("/health", "/ready", "/v1/models")), key)


# How they are sent.


class Connection:
    """One connection of a client, which reads answers and can be cut in any way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def end_sending(self) -> None:
        """Send that nothing more will come, and wait until the server closes."""
        self._writer.write_eof()
        await self._reader.read()

    async def read(self, *, most_chunks: int | None = None) -> int:
        """Read one answer, or its head and `most_chunks` chunks. Returns the status."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        headers = head.lower()
        if b"transfer-encoding: chunked" in headers:
            while most_chunks is None or most_chunks > 0:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                await self._reader.readexactly(size + 2)
                if not size:
                    break
                most_chunks = None if most_chunks is None else most_chunks - 1
        elif b"content-length: " in headers:
            await self._reader.readexactly(int(headers.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return status

    def reset(self) -> None:
        """Close with a RST."""
        own: socket.socket = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


@dataclass
class Seen:
    """What clients saw."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    """Requests whose client stayed and got no whole answer, by the exception."""
    freezes: int = 0
    restarts: int = 0

    @property
    def requests(self) -> int:
        return self.kinds.total()


class Client:
    """Sends one request after the other, each in a way of its own."""

    def __init__(self, port: int, keys: dict[str, str], seen: Seen, rng: random.Random, *, mock: bool) -> None:
        self._port = port
        self._keys = keys
        self._seen = seen
        self._rng = rng
        self._requests = Requests(rng, mock=mock)
        self._ways: list[tuple[int, str, Callable[[], Any]]] = [
            (30, "read", self._read),
            (6, "engine fails", self._fails),
            (14, "refused", self._refused),
            (4, "left in the head", self._leave_in_head),
            (4, "left in the body", self._leave_in_body),
            (8, "left unanswered", self._leave_unanswered),
            (8, "left at the first byte", lambda: self._leave_after(0)),
            (12, "left in the stream", lambda: self._leave_after(self._rng.randint(1, 20))),
            (4, "half closed", self._half_close),
            (4, "resumable, read or left", self._resumable),
            (2, "in the background", self._background),
            (10, "pipelined", self._pipeline),
            (4, "pipelined and left", self._pipeline_and_leave),
        ]

    async def run(self, left: Iterator[int]) -> None:
        weights = [weight for weight, _, _ in self._ways]
        for _ in left:
            (way,) = self._rng.choices(self._ways, weights)
            _, name, play = way
            try:
                async with asyncio.timeout(_READ_S):
                    await play()
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self._seen.lost[f"{name}: {type(error).__name__}"] += 1
            self._seen.kinds[name] += 1

    def _key(self) -> str:
        (name,) = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        return self._keys[name]

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        connection = Connection(reader, writer)
        try:
            yield connection
        finally:
            connection.close()

    async def _exchange(self, *requests: Request) -> None:
        async with self._connected() as connection:
            for one in requests:
                await connection.send(one.whole)
                self._seen.statuses[await connection.read()] += 1

    async def _read(self) -> None:
        await self._exchange(*(self._requests.good(self._key()) for _ in range(self._rng.randint(1, 2))))

    async def _fails(self) -> None:
        await self._exchange(self._requests.failing(self._key()))

    async def _refused(self) -> None:
        await self._exchange(self._requests.wrong(self._key()))

    async def _leave_in_head(self) -> None:
        one = self._requests.good(self._key())
        await self._cut(one.head[: self._rng.randint(1, len(one.head) - 1)])

    async def _leave_in_body(self) -> None:
        one = self._requests.good(self._key())
        await self._cut(one.head + one.body[: self._rng.randint(0, len(one.body) - 1)])

    async def _leave_unanswered(self) -> None:
        """At once, or after some milliseconds: in the queue, at the limits, in the engine."""
        await self._cut(self._requests.good(self._key(), tokens=200).whole)

    async def _cut(self, data: bytes) -> None:
        async with self._connected() as connection:
            await connection.send(data)
            if self._rng.random() < 0.7:
                await asyncio.sleep(self._rng.random() * 0.05)
            if self._rng.random() < 0.5:
                connection.reset()

    async def _leave_after(self, chunks: int) -> None:
        fields = {"messages": [{"role": "user", "content": "a long story"}], "stream": True}
        fields |= {"max_tokens": 200, "ignore_eos": True}
        async with self._connected() as connection:
            await connection.send(request("POST", "/v1/chat/completions", self._key(), fields).whole)
            self._seen.statuses[await connection.read(most_chunks=chunks)] += 1
            if self._rng.random() < 0.5:
                connection.reset()

    async def _half_close(self) -> None:
        """Say that nothing more will come; whether that is a farewell is the server's to decide."""
        async with self._connected() as connection:
            await connection.send(self._requests.good(self._key()).whole)
            await connection.end_sending()

    async def _resumable(self) -> None:
        """The stream is made to its end, whoever reads it."""
        fields = {"messages": [{"role": "user", "content": "a story"}], "stream": True, "resumable": True}
        one = request("POST", "/v1/chat/completions", self._key(), fields | {"max_tokens": 30, "ignore_eos": True})
        async with self._connected() as connection:
            await connection.send(one.whole)
            most = self._rng.choice((None, 0, 1, 5))
            self._seen.statuses[await connection.read(most_chunks=most)] += 1

    async def _background(self) -> None:
        fields = {"input": "a story", "background": True, "model": MODEL, "max_output_tokens": 30}
        await self._exchange(request("POST", "/v1/responses", self._key(), fields))

    def _several(self) -> list[Request]:
        makers = (self._requests.good, self._requests.wrong, self._requests.cheap)
        return [self._rng.choice(makers)(self._key()) for _ in range(self._rng.randint(2, 4))]

    async def _pipeline(self) -> None:
        requests = self._several()
        async with self._connected() as connection:
            await connection.send(b"".join(one.whole for one in requests))
            for _ in requests:
                self._seen.statuses[await connection.read()] += 1

    async def _pipeline_and_leave(self) -> None:
        requests = self._several()
        async with self._connected() as connection:
            await connection.send(b"".join(one.whole for one in requests))
            for _ in requests[: self._rng.randint(0, len(requests) - 1)]:
                self._seen.statuses[await connection.read()] += 1
            if self._rng.random() < 0.5:
                connection.reset()
