"""A load generator that costs little CPU, because on a small box it runs beside the server it measures.

Raw sockets, one connection per worker, no parsing beyond finding the end of a response.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import orjson


@dataclass(frozen=True)
class Scenario:
    """One load: `requests` in all, `concurrency` at a time, `tokens` per answer."""

    name: str
    stream: bool
    tokens: int
    concurrency: int
    requests: int


@dataclass(frozen=True)
class Result:
    """What a run of a scenario showed. Times in seconds."""

    duration_s: float
    requests: int
    tokens: int
    frames: int
    first_byte_s: float
    """Median time from request to first byte of the body: the time to first token of a stream."""

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.duration_s


@dataclass
class _Tally:
    frames: int = 0
    first_bytes: list[float] | None = None


async def run_load(port: int, scenario: Scenario, *, key: str = "", model: str = "shannon-chat") -> Result:
    """Send the scenario's requests to 127.0.0.1:`port`. Raises RuntimeError on any answer but 200."""
    numbers = iter(range(scenario.requests))
    tally = _Tally(first_bytes=[])
    started = time.perf_counter()
    await asyncio.gather(*(_work(port, scenario, numbers, key, model, tally) for _ in range(scenario.concurrency)))
    duration_s = time.perf_counter() - started
    assert tally.first_bytes is not None
    tokens = scenario.requests * scenario.tokens
    return Result(duration_s, scenario.requests, tokens, tally.frames, statistics.median(tally.first_bytes))


async def _work(port: int, scenario: Scenario, numbers: object, key: str, model: str, tally: _Tally) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        for number in numbers:  # type: ignore[attr-defined]
            started = time.perf_counter()
            writer.write(_request(scenario, number, key, model))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"unexpected answer: {head[:200]!r} {await reader.read(500)!r}")
            if scenario.stream:
                await _read_stream(reader, started, tally)
            else:
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                assert tally.first_bytes is not None
                tally.first_bytes.append(time.perf_counter() - started)
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, started: float, tally: _Tally) -> None:
    first = True
    tail = b""
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        data = await reader.read(2**18)
        if not data:
            raise RuntimeError("the stream was cut")
        if first:
            first = False
            assert tally.first_bytes is not None
            tally.first_bytes.append(time.perf_counter() - started)
        tally.frames += data.count(b"data: ")
        tail = (tail + data)[-16:]


def _request(scenario: Scenario, number: int, key: str, model: str) -> bytes:
    fields = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": scenario.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": scenario.stream,
    }
    body = orjson.dumps(fields)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(body), body)
    )


def prompt(number: int) -> str:
    """Return the user message of request `number`: all different, all of about the same length."""
    return f"This is request {number:06d}. Tell me about the gateway."
