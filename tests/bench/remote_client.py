"""CPU of HTTP clients for streams with one token per chunk: the product's transport, httpx's own, and aiohttp.

    python -m tests.bench.remote_client [--streams 64] [--chunks 400] [--rounds 6]

A server in another process sends each stream in small chunks, each in a write of its own. The clients read the same
streams in turn, in this process. The figures are CPU microseconds of this process per chunk, the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable

import aiohttp
import httpx
import uvloop

from engine.remote.http1 import Http1Transport

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SIDE_BY_SIDE = 8
INTERVAL_S = 0.002
Read = Callable[[str], Awaitable[int]]
"""Reads one stream and returns the number of its bytes."""


def serve(port: multiprocessing.SimpleQueue[int], chunks: int) -> None:
    """Send `chunks` chunks to every request, until the process is ended."""
    chunk = b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(HEAD)
                for _ in range(chunks):
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(INTERVAL_S)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


async def cpu_us(read: Read, url: str, streams: int, chunks: int) -> float:
    """CPU microseconds per chunk."""
    started = time.process_time()
    for _ in range(0, streams, SIDE_BY_SIDE):
        sizes = await asyncio.gather(*(read(url) for _ in range(SIDE_BY_SIDE)))
        assert sizes == [chunks * len(CHUNK)] * SIDE_BY_SIDE
    return (time.process_time() - started) / streams / chunks * 1e6


async def compare(url: str, streams: int, chunks: int, rounds: int) -> dict[str, list[float]]:
    """Measure every client in every round, in turn."""
    async with (
        httpx.AsyncClient(transport=Http1Transport(None, keepalive_s=5.0), timeout=None) as ours,
        httpx.AsyncClient(timeout=None, trust_env=False) as plain,
        aiohttp.ClientSession() as session,
    ):

        def with_httpx(client: httpx.AsyncClient) -> Read:
            async def read(url: str) -> int:
                async with client.stream("GET", url) as response:
                    return sum([len(data) async for data in response.aiter_raw()])

            return read

        async def with_aiohttp(url: str) -> int:
            async with session.get(url) as response:
                return sum([len(data) async for data in response.content.iter_any()])

        clients = {"engine.remote.http1": with_httpx(ours), "httpx": with_httpx(plain), "aiohttp": with_aiohttp}
        figures: dict[str, list[float]] = {name: [] for name in clients}
        for number in range(rounds + 1):
            for name, read in clients.items():
                figure = await cpu_us(read, url, streams, chunks)
                if number:  # the first round warms up
                    figures[name].append(figure)
    return figures


def main() -> None:
    """Print the medians, and their ratios to the product's transport."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("streams", 64), ("chunks", 400), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    port: multiprocessing.SimpleQueue[int] = multiprocessing.SimpleQueue()
    server = multiprocessing.Process(target=serve, args=(port, args.chunks), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{port.get()}/"
        figures = uvloop.run(compare(url, args.streams, args.chunks, args.rounds))
    finally:
        server.terminate()
    base = statistics.median(figures["engine.remote.http1"])
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name:20} {median:6.1f} us/chunk   {median / base:.2f}")


if __name__ == "__main__":
    main()
