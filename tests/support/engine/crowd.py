"""Many clients of one gateway, in a process of their own so that their CPU time is not the gateway's.

Example:

    python -m tests.support.engine.crowd

Reads one scene per line on stdin, as a JSON object, plays it, and prints the results on stdout. A scene is a list of
groups of clients, each under a key; a client sends a request, reads its stream to the end and sends the next. The
measured time begins with the next line, whatever it contains, and ends after `duration_s`, or with another line if that
is 0; then all connections are cut.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

_END = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Group:
    """Clients that are alike."""

    key: str
    clients: int
    tokens: int
    """Completion tokens of each request."""
    words: int = 8
    """Length of each prompt. No two begin alike, so the prefix cache has nothing of them."""
    late: bool = False
    """Begin only with the measured time."""


@dataclass
class Seen:
    """What a group saw in the measured time."""

    first_token_s: list[float] = field(default_factory=list)
    unanswered_s: list[float] = field(default_factory=list)
    """How long those had waited that had no token at the end."""


class Crowd:
    """Plays one scene."""

    def __init__(self, port: int, groups: list[Group], duration_s: float) -> None:
        self._port = port
        self._groups = groups
        self._duration_s = duration_s
        self._seen = [Seen() for _ in groups]
        self._measuring = False
        self._asked_at: dict[asyncio.Task[Any], tuple[Seen, float]] = {}

    async def play(self, next_line: Callable[[], Awaitable[object]]) -> list[Seen]:
        """Return what each group saw in the measured time."""
        async with asyncio.TaskGroup() as tasks:
            early = [self._join(tasks, i) for i, group in enumerate(self._groups) if not group.late]
            await next_line()
            self._measuring = True
            late = [self._join(tasks, i) for i, group in enumerate(self._groups) if group.late]
            await (asyncio.sleep(self._duration_s) if self._duration_s else next_line())
            self._measuring = False
            now = time.perf_counter()
            for seen, asked_at in self._asked_at.values():
                seen.unanswered_s.append(now - asked_at)
            for clients in early + late:
                for client in clients:
                    client.cancel()
        return self._seen

    def _join(self, tasks: asyncio.TaskGroup, number: int) -> list[asyncio.Task[None]]:
        group, seen = self._groups[number], self._seen[number]
        return [tasks.create_task(self._client(group, seen)) for _ in range(group.clients)]

    async def _client(self, group: Group, seen: Seen) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        try:
            while True:
                writer.write(_request(group))
                await self._read(reader, seen)
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, seen: Seen) -> None:
        task = asyncio.current_task()
        assert task is not None
        asked_at = time.perf_counter()
        self._asked_at[task] = seen, asked_at
        measured = self._measuring
        try:
            tail = b""
            while not tail.endswith(_END):
                data = await reader.read(2**18)
                if not data:
                    raise ConnectionError("the stream was cut")
                if task in self._asked_at and b"data: " in data:
                    del self._asked_at[task]
                    if measured and self._measuring:
                        seen.first_token_s.append(time.perf_counter() - asked_at)
                if b"HTTP/1.1 " in data and b"HTTP/1.1 200" not in data:
                    raise RuntimeError(f"unexpected answer: {data[:1000]!r}")
                tail = (tail + data)[-len(_END) :]
        finally:
            self._asked_at.pop(task, None)


def _request(group: Group) -> bytes:
    fields = {
        "messages": [{"role": "user", "content": " ".join([secrets.token_hex(4), *["word"] * group.words])}],
        "max_tokens": group.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {group.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def main() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        scene = json.loads(line)
        groups = [Group(**group) for group in scene.pop("groups")]
        seen = await Crowd(groups=groups, **scene).play(lines.readline)
        print(json.dumps([asdict(group) for group in seen]), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
